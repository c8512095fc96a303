//! The forward pass: configuration, weights, layers, and the batch it computes.

pub mod batch;
pub mod config;
mod error;
pub mod files;
mod keys;
pub mod layer;
mod opened;
pub mod rope;
pub mod text;
pub mod weights;

pub use error::ModelError;
pub use opened::{LoadFormat, Opened, WeightDtype, dummy_weights};
