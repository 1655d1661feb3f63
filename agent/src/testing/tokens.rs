//! JWT-SVIDs that several callers want at the same time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;
use tonic::Status;

use super::server::entry_message;
use super::{Running, World, selectors};
use crate::cache::{Cache, CacheError, IssueError, JwtSvid};

const SECOND: Duration = Duration::from_secs(1);

/// An agent that holds the entry `a` of `unix:uid:1`, and whose server takes a second for each token.
async fn with_slow_tokens() -> (World, Running) {
    let world = World::new();
    world.fake.put_entry("a", "unix:uid:1");
    let agent = world.start().await;
    agent.until(|agent| agent.cache.counts().x509_svids == 1).await;
    let revision = world.fake.change(|state| state.jwt_delay = SECOND);
    world.fake.acknowledged(revision).await;
    (world, agent)
}

/// One call of a process of `unix:uid:1`.
async fn ask(cache: Cache, audience: &str) -> Result<Arc<JwtSvid>, CacheError> {
    let svids = cache.jwt_svids(&selectors(&["unix:uid:1"]), &[audience.to_owned()], None).await?;
    assert_eq!(svids.len(), 1);
    Ok(svids[0].clone())
}

async fn ask_at_once(agent: &Running, callers: usize) -> Vec<Result<Arc<JwtSvid>, CacheError>> {
    join_all((0..callers).map(|_| ask(agent.cache.clone(), "x"))).await
}

fn asked(world: &World) -> usize {
    world.fake.state().jwt_asked
}

