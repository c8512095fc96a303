//! One node of Bindery: HTTP in, tokens out.
#![forbid(unsafe_code)]

pub mod backend;
pub mod bench;
pub mod config;
pub mod confine;
pub mod engine;
#[doc(hidden)]
pub mod fuzz;
pub mod kv;
pub mod model;
pub mod request;
pub mod sampling;
pub mod scheduler;
pub mod source;
pub mod supervise;
