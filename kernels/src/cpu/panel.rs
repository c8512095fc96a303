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

/// How a panel of one dtype is read. One type a dtype, and loops rather than closures, so that each is inlined into
/// code that is compiled for the wide instructions.
pub(crate) trait Decode {
    /// The values of columns `from..from + out.len()`, multiples of the block.
    fn chunk(panel: &[u8], cols: usize, from: usize, out: &mut [Lane]);
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct BF16;
pub(crate) struct Q8;
pub(crate) struct Q4;
pub(crate) struct Q4WithMinimum;
pub(crate) struct Q5;
pub(crate) struct Q5WithMinimum;
pub(crate) struct Q4K;
pub(crate) struct Q5K;
pub(crate) struct Q6K;

impl Decode for F32 {
    #[inline(always)]
    fn chunk(panel: &[u8], _: usize, from: usize, out: &mut [Lane]) {
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

impl Decode for F16 {
    #[inline(always)]
    fn chunk(panel: &[u8], _: usize, from: usize, out: &mut [Lane]) {
        for (out, bytes) in out.iter_mut().zip(panel[from * 2 * ROWS..].chunks_exact(2 * ROWS)) {
            *out = halves(bytes);
        }
    }
}

impl Decode for BF16 {
    #[inline(always)]
    fn chunk(panel: &[u8], _: usize, from: usize, out: &mut [Lane]) {
        for (out, bytes) in out.iter_mut().zip(panel[from * 2 * ROWS..].chunks_exact(2 * ROWS)) {
            for r in 0..ROWS {
                out[r] = f32::from_bits(
                    u32::from(u16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]])) << 16,
                );
            }
        }
    }
}

/// Implements [`Decode`] for a dtype with blocks of 32: `$lane` gives row `r` of column `k` from the quants' lane `q`.
macro_rules! decode_blocks {
    ($name:ident, $dtype:expr, $bytes:literal, |$block:ident, $parts:ident| $setup:expr, |$q:ident, $k:ident, $r:ident, $with:ident| $lane:expr) => {
        impl Decode for $name {
            #[inline(always)]
            fn chunk(panel: &[u8], _: usize, from: usize, out: &mut [Lane]) {
                let $parts = Parts::of($dtype);
                let blocks = panel[from / 32 * $parts.end..].chunks_exact($parts.end);
                for ($block, out) in blocks.zip(out.chunks_exact_mut(32)) {
                    let d = halves(&$block[..2 * ROWS]);
                    let $with = $setup;
                    let quants = $block[$parts.quants..$parts.end].chunks_exact($bytes);
                    for ($k, (out, bytes)) in out.iter_mut().zip(quants).enumerate() {
                        let $q = if $bytes == ROWS { byte_lane(bytes) } else { nibble_lane(bytes) };
                        for $r in 0..ROWS {
                            out[$r] = $lane(d[$r]);
                        }
                        let _ = $k;
                    }
                }
            }
        }
    };
}

decode_blocks!(Q8, Dtype::Q8_0, 16, |block, parts| (), |q, k, r, _with| |d: f32| q[r] * d);
decode_blocks!(Q4, Dtype::Q4_0, 8, |block, parts| (), |q, k, r, _with| |d: f32| (q[r] - 8.0) * d);
decode_blocks!(
    Q4WithMinimum,
    Dtype::Q4_1,
    8,
    |block, parts| halves(&block[2 * ROWS..4 * ROWS]),
    |q, k, r, m| { |d: f32| q[r] * d + m[r] }
);
decode_blocks!(
    Q5,
    Dtype::Q5_0,
    8,
    |block, parts| fifth_masks(&block[2 * ROWS..6 * ROWS]),
    |q, k, r, fifth| { |d: f32| (q[r] + ((fifth[r] >> k & 1) << 4) as f32 - 16.0) * d }
);
decode_blocks!(
    Q5WithMinimum,
    Dtype::Q5_1,
    8,
    |block, parts| (fifth_masks(&block[4 * ROWS..8 * ROWS]), halves(&block[2 * ROWS..4 * ROWS])),
    |q, k, r, with| |d: f32| (q[r] + ((with.0[r] >> k & 1) << 4) as f32) * d + with.1[r]
);

impl Decode for Q4K {
    #[inline(always)]
    fn chunk(panel: &[u8], cols: usize, from: usize, out: &mut [Lane]) {
        super_blocks(Dtype::Q4K, panel, cols, from, out);
    }
}

