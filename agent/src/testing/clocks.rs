//! Clocks of agents that are wrong for a while, with a server whose clock is right.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Running, World, selectors};
use crate::identity::IdentityError;

pub(super) const MINUTE: Duration = Duration::from_secs(60);
pub(super) const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Looks every ten seconds for `lasting` that the agent's SVID has not run out.
pub(super) async fn keeps_its_identity(agent: &Running, lasting: Duration) {
    let end = Instant::now() + lasting;
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(!agent.keeper.is_finished());
        assert!(agent.identity.svid().unwrap().svid.not_after > agent.clock.now(), "it ran out");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_was_ahead_for_a_minute_keeps_no_process_waiting_once_it_is_right() {
    for pushes in [true, false] {
        let world = World::new();
        world.fake.change(|state| {
            state.pushes = pushes;
            state.agent_ttl = 10 * DAY;
        });
        world.fake.put_entry("a", "unix:uid:1");
        let agent = world.start().await;
        let mut open = agent.subscribe(&["unix:uid:1"]);
        let before = agent.complete(&mut open).await;
        world.clock.step_forward(DAY);
        agent.until(|agent| agent.cache.counts().x509_svids == 0).await;
        tokio::time::sleep(MINUTE).await;
        // By this clock, all that the right server signs is over.
        assert_eq!(agent.cache.counts().x509_svids, 0);
        let asked = world.fake.count(|state| state.signed);
        assert!((3..20).contains(&asked), "{asked}");
        world.clock.step_back(DAY);
        let right = Instant::now();
        // What seemed to be over is still there, also for a process that only waits.
        let after = agent.complete(&mut open).await;
        assert!(right.elapsed() <= 3 * SECOND, "{:?}", right.elapsed());
        assert!(Arc::ptr_eq(&before.svids[0], &after.svids[0]));
        assert_eq!(world.fake.count(|state| state.signed), asked);
        agent.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_failed_while_the_clock_was_ahead_is_not_put_off_past_the_end() {
    for reattestable in [true, false] {
        let world = World::new();
        world.fake.change(|state| state.reattestable = reattestable);
        let agent = world.start().await;
        agent.cache.first_sync().await;
        world.fake.go_away();
        world.clock.step_forward(DAY);
        tokio::time::sleep(MINUTE).await;
        world.clock.step_back(DAY);
        world.fake.come_back();
        keeps_its_identity(&agent, 10 * HOUR).await;
        agent.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_svid_that_only_seems_to_be_over_is_not_deleted() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let serial = agent.agent_serial();
    world.clock.step_forward(DAY);
    tokio::time::sleep(MINUTE).await;
    // The server still knew the old one, and what it signed seems to be over, too: no reason for haste.
    assert_ne!(agent.agent_serial(), serial);
    assert_eq!(world.fake.count(|state| (state.attestations, state.renewals)), (1, 1));
    world.clock.step_back(DAY);
    keeps_its_identity(&agent, 10 * HOUR).await;
    let (attestations, renewals) = world.fake.count(|state| (state.attestations, state.renewals));
    assert_eq!(attestations, 1);
    assert!((4..=7).contains(&renewals), "{renewals} renewals in five half lives");
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_clock_stays_ahead_attests_every_tenth_of_a_life() {
    for tainted in [false, true] {
        let world = World::new();
        world.fake.change(|state| {
            state.reattestable = true;
            state.tainted = tainted;
        });
        world.clock.step_forward(DAY);
        let agent = world.start().await;
        agent.cache.first_sync().await;
        tokio::time::sleep(4 * HOUR).await;
        let attestations = world.fake.count(|state| state.attestations);
        assert!((9..=11).contains(&attestations), "{attestations}");
        agent.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_with_a_wrong_clock_leaves_the_stored_identity_to_the_next_one() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let serial = agent.agent_serial();
    agent.stop().await;
    world.clock.step_forward(DAY);
    world.fake.go_away();
    assert!(matches!(world.try_start().await, Err(IdentityError::Attest(_))));
    world.clock.step_back(DAY);
    world.fake.come_back();
    let agent = world.start().await;
    assert_eq!((agent.agent_serial(), world.fake.count(|state| state.attestations)), (serial, 1));
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_a_server_whose_clock_is_wrong_signs_replaces_nothing_that_is_good() {
    for ahead in [true, false] {
        let world = World::new();
        world.fake.put_entry("a", "unix:uid:1");
        let agent = world.start().await;
        let who = ["unix:uid:1"];
        let mut open = agent.subscribe(&who);
        let before = agent.complete(&mut open).await.svids[0].chain.clone();
        let (serial, all) = (agent.agent_serial(), selectors(&who));
        let token = async || agent.cache.jwt_svids(&all, &["x".into()], None).await.unwrap()[0].token.clone();
        let first = token().await;
        if ahead {
            world.fake.clock.step_forward(DAY)
        } else {
            world.fake.clock.step_back(DAY)
        }
        // The token's half, and then that of the SVIDs: everything is asked for again, and nothing of it taken.
        tokio::time::sleep(4 * MINUTE).await;
        assert_eq!(*token().await, *first);
        tokio::time::sleep(140 * MINUTE).await;
        let (renewals, signed) = world.fake.count(|state| (state.renewals, state.signed));
        assert!((3..300).contains(&renewals) && (3..300).contains(&signed), "{renewals} renewals, {signed} SVIDs");
        assert_eq!(agent.agent_serial(), serial);
        let held = agent.at_once(&who);
        assert!(held.svids[0].chain == before && held.is_valid_at(agent.clock.now()));
        assert!(!agent.keeper.is_finished());
        if ahead {
            world.fake.clock.step_back(DAY)
        } else {
            world.fake.clock.step_forward(DAY)
        }
        tokio::time::sleep(MINUTE).await;
        assert_ne!(agent.agent_serial(), serial);
        assert_ne!(agent.at_once(&who).svids[0].chain, before);
        assert_ne!(*token().await, *first);
        assert_eq!(world.fake.count(|state| state.attestations), 1);
        agent.stop().await;
    }
}

/// A token of the entry `a`.
async fn jwt(agent: &Running) -> zeroize::Zeroizing<String> {
    let svids = agent.cache.jwt_svids(&selectors(&["unix:uid:1"]), &["x".to_owned()], None).await.unwrap();
    svids[0].token.clone()
}

#[tokio::test(start_paused = true)]
async fn a_token_of_a_wrong_clock_takes_the_place_of_none_that_is_good() {
    for ahead in [true, false] {
        let world = World::new();
        world.fake.put_entry("a", "unix:uid:1");
        let agent = world.start().await;
        agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
        let token = jwt(&agent).await;
        // Past its renewal at 150 s ± 10 %.
        tokio::time::sleep(170 * SECOND).await;
        if ahead {
            world.fake.clock.step_forward(DAY)
        } else {
            world.fake.clock.step_back(DAY)
        }
        let asked = world.fake.state().jwt_asked;
        for _ in 0..100 {
            assert_eq!(*jwt(&agent).await, *token);
            tokio::time::sleep(SECOND).await;
        }
        let asked = world.fake.state().jwt_asked - asked;
        assert!((5..=10).contains(&asked), "{asked}");
        if ahead {
            world.fake.clock.step_back(DAY)
        } else {
            world.fake.clock.step_forward(DAY)
        }
        tokio::time::sleep(31 * SECOND).await;
        let new = jwt(&agent).await;
        assert_ne!(*new, *token);
        assert_eq!(*jwt(&agent).await, *new);
        agent.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_that_only_seems_to_be_over_is_handed_out_again() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
    let token = jwt(&agent).await;
    world.clock.step_forward(DAY);
    // By this clock it is over when it comes: whoever asked has it, and nobody else.
    assert_ne!(*jwt(&agent).await, *jwt(&agent).await);
    world.clock.step_back(DAY);
    assert_eq!(*jwt(&agent).await, *token);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_some_minutes_behind_the_servers_costs_no_identity() {
    for behind in [30 * SECOND, 5 * MINUTE] {
        let world = World::new();
        world.clock.step_back(behind);
        world.fake.put_entry("a", "unix:uid:1");
        let agent = world.start().await;
        let mut open = agent.subscribe(&["unix:uid:1"]);
        agent.complete(&mut open).await;
        let begun = Instant::now();
        while begun.elapsed() < 24 * HOUR {
            tokio::time::sleep(10 * SECOND).await;
            // By the right clock, which is the server's.
            let right = world.fake.clock.now();
            assert!(!agent.keeper.is_finished() && agent.identity.svid().unwrap().svid.not_after > right);
            assert!(agent.at_once(&["unix:uid:1"]).svids.iter().all(|svid| svid.not_after > right));
        }
        // A half life each, not more because of the clock.
        let (renewals, signed) = world.fake.count(|state| (state.renewals, state.signed));
        assert!((10..=15).contains(&renewals) && (13..=19).contains(&signed), "{renewals} {signed}");
        agent.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_was_wrong_at_both_ends_is_left_behind_at_once() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    world.fake.change(|state| state.reattestable = true);
    world.clock.step_forward(DAY);
    world.fake.clock.step_forward(DAY);
    let agent = world.start().await;
    let mut open = agent.subscribe(&["unix:uid:1"]);
    agent.complete(&mut open).await;
    tokio::time::sleep(MINUTE).await;
    world.clock.step_back(DAY);
    world.fake.clock.step_back(DAY);
    let right = Instant::now();
    let valid = |agent: &Running| {
        let now = agent.clock.now();
        let view = agent.at_once(&["unix:uid:1"]);
        agent.identity.svid().unwrap().svid.not_before <= now && view.complete && view.svids[0].not_before <= now
    };
    agent.until(valid).await;
    assert!(right.elapsed() <= 5 * SECOND, "{:?}", right.elapsed());
    agent.stop().await;
}
