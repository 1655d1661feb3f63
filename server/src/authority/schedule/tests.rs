use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::state::model::{AuthorityKind, KeyOwner};

const DAY: u64 = 24 * 3600;

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn slot(id: &str, status: SlotStatus, issued_at: u64, not_after: u64) -> Arc<AuthoritySlot> {
    Arc::new(AuthoritySlot {
        owner: KeyOwner::Shared,
        kind: AuthorityKind::X509,
        authority_id: id.into(),
        key_id: id.into(),
        status,
        issued_at: at(issued_at),
        not_after: at(not_after),
        certificate: None,
        upstream_chain: Vec::new(),
        public_key: Bytes::new(),
    })
}

/// The time `now` when the clocks agree.
fn steady(now: u64) -> Time {
    Time::new(at(now), Duration::ZERO)
}

/// Lines whose keys are at hand and whose roots are published.
fn lines(slots: &[Arc<AuthoritySlot>]) -> Vec<Line> {
    let has_key = |slot: &Arc<AuthoritySlot>| !matches!(slot.status, SlotStatus::Old | SlotStatus::Lost);
    slots.iter().map(|slot| Line { has_key: has_key(slot), slot: Arc::clone(slot), is_trusted: true }).collect()
}

fn next(slots: &[Arc<AuthoritySlot>], now: u64) -> Step {
    next_step(&lines(slots), steady(now))
}

#[test]
fn first_start_prepares_and_activates_at_once() {
    assert_eq!(next(&[], 1000), Step::Prepare);
    let prepared = slot("a", SlotStatus::Prepared, 1000, 1000 + DAY);
    assert_eq!(next(&[prepared], 1000), Step::Activate("a".into()));
}

#[test]
fn a_day_is_prepared_at_half_and_activated_at_five_sixths() {
    let active = slot("a", SlotStatus::Active, 1000, 1000 + DAY);
    let slots = [active];
    assert_eq!(next(&slots, 1000), Step::Wait(at(1000 + DAY / 2)));
    assert_eq!(next(&slots, 1000 + DAY / 2 - 1), Step::Wait(at(1000 + DAY / 2)));
    assert_eq!(next(&slots, 1000 + DAY / 2), Step::Prepare);
    let [active] = slots;
    let slots = [active, slot("b", SlotStatus::Prepared, 1000 + DAY / 2, 1000 + DAY / 2 + DAY)];
    assert_eq!(next(&slots, 1000 + DAY / 2), Step::Wait(at(1000 + DAY * 5 / 6)));
    assert_eq!(next(&slots, 1000 + DAY * 5 / 6), Step::Activate("b".into()));
}

#[test]
fn a_year_is_prepared_thirty_days_and_activated_seven_days_before_its_end() {
    let active = slot("a", SlotStatus::Active, 0, 365 * DAY);
    assert_eq!(prepare_at(&active), at(335 * DAY));
    assert_eq!(activate_at(&active), at(358 * DAY));
}

#[test]
fn an_expired_active_authority_gives_way_at_once() {
    let slots = [slot("a", SlotStatus::Active, 0, 100), slot("b", SlotStatus::Prepared, 50, 150)];
    assert_eq!(next(&slots, 100), Step::Activate("b".into()));
    assert_eq!(next(&slots, 150), Step::Prepare, "both have ended");
}

#[test]
fn a_lost_authority_is_replaced_and_forgotten_a_day_after_its_end() {
    let lost = slot("a", SlotStatus::Lost, 0, 100);
    assert_eq!(next(&[Arc::clone(&lost)], 50), Step::Prepare);
    let active = slot("b", SlotStatus::Active, 50, 50 + 100 * DAY);
    let slots = [lost, active];
    assert_eq!(next(&slots, 60), Step::Wait(at(100 + DAY)));
    assert_eq!(next(&slots, 100 + DAY), Step::Forget("a".into()));
}

#[test]
fn bundle_authorities_go_a_day_after_their_end_but_never_the_last_ones() {
    let authorities = [("a", Some(at(100))), ("b", Some(at(200))), ("c", None)];
    assert_eq!(ended(&authorities, true, steady(100)), (vec![], Some(at(100 + DAY))));
    assert_eq!(ended(&authorities, true, steady(100 + DAY)), (vec!["a"], Some(at(200 + DAY))));
    assert_eq!(ended(&authorities, true, steady(300 + DAY)), (vec!["a", "b"], None));
    assert_eq!(ended(&authorities[..2], true, steady(300 + DAY)), (vec![], None));
    assert_eq!(ended(&authorities[..2], false, steady(300 + DAY)), (vec!["a", "b"], None));
}

/// Carries out every step exactly when it is asked for, and looks whether there ever was nobody to sign.
fn run(lifetime: u64, until: u64) -> (Vec<(u64, Step)>, u64) {
    let (mut slots, mut log, mut gaps) = (Vec::<Arc<AuthoritySlot>>::new(), Vec::new(), 0);
    let mut now = 1000;
    while now < until {
        let step = next(&slots, now);
        match &step {
            Step::Prepare => {
                slots.push(slot(&log.len().to_string(), SlotStatus::Prepared, now, now + lifetime));
            }
            Step::Activate(id) => {
                for slot in &mut slots {
                    let status = if slot.authority_id == *id {
                        SlotStatus::Active
                    } else if slot.status == SlotStatus::Active {
                        SlotStatus::Old
                    } else {
                        slot.status
                    };
                    Arc::make_mut(slot).status = status;
                }
            }
            Step::Forget(id) => slots.retain(|slot| slot.authority_id != *id),
            Step::Withdraw(_) | Step::Retire(_) => panic!("nothing is early, and old keys are gone at once"),
            Step::Wait(next) => {
                let next = next.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
                assert!(next > now, "a wait is in the future");
                if active(&lines(&slots), at(next - 1)).is_none() {
                    gaps += 1;
                }
                now = next;
                continue;
            }
        }
        log.push((now, step));
        assert!(log.len() < 100_000);
    }
    (log, gaps)
}

