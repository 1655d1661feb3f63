//! An agent whose disk fails it.

use std::sync::Arc;

use super::clocks::{HOUR, MINUTE, keeps_its_identity};
use super::{Authority, World};
use crate::identity::DataFile;

/// Puts a file where the agent's directory was, so that nothing can be written there, and gives back what undoes that.
fn unwritable(world: &World) -> impl FnOnce() + use<> {
    let (place, aside) = (world.dir.path().to_owned(), world.dir.path().with_extension("aside"));
    std::fs::rename(&place, &aside).unwrap();
    std::fs::write(&place, b"in the way").unwrap();
    move || {
        std::fs::remove_file(&place).unwrap();
        std::fs::rename(&aside, &place).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_svid_that_cannot_be_written_is_used_in_the_last_quarter_only() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let first = agent.agent_serial();
    let put_right = unwritable(&world);
    // Renewed around the half of four hours, and not used until an hour is left.
    tokio::time::sleep(170 * MINUTE).await;
    assert_eq!((agent.agent_serial(), world.fake.count(|state| state.renewals)), (first.clone(), 1));
    assert!(!agent.keeper.is_finished());
    tokio::time::sleep(15 * MINUTE).await;
    let second = agent.agent_serial();
    assert_ne!(second, first);
    // Renewals go on in memory.
    keeps_its_identity(&agent, 10 * HOUR).await;
    assert!(world.fake.count(|state| state.renewals) >= 3);
    put_right();
    tokio::time::sleep(MINUTE).await;
    let last = agent.agent_serial();
    agent.kill();
    let agent = world.start().await;
    assert_eq!((agent.agent_serial(), world.fake.count(|state| state.attestations)), (last, 1));
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_started_anew_before_its_svid_could_be_written_finds_a_living_one() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let first = agent.agent_serial();
    let put_right = unwritable(&world);
    tokio::time::sleep(150 * MINUTE).await;
    assert_eq!(world.fake.count(|state| state.renewals), 1);
    agent.kill();
    put_right();
    let agent = world.start().await;
    assert_eq!((agent.agent_serial(), world.fake.count(|state| state.attestations)), (first, 1));
    keeps_its_identity(&agent, 10 * HOUR).await;
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_directory_that_was_removed_is_made_anew() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let first = agent.agent_serial();
    std::fs::remove_dir_all(world.dir.path()).unwrap();
    tokio::time::sleep(150 * MINUTE).await;
    let second = agent.agent_serial();
    assert_ne!(second, first);
    agent.kill();
    let agent = world.start().await;
    assert_eq!((agent.agent_serial(), world.fake.count(|state| state.attestations)), (second, 1));
    agent.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_bundle_that_could_not_be_written_is_written_once_that_can_be_done() {
    let world = World::new();
    let agent = world.start().await;
    agent.cache.first_sync().await;
    let stored = || DataFile::open(world.dir.path()).unwrap().load().unwrap().bundle;
    assert_eq!(stored().len(), 0);
    let put_right = unwritable(&world);
    let mut bundle = (*agent.identity.bundle().unwrap()).clone();
    let other = Authority::new(&bundle.trust_domain, world.clock.now()).bundle(2, false);
    bundle.x509.extend(other.x509);
    agent.identity.adopt_bundle(&Arc::new(bundle)).await;
    tokio::time::sleep(MINUTE).await;
    put_right();
    assert_eq!(stored().len(), 0);
    tokio::time::sleep(MINUTE).await;
    assert_eq!(stored().len(), 2);
    agent.stop().await;
}
