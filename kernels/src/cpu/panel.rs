//! The packed layout: 16 rows side by side, so that one instruction works on 16 outputs.
//!
//! Floats: [panel][k][16]. Blocks of 32: [panel][block]{16 scales, 16 minima, 16 fifth-bit masks, 32 x 16 quants}, the
//! 4-bit quants of rows r and r + 8 in one byte. Blocks of 256: [panel][16] rows as they come.
//! Every layout has the source's size (rows rounded up to 16).

#[cfg(test)]
use half::{bf16, f16};

use super::dtype::{Dtype, dequantize_block};

/// Rows of a panel.
pub(crate) const ROWS: usize = 16;
/// Columns that are dequantized at once: a multiple of every block, and a buffer that fits the first cache.
pub(crate) const CHUNK: usize = 256;

/// The values of one column of a panel.
pub(crate) type Lane = [f32; ROWS];

/// Where the parts of a 32-block of a panel begin. Bytes.
#[derive(Debug, Clone, Copy)]
struct Parts {
    minima: Option<usize>,
    fifth: Option<usize>,
    quants: usize,
    end: usize,
}

impl Parts {
    fn of(dtype: Dtype) -> Self {
        let halves = ROWS * 2;
        let (minima, fifth) = match dtype {
            Dtype::Q4_1 => (Some(halves), None),
            Dtype::Q5_0 => (None, Some(halves)),
            Dtype::Q5_1 => (Some(halves), Some(2 * halves)),
            _ => (None, None),
        };
        let quants = halves + minima.map_or(0, |_| halves) + fifth.map_or(0, |_| ROWS * 4);
        let end = quants + if dtype == Dtype::Q8_0 { 32 * ROWS } else { 32 * ROWS / 2 };
        Self { minima, fifth, quants, end }
    }
}

/// Bytes of one panel.
pub(crate) fn panel_bytes(dtype: Dtype, cols: usize) -> Option<usize> {
    dtype.bytes_for(ROWS, cols)
}

