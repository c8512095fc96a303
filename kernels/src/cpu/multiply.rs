//! The product of a batch with a weight matrix: out[m][r] = sum over c of x[m][c] * w[r][c].
//!
//! Each output is one chain of fused multiply-adds over c = 0..cols, whatever the batch: so it is the same to the bit
//! alone, in a batch, on any number of threads. The vector lanes are 16 outputs, never the inner dimension.
//! A chunk of 256 columns of a panel is dequantized into a buffer once and used for every row of the batch.

use rayon::prelude::*;

use super::dtype::Dtype;
use super::error::{KernelError, expect_len};
use super::instructions::dispatched;
use super::matrix::Matrix;
use super::panel::{self, CHUNK, Decode, Lane, ROWS};

/// Rows of the batch whose accumulators live in registers together: 6 x 2 of the 16 that AVX2 has.
const TILE: usize = 6;
/// Rows of the batch between two dequantizations of a chunk.
const BLOCK: usize = 16 * TILE;
/// Multiply-adds that are worth a task of their own.
const TASK: usize = 1 << 17;

/// One panel's part of a product.
#[derive(Debug, Clone, Copy)]
struct Part<'a> {
    dtype: Dtype,
    panel: &'a [u8],
    cols: usize,
    /// [rows of the batch, cols]
    x: &'a [f32],
}

/// Where the tasks write: each to columns of its own.
#[derive(Clone, Copy)]
struct Out {
    at: *mut f32,
    len: usize,
}

// SAFETY: tasks write disjoint elements, see `Out::write`.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// # Safety
    /// No other task may write or read element `index` during the product.
    unsafe fn write(self, index: usize, value: f32) {
        assert!(index < self.len, "inside the output");
        // SAFETY: the index is inside the slice that `at` was made from, and nobody else uses the element.
        unsafe { *self.at.wrapping_add(index) = value };
    }
}

impl Matrix {
    /// Multiplies a batch. `x`: [m, cols], `out`: [m, rows].
    ///
    /// # Errors
    /// When the lengths do not fit the matrix.
    pub fn multiply(&self, x: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
        let (rows, cols) = (self.rows(), self.cols());
        let m = x.len().checked_div(cols).unwrap_or(0);
        expect_len("the batch", x.len(), m * cols)?;
        expect_len("the product", out.len(), m * rows)?;
        let panels_per_task = (TASK / (ROWS * cols * m).max(1)).max(1);
        let target = Out { at: out.as_mut_ptr(), len: out.len() };
        let one = |index: usize| {
            for (block, x) in x.chunks(BLOCK * cols).enumerate() {
                let part = Part { dtype: self.dtype(), panel: self.panel(index), cols, x };
                let mut sums = [[0.0; ROWS]; BLOCK];
                if !multiply_one(part, &mut sums[0]) {
                    multiply_panel(part, &mut sums);
                }
                for (i, sums) in sums.iter().enumerate().take(x.len() / cols) {
                    let first = (block * BLOCK + i) * rows + index * ROWS;
                    let used = ROWS.min(rows - index * ROWS);
                    for (r, &sum) in sums[..used].iter().enumerate() {
                        // SAFETY: row and column name an element that only this panel's task writes.
                        unsafe { target.write(first + r, sum) };
                    }
                }
            }
        };
        if panels_per_task >= self.panels() {
            (0..self.panels()).for_each(one);
        } else {
            (0..self.panels()).into_par_iter().with_min_len(panels_per_task).for_each(one);
        }
        Ok(())
    }
}

/// A batch of one row by the loop of its dtype, if there is one.
fn multiply_one(part: Part<'_>, sums: &mut Lane) -> bool {
    #[cfg(target_arch = "x86_64")]
    if part.x.len() == part.cols {
        return super::vector::multiply(part.dtype, part.panel, part.x, sums);
    }
    let _ = (part, sums);
    false
}

