//! Node keys that are used by two agents at once.
//!
//! An agent stores each SVID before it uses it, so one that has been replaced comes back once at most, on a connection
//! from before. If replaced ones come back again within the life of an SVID, two agents hold one key: a copied data
//! directory, or one node certificate on two nodes. Each of them makes the other attest anew.

use std::collections::HashMap;
use std::time::Duration;

use spiffe::id::SpiffeId;

/// How many agents are told apart; beyond it the one that is forgotten soonest goes.
const MOST: usize = 1024;

/// Counts the replaced SVIDs that came back.
#[derive(Debug, Default)]
pub struct Twice {
    agents: HashMap<SpiffeId, Seen>,
}

#[derive(Debug)]
struct Seen {
    count: u32,
    /// When it is forgotten, by the boot clock.
    until: Duration,
}

impl Twice {
    /// Notes at `now`, of the boot clock, that a replaced SVID of `agent` came back, where the one in use ends in `left`.
    /// Whether this is to be told: at the second time within the life of one, and then once more in each.
    pub fn came_back(&mut self, agent: &SpiffeId, left: Duration, now: Duration) -> bool {
        self.agents.retain(|_, seen| now < seen.until);
        if self.agents.len() >= MOST && !self.agents.contains_key(agent) {
            let soonest = self.agents.iter().min_by_key(|(_, seen)| seen.until).map(|(agent, _)| agent.clone());
            soonest.map(|agent| self.agents.remove(&agent));
        }
        let seen = self.agents.entry(agent.clone()).or_insert(Seen { count: 0, until: now + left });
        seen.count = seen.count.saturating_add(1);
        seen.count == 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Duration = Duration::from_secs(3600);

    fn agent(number: usize) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://example.org/spire/agent/x509pop/{number}")).unwrap()
    }

    #[test]
    fn the_second_time_in_one_life_is_told_and_the_next_in_the_next() {
        let mut twice = Twice::default();
        let told: Vec<bool> = [0, 10, 20, 3599, 3600, 3601, 3602]
            .map(|second| twice.came_back(&agent(1), LIFE, Duration::from_secs(second)))
            .into();
        assert_eq!(told, [false, true, false, false, false, true, false]);
        assert!(!twice.came_back(&agent(2), LIFE, Duration::from_secs(3602)));
    }

    #[test]
    fn once_in_each_life_is_no_reason() {
        let mut twice = Twice::default();
        assert!((0..10).all(|life| !twice.came_back(&agent(1), LIFE, LIFE * life)));
    }

    #[test]
    fn many_agents_take_no_more_room_than_some() {
        let mut twice = Twice::default();
        for number in 0..3000 {
            let left = LIFE + Duration::from_secs(u64::try_from(number).unwrap());
            assert!(!twice.came_back(&agent(number), left, Duration::ZERO));
        }
        assert_eq!(twice.agents.len(), MOST);
        assert!(twice.came_back(&agent(2999), LIFE, Duration::ZERO));
    }
}
