//! The loop: schedule, launch, collect, commit. One thread owns scheduler, backend and KV arena.

mod clients;
pub mod command;
pub mod handle;
mod run;
pub mod stats;
#[cfg(test)]
mod tests;

pub(crate) use run::{Engine, stepped};
pub use run::{EngineConfig, Running, start};
