//! [`Lanes`] of AVX2 (two registers of 8 rows) and of AVX-512 with VNNI (one of 16).

#[allow(clippy::wildcard_imports, reason = "fifty names that only repeat those below")]
use std::arch::x86_64::*;

use super::lanes::{LANE_BYTES, Lanes, ROWS};

/// AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2;

/// AVX-512 F, BW, VL, DQ and VNNI.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512;

/// Runs intrinsics.
macro_rules! intrinsics {
    ($($body:tt)*) => {
        // SAFETY: these types are named only by code that is compiled for, and runs after a look for, their instructions;
        // pointers come from slices whose length was checked just before.
        unsafe { $($body)* }
    };
}

impl Lanes for Avx512 {
    type Floats = __m512;
    type Bytes = __m512i;
    type Sums = __m512i;

    #[inline(always)]
    fn splat(value: f32) -> __m512 {
        intrinsics!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn load(values: &[f32]) -> __m512 {
        let values = &values[..ROWS];
        intrinsics!(_mm512_loadu_ps(values.as_ptr()))
    }

    #[inline(always)]
    fn half_words(words: &[u16]) -> __m512 {
        let words = &words[..ROWS];
        intrinsics!(_mm512_cvtph_ps(_mm256_loadu_si256(words.as_ptr().cast())))
    }

    #[inline(always)]
    fn halves(bytes: &[u8]) -> __m512 {
        let bytes = &bytes[..2 * ROWS];
        intrinsics!(_mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())))
    }

    #[inline(always)]
    fn unsigned(bytes: &[u8]) -> __m512 {
        let bytes = &bytes[..ROWS];
        intrinsics!(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(
            bytes.as_ptr().cast()
        ))))
    }

    #[inline(always)]
    fn signed(bytes: &[u8]) -> __m512 {
        let bytes = &bytes[..ROWS];
        intrinsics!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
            bytes.as_ptr().cast()
        ))))
    }

    #[inline(always)]
    fn multiply(a: __m512, b: __m512) -> __m512 {
        intrinsics!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        intrinsics!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn store(values: __m512, out: &mut [f32]) {
        let out = &mut out[..ROWS];
        intrinsics!(_mm512_storeu_ps(out.as_mut_ptr(), values));
    }

    #[inline(always)]
    fn bytes(bytes: &[u8]) -> __m512i {
        let bytes = &bytes[..LANE_BYTES];
        intrinsics!(_mm512_loadu_si512(bytes.as_ptr().cast()))
    }

    #[inline(always)]
    fn low(bytes: __m512i) -> __m512i {
        intrinsics!(_mm512_and_si512(bytes, _mm512_set1_epi8(15)))
    }

    #[inline(always)]
    fn high(bytes: __m512i) -> __m512i {
        Self::low(intrinsics!(_mm512_srli_epi16::<4>(bytes)))
    }

    #[inline(always)]
    fn with_fifth(bytes: __m512i, bits: u64) -> __m512i {
        intrinsics!(_mm512_mask_add_epi8(bytes, bits, bytes, _mm512_set1_epi8(16)))
    }

    #[inline(always)]
    fn with_pair<const INDEX: u32>(bytes: __m512i, pairs: __m512i) -> __m512i {
        intrinsics! {
            let moved = match INDEX {
                0 => _mm512_slli_epi16::<4>(pairs),
                1 => _mm512_slli_epi16::<2>(pairs),
                2 => pairs,
                _ => _mm512_srli_epi16::<2>(pairs),
            };
            _mm512_or_si512(bytes, _mm512_and_si512(moved, _mm512_set1_epi8(0x30)))
        }
    }

    #[inline(always)]
    fn no_sum() -> __m512i {
        intrinsics!(_mm512_setzero_si512())
    }

    #[inline(always)]
    fn dot(sum: __m512i, bytes: __m512i, x: i32, _: bool) -> __m512i {
        intrinsics!(_mm512_dpbusd_epi32(sum, bytes, _mm512_set1_epi32(x)))
    }

    #[inline(always)]
    fn to_floats(sums: __m512i) -> __m512 {
        intrinsics!(_mm512_cvtepi32_ps(sums))
    }
}

impl Lanes for Avx2 {
    type Floats = [__m256; 2];
    type Bytes = [__m256i; 2];
    type Sums = [__m256i; 2];

    #[inline(always)]
    fn splat(value: f32) -> [__m256; 2] {
        [intrinsics!(_mm256_set1_ps(value)); 2]
    }

