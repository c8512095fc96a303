//! The packed layout: 16 rows side by side, so that one instruction works on 16 outputs.
//!
//! Floats: [panel][k][16]. Quantized: [panel][head]{what the 16 rows' blocks are scaled with, blocks of 32 columns}, as the
//! formats of [`super::quantized`] read them; quants lie in groups of 4 columns, [group][16 rows][4], without sign.
//! Sizes are the source's (rows rounded up to 16), but for the 6-bit scales of Q4_K and Q5_K, which take a byte each.

#[cfg(test)]
use half::{bf16, f16};

use super::dtype::{Dtype, scale_and_min};
use super::lanes::{LANE_BYTES, Portable, ROWS};
use super::quantized::{Format, with_format};

/// Columns that are widened at once: a buffer that fits the first cache.
pub(crate) const CHUNK: usize = 256;

/// The values of one column of a panel.
pub(crate) type Lane = [f32; ROWS];

/// Bytes of one panel; `None` when `cols` is not a multiple of the block or the sizes overflow.
pub(crate) fn panel_bytes(dtype: Dtype, cols: usize) -> Option<usize> {
    let floats = dtype.bytes_for(ROWS, cols)?;
    let quantized = with_format!(dtype, F => (cols / F::COLUMNS).checked_mul(F::BYTES)?);
    Some(quantized.unwrap_or(floats))
}

/// Packs up to 16 source rows (missing ones are zero bytes, which are zero values after a zero scale).
pub(crate) fn pack(dtype: Dtype, rows: &[Option<&[u8]>; ROWS], packed: &mut [u8]) {
    let quantized = with_format!(dtype, F => pack_quantized::<F>(dtype, rows, packed));
    if quantized.is_none() {
        pack_floats(dtype.block_bytes(), rows, packed);
    }
}

fn pack_floats(width: usize, rows: &[Option<&[u8]>; ROWS], packed: &mut [u8]) {
    for (k, column) in packed.chunks_exact_mut(width * ROWS).enumerate() {
        for (row, place) in rows.iter().zip(column.chunks_exact_mut(width)) {
            if let Some(row) = row {
                place.copy_from_slice(&row[k * width..(k + 1) * width]);
            }
        }
    }
}

fn pack_quantized<F: Format>(dtype: Dtype, rows: &[Option<&[u8]>; ROWS], packed: &mut [u8]) {
    let bytes = dtype.block_bytes();
    let heads = packed.chunks_exact_mut(F::BYTES);
    for (index, head) in heads.enumerate() {
        let (head, blocks) = head.split_at_mut(F::HEAD);
        for (r, row) in rows.iter().enumerate() {
            let Some(row) = row else { continue };
            let source = &row[index * bytes..(index + 1) * bytes];
            let halves = Source { dtype, bytes: source }.halves();
            for (place, half) in head.chunks_exact_mut(2 * ROWS).zip(halves.chunks_exact(2)) {
                place[2 * r..2 * r + 2].copy_from_slice(half);
            }
            for (sub, block) in blocks.chunks_exact_mut(F::BLOCK).enumerate() {
                pack_block(Source { dtype, bytes: source }, sub, r, block);
            }
        }
    }
}

/// A block of a row as GGUF has it.
#[derive(Debug, Clone, Copy)]
struct Source<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
}

