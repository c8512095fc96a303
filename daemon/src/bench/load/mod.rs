//! Sends requests to a server and notes when what came back.

pub(super) mod arrivals;
pub(super) mod client;
pub(super) mod prompts;
pub(super) mod random;
mod sse;
