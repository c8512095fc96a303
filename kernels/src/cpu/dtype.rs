//! How weights are stored: the GGUF block layouts, and their values.

/// The dtype of a weight matrix, with GGUF's block layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the field's standard names")]
pub enum Dtype {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
}

impl Dtype {
    /// Every dtype.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Values of one block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a matrix; `None` when `cols` is not a multiple of the block or the sizes overflow.
    pub fn bytes_for(self, rows: usize, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())?.checked_mul(rows)
    }

    /// GGUF's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }
}

/// Scale and minimum of sub-block `j` of 8, six bits each, packed in 12 bytes.
pub(crate) fn scale_and_min(j: usize, packed: &[u8]) -> [u8; 2] {
    if j < 4 {
        return [packed[j] & 63, packed[j + 4] & 63];
    }
    [packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4]
}

/// The values of blocks, as GGUF defines them: what the packed layouts are compared with.
#[cfg(test)]
pub(crate) mod plain {
    use half::{bf16, f16};

    use super::{Dtype, scale_and_min};

    fn half_at(bytes: &[u8], at: usize) -> f32 {
        f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
    }

    /// The values of one block of 256 (`block.len()` is the dtype's block bytes), or of one float.
    pub(crate) fn dequantize_block(dtype: Dtype, block: &[u8], out: &mut [f32]) {
        match dtype {
            Dtype::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            Dtype::F16 => out[0] = half_at(block, 0),
            Dtype::BF16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Dtype::Q8_0 => {
                let d = half_at(block, 0);
                out.iter_mut()
                    .zip(&block[2..])
                    .for_each(|(out, &q)| *out = f32::from(q.cast_signed()) * d);
            }
            Dtype::Q4_0 => {
                nibbles(&block[2..18], out, |q, _| (f32::from(q) - 8.0) * half_at(block, 0))
            }
            Dtype::Q4_1 => nibbles(&block[4..20], out, |q, _| {
                f32::from(q) * half_at(block, 0) + half_at(block, 2)
            }),
            Dtype::Q5_0 => {
                let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
                nibbles(&block[6..22], out, |q, i| (fifth(q, high, i) - 16.0) * half_at(block, 0));
            }
            Dtype::Q5_1 => {
                let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
                nibbles(&block[8..24], out, |q, i| {
                    fifth(q, high, i) * half_at(block, 0) + half_at(block, 2)
                });
            }
            Dtype::Q4K => q4k(block, out),
            Dtype::Q5K => q5k(block, out),
            Dtype::Q6K => q6k(block, out),
        }
    }

    /// Elements 0..16 are the low nibbles, 16..32 the high ones.
    fn nibbles(quants: &[u8], out: &mut [f32], value: impl Fn(u8, usize) -> f32) {
        for (i, &byte) in quants.iter().enumerate() {
            out[i] = value(byte & 15, i);
            out[i + 16] = value(byte >> 4, i + 16);
        }
    }

    fn fifth(nibble: u8, high: u32, index: usize) -> f32 {
        let bit = u8::from(high >> index & 1 == 1);
        f32::from(nibble | bit << 4)
    }

    fn q4k(block: &[u8], out: &mut [f32]) {
        let (d, dmin) = (half_at(block, 0), half_at(block, 2));
        let (scales, quants) = (&block[4..16], &block[16..144]);
        for pair in 0..4 {
            let [scale, min] = scale_and_min(2 * pair, scales).map(f32::from);
            let [scale_high, min_high] = scale_and_min(2 * pair + 1, scales).map(f32::from);
            for i in 0..32 {
                let byte = quants[pair * 32 + i];
                out[pair * 64 + i] = d * scale * f32::from(byte & 15) - dmin * min;
                out[pair * 64 + 32 + i] = d * scale_high * f32::from(byte >> 4) - dmin * min_high;
            }
        }
    }

    fn q5k(block: &[u8], out: &mut [f32]) {
        let (d, dmin) = (half_at(block, 0), half_at(block, 2));
        let (scales, high, quants) = (&block[4..16], &block[16..48], &block[48..176]);
        for pair in 0..4 {
            let [scale, min] = scale_and_min(2 * pair, scales).map(f32::from);
            let [scale_high, min_high] = scale_and_min(2 * pair + 1, scales).map(f32::from);
            for i in 0..32 {
                let byte = quants[pair * 32 + i];
                let low = byte & 15 | (high[i] >> (2 * pair) & 1) << 4;
                let upper = byte >> 4 | (high[i] >> (2 * pair + 1) & 1) << 4;
                out[pair * 64 + i] = d * scale * f32::from(low) - dmin * min;
                out[pair * 64 + 32 + i] = d * scale_high * f32::from(upper) - dmin * min_high;
            }
        }
    }

    fn q6k(block: &[u8], out: &mut [f32]) {
        let (low, high, scales, d) =
            (&block[..128], &block[128..192], &block[192..208], half_at(block, 208));
        for half in 0..2 {
            for i in 0..32 {
                let bits = high[half * 32 + i];
                let quarters = [
                    low[half * 64 + i] & 15 | (bits & 3) << 4,
                    low[half * 64 + 32 + i] & 15 | (bits >> 2 & 3) << 4,
                    low[half * 64 + i] >> 4 | (bits >> 4 & 3) << 4,
                    low[half * 64 + 32 + i] >> 4 | (bits >> 6) << 4,
                ];
                for (quarter, q) in quarters.into_iter().enumerate() {
                    let scale = f32::from(scales[half * 8 + quarter * 2 + i / 16].cast_signed());
                    out[half * 128 + quarter * 32 + i] = d * scale * (f32::from(q) - 32.0);
                }
            }
        }
    }
}