dispatched! {
    /// Adds one panel's products to `sums`.
    fn multiply_panel(part: Part<'_>, sums: &mut [[f32; ROWS]; BLOCK]) => multiply_panel_body
}

#[inline(always)]
fn multiply_panel_body(part: Part<'_>, sums: &mut [[f32; ROWS]; BLOCK]) {
    let mut buffer = [[0.0_f32; ROWS]; CHUNK];
    for from in (0..part.cols).step_by(CHUNK) {
        let weights = &mut buffer[..CHUNK.min(part.cols - from)];
        decode(part, from, weights);
        multiply_chunk(part, weights, from, sums);
    }
}

/// The values of a chunk of a panel, by the loop of its dtype if there is one.
#[inline(always)]
fn decode(part: Part<'_>, from: usize, weights: &mut [Lane]) {
    #[cfg(target_arch = "x86_64")]
    if super::vector::chunk(part.dtype, part.panel, from, weights) {
        return;
    }
    panel::with_decode!(part.dtype, D => D::chunk(part.panel, part.cols, from, weights));
}

/// All rows of the batch with one chunk of a panel.
#[inline(always)]
fn multiply_chunk(part: Part<'_>, weights: &[Lane], from: usize, sums: &mut [[f32; ROWS]; BLOCK]) {
    let m = part.x.len() / part.cols;
    let mut row = 0;
    while row + TILE <= m {
        tile::<TILE>(part, weights, from, row, sums);
        row += TILE;
    }
    match m - row {
        1 => tile::<1>(part, weights, from, row, sums),
        2 => tile::<2>(part, weights, from, row, sums),
        3 => tile::<3>(part, weights, from, row, sums),
        4 => tile::<4>(part, weights, from, row, sums),
        5 => tile::<5>(part, weights, from, row, sums),
        _ => {}
    }
}

/// `M` rows of the batch with one chunk of a panel.
#[inline(always)]
fn tile<const M: usize>(
    part: Part<'_>,
    weights: &[Lane],
    from: usize,
    row: usize,
    sums: &mut [[f32; ROWS]; BLOCK],
) {
    let x: [&[f32]; M] =
        std::array::from_fn(|i| &part.x[(row + i) * part.cols + from..][..weights.len()]);
    let mut acc: [Lane; M] = std::array::from_fn(|i| sums[row + i]);
    for (k, weights) in weights.iter().enumerate() {
        for i in 0..M {
            let value = x[i][k];
            for r in 0..ROWS {
                acc[i][r] = value.mul_add(weights[r], acc[i][r]);
            }
        }
    }
    sums[row..row + M].copy_from_slice(&acc);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::dtype::dequantize_block;

    /// A generator of repeatable values in [-1, 1).
    struct Values(u64);

    impl Values {
        fn next(&mut self) -> f32 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            f32::from(u16::try_from(self.0 >> 48).unwrap()) / 32_768.0 - 1.0
        }

        /// A matrix's bytes whose scales are finite and small.
        fn weights(&mut self, dtype: Dtype, rows: usize, cols: usize) -> Vec<u8> {
            let mut bytes: Vec<u8> = (0..dtype.bytes_for(rows, cols).unwrap())
                .map(|_| self.next().to_le_bytes()[1])
                .collect();
            let scales: &[usize] = match dtype {
                Dtype::F32 | Dtype::F16 | Dtype::BF16 => &[],
                Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => &[0, 2],
                Dtype::Q6K => &[208],
                _ => &[0],
            };
            for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                match dtype {
                    Dtype::F32 => block.copy_from_slice(&self.next().to_le_bytes()),
                    Dtype::F16 => {
                        block.copy_from_slice(&half::f16::from_f32(self.next()).to_le_bytes())
                    }
                    Dtype::BF16 => {
                        block.copy_from_slice(&half::bf16::from_f32(self.next()).to_le_bytes())
                    }
                    _ => {}
                }
                for &at in scales {
                    let scale = half::f16::from_f32(self.next() * 0.1).to_le_bytes();
                    block[at..at + 2].copy_from_slice(&scale);
                }
            }
            bytes
        }
    }

    fn dense(dtype: Dtype, rows: usize, cols: usize, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; rows * cols];
        let blocks =
            values.chunks_exact_mut(dtype.block_len()).zip(bytes.chunks_exact(dtype.block_bytes()));
        blocks.for_each(|(values, block)| dequantize_block(dtype, block, values));
        values
    }

    #[test]
    fn products_of_every_dtype_are_those_of_the_dequantized_values_and_the_same_bits_in_every_batch()
     {
        for dtype in Dtype::ALL {
            let (rows, cols) = (35, 512);
            let mut values = Values(7);
            let bytes = values.weights(dtype, rows, cols);
            let matrix = Matrix::pack(dtype, rows, cols, &bytes, &|row| (row + 3) % rows).unwrap();
            assert_eq!(matrix.bytes(), dtype.bytes_for(48, cols).unwrap());
            let dense = dense(dtype, rows, cols, &bytes);
            let x: Vec<f32> = (0..200 * cols).map(|_| values.next()).collect();
            let mut out = vec![f32::NAN; 200 * rows];
            matrix.multiply(&x, &mut out).unwrap();
            for (i, x) in x.chunks_exact(cols).enumerate().step_by(7) {
                let mut alone = vec![f32::NAN; rows];
                matrix.multiply(x, &mut alone).unwrap();
                assert_eq!(
                    alone,
                    out[i * rows..(i + 1) * rows],
                    "{dtype:?}: row {i} alone and in a batch"
                );
                for (row, &got) in alone.iter().enumerate() {
                    let weights = &dense[(row + 3) % rows * cols..][..cols];
                    let wanted: f64 =
                        x.iter().zip(weights).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    let size: f64 =
                        x.iter().zip(weights).map(|(&a, &b)| f64::from(a * b).abs()).sum();
                    assert!(
                        (f64::from(got) - wanted).abs() <= 1e-5 * size + 1e-6,
                        "{dtype:?}: {got} is not {wanted}"
                    );
                }
            }
            let mut row = vec![f32::NAN; cols];
            matrix.dequantize_row(33, &mut row).unwrap();
            assert_eq!(row, dense[36 % rows * cols..][..cols], "{dtype:?}");
        }
    }

    #[test]
    fn a_batch_has_the_same_bits_on_one_thread_and_on_four_in_all_sizes() {
        let (rows, cols) = (600, 96);
        let mut values = Values(9);
        let bytes = values.weights(Dtype::Q4_1, rows, cols);
        let matrix = Matrix::pack(Dtype::Q4_1, rows, cols, &bytes, &|row| row).unwrap();
        let x: Vec<f32> = (0..70 * cols).map(|_| values.next()).collect();
        let run = |threads: usize, m: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![f32::NAN; m * rows];
            pool.install(|| matrix.multiply(&x[..m * cols], &mut out)).unwrap();
            out
        };
        let all = run(1, 70);
        for m in [1, 2, 3, 5, 6, 7, 64, 70] {
            assert_eq!(run(4, m), all[..m * rows], "{m} rows");
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let matrix = Matrix::pack(Dtype::F32, 2, 3, &[0; 24], &|row| row).unwrap();
        let wrong = |result: Result<(), KernelError>| {
            assert!(matches!(result, Err(KernelError::Length { .. })))
        };
        wrong(matrix.multiply(&[0.0; 4], &mut [0.0; 2]));
        wrong(matrix.multiply(&[0.0; 3], &mut [0.0; 3]));
        wrong(matrix.dequantize_row(0, &mut [0.0; 2]));
        assert!(matrix.dequantize_row(2, &mut [0.0; 3]).is_err());
        assert!(Matrix::pack(Dtype::Q4_1, 2, 33, &[0; 40], &|row| row).is_err());
        assert!(Matrix::pack(Dtype::F32, 2, 3, &[0; 23], &|row| row).is_err());
        assert!(Matrix::pack(Dtype::F32, 2, 3, &[0; 24], &|_| 2).is_err());
    }
}
