use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
}

fn candidate(entry: &str, demand: Demand, held: Option<Held>) -> Candidate {
    Candidate { entry: entry.into(), held, demand, last_used: 0, signing: false, retry_at: None }
}

fn until(seconds: u64) -> Validity {
    Validity { not_before: at(0), not_after: at(seconds) }
}

fn held(renew_at: u64, not_after: u64) -> Option<Held> {
    Some(Held { renew_at: at(renew_at), validity: until(not_after), outdated: false })
}

fn names(ids: &[EntryId]) -> Vec<&str> {
    ids.iter().map(|id| &**id).collect()
}

#[test]
fn near_expiry_comes_first_then_subscribed_then_prefetch() {
    let all = [
        candidate("a", Demand::Prefetch, None),
        candidate("b", Demand::Subscribed, None),
        candidate("c", Demand::Prefetch, held(5, 20)),
        candidate("d", Demand::Subscribed, held(5, 15)),
        candidate("e", Demand::Subscribed, held(50, 100)),
    ];
    let plan = plan(&all, 10, at(10));
    assert_eq!(names(&plan.sign), ["d", "c", "b", "a"]);
    assert!(plan.forget.is_empty());
    assert_eq!(plan.wake, Some(at(15)));
}

#[test]
fn prefetch_fills_the_room_in_entry_order() {
    let all: Vec<Candidate> = ["a", "b", "c", "d"].iter().map(|id| candidate(id, Demand::Prefetch, None)).collect();
    assert_eq!(names(&plan(&all, 3, at(0)).sign), ["a", "b", "c"]);
}

#[test]
fn on_demand_is_never_prefetched_but_renewed_once_held() {
    let all = [candidate("a", Demand::OnDemand, None), candidate("b", Demand::OnDemand, held(5, 20))];
    assert_eq!(names(&plan(&all, 10, at(10)).sign), ["b"]);
}

#[test]
fn subscribers_exceed_the_limit_and_the_least_used_goes() {
    let mut old = candidate("b", Demand::Prefetch, held(50, 100));
    old.last_used = 1;
    let mut recent = candidate("c", Demand::OnDemand, held(50, 100));
    recent.last_used = 2;
    let all = [candidate("a", Demand::Subscribed, held(50, 100)), old, recent];
    assert_eq!(names(&plan(&all, 2, at(0)).forget), ["b"]);
    assert_eq!(names(&plan(&all, 0, at(0)).forget), ["c", "b"]);
    assert!(plan(&all, 0, at(0)).sign.is_empty());
}

#[test]
fn expired_is_told_and_signed_anew() {
    let all = [candidate("a", Demand::Subscribed, held(5, 10))];
    let plan = plan(&all, 10, at(10));
    assert_eq!((names(&plan.over), names(&plan.sign)), (vec!["a"], vec!["a"]));
    assert!(plan.forget.is_empty());
    assert_eq!(plan.wake, None);
}

#[test]
fn what_begins_tomorrow_is_asked_for_anew_and_what_begins_soon_is_not() {
    let held = |from: u64| Held {
        renew_at: at(90_000),
        validity: Validity { not_before: at(from), not_after: at(99_000) },
        outdated: false,
    };
    let signs = |from| names(&plan(&[candidate("a", Demand::Prefetch, Some(held(from)))], 10, at(10)).sign).len();
    assert_eq!([610, 611, 86_410].map(signs), [0, 1, 1]);
}

#[test]
fn nothing_is_taken_that_is_over_or_begins_tomorrow() {
    let from_to = |from, until| Validity { not_before: at(from), not_after: at(until) };
    for held in [None, Some(until(1)), Some(until(100))] {
        for signed in [from_to(0, 10), from_to(611, 4000), from_to(86_410, 90_000)] {
            assert_eq!(take(held, signed, at(10)), Succession::Never);
        }
        assert_eq!(take(held, from_to(10, 4000), at(10)), Succession::Now);
    }
    // What begins soon is better than nothing, and not better than what is good.
    assert_eq!(take(None, from_to(40, 4000), at(10)), Succession::Now);
    assert_eq!(take(Some(until(100)), from_to(40, 4000), at(10)), Succession::At(at(40)));
}

#[test]
fn an_outdated_revision_is_signed_at_once() {
    let outdated = Held { renew_at: at(50), validity: until(100), outdated: true };
    let all = [candidate("a", Demand::Subscribed, Some(outdated))];
    assert_eq!(names(&plan(&all, 10, at(0)).sign), ["a"]);
}

#[test]
fn what_is_under_way_or_was_refused_waits() {
    let mut under_way = candidate("a", Demand::Subscribed, None);
    under_way.signing = true;
    let mut refused = candidate("b", Demand::Subscribed, None);
    refused.retry_at = Some(at(7));
    let all = [under_way, refused];
    let first = plan(&all, 10, at(0));
    assert!(first.sign.is_empty());
    assert_eq!(first.wake, Some(at(7)));
    assert_eq!(names(&plan(&all, 10, at(7)).sign), ["b"]);
}

