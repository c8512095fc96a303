//! The loop: schedule, launch, collect, commit. One thread owns scheduler, backend and KV arena.

pub mod command;
pub mod handle;
pub mod stats;
