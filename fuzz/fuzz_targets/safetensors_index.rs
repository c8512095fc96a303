//! See `daemon::fuzz::fuzz_safetensors_index`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| daemon::fuzz::fuzz_safetensors_index(data));
