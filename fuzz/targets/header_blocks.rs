//! The shim in front of HTTP/2 on Unix sockets: frames and compressed header blocks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transport::authority::filtered;

fuzz_target!(|data: &[u8]| {
    let whole = filtered(data, usize::MAX);
    let (Ok(whole), Ok(pieces)) = (&whole, &filtered(data, 1)) else {
        assert!(whole.is_err() && filtered(data, 1).is_err(), "the verdict depends on how the bytes arrive");
        return;
    };
    assert_eq!(whole, pieces, "what passes depends on how the bytes arrive");
    // What came out has nothing left to mend, and needs no state of the client's.
    let again = filtered(whole, usize::MAX).expect("the shim refuses its own output");
    assert_eq!(&again, whole, "the output is mended once more");
});
