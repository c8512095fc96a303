//! Logits to token: pure, seeded, the same for a row whatever else is in the batch.
//! Nothing here knows devices, requests in flight or time.

mod beam;
mod filter;
pub mod logprob;
mod params;
pub mod philox;
pub mod rows;
mod survey;

pub use beam::{BeamSearch, Continuation};
pub use params::Params;