impl<'a> Source<'a> {
    /// The f16 that scale the block, two bytes each.
    fn halves(self) -> &'a [u8] {
        match self.dtype {
            Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => &self.bytes[..4],
            Dtype::Q6K => &self.bytes[208..],
            _ => &self.bytes[..2],
        }
    }

    /// The bytes that scale 32 columns: scale and minimum, or the scales of their halves.
    fn scales(self, sub: usize) -> Option<[u8; 2]> {
        match self.dtype {
            Dtype::Q4K | Dtype::Q5K => Some(scale_and_min(sub, &self.bytes[4..16])),
            Dtype::Q6K => Some([self.bytes[192 + 2 * sub], self.bytes[193 + 2 * sub]]),
            _ => None,
        }
    }

    /// 32 quants from number 32 * `sub` on, counted from the smallest that there can be.
    fn quants(self, sub: usize) -> [u8; 32] {
        std::array::from_fn(|i| self.quant(sub, i))
    }

    fn quant(self, sub: usize, i: usize) -> u8 {
        let bytes = self.bytes;
        // Q4_K and Q5_K: two times 32 quants share 32 bytes, the lower half in the low nibbles.
        let of_pair = |at: usize| bytes[at + sub / 2 * 32 + i] >> (sub % 2 * 4) & 15;
        let of_block = |at: usize| bytes[at + i % 16] >> (i / 16 * 4) & 15;
        let fifth = |at: usize| (bytes[at + i / 8] >> (i % 8) & 1) << 4;
        match self.dtype {
            Dtype::Q4_0 => of_block(2),
            Dtype::Q4_1 => of_block(4),
            Dtype::Q5_0 => of_block(6) | fifth(2),
            Dtype::Q5_1 => of_block(8) | fifth(4),
            Dtype::Q4K => of_pair(16),
            Dtype::Q5K => of_pair(48) | (bytes[16 + i] >> sub & 1) << 4,
            Dtype::Q6K => {
                let (half, quarter) = (sub / 4, sub % 4);
                let low = bytes[half * 64 + quarter % 2 * 32 + i] >> (quarter / 2 * 4) & 15;
                low | (bytes[128 + half * 32 + i] >> (2 * quarter) & 3) << 4
            }
            // Q8_0: a signed byte plus 128.
            _ => bytes[2 + i] ^ 128,
        }
    }
}

/// Writes 32 columns of row `r`: [scales][fifth bits][nibbles][pairs of further bits], or bytes.
fn pack_block(source: Source<'_>, sub: usize, r: usize, block: &mut [u8]) {
    let quants = source.quants(sub);
    let mut rest = block;
    if let Some(scales) = source.scales(sub) {
        let (place, others) = rest.split_at_mut(2 * ROWS);
        (place[r], place[ROWS + r]) = (scales[0], scales[1]);
        rest = others;
    }
    if matches!(source.dtype, Dtype::Q5_0 | Dtype::Q5_1 | Dtype::Q5K) {
        let (place, others) = rest.split_at_mut(LANE_BYTES);
        for (i, quant) in quants.iter().enumerate() {
            let bit = r * 4 + i % 4;
            place[i / 4 * 8 + bit / 8] |= (quant >> 4) << (bit % 8);
        }
        rest = others;
    }
    if source.dtype == Dtype::Q8_0 {
        for (i, quant) in quants.into_iter().enumerate() {
            rest[i / 4 * LANE_BYTES + r * 4 + i % 4] = quant;
        }
        return;
    }
    let (nibbles, pairs) = rest.split_at_mut(4 * LANE_BYTES);
    for (i, quant) in quants.into_iter().enumerate() {
        let (group, at) = (i / 4, r * 4 + i % 4);
        nibbles[group % 4 * LANE_BYTES + at] |= (quant & 15) << (group / 4 * 4);
        if source.dtype == Dtype::Q6K {
            pairs[group / 4 * LANE_BYTES + at] |= (quant >> 4) << (group % 4 * 2);
        }
    }
}

#[inline(always)]
fn halves(bytes: &[u8]) -> Lane {
    std::array::from_fn(|r| widen_f16(u16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]])))
}

/// f16 to f32 without a branch, so that 16 of them are one vector (subnormals and infinities included).
#[inline(always)]
pub(crate) fn widen_f16(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let (sign, rest) = ((bits & 0x8000) << 16, bits & 0x7fff);
    // The exponent is biased by 15 in one and 127 in the other; a product with 2^112 moves it, subnormals too.
    let moved = f32::from_bits(rest << 13) * f32::from_bits(0x7780_0000);
    let value = if rest >= 0x7c00 { rest << 13 | 0x7f80_0000 } else { moved.to_bits() };
    f32::from_bits(value | sign)
}

