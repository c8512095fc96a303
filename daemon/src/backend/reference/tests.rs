//! What is stored means the same to the kernels and to candle, whose reading of each layout is its own.

use kernels::cpu::{Matrix, Memory};

use super::*;

/// More than two panels of rows, the last one partly filled.
const ROWS: usize = 37;
/// Two of the largest blocks.
const COLS: usize = 512;

/// Bytes that look random, the same ones every time.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let step = |state: &mut u64| {
        *state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Some(state.to_be_bytes()[0])
    };
    std::iter::repeat_n((), len).scan(seed, |state, ()| step(state)).collect()
}

/// Where a block keeps its half-precision scales, as first byte and number of halves.
fn scales(dtype: Dtype) -> (usize, usize) {
    match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => (0, 0),
        Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => (0, 1),
        Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => (0, 2),
        Dtype::Q6K => (208, 1),
    }
}

/// Rows of blocks in which everything is random and every number finite.
fn blocks(dtype: Dtype) -> Vec<u8> {
    let mut bytes = noise(dtype.bytes_for(ROWS, COLS).unwrap(), 1 + dtype.block_bytes() as u64);
    let (first, halves) = scales(dtype);
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        for half in block[first..].chunks_exact_mut(2).take(halves) {
            // No exponent of all ones, in half precision and, where numbers stand alone, in any.
            half[1] &= 0xbf;
        }
        if halves == 0 {
            let last = block.len() - 1;
            block[last] &= 0xbf;
        }
    }
    bytes
}

#[test]
fn every_dtype_has_the_values_that_candle_reads() {
    for dtype in Dtype::ALL {
        let bytes = blocks(dtype);
        let tensor = qtensor_from_ggml(ggml_dtype(dtype), &bytes, vec![ROWS, COLS], &Device::Cpu);
        let wanted = tensor.unwrap().dequantize(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
        let matrix =
            Matrix::pack(&mut Memory::default(), dtype, ROWS, COLS, &bytes, &|row| row).unwrap();
        let mut got = vec![0.0; COLS];
        for (row, wanted) in wanted.iter().enumerate() {
            matrix.dequantize_row(row, &mut got).unwrap();
            check_row(dtype, &got, wanted);
        }
    }
}

/// Within a block the scales are alike: a product and a sum there may be rounded once or twice.
#[track_caller]
fn check_row(dtype: Dtype, got: &[f32], wanted: &[f32]) {
    let blocks = got.chunks(dtype.block_len()).zip(wanted.chunks(dtype.block_len()));
    for (got, wanted) in blocks {
        let largest = wanted.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        assert!(largest.is_finite(), "{dtype:?}: {wanted:?}");
        for (got, wanted) in got.iter().zip(wanted) {
            assert!((got - wanted).abs() <= largest * 1e-6, "{dtype:?}: {got}, wanted {wanted}");
        }
    }
}
