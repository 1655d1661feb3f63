//! Who holds how much of a listener, and who has to give when it runs short.
//!
//! Whoever can connect can connect ten thousand times. A fixed share for everybody would be too small for the one
//! proxy that needs many connections, or too large in sum; so nothing is taken from anybody until there is not enough
//! for all, and then the newest connections of the heaviest party go first. Before anybody is known it is the other way
//! round: an honest handshake is over in milliseconds, so what has lasted longest is least likely to become one.
//!
//! Who is served an identity comes before who is not: of a party that holds more than a few connections without any
//! entitled call, such connections go first, however heavy others are. A few each party may have in any case, because
//! every connection begins as one.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ending::{Ending, Reason};

/// One who connects, and the larger whole it belongs to.
pub(super) trait Party: Clone + Eq + Hash + Send + 'static {
    /// What is weighed first: parties of one group answer for each other, so that nobody gains by multiplying.
    type Group: Clone + Eq + Hash + Send;

    /// The group.
    fn group(&self) -> Self::Group;
}

struct Member {
    ending: Ending,
    /// Weight of its calls.
    streams: usize,
    /// Calls among them that are entitled.
    entitled: usize,
}

struct Held<G> {
    group: G,
    members: BTreeMap<u64, Member>,
    streams: usize,
    /// Members without an entitled call.
    plain: usize,
}

struct Inner<P: Party> {
    next: u64,
    parties: HashMap<P, Held<P::Group>>,
    /// Connections that nobody told to go.
    connections: usize,
    /// Connections that were told to go and have not gone yet.
    leaving: usize,
    streams: usize,
    first: First,
    /// Connections without an entitled call that each group may have as long as there are heavier ones.
    allowance: usize,
    /// Connections of each group that nobody told to go.
    groups: HashMap<P::Group, usize>,
    portion: Portion,
}

/// How many connections one group may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Portion {
    /// All that there are, as long as there is enough for everybody.
    All,
    /// A quarter of what is free for it, and never less than this.
    Quarter { least: usize },
    /// So many.
    Fixed(usize),
}

impl Portion {
    /// The most for a group if so many connections are free or its own.
    fn of(self, free: usize) -> usize {
        match self {
            Self::All => usize::MAX,
            Self::Quarter { least } => least.max(free / 4),
            Self::Fixed(most) => most,
        }
    }
}

/// The connections of one listener.
pub(super) struct Crowd<P: Party> {
    inner: Mutex<Inner<P>>,
    most_connections: usize,
    most_streams: usize,
    most_leaving: usize,
}

/// Which of the heaviest party's connections goes first; among equals, which party's.
#[derive(Clone, Copy)]
pub(super) enum First {
    /// Whoever is served stays served.
    Newest,
    /// Whoever has had the most time has had enough.
    Oldest,
}

/// What ran short.
#[derive(Clone, Copy)]
enum Short {
    Connections,
    Streams,
}

/// The place of one connection; dropped when the connection is gone.
pub(super) struct Place<P: Party> {
    crowd: Arc<Crowd<P>>,
    party: P,
    number: u64,
}

impl<P: Party> Crowd<P> {
    pub(super) fn new(most_connections: usize, most_streams: usize, first: First) -> Arc<Self> {
        Self::with_portions(most_connections, most_streams, first, Portion::All)
    }