impl Decode for Q5K {
    #[inline(always)]
    fn chunk(panel: &[u8], cols: usize, from: usize, out: &mut [Lane]) {
        super_blocks(Dtype::Q5K, panel, cols, from, out);
    }
}

impl Decode for Q6K {
    #[inline(always)]
    fn chunk(panel: &[u8], cols: usize, from: usize, out: &mut [Lane]) {
        super_blocks(Dtype::Q6K, panel, cols, from, out);
    }
}

/// Evaluates `$body` with `$decode` standing for the type that reads `$dtype`.
macro_rules! with_decode {
    ($dtype:expr, $decode:ident => $body:expr) => {
        match $dtype {
            $crate::cpu::Dtype::F32 => {
                type $decode = $crate::cpu::panel::F32;
                $body
            }
            $crate::cpu::Dtype::F16 => {
                type $decode = $crate::cpu::panel::F16;
                $body
            }
            $crate::cpu::Dtype::BF16 => {
                type $decode = $crate::cpu::panel::BF16;
                $body
            }
            $crate::cpu::Dtype::Q8_0 => {
                type $decode = $crate::cpu::panel::Q8;
                $body
            }
            $crate::cpu::Dtype::Q4_0 => {
                type $decode = $crate::cpu::panel::Q4;
                $body
            }
            $crate::cpu::Dtype::Q4_1 => {
                type $decode = $crate::cpu::panel::Q4WithMinimum;
                $body
            }
            $crate::cpu::Dtype::Q5_0 => {
                type $decode = $crate::cpu::panel::Q5;
                $body
            }
            $crate::cpu::Dtype::Q5_1 => {
                type $decode = $crate::cpu::panel::Q5WithMinimum;
                $body
            }
            $crate::cpu::Dtype::Q4K => {
                type $decode = $crate::cpu::panel::Q4K;
                $body
            }
            $crate::cpu::Dtype::Q5K => {
                type $decode = $crate::cpu::panel::Q5K;
                $body
            }
            $crate::cpu::Dtype::Q6K => {
                type $decode = $crate::cpu::panel::Q6K;
                $body
            }
        }
    };
}
pub(crate) use with_decode;

#[inline(always)]
fn nibble_lane(bytes: &[u8]) -> Lane {
    let mut lane = [0.0; ROWS];
    for r in 0..8 {
        lane[r] = f32::from(bytes[r] & 15);
        lane[r + 8] = f32::from(bytes[r] >> 4);
    }
    lane
}

#[inline(always)]
fn byte_lane(bytes: &[u8]) -> Lane {
    let mut lane = [0.0; ROWS];
    for r in 0..ROWS {
        lane[r] = f32::from(bytes[r % bytes.len()].cast_signed());
    }
    lane
}

#[inline(always)]
fn fifth_masks(bytes: &[u8]) -> [u32; ROWS] {
    std::array::from_fn(|r| {
        u32::from_le_bytes([bytes[4 * r], bytes[4 * r + 1], bytes[4 * r + 2], bytes[4 * r + 3]])
    })
}

/// Rows of 256-blocks are dequantized one by one and turned.
#[inline(always)]
fn super_blocks(dtype: Dtype, panel: &[u8], cols: usize, from: usize, out: &mut [Lane]) {
    let row_bytes = cols / 256 * dtype.block_bytes();
    let mut values = [0.0_f32; 256];
    for (block, out) in (from / 256..).zip(out.chunks_exact_mut(256)) {
        for r in 0..ROWS {
            let at = r * row_bytes + block * dtype.block_bytes();
            dequantize_block(dtype, &panel[at..at + dtype.block_bytes()], &mut values);
            for (out, value) in out.iter_mut().zip(values) {
                out[r] = value;
            }
        }
    }
}

/// One row of a panel.
pub(crate) fn row_of(dtype: Dtype, panel: &[u8], cols: usize, row: usize, out: &mut [f32]) {
    let mut buffer = [[0.0; ROWS]; CHUNK];
    for (index, out) in out.chunks_mut(CHUNK).enumerate() {
        let buffer = &mut buffer[..out.len()];
        with_decode!(dtype, D => D::chunk(panel, cols, index * CHUNK, buffer));
        out.iter_mut().zip(buffer).for_each(|(out, lane)| *out = lane[row]);
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