    #[inline(always)]
    fn load(values: &[f32]) -> [__m256; 2] {
        let (low, high) = values[..ROWS].split_at(ROWS / 2);
        intrinsics!([_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())])
    }

    #[inline(always)]
    fn half_words(words: &[u16]) -> [__m256; 2] {
        let (low, high) = words[..ROWS].split_at(ROWS / 2);
        intrinsics!([
            _mm256_cvtph_ps(_mm_loadu_si128(low.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(high.as_ptr().cast())),
        ])
    }

    #[inline(always)]
    fn halves(bytes: &[u8]) -> [__m256; 2] {
        let (low, high) = bytes[..2 * ROWS].split_at(ROWS);
        intrinsics!([
            _mm256_cvtph_ps(_mm_loadu_si128(low.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(high.as_ptr().cast())),
        ])
    }

    #[inline(always)]
    fn unsigned(bytes: &[u8]) -> [__m256; 2] {
        let (low, high) = bytes[..ROWS].split_at(ROWS / 2);
        intrinsics!([
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(low.as_ptr().cast()))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(high.as_ptr().cast()))),
        ])
    }

    #[inline(always)]
    fn signed(bytes: &[u8]) -> [__m256; 2] {
        let (low, high) = bytes[..ROWS].split_at(ROWS / 2);
        intrinsics!([
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(low.as_ptr().cast()))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(high.as_ptr().cast()))),
        ])
    }

    #[inline(always)]
    fn multiply(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        intrinsics!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn multiply_add(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        intrinsics!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn store(values: [__m256; 2], out: &mut [f32]) {
        let (low, high) = out[..ROWS].split_at_mut(ROWS / 2);
        intrinsics! {
            _mm256_storeu_ps(low.as_mut_ptr(), values[0]);
            _mm256_storeu_ps(high.as_mut_ptr(), values[1]);
        }
    }

    #[inline(always)]
    fn bytes(bytes: &[u8]) -> [__m256i; 2] {
        let (low, high) = bytes[..LANE_BYTES].split_at(LANE_BYTES / 2);
        intrinsics!([
            _mm256_loadu_si256(low.as_ptr().cast()),
            _mm256_loadu_si256(high.as_ptr().cast()),
        ])
    }

    #[inline(always)]
    fn low(bytes: [__m256i; 2]) -> [__m256i; 2] {
        intrinsics! {
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(bytes[0], mask), _mm256_and_si256(bytes[1], mask)]
        }
    }

    #[inline(always)]
    fn high(bytes: [__m256i; 2]) -> [__m256i; 2] {
        Self::low(intrinsics!([_mm256_srli_epi16::<4>(bytes[0]), _mm256_srli_epi16::<4>(bytes[1])]))
    }

    #[inline(always)]
    fn with_fifth(bytes: [__m256i; 2], bits: u64) -> [__m256i; 2] {
        intrinsics!([fifth::<0>(bytes[0], bits), fifth::<4>(bytes[1], bits)])
    }

    #[inline(always)]
    fn with_pair<const INDEX: u32>(bytes: [__m256i; 2], pairs: [__m256i; 2]) -> [__m256i; 2] {
        intrinsics!([pair::<INDEX>(bytes[0], pairs[0]), pair::<INDEX>(bytes[1], pairs[1])])
    }

    #[inline(always)]
    fn no_sum() -> [__m256i; 2] {
        [intrinsics!(_mm256_setzero_si256()); 2]
    }

    #[inline(always)]
    fn dot(sum: [__m256i; 2], bytes: [__m256i; 2], x: i32, wide: bool) -> [__m256i; 2] {
        intrinsics! {
            let x = _mm256_set1_epi32(x);
            [
                _mm256_add_epi32(sum[0], four(bytes[0], x, wide)),
                _mm256_add_epi32(sum[1], four(bytes[1], x, wide)),
            ]
        }
    }

    #[inline(always)]
    fn to_floats(sums: [__m256i; 2]) -> [__m256; 2] {
        intrinsics!([_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])])
    }
}

/// Sums of 4 products. A byte's upper bit is taken apart: with it two products would not fit in the 16 bits between.
#[inline]
#[target_feature(enable = "avx2")]
fn four(bytes: __m256i, x: __m256i, wide: bool) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    if !wide {
        return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, x), ones);
    }
    let low = _mm256_maddubs_epi16(_mm256_and_si256(bytes, _mm256_set1_epi8(127)), x);
    let upper = _mm256_and_si256(_mm256_srli_epi16::<7>(bytes), _mm256_set1_epi8(1));
    let upper = _mm256_madd_epi16(_mm256_maddubs_epi16(upper, x), ones);
    _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_slli_epi32::<7>(upper))
}

/// 16 more for each byte whose bit is set, from byte `FROM` of `bits` on.
#[inline]
#[target_feature(enable = "avx2")]
fn fifth<const FROM: i64>(bytes: __m256i, bits: u64) -> __m256i {
    // Each byte takes the byte of `bits` that holds its bit, then looks at that bit.
    const EACH: i64 = 0x0101_0101_0101_0101;
    let spread =
        _mm256_setr_epi64x(FROM * EACH, (FROM + 1) * EACH, (FROM + 2) * EACH, (FROM + 3) * EACH);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
    let spread = _mm256_shuffle_epi8(_mm256_set1_epi64x(bits.cast_signed()), spread);
    let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    _mm256_or_si256(bytes, _mm256_and_si256(is_set, _mm256_set1_epi8(16)))
}

/// Two bits of `pairs` as bits 4 and 5.
#[inline]
#[target_feature(enable = "avx2")]
fn pair<const INDEX: u32>(bytes: __m256i, pairs: __m256i) -> __m256i {
    let moved = match INDEX {
        0 => _mm256_slli_epi16::<4>(pairs),
        1 => _mm256_slli_epi16::<2>(pairs),
        2 => pairs,
        _ => _mm256_srli_epi16::<2>(pairs),
    };
    _mm256_or_si256(bytes, _mm256_and_si256(moved, _mm256_set1_epi8(0x30)))
}