/// How a panel of floats is read. One type a dtype, and loops rather than closures, so that each is inlined into code that is
/// compiled for the wide instructions.
pub(crate) trait Widen {
    /// The values of columns `from..from + out.len()`.
    fn chunk(panel: &[u8], from: usize, out: &mut [Lane]);
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct BF16;

impl Widen for F32 {
    #[inline(always)]
    fn chunk(panel: &[u8], from: usize, out: &mut [Lane]) {
        for (out, bytes) in out.iter_mut().zip(panel[from * 4 * ROWS..].chunks_exact(4 * ROWS)) {
            for r in 0..ROWS {
                out[r] = f32::from_le_bytes([
                    bytes[4 * r],
                    bytes[4 * r + 1],
                    bytes[4 * r + 2],
                    bytes[4 * r + 3],
                ]);
            }
        }
    }
}

impl Widen for F16 {
    #[inline(always)]
    fn chunk(panel: &[u8], from: usize, out: &mut [Lane]) {
        for (out, bytes) in out.iter_mut().zip(panel[from * 2 * ROWS..].chunks_exact(2 * ROWS)) {
            *out = halves(bytes);
        }
    }
}

impl Widen for BF16 {
    #[inline(always)]
    fn chunk(panel: &[u8], from: usize, out: &mut [Lane]) {
        for (out, bytes) in out.iter_mut().zip(panel[from * 2 * ROWS..].chunks_exact(2 * ROWS)) {
            for r in 0..ROWS {
                out[r] = f32::from_bits(
                    u32::from(u16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]])) << 16,
                );
            }
        }
    }
}

/// One row of a panel.
pub(crate) fn row_of(dtype: Dtype, panel: &[u8], row: usize, out: &mut [f32]) {
    let quantized = with_format!(dtype, F => quantized_row::<F>(panel, row, out));
    if quantized.is_some() {
        return;
    }
    let mut buffer = [[0.0; ROWS]; CHUNK];
    for (index, out) in out.chunks_mut(CHUNK).enumerate() {
        let buffer = &mut buffer[..out.len()];
        widen(dtype, panel, index * CHUNK, buffer);
        out.iter_mut().zip(buffer).for_each(|(out, lane)| *out = lane[row]);
    }
}

/// The values of columns `from..from + out.len()` of a panel of floats.
#[inline(always)]
pub(crate) fn widen(dtype: Dtype, panel: &[u8], from: usize, out: &mut [Lane]) {
    match dtype {
        Dtype::F16 => F16::chunk(panel, from, out),
        Dtype::BF16 => BF16::chunk(panel, from, out),
        _ => F32::chunk(panel, from, out),
    }
}

fn quantized_row<F: Format>(panel: &[u8], row: usize, out: &mut [f32]) {
    let heads = panel.chunks_exact(F::BYTES);
    for (head, out) in heads.zip(out.chunks_exact_mut(F::COLUMNS)) {
        let (head, blocks) = head.split_at(F::HEAD);
        for (block, out) in blocks.chunks_exact(F::BLOCK).zip(out.chunks_exact_mut(32)) {
            let weights = F::read::<Portable>(head, block);
            for (k, out) in out.iter_mut().enumerate() {
                let quant = f32::from(weights.quants[k / 4][row * 4 + k % 4]);
                *out = quant * weights.scale[k / 16][row] + weights.offset[k / 16][row];
            }
        }
    }
}

/// A check that the compiler's conversions agree with ours.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_as_the_library_says() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (widen_f16(bits), f16::from_bits(bits).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()),
                "{bits:#x}"
            );
        }
        assert_eq!(bf16::from_f32(1.5).to_f32(), 1.5);
    }
}