    /// A crowd in which a group that holds more than its portion gives, whether or not it runs short for others.
    pub(super) fn with_portions(
        most_connections: usize,
        most_streams: usize,
        first: First,
        portion: Portion,
    ) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                next: 0,
                parties: HashMap::new(),
                connections: 0,
                leaving: 0,
                streams: 0,
                first,
                allowance: (most_connections / 8).clamp(1, 16),
                groups: HashMap::new(),
                portion,
            }),
            most_connections: most_connections.max(1),
            most_streams: most_streams.max(1),
            most_leaving: (most_connections / 16).clamp(2, 256),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner<P>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place. If there is none left, somebody is told to go, who may be the one that came. Nothing if that one
    /// can only be dropped, because too many are on their way out already.
    pub(super) fn enter(self: &Arc<Self>, party: P, ending: Ending) -> Option<Place<P>> {
        let mut inner = self.inner();
        let number = inner.next;
        inner.next += 1;
        inner.connections += 1;
        let group = party.group();
        let of_group = inner.groups.entry(group.clone()).or_default();
        *of_group += 1;
        let of_group = *of_group;
        let held = inner.parties.entry(party.clone()).or_insert_with(|| Held {
            group: group.clone(),
            members: BTreeMap::new(),
            streams: 0,
            plain: 0,
        });
        held.members.insert(number, Member { ending: ending.clone(), streams: 0, entitled: 0 });
        held.plain += 1;
        if inner.connections > self.most_connections {
            inner.shed(Short::Connections, self.most_leaving);
        } else if of_group > inner.portion.of((self.most_connections + of_group).saturating_sub(inner.connections)) {
            inner.shed_of(&group, false, Short::Connections, self.most_leaving);
        }
        drop(inner);
        // Counts as leaving until the place is dropped, which is now if there is no time for a farewell.
        let place = Place { crowd: Arc::clone(self), party, number };
        (ending.reason() != Some(Reason::Dropped)).then_some(place)
    }

    /// How many places this party holds.
    pub(super) fn held_by(&self, party: &P) -> usize {
        self.inner().parties.get(party).map_or(0, |held| held.members.len())
    }

    /// Tells one connection of the heaviest party to go: descriptors ran short for a reason outside of this
    /// listener.
    pub(super) fn shed(&self) {
        self.inner().shed(Short::Connections, self.most_leaving);
    }

    /// Tells everybody to go.
    pub(super) fn end_all(&self, reason: Reason) {
        let inner = self.inner();
        for member in inner.parties.values().flat_map(|held| held.members.values()) {
            member.ending.end(reason);
        }
    }

    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.inner().connections
    }
}

impl<P: Party> Inner<P> {
    /// Tells one connection of the heaviest party in the heaviest group to go; without a farewell if `most` are on their
    /// way out.
    fn shed(&mut self, short: Short, most: usize) {
        let first = self.first;
        let mut groups: HashMap<&P::Group, (usize, usize, u64)> = HashMap::new();
        for held in self.parties.values().filter(|held| !held.members.is_empty()) {
            let (plain, weight, turn) = groups.entry(&held.group).or_default();
            *plain += held.plain;
            *weight += held.weight(short);
            *turn = held.turn(first).max(*turn);
        }
        let plainest = groups.iter().max_by_key(|(_, (plain, _, turn))| (*plain, *turn));
        let plainest = match (short, first) {
            (Short::Connections, First::Newest) => plainest.filter(|(_, (plain, ..))| *plain > self.allowance),
            _ => None,
        };
        let heaviest = plainest.or_else(|| groups.iter().max_by_key(|(_, (_, weight, turn))| (*weight, *turn)));
        let Some(heaviest) = heaviest.map(|(group, _)| (*group).clone()) else { return };
        self.shed_of(&heaviest, plainest.is_some(), short, most);
    }

    /// Tells one connection of the heaviest party in `group` to go.
    fn shed_of(&mut self, group: &P::Group, of_plain: bool, short: Short, most: usize) {
        let first = self.first;
        let Some(held) = self
            .parties
            .values_mut()
            .filter(|held| held.group == *group)
            .max_by_key(|held| (if of_plain { held.plain } else { held.weight(short) }, held.turn(first)))
        else {
            return;
        };
        let newest = || held.members.keys().next_back().copied();
        let victim = match (short, first) {
            (Short::Connections, First::Newest) => {
                let plain = held.members.iter().rfind(|(_, member)| member.entitled == 0);
                plain.map(|(number, _)| *number).or_else(newest)
            }
            (Short::Connections, First::Oldest) => held.members.keys().next().copied(),
            (Short::Streams, _) => held.members.iter().max_by_key(|(number, m)| (m.streams, **number)).map(|(n, _)| *n),
        };
        if let Some(member) = victim.and_then(|number| held.members.remove(&number)) {
            held.streams = held.streams.saturating_sub(member.streams);
            held.plain = held.plain.saturating_sub(usize::from(member.entitled == 0));
            self.streams = self.streams.saturating_sub(member.streams);
            self.connections = self.connections.saturating_sub(1);
            self.leave(group);
            member.ending.end(if self.leaving < most { Reason::Overload } else { Reason::Dropped });
            self.leaving += 1;
        }
    }
}

