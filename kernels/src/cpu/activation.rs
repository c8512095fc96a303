//! A batch as the quantized product takes it: 8 bits a value, one scale for 32 values of a row, as GGUF's Q8_1 has it.

use rayon::prelude::*;

use super::instructions::dispatched;

/// Rows of the batch that are side by side.
pub(crate) const TILE: usize = 16;
/// Values with one scale.
pub(crate) const BLOCK: usize = 32;
/// Values that are worth a task of their own.
const TASK: usize = 1 << 14;

/// 32 columns of 16 rows of the batch.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(crate) struct Block {
    /// [row] 32 signed bytes, 4 in each word.
    pub(crate) quants: [[i32; BLOCK / 4]; TILE],
    /// [row] what a quant is worth.
    pub(crate) scale: [f32; TILE],
    /// [half of the columns][row] scale times the sum of the quants.
    pub(crate) sum: [[f32; TILE]; 2],
    /// [row] that of both halves.
    pub(crate) total: [f32; TILE],
}

impl Block {
    const EMPTY: Self = Self {
        quants: [[0; BLOCK / 4]; TILE],
        scale: [0.0; TILE],
        sum: [[0.0; TILE]; 2],
        total: [0.0; TILE],
    };
}

/// Quantized rows. Owns their memory, which is kept from one batch to the next.
#[derive(Debug, Default)]
pub(crate) struct Quantized {
    /// [tile of rows][cols / 32]
    blocks: Vec<Block>,
}

impl Quantized {
    /// Quantizes `x`: [m, cols], cols a multiple of 32. The result depends on each row alone.
    pub(crate) fn fill(&mut self, x: &[f32], cols: usize) {
        let blocks = (cols / BLOCK).max(1);
        let tiles = (x.len() / cols.max(1)).div_ceil(TILE);
        // What a larger batch has left is written over, not cleared.
        if self.blocks.len() < tiles * blocks {
            self.blocks.resize(tiles * blocks, Block::EMPTY);
        }
        let tiles = self.blocks.par_chunks_exact_mut(blocks).with_min_len(TASK / cols + 1);
        tiles.zip(x.par_chunks(TILE * cols)).for_each(|(tile, x)| quantize_tile(x, cols, tile));
    }

    /// The blocks of 16 rows each: [cols / 32]. Those behind the batch are an earlier one's.
    pub(crate) fn tiles(&self, cols: usize) -> impl Iterator<Item = &[Block]> {
        self.blocks.chunks_exact((cols / BLOCK).max(1))
    }
}

dispatched! {
    /// `x`: up to 16 rows of `cols` values.
    fn quantize_tile(x: &[f32], cols: usize, tile: &mut [Block]) => quantize_tile_body
}

#[inline(always)]
fn quantize_tile_body(x: &[f32], cols: usize, tile: &mut [Block]) {
    for (row, x) in x.chunks_exact(cols).enumerate() {
        for (x, block) in x.chunks_exact(BLOCK).zip(tile.iter_mut()) {
            quantize(x, row, block);
        }
    }
}

/// The largest magnitude, by 16 lanes; NaN where there is one. Without their sign floats have the order of their bits.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let mut lanes = [0_u32; BLOCK / 2];
    for x in x.chunks_exact(BLOCK / 2) {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = (*lane).max(x.abs().to_bits());
        }
    }
    let mut most = 0;
    for lane in lanes {
        most = most.max(lane);
    }
    f32::from_bits(most)
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "clamped to 8 bits")]
fn quantize(x: &[f32], row: usize, block: &mut Block) {
    let largest = largest(x);
    let scale = largest / 127.0;
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let mut quants = [0_i8; BLOCK];
    for (quant, x) in quants.iter_mut().zip(x) {
        // At most 127, but for values so small that the inverse is infinite.
        *quant = ((x * inverse).round_ties_even() as i32).clamp(-127, 127) as i8;
    }
    for (word, quants) in block.quants[row].iter_mut().zip(quants.chunks_exact(4)) {
        let bytes = [quants[0], quants[1], quants[2], quants[3]].map(i8::cast_unsigned);
        *word = i32::from_le_bytes(bytes);
    }
    block.scale[row] = scale;
    let mut sums = [0_i32; 2];
    for (sum, quants) in sums.iter_mut().zip(quants.chunks_exact(BLOCK / 2)) {
        for quant in quants {
            *sum += i32::from(*quant);
        }
    }
    for (half, sum) in sums.into_iter().enumerate() {
        block.sum[half][row] = scale * sum as f32;
    }
    block.total[row] = scale * (sums[0] + sums[1]) as f32;
}
