//! Sixteen numbers side by side: what products and attention ask of a processor, written once for each instruction set.
//! Sums of integers are exact and every float operation is the same, so all of them give the same bits.

/// Rows of a panel: the lanes.
pub(crate) const ROWS: usize = 16;
/// Inner columns that one dot product takes from each row.
pub(crate) const DEPTH: usize = 4;
/// Bytes of [`Lanes::Bytes`].
pub(crate) const LANE_BYTES: usize = ROWS * DEPTH;

/// The vectors of one instruction set, used only in code that is compiled for it.
pub(crate) trait Lanes: Copy {
    /// 16 f32.
    type Floats: Copy;
    /// 16 rows of 4 bytes.
    type Bytes: Copy;
    /// 16 i32.
    type Sums: Copy;

    fn splat(value: f32) -> Self::Floats;
    /// 16 of them.
    fn load(values: &[f32]) -> Self::Floats;
    /// 16 f16 by their bits, widened.
    fn half_words(words: &[u16]) -> Self::Floats;
    /// 16 f16, widened. `bytes`: 32.
    fn halves(bytes: &[u8]) -> Self::Floats;
    /// 16 bytes as numbers from 0 on.
    fn unsigned(bytes: &[u8]) -> Self::Floats;
    /// 16 bytes as numbers with a sign.
    fn signed(bytes: &[u8]) -> Self::Floats;
    fn multiply(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// a * b + c, rounded once.
    fn multiply_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    fn store(values: Self::Floats, out: &mut [f32]);

    /// 64 bytes.
    fn bytes(bytes: &[u8]) -> Self::Bytes;
    /// Bits 0 to 3 of each byte.
    fn low(bytes: Self::Bytes) -> Self::Bytes;
    /// Bits 4 to 7 of each byte, moved down.
    fn high(bytes: Self::Bytes) -> Self::Bytes;
    /// 16 more for each byte whose bit is set.
    fn with_fifth(bytes: Self::Bytes, bits: u64) -> Self::Bytes;
    /// Bits 2 * `INDEX` and the next of each byte of `pairs` as bits 4 and 5 of `bytes`.
    fn with_pair<const INDEX: u32>(bytes: Self::Bytes, pairs: Self::Bytes) -> Self::Bytes;

    fn no_sum() -> Self::Sums;
    /// Adds the products of each row's 4 bytes, which have no sign and are below 64 unless `wide`, with the 4 signed bytes of
    /// `x`, of which none is -128.
    fn dot(sum: Self::Sums, bytes: Self::Bytes, x: i32, wide: bool) -> Self::Sums;
    fn to_floats(sums: Self::Sums) -> Self::Floats;
}

/// What every processor has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

impl Lanes for Portable {
    type Floats = [f32; ROWS];
    type Bytes = [u8; LANE_BYTES];
    type Sums = [i32; ROWS];

    #[inline(always)]
    fn splat(value: f32) -> [f32; ROWS] {
        [value; ROWS]
    }

    #[inline(always)]
    fn load(values: &[f32]) -> [f32; ROWS] {
        let mut loaded = [0.0; ROWS];
        loaded.copy_from_slice(&values[..ROWS]);
        loaded
    }

    #[inline(always)]
    fn half_words(words: &[u16]) -> [f32; ROWS] {
        let mut values = [0.0; ROWS];
        for (value, word) in values.iter_mut().zip(words) {
            *value = super::panel::widen_f16(*word);
        }
        values
    }

    #[inline(always)]
    fn halves(bytes: &[u8]) -> [f32; ROWS] {
        let mut values = [0.0; ROWS];
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(2)) {
            *value = super::panel::widen_f16(u16::from_le_bytes([bytes[0], bytes[1]]));
        }
        values
    }

    #[inline(always)]
    fn unsigned(bytes: &[u8]) -> [f32; ROWS] {
        let mut values = [0.0; ROWS];
        for (value, byte) in values.iter_mut().zip(bytes) {
            *value = f32::from(*byte);
        }
        values
    }

    #[inline(always)]
    fn signed(bytes: &[u8]) -> [f32; ROWS] {
        let mut values = [0.0; ROWS];
        for (value, byte) in values.iter_mut().zip(bytes) {
            *value = f32::from(byte.cast_signed());
        }
        values
    }

    #[inline(always)]
    fn multiply(mut a: [f32; ROWS], b: [f32; ROWS]) -> [f32; ROWS] {
        for r in 0..ROWS {
            a[r] *= b[r];
        }
        a
    }

    #[inline(always)]
    fn multiply_add(a: [f32; ROWS], b: [f32; ROWS], mut c: [f32; ROWS]) -> [f32; ROWS] {
        for r in 0..ROWS {
            c[r] = a[r].mul_add(b[r], c[r]);
        }
        c
    }

    #[inline(always)]
    fn store(values: [f32; ROWS], out: &mut [f32]) {
        out[..ROWS].copy_from_slice(&values);
    }

    #[inline(always)]
    fn bytes(bytes: &[u8]) -> [u8; LANE_BYTES] {
        let mut values = [0; LANE_BYTES];
        values.copy_from_slice(&bytes[..LANE_BYTES]);
        values
    }

    #[inline(always)]
    fn low(mut bytes: [u8; LANE_BYTES]) -> [u8; LANE_BYTES] {
        for byte in &mut bytes {
            *byte &= 15;
        }
        bytes
    }

    #[inline(always)]
    fn high(mut bytes: [u8; LANE_BYTES]) -> [u8; LANE_BYTES] {
        for byte in &mut bytes {
            *byte >>= 4;
        }
        bytes
    }

    #[inline(always)]
    fn with_fifth(mut bytes: [u8; LANE_BYTES], bits: u64) -> [u8; LANE_BYTES] {
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte |= u8::from(bits >> i & 1 == 1) << 4;
        }
        bytes
    }

    #[inline(always)]
    fn with_pair<const INDEX: u32>(
        mut bytes: [u8; LANE_BYTES],
        pairs: [u8; LANE_BYTES],
    ) -> [u8; LANE_BYTES] {
        for (byte, pairs) in bytes.iter_mut().zip(pairs) {
            *byte |= (pairs >> (2 * INDEX) & 3) << 4;
        }
        bytes
    }

    #[inline(always)]
    fn no_sum() -> [i32; ROWS] {
        [0; ROWS]
    }

    #[inline(always)]
    fn dot(mut sum: [i32; ROWS], bytes: [u8; LANE_BYTES], x: i32, _: bool) -> [i32; ROWS] {
        let x = x.to_le_bytes();
        for (sum, bytes) in sum.iter_mut().zip(bytes.chunks_exact(DEPTH)) {
            for (byte, x) in bytes.iter().zip(x) {
                *sum += i32::from(*byte) * i32::from(x.cast_signed());
            }
        }
        sum
    }

    #[inline(always)]
    fn to_floats(sums: [i32; ROWS]) -> [f32; ROWS] {
        let mut values = [0.0; ROWS];
        for (value, sum) in values.iter_mut().zip(sums) {
            *value = sum as f32;
        }
        values
    }
}