#[test]
fn renewal_keeps_away_from_the_first_tenth() {
    let hours = |hours: u64| at(hours * 3600);
    let (not_before, not_after, received_at) = (hours(0), hours(1000), hours(50));
    let drawn = RenewAt::draw(not_before, not_after, received_at, 0);
    // A wish that was past when the credential came.
    let target = Some(Duration::from_secs(985 * 3600));
    assert_eq!(renewal(drawn, not_before, not_after, received_at, target, 0), hours(150));
    assert_eq!(renewal(drawn, not_before, not_after, received_at, None, 0), drawn.at());
}

#[test]
fn renewal_comes_before_the_end_of_what_was_nearly_over() {
    // Received when a hundredth of its life was left.
    let (not_before, not_after, received_at) = (at(0), at(10_000), at(9_900));
    let drawn = RenewAt::draw(not_before, not_after, received_at, 0);
    assert_eq!(drawn.at(), at(9_945));
    assert_eq!(renewal(drawn, not_before, not_after, received_at, None, 0), drawn.at());
}

#[test]
fn renewal_honours_the_availability_target() {
    let hour = 3600;
    let target = Some(Duration::from_secs(24 * hour));
    let of = |hours: u64| {
        let drawn = RenewAt::draw(at(0), at(hours * hour), at(0), 100);
        renewal(drawn, at(0), at(hours * hour), at(0), target, 60)
    };
    // 24 h left comes before half of 48 h by the spread of a minute; half of 96 h comes before that.
    assert_eq!(of(48), at(24 * hour - 60));
    assert_eq!(of(96), at(48 * hour));
    // Outlives the target by less than twelve hours: half of life stays the rule.
    assert_eq!(of(30), at(15 * hour));
}

prop_compose! {
    fn arbitrary_held()(renew in 0u64..100, life in 0u64..100, outdated in any::<bool>()) -> Held {
        Held { renew_at: at(renew), validity: until(renew + life), outdated }
    }
}

fn arbitrary_candidates() -> impl Strategy<Value = Vec<Candidate>> {
    let demand = prop_oneof![Just(Demand::Subscribed), Just(Demand::Prefetch), Just(Demand::OnDemand)];
    let one = (
        proptest::option::of(arbitrary_held()),
        demand,
        0u64..10,
        any::<bool>(),
        proptest::option::of((0u64..100).prop_map(at)),
    );
    proptest::collection::vec(one, 0..40).prop_map(|all| {
        all.into_iter()
            .enumerate()
            .map(|(number, (held, demand, last_used, signing, retry_at))| Candidate {
                entry: format!("{number:03}").into(),
                held,
                demand,
                last_used,
                signing,
                retry_at,
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn the_plan_keeps_its_promises(all in arbitrary_candidates(), limit in 0usize..40, now in 0u64..150) {
        let now = at(now);
        let plan = plan(&all, limit, now);
        let sign: BTreeSet<_> = plan.sign.iter().cloned().collect();
        let forget: BTreeSet<_> = plan.forget.iter().cloned().collect();
        let over: BTreeSet<_> = plan.over.iter().cloned().collect();
        prop_assert_eq!(sign.len(), plan.sign.len());
        prop_assert_eq!(forget.len(), plan.forget.len());
        let mut subscribed = 0;
        let mut holding = 0;
        for candidate in &all {
            let live = candidate.held.filter(|held| held.validity.not_after > now);
            let waits = candidate.signing || candidate.retry_at.is_some_and(|retry_at| retry_at > now);
            let signs = sign.contains(&candidate.entry);
            let forgets = forget.contains(&candidate.entry);
            // Exactly what has expired is over, and nothing is signed twice at once or against a wait.
            prop_assert_eq!(over.contains(&candidate.entry), candidate.held.is_some() && live.is_none());
            prop_assert!(!forgets || live.is_some());
            prop_assert!(!(signs && waits));
            // Nothing that is good is replaced.
            if let Some(held) = live && !held.outdated && held.renew_at > now {
                prop_assert!(!signs);
            }
            if candidate.demand == Demand::Subscribed {
                subscribed += 1;
                prop_assert!(!(forgets && live.is_some()));
                let needs = live.is_none_or(|held| held.outdated || held.renew_at <= now);
                prop_assert_eq!(signs, needs && !waits);
            }
            if candidate.demand == Demand::OnDemand && live.is_none() {
                prop_assert!(!signs);
            }
            if (live.is_some() && !forgets) || signs {
                holding += 1;
            }
        }
        prop_assert!(holding <= limit.max(subscribed));
        prop_assert!(plan.wake.is_none_or(|wake| wake > now));
    }
}
