//! The forward pass: configuration, weights, layers, and the batch it computes.

pub mod batch;
pub mod text;
pub mod weights;
