//! What the next step computes. Pure: counts and tables, never tensors, never a clock.

use crate::request::{Decoding, Request};

/// The most blocks that the request may need for one schedulable unit:
/// a beam search moves as one, the choices of a sampled request run one by one if they must.
pub fn blocks_needed(request: &Request, block_size: u32) -> usize {
    let longest = request.prompt.len() + request.max_tokens.get() as usize;
    let per_sequence = longest.div_ceil(block_size as usize);
    match &request.decoding {
        Decoding::Sample { .. } => per_sequence,
        Decoding::Beam(beam) => per_sequence * beam.width.get() as usize,
    }
}
