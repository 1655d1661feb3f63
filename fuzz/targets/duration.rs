//! Durations in Go's syntax.
#![no_main]

use libfuzzer_sys::fuzz_target;
use runtime::duration::{format, parse};

fuzz_target!(|text: &str| {
    let Ok(duration) = parse(text) else { return };
    assert_eq!(parse(&format(duration)).expect("our own text"), duration);
});