/// Packs up to 16 source rows (missing ones are zero bytes, which are zero values after a zero scale).
pub(crate) fn pack(dtype: Dtype, rows: &[Option<&[u8]>; ROWS], packed: &mut [u8]) {
    match dtype.block_len() {
        1 => pack_floats(dtype.block_bytes(), rows, packed),
        32 => pack_blocks(dtype, rows, packed),
        _ => {
            let bytes = packed.len() / ROWS;
            for (row, place) in rows.iter().zip(packed.chunks_exact_mut(bytes)) {
                if let Some(row) = row {
                    place.copy_from_slice(row);
                }
            }
        }
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

fn pack_blocks(dtype: Dtype, rows: &[Option<&[u8]>; ROWS], packed: &mut [u8]) {
    let parts = Parts::of(dtype);
    let bytes = dtype.block_bytes();
    for (index, block) in packed.chunks_exact_mut(parts.end).enumerate() {
        for (r, row) in rows.iter().enumerate() {
            let Some(row) = row else { continue };
            let source = &row[index * bytes..(index + 1) * bytes];
            block[2 * r..2 * r + 2].copy_from_slice(&source[..2]);
            let mut at = 2;
            if let Some(minima) = parts.minima {
                block[minima + 2 * r..minima + 2 * r + 2].copy_from_slice(&source[at..at + 2]);
                at += 2;
            }
            if let Some(fifth) = parts.fifth {
                block[fifth + 4 * r..fifth + 4 * r + 4].copy_from_slice(&source[at..at + 4]);
                at += 4;
            }
            pack_quants(dtype, r, &source[at..], &mut block[parts.quants..]);
        }
    }
}

fn pack_quants(dtype: Dtype, r: usize, source: &[u8], quants: &mut [u8]) {
    for k in 0..32 {
        if dtype == Dtype::Q8_0 {
            quants[k * ROWS + r] = source[k];
        } else {
            let nibble = if k < 16 { source[k] & 15 } else { source[k - 16] >> 4 };
            quants[k * 8 + r % 8] |= nibble << (r / 8 * 4);
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

/// Calls `column(k, values)` for every column `k` of `from..to` (multiples of the block, at most [`CHUNK`] apart).
#[inline(always)]
pub(crate) fn columns(dtype: Dtype, panel: &[u8], cols: usize, from: usize, to: usize, mut column: impl FnMut(usize, &Lane)) {
    match dtype {
        Dtype::F32 => {
            for k in from..to {
                let bytes = &panel[k * 4 * ROWS..][..4 * ROWS];
                let at = |r: usize| f32::from_le_bytes([bytes[4 * r], bytes[4 * r + 1], bytes[4 * r + 2], bytes[4 * r + 3]]);
                column(k, &std::array::from_fn(at));
            }
        }
        Dtype::F16 => (from..to).for_each(|k| column(k, &halves(&panel[k * 2 * ROWS..][..2 * ROWS]))),
        Dtype::BF16 => {
            for k in from..to {
                let bytes = &panel[k * 2 * ROWS..][..2 * ROWS];
                let at = |r: usize| f32::from_bits(u32::from(u16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]])) << 16);
                column(k, &std::array::from_fn(at));
            }
        }
        Dtype::Q8_0 => blocks(panel, dtype, from, to, |block, parts, k0| {
            let d = halves(&block[..2 * ROWS]);
            for (k, q) in (k0..).zip(block[parts.quants..parts.end].chunks_exact(ROWS)) {
                column(k, &std::array::from_fn(|r| f32::from(q[r].cast_signed()) * d[r]));
            }
        }),
        Dtype::Q4_0 => blocks(panel, dtype, from, to, |block, parts, k0| {
            let d = halves(&block[..2 * ROWS]);
            for (k, q) in (k0..).zip(block[parts.quants..parts.end].chunks_exact(8)) {
                let q = nibble_lane(q);
                column(k, &std::array::from_fn(|r| (q[r] - 8.0) * d[r]));
            }
        }),
        Dtype::Q4_1 => blocks(panel, dtype, from, to, |block, parts, k0| {
            let (d, m) = (halves(&block[..2 * ROWS]), halves(&block[2 * ROWS..4 * ROWS]));
            for (k, q) in (k0..).zip(block[parts.quants..parts.end].chunks_exact(8)) {
                let q = nibble_lane(q);
                column(k, &std::array::from_fn(|r| q[r] * d[r] + m[r]));
            }
        }),
        Dtype::Q5_0 | Dtype::Q5_1 => blocks(panel, dtype, from, to, |block, parts, k0| {
            let d = halves(&block[..2 * ROWS]);
            let m = parts.minima.map(|at| halves(&block[at..at + 2 * ROWS]));
            let fifth = fifth_masks(&block[parts.fifth.unwrap_or(0)..]);
            for (i, q) in block[parts.quants..parts.end].chunks_exact(8).enumerate() {
                let q = nibble_lane(q);
                let q: Lane = std::array::from_fn(|r| q[r] + if fifth[r] >> i & 1 == 1 { 16.0 } else { 0.0 });
                match &m {
                    None => column(k0 + i, &std::array::from_fn(|r| (q[r] - 16.0) * d[r])),
                    Some(m) => column(k0 + i, &std::array::from_fn(|r| q[r] * d[r] + m[r])),
                }
            }
        }),
        Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => super_blocks(dtype, panel, cols, from, to, column),
    }
}

#[inline(always)]
fn blocks(panel: &[u8], dtype: Dtype, from: usize, to: usize, mut each: impl FnMut(&[u8], Parts, usize)) {
    let parts = Parts::of(dtype);
    for index in from / 32..to / 32 {
        each(&panel[index * parts.end..][..parts.end], parts, index * 32);
    }
}

#[inline(always)]
fn nibble_lane(bytes: &[u8]) -> Lane {
    let bytes: [u8; 8] = std::array::from_fn(|r| bytes[r]);
    std::array::from_fn(|r| {
        let nibble = if r < 8 { bytes[r % 8] & 15 } else { bytes[r % 8] >> 4 };
        f32::from(nibble)
    })
}

fn fifth_masks(bytes: &[u8]) -> [u32; ROWS] {
    std::array::from_fn(|r| u32::from_le_bytes([bytes[4 * r], bytes[4 * r + 1], bytes[4 * r + 2], bytes[4 * r + 3]]))
}

/// Rows of 256-blocks are dequantized one by one and turned.
#[inline(always)]
fn super_blocks(dtype: Dtype, panel: &[u8], cols: usize, from: usize, to: usize, mut column: impl FnMut(usize, &Lane)) {
    let row_bytes = cols / 256 * dtype.block_bytes();
    let mut values = [[0.0_f32; 256]; ROWS];
    for block in from / 256..to.div_ceil(256) {
        for (r, values) in values.iter_mut().enumerate() {
            let at = r * row_bytes + block * dtype.block_bytes();
            dequantize_block(dtype, &panel[at..at + dtype.block_bytes()], values);
        }
        for k in 0..256 {
            column(block * 256 + k, &std::array::from_fn(|r| values[r][k]));
        }
    }
}

/// One row of a panel.
pub(crate) fn row_of(dtype: Dtype, panel: &[u8], cols: usize, row: usize, out: &mut [f32]) {
    for from in (0..cols).step_by(CHUNK) {
        columns(dtype, panel, cols, from, cols.min(from + CHUNK), |k, values| out[k] = values[row]);
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
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{bits:#x}");
        }
        assert_eq!(bf16::from_f32(1.5).to_f32(), 1.5);
    }
}
