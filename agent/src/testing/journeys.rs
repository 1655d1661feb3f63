use std::time::Duration;

use spiffe_proto::types::permission_denied_details::Reason;
use tokio::time::Instant;
use tonic::Status;

use super::server::{denied, entry_message};
use super::{Running, World, ids, selectors};
use crate::cache::CacheError;
use crate::identity::{Denial, IdentityError, UnknownAuthority};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
/// One back-off step at its longest, and the moment that the work after it takes.
const ONE_STEP: Duration = Duration::from_millis(30_100);

/// Looks every ten seconds for `lasting` that nobody gets anything expired; answers how often a process that came
/// then got its SVID at once.
async fn watch(agent: &Running, lasting: Duration) -> (u64, u64) {
    let (mut looks, mut served) = (0, 0);
    let end = Instant::now() + lasting;
    let mut open = agent.subscribe(&["unix:uid:1"]);
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_secs(10)).await;
        let now = agent.clock.now();
        for view in [agent.at_once(&["unix:uid:1"]), open.current()] {
            assert!(view.svids.iter().all(|svid| svid.not_after > now), "an expired SVID at {now:?}");
        }
        looks += 1;
        served += u64::from(agent.at_once(&["unix:uid:1"]).complete);
    }
    // Nor is anything handed out of what was signed before.
    if let Some(view) = futures_util::FutureExt::now_or_never(open.changed()).flatten() {
        assert!(view.is_valid_at(agent.clock.now()));
    }
    (looks, served)
}

