//! Each launch against its CPU reference, on a GPU. Without one every test fails and says so.
//! `BINDERY_SEED` repeats a run, `BINDERY_CASES` says how many random shapes each test tries.

#[path = "parity/linear.rs"]
mod linear;
#[path = "parity/paged_prefill.rs"]
mod paged_prefill;
#[path = "parity/rows.rs"]
mod rows;
#[path = "parity/support.rs"]
mod support;

#[path = "parity/paged_decode.rs"]
mod paged_decode;

#[path = "parity/sample.rs"]
mod sample;
