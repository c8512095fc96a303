//! Measures servers from the outside.

mod load;
mod percentile;
mod report;
pub mod serve;
