//! One node of Bindery: HTTP in, tokens out.
#![forbid(unsafe_code)]

pub mod api;
pub mod backend;
pub mod bench;
pub mod claim;
pub mod config;
pub mod confine;
pub mod engine;
#[doc(hidden)]
pub mod fuzz;
pub mod kv;
pub mod metrics;
pub mod model;
pub mod node;
pub mod plan;
#[cfg(test)]
mod purity;
pub mod replica;
pub mod request;
pub mod sampling;
pub mod scheduler;
pub mod serve;
pub mod source;
pub mod supervise;
