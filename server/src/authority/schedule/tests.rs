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

#[test]
fn first_start_prepares_and_activates_at_once() {
    assert_eq!(next_step(&[], at(1000)), Step::Prepare);
    let prepared = slot("a", SlotStatus::Prepared, 1000, 1000 + DAY);
    assert_eq!(next_step(&[prepared], at(1000)), Step::Activate("a".into()));
}

#[test]
fn a_day_is_prepared_at_half_and_activated_at_five_sixths() {
    let active = slot("a", SlotStatus::Active, 1000, 1000 + DAY);
    let slots = [active];
    assert_eq!(next_step(&slots, at(1000)), Step::Wait(at(1000 + DAY / 2)));
    assert_eq!(next_step(&slots, at(1000 + DAY / 2 - 1)), Step::Wait(at(1000 + DAY / 2)));
    assert_eq!(next_step(&slots, at(1000 + DAY / 2)), Step::Prepare);
    let [active] = slots;
    let slots = [active, slot("b", SlotStatus::Prepared, 1000 + DAY / 2, 1000 + DAY / 2 + DAY)];
    assert_eq!(next_step(&slots, at(1000 + DAY / 2)), Step::Wait(at(1000 + DAY * 5 / 6)));
    assert_eq!(next_step(&slots, at(1000 + DAY * 5 / 6)), Step::Activate("b".into()));
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
    assert_eq!(next_step(&slots, at(100)), Step::Activate("b".into()));
    assert_eq!(next_step(&slots, at(150)), Step::Prepare, "both have ended");
}

#[test]
fn a_lost_authority_is_replaced_and_forgotten_a_day_after_its_end() {
    let lost = slot("a", SlotStatus::Lost, 0, 100);
    assert_eq!(next_step(&[Arc::clone(&lost)], at(50)), Step::Prepare);
    let active = slot("b", SlotStatus::Active, 50, 50 + 100 * DAY);
    let slots = [lost, active];
    assert_eq!(next_step(&slots, at(60)), Step::Wait(at(100 + DAY)));
    assert_eq!(next_step(&slots, at(100 + DAY)), Step::Forget("a".into()));
}

#[test]
fn bundle_authorities_go_a_day_after_their_end_but_never_the_last_ones() {
    let authorities = [("a", Some(at(100))), ("b", Some(at(200))), ("c", None)];
    assert_eq!(ended(&authorities, true, at(100)), (vec![], Some(at(100 + DAY))));
    assert_eq!(ended(&authorities, true, at(100 + DAY)), (vec!["a"], Some(at(200 + DAY))));
    assert_eq!(ended(&authorities, true, at(300 + DAY)), (vec!["a", "b"], None));
    assert_eq!(ended(&authorities[..2], true, at(300 + DAY)), (vec![], None));
    assert_eq!(ended(&authorities[..2], false, at(300 + DAY)), (vec!["a", "b"], None));
}

/// Carries out every step exactly when it is asked for, and looks whether there ever was nobody to sign.
fn run(lifetime: u64, until: u64) -> (Vec<(u64, Step)>, u64) {
    let (mut slots, mut log, mut gaps) = (Vec::<Arc<AuthoritySlot>>::new(), Vec::new(), 0);
    let mut now = 1000;
    while now < until {
        let step = next_step(&slots, at(now));
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
            Step::Wait(next) => {
                let next = next.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
                assert!(next > now, "a wait is in the future");
                if active(&slots, at(next - 1)).is_none() {
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