impl<P: Party> Inner<P> {
    /// One connection less of this group.
    fn leave(&mut self, group: &P::Group) {
        if let Some(count) = self.groups.get_mut(group) {
            *count -= 1;
            if *count == 0 {
                self.groups.remove(group);
            }
        }
    }
}

impl<G> Held<G> {
    /// Grows with how soon it is this party's turn among equals.
    fn turn(&self, first: First) -> u64 {
        match first {
            First::Newest => self.members.keys().next_back().copied().unwrap_or_default(),
            First::Oldest => u64::MAX - self.members.keys().next().copied().unwrap_or(u64::MAX),
        }
    }

    fn weight(&self, short: Short) -> usize {
        match short {
            Short::Connections => self.members.len(),
            Short::Streams => self.streams,
        }
    }
}

impl<P: Party> Place<P> {
    /// Counts more weight of this connection's calls, unless the connection was told to go.
    pub(super) fn take(&self, weight: usize) {
        let mut inner = self.crowd.inner();
        let Some(held) = inner.parties.get_mut(&self.party) else { return };
        let Some(member) = held.members.get_mut(&self.number) else { return };
        member.streams += weight;
        held.streams += weight;
        inner.streams += weight;
        if inner.streams > self.crowd.most_streams {
            inner.shed(Short::Streams, self.crowd.most_leaving);
        }
    }

    /// Counts an entitled call.
    pub(super) fn entitle(&self) {
        let mut inner = self.crowd.inner();
        let Some(held) = inner.parties.get_mut(&self.party) else { return };
        let Some(member) = held.members.get_mut(&self.number) else { return };
        held.plain -= usize::from(member.entitled == 0);
        member.entitled += 1;
    }

    /// Ends what [`Place::take`] and [`Place::entitle`] counted for one call.
    pub(super) fn give_back(&self, weight: usize, entitled: bool) {
        let mut inner = self.crowd.inner();
        let Some(held) = inner.parties.get_mut(&self.party) else { return };
        let Some(member) = held.members.get_mut(&self.number) else { return };
        if entitled {
            member.entitled = member.entitled.saturating_sub(1);
            held.plain += usize::from(member.entitled == 0);
        }
        member.streams = member.streams.saturating_sub(weight);
        held.streams = held.streams.saturating_sub(weight);
        inner.streams = inner.streams.saturating_sub(weight);
    }
}

impl<P: Party> Drop for Place<P> {
    fn drop(&mut self) {
        let mut inner = self.crowd.inner();
        let inner = &mut *inner;
        let Some(held) = inner.parties.get_mut(&self.party) else {
            inner.leaving = inner.leaving.saturating_sub(1);
            return;
        };
        match held.members.remove(&self.number) {
            Some(member) => {
                held.streams = held.streams.saturating_sub(member.streams);
                held.plain = held.plain.saturating_sub(usize::from(member.entitled == 0));
                inner.streams = inner.streams.saturating_sub(member.streams);
                inner.connections = inner.connections.saturating_sub(1);
                let group = held.group.clone();
                inner.leave(&group);
            }
            None => inner.leaving = inner.leaving.saturating_sub(1),
        }
        if inner.parties.get(&self.party).is_some_and(|held| held.members.is_empty()) {
            inner.parties.remove(&self.party);
        }
    }
}

/// What a call needs of a place, whoever the party is.
pub(super) trait Seat: Send + Sync {
    fn take(&self, weight: usize);
    fn entitle(&self);
    fn give_back(&self, weight: usize, entitled: bool);
}

impl<P: Party + Sync> Seat for Place<P> {
    fn take(&self, weight: usize) {
        Place::take(self, weight);
    }

    fn entitle(&self) {
        Place::entitle(self);
    }

    fn give_back(&self, weight: usize, entitled: bool) {
        Place::give_back(self, weight, entitled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, PartialEq, Eq, Hash)]
    struct Process {
        container: &'static str,
        pid: i32,
    }