#[tokio::test(start_paused = true)]
async fn callers_who_want_the_same_token_at_the_same_time_share_one_request() {
    let (world, agent) = with_slow_tokens().await;
    for round in 1..4 {
        let got = ask_at_once(&agent, 40).await;
        assert!(got.iter().all(|svid| *svid.as_ref().unwrap().token == *got[0].as_ref().unwrap().token));
        assert_eq!((asked(&world), agent.cache.jwt_requests()), (round, 0));
        // Past its renewal at 150 s ± 10 %: now they share the request for its successor.
        tokio::time::sleep(170 * SECOND).await;
    }
    let (x, y) = tokio::join!(ask(agent.cache.clone(), "x"), ask(agent.cache.clone(), "y"));
    assert_ne!(*x.unwrap().token, *y.unwrap().token);
    assert_eq!(asked(&world), 5);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_goes_away_takes_no_answer_from_the_others() {
    let (world, agent) = with_slow_tokens().await;
    let first = tokio::spawn(ask(agent.cache.clone(), "x"));
    tokio::time::sleep(SECOND / 4).await;
    let begun = Instant::now();
    let others: Vec<_> = (0..9).map(|_| tokio::spawn(ask(agent.cache.clone(), "x"))).collect();
    tokio::time::sleep(SECOND / 4).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    for other in others {
        other.await.unwrap().unwrap();
    }
    // The request of the one who left was carried on.
    assert!(begun.elapsed() <= SECOND, "{:?}", begun.elapsed());
    assert_eq!((asked(&world), agent.cache.jwt_requests()), (1, 0));
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_nobody_waits_for_any_more_is_given_up() {
    let (world, agent) = with_slow_tokens().await;
    let callers: Vec<_> = (0..5).map(|_| tokio::spawn(ask(agent.cache.clone(), "x"))).collect();
    tokio::time::sleep(SECOND / 2).await;
    assert_eq!(agent.cache.jwt_requests(), 1);
    for caller in callers {
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
    }
    assert_eq!((agent.cache.jwt_requests(), agent.cache.counts().jwt_svids), (0, 0));
    ask(agent.cache.clone(), "x").await.unwrap();
    assert_eq!(asked(&world), 2);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_error_goes_to_all_who_waited_and_to_nobody_after_them() {
    let (world, agent) = with_slow_tokens().await;
    world.fake.state().say.push(Status::resource_exhausted("too many"));
    for got in ask_at_once(&agent, 20).await {
        assert!(matches!(got, Err(CacheError::Issue(_))), "{got:?}");
    }
    assert_eq!((asked(&world), agent.cache.jwt_requests()), (1, 0));
    ask(agent.cache.clone(), "x").await.unwrap();
    assert_eq!(asked(&world), 2);
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn tokens_with_an_id_of_their_own_are_never_shared() {
    let (world, agent) = with_slow_tokens().await;
    let revision = world.fake.change(|state| {
        let entry = state.entries.get_mut("a").unwrap();
        entry.revision_number = 1;
        entry.additional_attributes =
            Some(spiffe_proto::types::entry::AdditionalAttributes { jwt_svid_include_jti: true, ..Default::default() });
    });
    world.fake.acknowledged(revision).await;
    let got = ask_at_once(&agent, 5).await;
    let tokens: BTreeSet<String> = got.into_iter().map(|svid| svid.unwrap().token.to_string()).collect();
    assert_eq!((tokens.len(), asked(&world), agent.cache.counts().jwt_svids), (5, 5, 0));
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_goes_while_the_server_signs_leaves_nobody_a_token() {
    let (world, agent) = with_slow_tokens().await;
    let deletion = async {
        tokio::time::sleep(SECOND / 2).await;
        let revision = world.fake.remove_entry("a");
        world.fake.acknowledged(revision).await;
        assert_eq!(agent.cache.jwt_requests(), 1);
    };
    let (got, ()) = tokio::join!(ask_at_once(&agent, 20), deletion);
    for got in got {
        assert!(matches!(got, Err(CacheError::NotEntitled)), "{got:?}");
    }
    assert_eq!((asked(&world), agent.cache.jwt_requests(), agent.cache.counts().jwt_svids), (1, 0, 0));
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_token_from_memory_does_not_outlive_its_entry_while_another_one_is_signed() {
    let (world, agent) = with_slow_tokens().await;
    ask(agent.cache.clone(), "x").await.unwrap();
    let trust_domain = "example.org".parse().unwrap();
    let revision = world.fake.change(|state| {
        state.entries.insert("b".into(), entry_message(&trust_domain, "b", "unix:uid:1"));
    });
    world.fake.acknowledged(revision).await;
    let deletion = async {
        tokio::time::sleep(SECOND / 2).await;
        let revision = world.fake.remove_entry("a");
        world.fake.acknowledged(revision).await;
    };
    let (who, audience) = (selectors(&["unix:uid:1"]), ["x".to_owned()]);
    let (got, ()) = tokio::join!(agent.cache.jwt_svids(&who, &audience, None), deletion);
    let paths: Vec<_> = got.unwrap().iter().map(|svid| svid.id.path().to_owned()).collect();
    assert_eq!(paths, ["/b"]);
    agent.stop().await;
}

/// Edits entry `a`, for the first time after half a second, `times` times in all, a second apart.
async fn edited(world: &World, times: u64) {
    tokio::time::sleep(SECOND / 2).await;
    for time in 1..=times {
        let revision = world.fake.change(|state| {
            let entry = state.entries.get_mut("a").unwrap();
            entry.revision_number += 1;
            entry.hint = format!("edited {time}");
        });
        world.fake.acknowledged(revision).await;
        tokio::time::sleep(SECOND).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_is_edited_while_its_token_is_signed_still_entitles() {
    let (world, agent) = with_slow_tokens().await;
    let (got, ()) = tokio::join!(ask_at_once(&agent, 5), edited(&world, 1));
    assert!(got.iter().all(|svid| *svid.as_ref().unwrap().hint == *"edited 1"), "{got:?}");
    assert_eq!((asked(&world), agent.cache.jwt_requests(), agent.cache.counts().jwt_svids), (2, 0, 1));
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_is_edited_again_and_again_is_no_denial() {
    let (world, agent) = with_slow_tokens().await;
    let (got, ()) = tokio::join!(ask(agent.cache.clone(), "x"), edited(&world, 2));
    assert!(matches!(&got, Err(CacheError::Issue(error)) if matches!(**error, IssueError::Outdated)), "{got:?}");
    agent.stop().await;
}
