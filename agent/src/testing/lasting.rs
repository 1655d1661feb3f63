//! Credentials that must not run out while somebody is there to renew them: short lives, and servers that come back
//! late.

use std::time::{Duration, SystemTime};

use super::World;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn an_agent_whose_svids_last_for_two_seconds_keeps_its_identity() {
    for backdated in [10, 3600] {
        let world = World::new();
        world.fake.change(|state| {
            state.authority.backdate = backdated * SECOND;
            state.agent_ttl = 2 * SECOND;
        });
        let agent = world.start().await;
        agent.cache.first_sync().await;
        for _ in 0..600 {
            tokio::time::sleep(SECOND / 10).await;
            let left = agent.identity.svid().unwrap().svid.not_after.duration_since(agent.clock.now());
            assert!(left.is_ok_and(|left| !left.is_zero()), "it ran out");
        }
        let (attestations, renewals) = world.fake.count(|state| (state.attestations, state.renewals));
        assert_eq!(attestations, 1);
        // The halves of what is left: from one to two seconds, as certificates know whole seconds only.
        assert!((60..=130).contains(&renewals), "{renewals}");
        agent.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_back_before_the_agents_svid_ends_finds_it_awake() {
    for left in [20, 10, 5, 2, 1] {
        let world = World::new();
        world.fake.change(|state| state.agent_ttl = 10 * MINUTE);
        let agent = world.start().await;
        agent.cache.first_sync().await;
        let (serial, end) = (agent.agent_serial(), agent.identity.svid().unwrap().svid.not_after);
        world.fake.go_away();
        agent.clock.sleep_until(end - left * SECOND).await;
        assert_eq!(agent.agent_serial(), serial);
        world.fake.come_back();
        agent.clock.sleep_until(end).await;
        assert_ne!(agent.agent_serial(), serial, "slept through the last {left} s");
        assert_eq!(world.fake.state().attestations, 1);
        agent.stop().await;
    }
}

/// Runs until `left` before the end of the one SVID whose renewal `troubled` prevents, ends the trouble, and looks that
/// a process is served at every moment after.
async fn renewed_in_the_last(left: Duration, trouble: impl Fn(&World, bool)) {
    let world = World::new();
    world.fake.change(|state| state.svid_ttl = 20 * MINUTE);
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    let mut open = agent.subscribe(&["unix:uid:1"]);
    let end = agent.complete(&mut open).await.svids[0].not_after;
    trouble(&world, true);
    agent.clock.sleep_until(end - left).await;
    let ends = |end: SystemTime| agent.at_once(&["unix:uid:1"]).svids.iter().all(|svid| svid.not_after == end);
    assert!(ends(end));
    trouble(&world, false);
    agent.clock.sleep_until(end).await;
    assert!(agent.at_once(&["unix:uid:1"]).complete && !ends(end), "slept through the last {left:?}");
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_back_before_an_svid_ends_is_asked_in_time() {
    for left in [25, 20, 15, 10, 5, 3] {
        for pushes in [true, false] {
            renewed_in_the_last(left * SECOND, |world, on| {
                world.fake.state().pushes = pushes;
                if on { world.fake.go_away() } else { world.fake.come_back() }
            })
            .await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_item_that_was_refused_is_asked_for_again_before_its_svid_ends() {
    for left in [25, 20, 15, 10, 5, 3] {
        renewed_in_the_last(left * SECOND, |world, on| {
            let mut state = world.fake.state();
            if on {
                state.refuse_entries.insert("a".into());
            } else {
                state.refuse_entries.clear();
            }
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_hangs_does_not_outlast_the_svid() {
    for reattestable in [false, true] {
        let world = World::new();
        world.fake.change(|state| {
            state.agent_ttl = 20 * SECOND;
            state.reattestable = reattestable;
        });
        let agent = world.start().await;
        agent.cache.first_sync().await;
        for _ in 0..5 {
            let serial = agent.agent_serial();
            world.fake.hang_connections();
            let end = agent.identity.svid().unwrap().svid.not_after;
            while agent.agent_serial() == serial {
                tokio::time::sleep(SECOND / 10).await;
                assert!(agent.clock.now() < end && !agent.keeper.is_finished(), "waited until the end");
            }
        }
        agent.stop().await;
    }
}
