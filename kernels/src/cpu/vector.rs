//! Panels dequantized with AVX2: into a buffer for a batch, and from register to register for one row, which is what
//! single-stream decoding spends its time on. The same chain of operations as the general product, so the same bits; only where AVX2 is and for the
//! dtypes that have a loop here.
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "one SAFETY comment covers a function's intrinsics"
)]

use std::arch::x86_64::{
    __m128i, __m256, _mm_and_si128, _mm_loadl_epi64, _mm_loadu_si128, _mm_set1_epi8,
    _mm_srli_epi16, _mm_srli_si128, _mm256_add_ps, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi32, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_mul_ps,
    _mm256_set1_ps, _mm256_storeu_ps, _mm256_sub_ps,
};

use super::dtype::Dtype;
use super::instructions::{InstructionSet, instruction_set};
use super::panel::{Lane, ROWS};

/// Two registers hold one value of each of the 16 rows.
type Pair = [__m256; 2];

/// Adds the products of `x`: [cols] with a panel to `sums`. `false`: there is no loop for this dtype or machine.
pub(crate) fn multiply(dtype: Dtype, panel: &[u8], x: &[f32], sums: &mut Lane) -> bool {
    if instruction_set() == InstructionSet::Portable {
        return false;
    }
    match dtype {
        // SAFETY: the processor has AVX2, FMA and F16C, `instruction_set` asked it.
        Dtype::Q4_1 => unsafe { nibbles::<64, true>(panel, x, sums) },
        // SAFETY: as above.
        Dtype::Q4_0 => unsafe { nibbles::<32, false>(panel, x, sums) },
        // SAFETY: as above.
        Dtype::Q8_0 => unsafe { bytes(panel, x, sums) },
        _ => return false,
    }
    true
}

/// The values of columns `from..from + out.len()` of a panel. `false`: there is no loop for this dtype or machine.
pub(crate) fn chunk(dtype: Dtype, panel: &[u8], from: usize, out: &mut [Lane]) -> bool {
    if instruction_set() == InstructionSet::Portable {
        return false;
    }
    match dtype {
        // SAFETY: the processor has AVX2, FMA and F16C, `instruction_set` asked it.
        Dtype::Q4_1 => unsafe { nibble_chunk::<64, true>(&panel[from / 32 * 320..], out) },
        // SAFETY: as above.
        Dtype::Q4_0 => unsafe { nibble_chunk::<32, false>(&panel[from / 32 * 288..], out) },
        // SAFETY: as above.
        Dtype::Q8_0 => unsafe { byte_chunk(&panel[from / 32 * 544..], out) },
        _ => return false,
    }
    true
}

#[target_feature(enable = "avx2,fma,f16c")]
fn nibble_chunk<const SCALES: usize, const MINIMA: bool>(panel: &[u8], out: &mut [Lane]) {
    let eight = _mm256_set1_ps(8.0);
    let mask = _mm_set1_epi8(15);
    for (block, out) in panel.chunks_exact(SCALES + 256).zip(out.chunks_exact_mut(32)) {
        let d = halves(&block[..32]);
        let m = if MINIMA { halves(&block[32..64]) } else { d };
        for (quants, out) in block[SCALES..].chunks_exact(8).zip(out) {
            // SAFETY: the chunk has 8 bytes.
            let packed = unsafe { _mm_loadl_epi64(quants.as_ptr().cast::<__m128i>()) };
            let nibbles =
                [_mm_and_si128(packed, mask), _mm_and_si128(_mm_srli_epi16::<4>(packed), mask)];
            let mut values = d;
            for i in 0..2 {
                let q = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(nibbles[i]));
                values[i] = if MINIMA {
                    _mm256_add_ps(_mm256_mul_ps(q, d[i]), m[i])
                } else {
                    _mm256_mul_ps(_mm256_sub_ps(q, eight), d[i])
                };
            }
            store(values, out);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn byte_chunk(panel: &[u8], out: &mut [Lane]) {
    for (block, out) in panel.chunks_exact(32 + 512).zip(out.chunks_exact_mut(32)) {
        let d = halves(&block[..32]);
        for (quants, out) in block[32..].chunks_exact(ROWS).zip(out) {
            // SAFETY: the chunk has 16 bytes.
            let quants = unsafe { _mm_loadu_si128(quants.as_ptr().cast::<__m128i>()) };
            let low = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(quants)), d[0]);
            let upper = _mm_srli_si128::<8>(quants);
            let high = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(upper)), d[1]);
            store([low, high], out);
        }
    }
}

