//! Logits to token: pure, seeded, the same for a row whatever else is in the batch.
//! Nothing here knows devices, requests in flight or time.

mod params;

pub use params::Params;
