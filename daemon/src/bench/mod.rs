//! Measures: servers from the outside, the engine and its memory from the inside.

mod load;
mod made_up;
pub mod memory;
mod model;
mod percentile;
mod plot;
mod report;
pub mod serve;
mod stepped;
pub mod sweep;
mod table;