proptest! {
    #[test]
    fn somebody_can_always_sign_and_successors_are_known_before_they_sign(sixth in 10u64..70 * DAY) {
        // Whole sixths, because this clock ticks in seconds.
        let lifetime = 6 * sixth;
        let (log, gaps) = run(lifetime, 1000 + 10 * lifetime);
        prop_assert_eq!(gaps, 0);
        let mut prepared = Vec::new();
        for (index, (time, step)) in log.iter().enumerate() {
            match step {
                Step::Prepare => prepared.push((index.to_string(), *time)),
                Step::Activate(id) if **id != *"0" => {
                    let (_, published) = prepared.iter().find(|(known, _)| **known == **id).unwrap();
                    prop_assert!(time - published >= (lifetime / 3).min(23 * DAY) - 1, "published {} activated {}", published, time);
                }
                _ => {}
            }
        }
    }
}

/// Lines whose keys are all at hand.
fn with_keys(slots: &[Arc<AuthoritySlot>]) -> Vec<Line> {
    lines(slots).into_iter().map(|line| Line { has_key: true, ..line }).collect()
}

#[test]
fn an_authority_that_has_not_begun_gives_way_to_one_that_signed_before() {
    // Made while the clock was a day ahead; the clock is right again.
    let slots =
        [slot("a", SlotStatus::Old, 1000, 1000 + DAY), slot("b", SlotStatus::Active, 2000 + DAY, 2000 + 2 * DAY)];
    let unsteady = Time::new(at(2000), Duration::from_secs(600));
    assert_eq!(active(&with_keys(&slots), at(2000)), None);
    assert_eq!(next_step(&with_keys(&slots), unsteady), Step::Activate("a".into()));
    // Its key is gone, or its root is tainted: a new one is made at once.
    assert_eq!(next_step(&lines(&slots), unsteady), Step::Prepare);
    let tainted: Vec<Line> = with_keys(&slots).into_iter().map(|line| Line { is_trusted: false, ..line }).collect();
    assert_eq!(next_step(&tainted, unsteady), Step::Prepare);

    let slots =
        [slot("a", SlotStatus::Active, 1000, 1000 + DAY), slot("b", SlotStatus::Old, 2000 + DAY, 2000 + 2 * DAY)];
    assert_eq!(next_step(&with_keys(&slots), unsteady), Step::Wait(at(2600)));
    assert_eq!(next_step(&with_keys(&slots), steady(2600)), Step::Withdraw("b".into()));
}

#[test]
fn the_time_of_the_first_signature_is_that_of_the_certificate() {
    let slots = [slot("a", SlotStatus::Active, 1000, 1000 + DAY)];
    assert_eq!(active(&lines(&slots), at(990)), Some(&slots[0]), "a certificate is dated back by ten seconds");
    assert_eq!(active(&lines(&slots), at(989)), None);
    assert_eq!(next(&slots, 989), Step::Prepare);
    let prepared = [slot("a", SlotStatus::Prepared, 1000, 1000 + DAY)];
    assert_eq!(next(&prepared, 989), Step::Prepare);
}

#[test]
fn old_keys_stay_until_the_clocks_agree() {
    let slots = [slot("a", SlotStatus::Old, 0, DAY), slot("b", SlotStatus::Active, 1000, 1000 + DAY)];
    let unsteady = |now| Time::new(at(now), Duration::from_secs(600));
    assert_eq!(next_step(&with_keys(&slots), unsteady(2000)), Step::Wait(at(2600)));
    assert_eq!(next_step(&with_keys(&slots), steady(2600)), Step::Retire("a".into()));
    let lost = [slot("a", SlotStatus::Lost, 0, DAY), slot("b", SlotStatus::Active, 1000, 1000 + DAY)];
    assert_eq!(next_step(&with_keys(&lost), steady(2600)), Step::Retire("a".into()));
    // An old one that would live longer is taken up again before another is made.
    let slots = [slot("a", SlotStatus::Old, 1000, 1000 + DAY), slot("b", SlotStatus::Active, 0, 60_000)];
    assert_eq!(next_step(&with_keys(&slots), unsteady(40_000)), Step::Wait(at(40_600)));
    assert_eq!(next_step(&with_keys(&slots), unsteady(50_000)), Step::Activate("a".into()));
}

#[test]
fn nothing_ended_is_removed_before_the_clocks_agree() {
    let unsteady = |now| Time::new(at(now), Duration::from_secs(600));
    let slots = [slot("a", SlotStatus::Lost, 0, 100), slot("b", SlotStatus::Active, 50, 50 + 100 * DAY)];
    assert_eq!(next_step(&lines(&slots), unsteady(100 + DAY)), Step::Wait(at(700 + DAY)));
    let authorities = [("a", Some(at(100))), ("b", None)];
    assert_eq!(ended(&authorities, true, unsteady(100 + DAY)), (vec![], Some(at(700 + DAY))));
    assert_eq!(ended(&authorities, true, unsteady(DAY)), (vec![], Some(at(600 + DAY))));
}
