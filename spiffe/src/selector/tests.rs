use super::*;

fn set(texts: &[&str]) -> SelectorSet {
    texts.iter().map(|text| Selector::parse(text).unwrap()).collect()
}

#[test]
fn only_the_first_colon_divides() {
    let selector = Selector::parse("unix:uid:1000").unwrap();
    assert_eq!((selector.kind(), selector.value()), ("unix", "uid:1000"));
    assert_eq!(selector.to_string(), "unix:uid:1000");
}

#[test]
fn the_order_is_that_of_type_and_value() {
    let mut sorted = ["a-b:x", "a:z", "a:y", "b:a"].map(|text| Selector::parse(text).unwrap());
    sorted.sort();
    assert_eq!(sorted.map(|selector| selector.to_string()), ["a:y", "a:z", "a-b:x", "b:a"]);
}

#[test]
fn malformed_selectors_are_refused() {
    assert_eq!(Selector::parse("unix"), Err(SelectorError::MissingColon));
    assert_eq!(Selector::parse(":uid"), Err(SelectorError::EmptyType));
    assert_eq!(Selector::parse("unix:"), Err(SelectorError::EmptyValue));
    assert_eq!(Selector::new("a:b", "c"), Err(SelectorError::ColonInType));
}

#[test]
fn sets_have_no_order_and_no_repetition() {
    let both = set(&["b:2", "a:1", "b:2"]);
    assert_eq!(both, set(&["a:1", "b:2"]));
    assert_eq!(both.len(), 2);
    assert!(both.contains(&Selector::parse("b:2").unwrap()));
    assert!(!both.contains(&Selector::parse("b:1").unwrap()));
}

#[test]
fn subsets() {
    let (none, one, two, other) = (set(&[]), set(&["a:1"]), set(&["a:1", "b:2"]), set(&["a:1", "c:3"]));
    assert!(none.is_subset_of(&none) && none.is_subset_of(&two) && one.is_subset_of(&two) && two.is_subset_of(&two));
    assert!(!two.is_subset_of(&one) && !other.is_subset_of(&two) && !one.is_subset_of(&none));
}

#[test]
fn the_four_relations() {
    let (one, two, three) = (set(&["a:1"]), set(&["a:1", "b:2"]), set(&["a:1", "b:2", "c:3"]));
    let other = set(&["b:2", "c:3"]);
    let related = |have: &SelectorSet| {
        [Match::Exact, Match::Subset, Match::Superset, Match::Any].map(|how| have.matches(&two, how))
    };
    assert_eq!(related(&two), [true, true, true, true]);
    assert_eq!(related(&one), [false, true, false, true]);
    assert_eq!(related(&three), [false, false, true, true]);
    assert_eq!(related(&other), [false, false, false, true]);
    assert_eq!(related(&set(&["z:9"])), [false, false, false, false]);
    // As in SPIRE: an agent without selectors is found by none of them.
    assert_eq!(related(&set(&[])), [false, false, false, false]);
}

#[test]
fn the_union_is_a_set() {
    assert_eq!(set(&["a:1"]).union(&set(&["a:1", "b:2"])), set(&["a:1", "b:2"]));
}