    impl Party for Process {
        type Group = &'static str;

        fn group(&self) -> &'static str {
            self.container
        }
    }

    fn enter(crowd: &Arc<Crowd<Process>>, container: &'static str, pid: i32) -> (Ending, Place<Process>) {
        let ending = Ending::new();
        let place = crowd.enter(Process { container, pid }, ending.clone()).unwrap();
        (ending, place)
    }

    #[test]
    fn newest_of_the_heaviest_process_in_the_heaviest_group_goes() {
        let crowd = Crowd::new(6, 100, First::Newest);
        let quiet = enter(&crowd, "quiet", 1);
        let other = enter(&crowd, "loud", 2);
        let loud: Vec<_> = (0..4).map(|_| enter(&crowd, "loud", 3)).collect();
        assert_eq!(crowd.connections(), 6);
        let late = enter(&crowd, "late", 4);
        let gone = |held: &(Ending, Place<Process>)| held.0.reason() == Some(Reason::Overload);
        assert!(!gone(&quiet) && !gone(&other) && !gone(&late));
        assert_eq!(loud.iter().map(gone).collect::<Vec<_>>(), [false, false, false, true]);
        let one_more = enter(&crowd, "loud", 3);
        assert!(gone(&one_more));
        assert_eq!(crowd.connections(), 6);
        drop((quiet, other, loud, late, one_more));
        let inner = crowd.inner();
        assert_eq!((inner.connections, inner.leaving, inner.parties.len()), (0, 0, 0));
    }

    #[test]
    fn before_anybody_is_known_the_oldest_of_the_heaviest_goes() {
        let crowd = Crowd::new(4, 100, First::Oldest);
        let strangers: Vec<_> = ["a", "b", "b", "c"].map(|from| enter(&crowd, from, 1)).into();
        let gone = |held: &(Ending, Place<Process>)| held.0.reason().is_some();
        let of_the_heaviest = enter(&crowd, "d", 1);
        assert_eq!(strangers.iter().map(gone).collect::<Vec<_>>(), [false, true, false, false]);
        // Among equals, whoever has had the most time.
        let late = enter(&crowd, "e", 1);
        assert_eq!(strangers.iter().map(gone).collect::<Vec<_>>(), [true, true, false, false]);
        assert!(!gone(&of_the_heaviest) && !gone(&late));
    }

    #[test]
    fn a_group_holds_a_quarter_of_what_is_free_and_never_less_than_the_least() {
        let crowd = Crowd::with_portions(800, 100, First::Newest, Portion::Quarter { least: 40 });
        let gone = |held: &[(Ending, Place<Process>)]| held.iter().filter(|held| held.0.reason().is_some()).count();
        // Nobody else is there: 200 of 800. The heaviest process of the group gives, not the one that came last.
        let loud: Vec<_> = (0..225).map(|_| enter(&crowd, "loud", 1)).collect();
        assert_eq!(gone(&loud), 25);
        let neighbour = enter(&crowd, "loud", 2);
        assert_eq!((gone(&loud), neighbour.0.reason()), (26, None));
        drop(loud);
        let many: Vec<_> = (0..150).map(|_| enter(&crowd, "a", 1)).collect();
        let more: Vec<_> = (0..150).map(|_| enter(&crowd, "b", 1)).collect();
        assert_eq!((gone(&many), gone(&more)), (0, 0));
        // Others hold 301, so 499 are free for it.
        let third: Vec<_> = (0..150).map(|_| enter(&crowd, "c", 1)).collect();
        assert_eq!(gone(&third), 150 - 124);
        drop((neighbour, many, more, third));
        let inner = crowd.inner();
        assert_eq!((inner.connections, inner.leaving, inner.parties.len(), inner.groups.len()), (0, 0, 0, 0));
        assert_eq!(Portion::Quarter { least: 64 }.of(100), 64);
        assert_eq!((Portion::Fixed(1_000).of(100), Portion::All.of(0)), (1_000, usize::MAX));
    }

    #[test]
    fn many_processes_of_one_group_count_together() {
        let crowd = Crowd::new(5, 100, First::Newest);
        let quiet: Vec<_> = (0..2).map(|_| enter(&crowd, "quiet", 1)).collect();
        let forks: Vec<_> = (0..4).map(|pid| enter(&crowd, "forks", 10 + pid)).collect();
        assert!(quiet.iter().all(|held| held.0.reason().is_none()));
        assert_eq!(forks.iter().filter(|held| held.0.reason().is_some()).count(), 1);
    }

    #[test]
    fn too_many_that_leave_are_dropped_but_nobody_else() {
        let crowd = Crowd::new(3, 100, First::Newest);
        let loud: Vec<_> = (0..5).map(|_| enter(&crowd, "loud", 1)).collect();
        let reasons: Vec<_> = loud.iter().map(|held| held.0.reason()).collect();
        assert_eq!(reasons, [None, None, None, Some(Reason::Overload), Some(Reason::Overload)]);
        assert!(crowd.enter(Process { container: "loud", pid: 1 }, Ending::new()).is_none());
        let quiet = enter(&crowd, "quiet", 2);
        assert_eq!(quiet.0.reason(), None);
        assert_eq!(loud[2].0.reason(), Some(Reason::Dropped));
        let inner = crowd.inner();
        assert_eq!((inner.connections, inner.leaving), (3, 3));
    }

    #[test]
    fn streams_are_shared_likewise() {
        let crowd = Crowd::new(10, 5, First::Newest);
        let (quiet, quiet_place) = enter(&crowd, "quiet", 1);
        let (loud, loud_place) = enter(&crowd, "loud", 2);
        quiet_place.take(1);
        for _ in 0..4 {
            loud_place.take(1);
        }
        assert_eq!(loud.reason(), None);
        loud_place.take(1);
        assert_eq!((quiet.reason(), loud.reason()), (None, Some(Reason::Overload)));
        assert_eq!(crowd.inner().streams, 1);
        loud_place.give_back(1, false);
        quiet_place.give_back(1, false);
        assert_eq!(crowd.inner().streams, 0);
    }

    #[test]
    fn connections_without_an_entitled_call_go_first() {
        let crowd = Crowd::new(8, 100, First::Newest);
        let gone = |held: &(Ending, Place<Process>)| held.0.reason().is_some();
        let served: Vec<_> = (0..5).map(|_| enter(&crowd, "served", 1)).collect();
        served.iter().for_each(|(_, place)| place.entitle());
        let mut idle: Vec<_> = (0..3).map(|_| enter(&crowd, "idle", 2)).collect();
        // The lighter party goes first while it has more than its allowance of one.
        idle.push(enter(&crowd, "late", 3));
        assert_eq!(idle.iter().map(gone).collect::<Vec<_>>(), [false, false, true, false]);
        idle.push(enter(&crowd, "later", 4));
        assert_eq!(idle.iter().map(gone).collect::<Vec<_>>(), [false, true, true, false, false]);
        // Then everybody has what every party may have, and the heaviest gives.
        let last = enter(&crowd, "last", 5);
        assert!(!gone(&last) && !gone(&idle[0]) && !gone(&idle[3]) && !gone(&idle[4]));
        assert_eq!(served.iter().map(gone).collect::<Vec<_>>(), [false, false, false, false, true]);
        // Of its connections, one whose entitled call is over.
        served[1].1.give_back(0, true);
        let again = enter(&crowd, "again", 6);
        assert!(!gone(&again));
        assert_eq!(served.iter().map(gone).collect::<Vec<_>>(), [false, true, false, false, true]);
        drop((served, idle, last, again));
        assert_eq!(crowd.inner().parties.len(), 0);
    }

    #[test]
    fn calls_that_hold_much_weigh_much() {
        let crowd = Crowd::new(10, 100, First::Newest);
        let (quiet, quiet_place) = enter(&crowd, "quiet", 1);
        let (loud, loud_place) = enter(&crowd, "loud", 2);
        (0..20).for_each(|_| quiet_place.take(1));
        loud_place.take(1);
        loud_place.take(80);
        assert_eq!((quiet.reason(), loud.reason()), (None, Some(Reason::Overload)));
        assert_eq!(crowd.inner().streams, 20);
    }
}