/// Blocks of `SCALES` bytes of scales (and minima, with `MINIMA`) and 32 x 8 bytes of nibbles.
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles<const SCALES: usize, const MINIMA: bool>(panel: &[u8], x: &[f32], sums: &mut Lane) {
    let mut sum = load(sums);
    let eight = _mm256_set1_ps(8.0);
    for (block, x) in panel.chunks_exact(SCALES + 256).zip(x.chunks_exact(32)) {
        let d = halves(&block[..32]);
        let m = if MINIMA { halves(&block[32..64]) } else { d };
        for (quants, &x) in block[SCALES..].chunks_exact(8).zip(x) {
            // SAFETY: the chunk has 8 bytes.
            let packed = unsafe { _mm_loadl_epi64(quants.as_ptr().cast::<__m128i>()) };
            let mask = _mm_set1_epi8(15);
            let low = _mm_and_si128(packed, mask);
            let high = _mm_and_si128(_mm_srli_epi16::<4>(packed), mask);
            let x = _mm256_set1_ps(x);
            for (i, quants) in [low, high].into_iter().enumerate() {
                let q = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(quants));
                let value = if MINIMA {
                    _mm256_add_ps(_mm256_mul_ps(q, d[i]), m[i])
                } else {
                    _mm256_mul_ps(_mm256_sub_ps(q, eight), d[i])
                };
                sum[i] = _mm256_fmadd_ps(x, value, sum[i]);
            }
        }
    }
    store(sum, sums);
}

/// Blocks of 32 bytes of scales and 32 x 16 quants.
#[target_feature(enable = "avx2,fma,f16c")]
fn bytes(panel: &[u8], x: &[f32], sums: &mut Lane) {
    let mut sum = load(sums);
    for (block, x) in panel.chunks_exact(32 + 512).zip(x.chunks_exact(32)) {
        let d = halves(&block[..32]);
        for (quants, &x) in block[32..].chunks_exact(ROWS).zip(x) {
            // SAFETY: the chunk has 16 bytes.
            let quants = unsafe { _mm_loadu_si128(quants.as_ptr().cast::<__m128i>()) };
            let x = _mm256_set1_ps(x);
            for (i, quants) in [quants, _mm_srli_si128::<8>(quants)].into_iter().enumerate() {
                let value = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(quants)), d[i]);
                sum[i] = _mm256_fmadd_ps(x, value, sum[i]);
            }
        }
    }
    store(sum, sums);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn halves(bytes: &[u8]) -> Pair {
    let (low, high) = bytes[..32].split_at(16);
    // SAFETY: each half of the slice has 16 bytes.
    unsafe {
        [
            _mm256_cvtph_ps(_mm_loadu_si128(low.as_ptr().cast::<__m128i>())),
            _mm256_cvtph_ps(_mm_loadu_si128(high.as_ptr().cast::<__m128i>())),
        ]
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn load(lane: &Lane) -> Pair {
    // SAFETY: a lane is 16 floats.
    unsafe { [_mm256_loadu_ps(lane.as_ptr()), _mm256_loadu_ps(lane.as_ptr().add(8))] }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn store(pair: Pair, lane: &mut Lane) {
    // SAFETY: a lane is 16 floats.
    unsafe {
        _mm256_storeu_ps(lane.as_mut_ptr(), pair[0]);
        _mm256_storeu_ps(lane.as_mut_ptr().add(8), pair[1]);
    }
}