#[tokio::test(start_paused = true)]
async fn a_process_gets_what_was_signed_before_it_asked() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
    let view = agent.at_once(&["unix:uid:1", "unix:gid:1"]);
    assert!(view.complete && view.entitled);
    assert_eq!(ids(&view), ["a"]);
    assert_eq!(view.svids[0].id.as_str(), "spiffe://example.org/a");
    assert_eq!(view.bundle.x509.len(), 1);
    let nobody = agent.at_once(&["unix:uid:2"]);
    assert!(!nobody.entitled);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_change_is_pushed_signed_and_handed_out_without_a_wait() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let mut open = agent.subscribe(&["unix:uid:1"]);
    assert!(!open.changed().await.unwrap().entitled);
    let before = Instant::now();

    world.fake.put_entry("a", "unix:uid:1");
    assert_eq!(ids(&*agent.complete(&mut open).await), ["a"]);

    world.fake.change(|state| {
        let entry = state.entries.get_mut("a").unwrap();
        entry.revision_number = 1;
        entry.hint = "changed".into();
    });
    let view = agent.complete(&mut open).await;
    assert_eq!(&*view.svids[0].hint, "changed");

    let revision = world.fake.remove_entry("a");
    let view = open.changed().await.unwrap();
    assert!(!view.entitled && view.svids.is_empty());
    world.fake.acknowledged(revision).await;
    assert!(before.elapsed() < Duration::from_millis(50), "{:?}", before.elapsed());
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_of_an_entry_is_handed_out_after_its_deletion_was_acknowledged() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let mut open = agent.subscribe(&["unix:uid:1"]);
    for round in 0..50 {
        world.fake.put_entry("a", "unix:uid:1");
        // Sometimes before it is signed, sometimes after.
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        let revision = world.fake.remove_entry("a");
        world.fake.acknowledged(revision).await;
        // A stream that has not looked since before the entry came.
        if let Some(view) = futures_util::FutureExt::now_or_never(open.changed()).flatten() {
            assert!(!view.entitled && view.svids.is_empty());
        }
        for _ in 0..20 {
            assert!(!agent.at_once(&["unix:uid:1"]).entitled);
            assert!(!open.current().entitled);
            let jwt = agent.cache.jwt_svids(&selectors(&["unix:uid:1"]), &["x".into()], None).await;
            assert!(matches!(jwt, Err(CacheError::NotEntitled)));
            tokio::task::yield_now().await;
        }
        assert_eq!(agent.cache.counts().x509_svids, 0);
    }
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_entry_made_anew_under_its_old_id_gets_a_new_svid() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    let mut open = agent.subscribe(&["unix:uid:1"]);
    let first = agent.complete(&mut open).await;
    world.fake.change(|state| {
        let entry = state.entries.get_mut("a").unwrap();
        entry.created_at = 200;
        entry.spiffe_id.as_mut().unwrap().path = "/other".into();
    });
    let second = agent.complete(&mut open).await;
    assert_eq!(first.svids[0].id.path(), "/a");
    assert_eq!(second.svids[0].id.path(), "/other");
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a5_server_away_for_an_hour_costs_nobody_anything() {
    for pushes in [true, false] {
        let world = World::new();
        world.fake.change(|state| state.pushes = pushes);
        world.fake.put_entry("a", "unix:uid:1");
        let agent = world.start().await;
        agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
        assert_eq!(watch(&agent, HOUR).await.1, 360);
        let (polls, connections) = world.fake.count(|state| (state.polls, state.connections));
        world.fake.go_away();
        let (looks, served) = watch(&agent, HOUR).await;
        assert_eq!((looks, served), (360, 360));
        assert_eq!(world.fake.state().connections, connections);
        world.fake.put_entry("b", "unix:uid:2");
        world.fake.come_back();
        let back = Instant::now();
        agent.until(|agent| agent.at_once(&["unix:uid:2"]).complete).await;
        assert!(back.elapsed() <= ONE_STEP, "noticed after {:?}", back.elapsed());
        assert_eq!(world.fake.state().polls > polls, !pushes);
        agent.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a5_server_away_for_five_hours_nothing_expired_is_served() {
    for pushes in [true, false] {
        let world = World::new();
        world.fake.change(|state| {
            state.pushes = pushes;
            state.reattestable = true;
        });
        world.fake.put_entry("a", "unix:uid:1");
        let agent = world.start().await;
        agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
        world.fake.go_away();
        let (looks, served) = watch(&agent, 5 * HOUR).await;
        // What was there lasted for its three hours and not a moment longer.
        assert_eq!((looks, served), (1800, 3 * 360 - 1));
        assert_eq!(agent.cache.counts().x509_svids, 0);
        let mut open = agent.subscribe(&["unix:uid:1"]);
        world.fake.come_back();
        let back = Instant::now();
        assert_eq!(ids(&*agent.complete(&mut open).await), ["a"]);
        assert!(back.elapsed() <= 2 * ONE_STEP, "noticed after {:?}", back.elapsed());
        // The agent's own SVID ran out after four hours, so it attested again.
        assert_eq!(world.fake.state().attestations, 2);
        agent.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_cannot_attest_again_ends_when_the_server_is_back_too_late() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
    world.fake.go_away();
    watch(&agent, 5 * HOUR).await;
    assert!(!agent.keeper.is_finished());
    world.fake.come_back();
    let back = Instant::now();
    let ended = agent.keeper.await.unwrap().unwrap_err();
    assert!(matches!(ended, IdentityError::Expired { .. }));
    assert_eq!(
        ended.to_string(),
        "the agent's SVID expired before it could be renewed, and its join token is used up: to bring it back, \
         `signet-server entry show -parentID spiffe://example.org/spire/agent/test/1` shows the alias of this node, \
         `signet-server token generate -spiffeID ALIAS` makes a join token for it, and `signet-agent run -joinToken \
         TOKEN` attests with that here"
    );
    assert!(back.elapsed() <= ONE_STEP);
}

#[tokio::test(start_paused = true)]
async fn credentials_are_renewed_once_and_in_time() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
    let first = agent.agent_serial();
    // Twelve hours: SVIDs of three hours live about half, the agent's of four hours, too.
    let (looks, served) = watch(&agent, 12 * HOUR).await;
    assert_eq!(looks, served);
    let (signed, renewals) = world.fake.count(|state| (state.signed, state.renewals));
    assert!((8..=10).contains(&signed), "{signed} SVIDs in eight half lives");
    assert!((5..=7).contains(&renewals), "{renewals} renewals in six half lives");
    assert_ne!(agent.agent_serial(), first);
    assert_eq!(world.fake.state().attestations, 1);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_renewal_waits_for_calls_under_way_and_then_moves_the_connection() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let (number, serial) = (agent.link.connection(), agent.agent_serial());
    let lease = agent.link.lease().await.unwrap();
    assert_eq!(lease.connection(), number);
    tokio::time::timeout(4 * HOUR, lease.retired()).await.unwrap();
    assert_ne!(agent.agent_serial(), serial);
    let pending = |state: &super::server::State| state.pending.len();
    for _ in 0..5 {
        // Somebody who stops waiting does not let the next one through.
        let next = tokio::time::timeout(Duration::from_secs(1), agent.link.lease()).await;
        assert!(next.is_err(), "the successor was used before the old connection was drained");
        assert_eq!(world.fake.count(pending), 1);
    }
    drop(lease);
    assert!(agent.link.lease().await.unwrap().connection() > number);
    agent.until(|_| world.fake.count(pending) == 0).await;
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn killed_at_any_moment_an_attested_agent_needs_no_attestation() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    world.fake.change(|state| state.agent_ttl = 10 * MINUTE);
    for round in 0..60_u64 {
        let agent = world.start().await;
        agent.cache.first_sync().await;
        // Over many rounds this hits every part of a renewal.
        tokio::time::sleep(Duration::from_secs(60) + Duration::from_micros(round * 37)).await;
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        agent.kill();
        world.fake.break_connections();
    }
    assert_eq!(world.fake.state().attestations, 1);
    let renewals = world.fake.count(|state| state.renewals);
    assert!(renewals >= 10, "{renewals}");
}

#[tokio::test(start_paused = true)]
async fn a_killed_agent_that_got_its_next_svid_but_did_not_use_it_goes_on() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    // The server has signed the next one, and the agent died before its answer came.
    agent.kill();
    world.fake.change(|state| {
        state.pending.insert(4711);
    });
    let agent = world.start().await;
    agent.cache.first_sync().await;
    assert_eq!(world.fake.state().attestations, 1);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn told_once_that_it_is_not_active_an_agent_asks_again() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
    for reason in [Reason::AgentNotActive, Reason::AgentNotAttested, Reason::AgentExpired] {
        world.fake.change(|state| state.say = vec![denied(reason)]);
        tokio::time::sleep(MINUTE).await;
        assert!(world.fake.state().say.is_empty());
        assert!(!agent.keeper.is_finished());
    }
    assert_eq!(world.fake.state().attestations, 1);
    assert!(agent.at_once(&["unix:uid:1"]).complete);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn evicted_an_agent_that_cannot_attest_again_forgets_itself() {
    for pushes in [true, false] {
        let world = World::new();
        world.fake.change(|state| state.pushes = pushes);
        let agent = world.start().await;
        agent.cache.first_sync().await;
        world.fake.change(|state| state.active = None);
        let ended = tokio::time::timeout(MINUTE, agent.keeper).await.unwrap().unwrap();
        assert!(matches!(ended, Err(IdentityError::Denied { denial: Denial::NotAttested, .. })), "{ended:?}");
        // What is stored has no SVID any more, so the next start attests.
        world.try_start().await.unwrap();
        assert_eq!(world.fake.state().attestations, 2);
    }
}

#[tokio::test(start_paused = true)]
async fn evicted_an_agent_that_can_attest_again_does() {
    let world = World::new();
    world.fake.change(|state| state.reattestable = true);
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
    world.fake.change(|state| state.active = None);
    agent.until(|_| world.fake.state().attestations == 2).await;
    world.fake.put_entry("b", "unix:uid:2");
    agent.until(|agent| agent.at_once(&["unix:uid:2"]).complete).await;
    assert!(agent.at_once(&["unix:uid:1"]).complete);
    assert!(!agent.keeper.is_finished());
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn banned_an_agent_ends_at_once_and_is_not_let_in_again() {
    let world = World::new();
    world.fake.change(|state| state.reattestable = true);
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let before = Instant::now();
    world.fake.change(|state| state.banned = true);
    let ended = agent.keeper.await.unwrap();
    assert!(matches!(ended, Err(IdentityError::Denied { denial: Denial::Banned, .. })), "{ended:?}");
    assert!(before.elapsed() < Duration::from_millis(50), "{:?}", before.elapsed());
    assert!(matches!(world.try_start().await, Err(IdentityError::Attest(_))));
    assert_eq!(world.fake.state().attestations, 1);
}

#[tokio::test(start_paused = true)]
async fn a_denial_without_a_reason_is_retried() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    world.fake.change(|state| {
        state.say = (0..5).map(|_| Status::permission_denied("for no reason")).collect();
    });
    tokio::time::sleep(5 * MINUTE).await;
    assert!(world.fake.state().say.is_empty() && !agent.keeper.is_finished());
    world.fake.put_entry("a", "unix:uid:1");
    agent.until(|agent| agent.at_once(&["unix:uid:1"]).complete).await;
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn more_than_a_page_of_entries_is_polled() {
    let world = World::new();
    world.fake.change(|state| state.pushes = false);
    let trust_domain = "example.org".parse().unwrap();
    world.fake.change(|state| {
        for number in 0..1203 {
            let id = format!("{number:05}");
            state.entries.insert(id.clone(), entry_message(&trust_domain, &id, &format!("unix:uid:{number}")));
        }
    });
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1000).await;
    assert_eq!(agent.cache.counts().entries, 1203);
    assert_eq!(world.fake.state().batches, 2);
    // Beyond the limit an SVID is signed when somebody asks, and what was least used makes room.
    let mut late = agent.subscribe(&["unix:uid:1202"]);
    assert_eq!(ids(&*agent.complete(&mut late).await), ["01202"]);
    agent.until(|agent| agent.cache.counts().x509_svids == 1000).await;

    world.fake.change(|state| {
        state.entries.retain(|id, _| id.as_str() < "00010");
    });
    agent.until(|agent| agent.cache.counts().entries == 10).await;
    assert!(!late.changed().await.unwrap().entitled);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn foreign_bundles_come_and_go_with_the_entries() {
    for pushes in [true, false] {
        let world = World::new();
        world.fake.change(|state| state.pushes = pushes);
        let foreign = spiffe_proto::types::Bundle { trust_domain: "b.org".into(), ..Default::default() };
        world.fake.change(|state| {
            state.federated.insert("b.org".into(), foreign);
            let mut entry = entry_message(&"example.org".parse().unwrap(), "a", "unix:uid:1");
            entry.federates_with = vec!["b.org".into(), "unknown.org".into()];
            state.entries.insert("a".into(), entry);
        });
        let agent = world.start().await;
        let mut open = agent.subscribe(&["unix:uid:1"]);
        let view = agent.complete(&mut open).await;
        assert_eq!(view.federated.len(), 1);
        assert_eq!(agent.cache.bundles_for(&selectors(&["unix:uid:1"])).len(), 2);
        assert_eq!(agent.cache.bundles_for(&selectors(&["unix:uid:2"])).len(), 1);
        world.fake.change(|state| {
            state.federated.clear();
        });
        assert!(agent.complete(&mut open).await.federated.is_empty());
        agent.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_tainted_authority_makes_everything_new_but_not_again_and_again() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
    // Past the first tenth of both lives, so that nothing holds the renewal back.
    tokio::time::sleep(30 * MINUTE).await;
    world.fake.change(|state| {
        state.tainted = true;
        state.sequence += 1;
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.fake.count(|state| (state.signed, state.renewals)), (2, 1));
    // The server goes on signing with it: renewals stay a tenth of a life apart.
    tokio::time::sleep(HOUR).await;
    let (signed, renewals) = world.fake.count(|state| (state.signed, state.renewals));
    assert!(signed <= 6 && renewals <= 4, "{signed} {renewals}");
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_item_that_is_refused_holds_up_only_those_who_need_it() {
    let world = World::new();
    world.fake.change(|state| {
        state.refuse_entries.insert("b".into());
    });
    world.fake.put_entry("a", "unix:uid:1");
    world.fake.put_entry("b", "unix:gid:1");
    let agent = world.start().await;
    let mut one = agent.subscribe(&["unix:uid:1"]);
    assert_eq!(ids(&*agent.complete(&mut one).await), ["a"]);
    tokio::time::sleep(10 * MINUTE).await;
    let both = agent.at_once(&["unix:uid:1", "unix:gid:1"]);
    assert!(both.entitled && !both.complete);
    assert_eq!(world.fake.state().signed, 1);
    // It was tried, but less and less often.
    let batches = world.fake.state().batches;
    assert!((10..40).contains(&batches), "{batches}");
    world.fake.change(|state| state.refuse_entries.clear());
    let before = Instant::now();
    agent.until(|agent| agent.at_once(&["unix:uid:1", "unix:gid:1"]).complete).await;
    assert!(before.elapsed() <= ONE_STEP);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn jwt_svids_are_kept_until_their_renewal_and_while_the_server_is_away_until_they_expire() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let who = selectors(&["unix:uid:1"]);
    let audience = ["x".to_owned()];
    let first = agent.cache.jwt_svids(&who, &audience, None).await.unwrap();
    assert_eq!(first.len(), 1);
    assert_eq!(world.fake.state().jwt_signed, 1);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let again = agent.cache.jwt_svids(&who, &audience, None).await.unwrap();
    assert_eq!(*again[0].token, *first[0].token);
    // Past the renewal time, which is at 150 s ± 10 %.
    tokio::time::sleep(Duration::from_secs(70)).await;
    let renewed = agent.cache.jwt_svids(&who, &audience, None).await.unwrap();
    assert_ne!(*renewed[0].token, *first[0].token);
    world.fake.go_away();
    tokio::time::sleep(Duration::from_secs(290)).await;
    let held = agent.cache.jwt_svids(&who, &audience, None).await.unwrap();
    assert_eq!(*held[0].token, *renewed[0].token);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let gone = agent.cache.jwt_svids(&who, &audience, None).await;
    assert!(matches!(gone, Err(CacheError::Issue(_))));
    let nobody = agent.cache.jwt_svids(&selectors(&["unix:uid:2"]), &audience, None).await;
    assert!(matches!(nobody, Err(CacheError::NotEntitled)));
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_entry_with_jti_gets_a_new_token_each_time() {
    let world = World::new();
    world.fake.change(|state| {
        let mut entry = entry_message(&"example.org".parse().unwrap(), "a", "unix:uid:1");
        entry.additional_attributes = Some(spiffe_proto::types::entry::AdditionalAttributes {
            jwt_svid_include_jti: true,
            disable_x509_svid_prefetch: true,
        });
        state.entries.insert("a".into(), entry);
    });
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let audience = ["x".to_owned()];
    for count in 1..4 {
        agent.cache.jwt_svids(&selectors(&["unix:uid:1"]), &audience, None).await.unwrap();
        assert_eq!(world.fake.state().jwt_signed, count);
    }
    assert_eq!(agent.cache.counts().jwt_svids, 0);
    // Nor is its X.509-SVID signed before somebody asks.
    tokio::time::sleep(MINUTE).await;
    assert_eq!(world.fake.state().signed, 0);
    let mut open = agent.subscribe(&["unix:uid:1"]);
    agent.complete(&mut open).await;
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_broke_is_resumed_without_sending_anything_again() {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
    let mut open = agent.subscribe(&["unix:uid:1"]);
    open.changed().await.unwrap();
    world.fake.break_connections();
    agent.until(|_| world.fake.state().hellos.len() == 2).await;
    let same = world.fake.count(|state| state.hellos[0].digest == state.hellos[1].digest);
    assert!(!same);
    world.fake.put_entry("b", "unix:uid:2");
    agent.until(|agent| agent.at_once(&["unix:uid:2"]).complete).await;
    assert!(futures_util::FutureExt::now_or_never(open.changed()).is_none());
    assert_eq!(world.fake.state().signed, 2);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_a_server_a_first_start_gives_up_and_a_later_one_does_not() {
    let world = World::new();
    world.fake.go_away();
    let before = Instant::now();
    assert!(matches!(world.try_start().await, Err(IdentityError::Attest(_))));
    assert!(before.elapsed() <= MINUTE);
    world.fake.come_back();
    world.start().await.stop().await;
    world.fake.go_away();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    tokio::time::sleep(30 * MINUTE).await;
    assert!(!agent.cache.synced() && !agent.keeper.is_finished());
    world.fake.come_back();
    let back = Instant::now();
    agent.until(|agent| agent.at_once(&["unix:uid:1"]).complete).await;
    assert!(back.elapsed() <= ONE_STEP);
    assert_eq!(world.fake.state().attestations, 1);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_server_of_an_unknown_authority_ends_the_agent_but_not_its_identity() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    world.fake.state().unknown_authority = true;
    world.fake.break_connections();
    let ended = tokio::time::timeout(MINUTE, agent.keeper).await.unwrap().unwrap();
    assert!(matches!(ended, Err(IdentityError::UnknownAuthority)), "{ended:?}");
    world.fake.state().unknown_authority = false;
    world.start().await.stop().await;
    assert_eq!(world.fake.state().attestations, 1);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_may_bootstraps_anew_after_the_configured_time() {
    let mut world = World::new();
    world.unknown_authority = UnknownAuthority::Rebootstrap { after: 10 * MINUTE, required: true };
    world.fake.change(|state| state.reattestable = true);
    let agent = world.start().await;
    agent.cache.first_sync().await;
    world.fake.state().unknown_authority = true;
    world.fake.break_connections();
    let before = Instant::now();
    let ended = agent.keeper.await.unwrap();
    assert!(matches!(ended, Err(IdentityError::Rebootstrap)), "{ended:?}");
    let lasted = before.elapsed();
    assert!(lasted >= 10 * MINUTE && lasted <= 10 * MINUTE + 2 * ONE_STEP, "{lasted:?}");
    world.fake.state().unknown_authority = false;
    world.start().await.stop().await;
    assert_eq!(world.fake.state().attestations, 2);

    let mut world = World::new();
    world.unknown_authority = UnknownAuthority::Rebootstrap { after: MINUTE, required: true };
    assert!(matches!(world.try_start().await, Err(IdentityError::CannotRebootstrap)));
}
