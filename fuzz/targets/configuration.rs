//! Configuration files in both dialects, up to where files that they name would be opened.
#![no_main]

use libfuzzer_sys::fuzz_target;
use runtime::hcl::{Document, Mistakes};

fuzz_target!(|text: &str| {
    let Ok(document) = Document::parse(text) else { return };
    let mistakes = Mistakes::new();
    drop(signet_server::config::raw::Raw::read(&document, &mistakes));
    drop(signet_agent::config::raw::Raw::read(&document, &mistakes));
    let (refused, warnings) = mistakes.take();
    let lines = u32::try_from(text.lines().count()).expect("few lines");
    for line in refused.iter().chain(&warnings).filter_map(|mistake| mistake.line) {
        assert!(line >= 1 && line <= lines, "a mistake in line {line} of {lines}");
    }
});
