//! See `daemon::fuzz::fuzz_completion_request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| daemon::fuzz::fuzz_completion_request(data));
