//! The product of a batch with weight matrices: out[m][r] = sum over c of x[m][c] * w[r][c].
//!
//! Each output is one chain over the columns, whatever the batch: so it is the same to the bit alone, in a batch, on any
//! number of threads. The vector lanes are 16 outputs, never the inner dimension. Quantized weights meet a batch that is
//! quantized to 8 bits (`quantized`); a chunk of 256 columns of float weights is widened into a buffer once for every row.

use rayon::prelude::*;

use super::activation::{Quantized, TILE as QUANTIZED_ROWS};
use super::dtype::Dtype;
use super::error::{KernelError, expect_len};
use super::instructions::dispatched;
use super::lanes::ROWS;
use super::matrix::Matrix;
use super::out::Out;
use super::panel::{self, CHUNK, Lane};
use super::quantized;

/// Rows of the batch whose accumulators live in registers together: 6 x 2 of the 16 that AVX2 has.
const TILE: usize = 6;
/// Rows of the batch between two widenings of a chunk.
const BLOCK: usize = 16 * TILE;
/// Multiply-adds that are worth a task of their own.
const TASK: usize = 1 << 18;

/// One matrix and where its product goes: [m, rows].
#[derive(Debug)]
pub struct Map<'a> {
    pub matrix: &'a Matrix,
    pub out: &'a mut [f32],
}

/// Multiplies; keeps the memory that quantized batches need.
#[derive(Debug, Default)]
pub struct Multiplier {
    quantized: Quantized,
}

/// One panel's part of a product with floats.
#[derive(Debug, Clone, Copy)]
struct Part<'a> {
    dtype: Dtype,
    panel: &'a [u8],
    cols: usize,
    /// [rows of the batch, cols]
    x: &'a [f32],
}

/// What the tasks of one product share.
#[derive(Debug, Clone, Copy)]
struct Product<'a> {
    matrix: &'a Matrix,
    out: Out<'a>,
    x: &'a [f32],
    quantized: &'a Quantized,
}

impl Multiplier {
    /// Multiplies a batch with every map. `x`: [m, cols] with the columns of all maps.
    ///
    /// # Errors
    /// When the lengths do not fit the matrices.
    pub fn multiply<const N: usize>(
        &mut self,
        x: &[f32],
        maps: [Map<'_>; N],
    ) -> Result<(), KernelError> {
        let cols = maps.first().map_or(0, |map| map.matrix.cols());
        let m = x.len().checked_div(cols).unwrap_or(0);
        expect_len("the batch", x.len(), m * cols)?;
        for map in &maps {
            expect_len("the columns of a map", map.matrix.cols(), cols)?;
            expect_len("the product", map.out.len(), m * map.matrix.rows())?;
        }
        if maps.iter().any(|map| map.matrix.dtype().block_len() > 1) {
            self.quantized.fill(x, cols);
        }
        let quantized = &self.quantized;
        let products =
            maps.map(|Map { matrix, out }| Product { matrix, out: Out::new(out), x, quantized });
        run(&products, m);
        Ok(())
    }
}

/// Every panel of every product, in one round of the threads.
fn run(products: &[Product<'_>], m: usize) {
    let panels: usize = products.iter().map(|product| product.matrix.panels()).sum();
    let cols = products.first().map_or(0, |product| product.matrix.cols());
    let panels_per_task = (TASK / (ROWS * cols * m).max(1)).max(1);
    let one = |index: usize| {
        let mut index = index;
        for product in products {
            match index.checked_sub(product.matrix.panels()) {
                Some(rest) => index = rest,
                None => return multiply_panel(*product, index),
            }
        }
    };
    if panels_per_task >= panels {
        (0..panels).for_each(one);
    } else {
        (0..panels).into_par_iter().with_min_len(panels_per_task).for_each(one);
    }
}

fn multiply_panel(product: Product<'_>, index: usize) {
    if product.matrix.dtype().block_len() == 1 {
        return multiply_floats(product, index);
    }
    let Product { matrix, quantized, .. } = product;
    let m = product.x.len() / matrix.cols();
    let tiles = quantized.tiles(matrix.cols()).take(m.div_ceil(QUANTIZED_ROWS));
    for (tile, x) in tiles.enumerate() {
        let first = tile * QUANTIZED_ROWS;
        let mut sums = [[0.0; ROWS]; QUANTIZED_ROWS];
        let sums = &mut sums[..QUANTIZED_ROWS.min(m - first)];
        quantized::multiply(matrix.dtype(), matrix.panel(index), x, sums);
        product.write(index, first, sums);
    }
}

fn multiply_floats(product: Product<'_>, index: usize) {
    let (dtype, cols) = (product.matrix.dtype(), product.matrix.cols());
    for (block, x) in product.x.chunks(BLOCK * cols).enumerate() {
        let mut sums = [[0.0; ROWS]; BLOCK];
        multiply_floats_with(
            Part { dtype, panel: product.matrix.panel(index), cols, x },
            &mut sums,
        );
        product.write(index, block * BLOCK, &sums[..x.len() / cols]);
    }
}

impl Product<'_> {
    /// Writes a panel's sums for rows of the batch from `first` on.
    fn write(&self, panel: usize, first: usize, sums: &[[f32; ROWS]]) {
        let rows = self.matrix.rows();
        let used = ROWS.min(rows - panel * ROWS);
        for (i, sums) in sums.iter().enumerate() {
            let at = (first + i) * rows + panel * ROWS;
            // SAFETY: row and columns name elements that only this panel's task writes.
            unsafe { self.out.part(at..at + used) }.copy_from_slice(&sums[..used]);
        }
    }
}

dispatched! {
    /// Adds one panel's products to `sums`.
    fn multiply_floats_with(part: Part<'_>, sums: &mut [[f32; ROWS]; BLOCK]) => multiply_floats_body
}

#[inline(always)]
fn multiply_floats_body(part: Part<'_>, sums: &mut [[f32; ROWS]; BLOCK]) {
    let mut buffer = [[0.0_f32; ROWS]; CHUNK];
    for from in (0..part.cols).step_by(CHUNK) {
        let weights = &mut buffer[..CHUNK.min(part.cols - from)];
        panel::widen(part.dtype, part.panel, from, weights);
        multiply_chunk(part, weights, from, sums);
    }
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
    use crate::cpu::dtype::plain::dequantize_block;
    use crate::cpu::{InstructionSet, Memory};

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

    fn multiply(matrix: &Matrix, x: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.len() / matrix.cols() * matrix.rows()];
        Multiplier::default().multiply(x, [Map { matrix, out: &mut out }]).unwrap();
        out
    }

    /// A row as quantized weights see it: 8 bits a value, the largest of 32 is 127.
    fn rounded(x: &[f32]) -> Vec<f64> {
        let block = |x: &[f32]| {
            let scale = x.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0;
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let round = move |x: &f32| f64::from((x * inverse).round()) * f64::from(scale);
            x.iter().map(round).collect::<Vec<_>>()
        };
        x.chunks(32).flat_map(block).collect()
    }

    fn matrix(values: &mut Values, dtype: Dtype, rows: usize, cols: usize) -> (Matrix, Vec<f32>) {
        let bytes = values.weights(dtype, rows, cols);
        let matrix = Matrix::pack(&mut Memory::default(), dtype, rows, cols, &bytes, &|row| {
            (row + 3) % rows
        })
        .unwrap();
        (matrix, dense(dtype, rows, cols, &bytes))
    }

    #[test]
    fn products_of_every_dtype_are_those_of_the_dequantized_values_and_the_same_bits_in_every_batch()
     {
        for dtype in Dtype::ALL {
            let (rows, cols) = (35, 512);
            let mut values = Values(7);
            let (matrix, dense) = matrix(&mut values, dtype, rows, cols);
            let x: Vec<f32> = (0..200 * cols).map(|_| values.next()).collect();
            let out = multiply(&matrix, &x);
            for (i, x) in x.chunks_exact(cols).enumerate().step_by(7) {
                let alone = multiply(&matrix, x);
                assert_eq!(
                    alone,
                    out[i * rows..(i + 1) * rows],
                    "{dtype:?}: row {i} alone and in a batch"
                );
                let is_float = dtype.block_len() == 1;
                let exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                let seen = if is_float { exact.clone() } else { rounded(x) };
                for (row, &got) in alone.iter().enumerate() {
                    let weights = &dense[(row + 3) % rows * cols..][..cols];
                    let dot = |x: &[f64]| -> f64 {
                        x.iter().zip(weights).map(|(a, &b)| a * f64::from(b)).sum()
                    };
                    let size: f64 =
                        exact.iter().zip(weights).map(|(a, &b)| (a * f64::from(b)).abs()).sum();
                    // A value that lies between two quants may be rounded either way: few of 512 do.
                    let slack = if is_float { 1e-5 } else { 1e-4 };
                    let far = (f64::from(got) - dot(&seen)).abs();
                    assert!(far <= slack * size + 1e-6, "{dtype:?}: {got}, not {}", dot(&seen));
                    let lost = (f64::from(got) - dot(&exact)).abs();
                    assert!(lost <= 0.01 * size, "{dtype:?}: {got}, not about {}", dot(&exact));
                }
            }
        }
    }

    #[test]
    fn a_packed_row_has_the_values_of_its_source() {
        for dtype in Dtype::ALL {
            let (rows, cols) = (35, 512);
            let (matrix, dense) = matrix(&mut Values(5), dtype, rows, cols);
            let most = dtype.bytes_for(48, cols).unwrap();
            assert!(matrix.bytes() <= most + most / 32, "{dtype:?}");
            for row in [0, 17, 33, 34] {
                let mut got = vec![f32::NAN; cols];
                matrix.dequantize_row(row, &mut got).unwrap();
                let wanted = &dense[(row + 3) % rows * cols..][..cols];
                for (got, wanted) in got.iter().zip(wanted) {
                    // Q6_K's 25 bits are rounded in another place.
                    assert!(
                        (got - wanted).abs() <= 4e-6 * wanted.abs(),
                        "{dtype:?}: {got}, {wanted}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_of_this_machine_gives_the_same_bits() {
        for dtype in Dtype::ALL.into_iter().filter(|dtype| dtype.block_len() > 1) {
            let cols = 512;
            let mut values = Values(11);
            let (matrix, _) = matrix(&mut values, dtype, 16, cols);
            // All lengths of a tile, and values at both ends of what 8 bits hold.
            for m in 1..=16 {
                let mut x: Vec<f32> = (0..m * cols).map(|_| values.next()).collect();
                x[..64].iter_mut().for_each(|x| *x = x.signum());
                let mut quantized = Quantized::default();
                quantized.fill(&x, cols);
                let tile = quantized.tiles(cols).next().unwrap();
                let product = |set| {
                    let mut out = vec![[f32::NAN; ROWS]; m];
                    assert!(quantized::multiply_with(set, dtype, matrix.panel(0), tile, &mut out));
                    out
                };
                let wanted = product(InstructionSet::Portable);
                for &set in InstructionSet::all_here() {
                    assert_eq!(product(set), wanted, "{dtype:?}, {set:?}, {m} rows");
                }
            }
        }
    }

    #[test]
    fn values_that_no_scale_fits_do_not_spoil_others() {
        let (matrix, _) = matrix(&mut Values(3), Dtype::Q4_1, 16, 64);
        let usual = vec![0.5; 64];
        let wanted = multiply(&matrix, &usual);
        for odd in [0.0, 1e-44, f32::MAX, f32::INFINITY, f32::NAN] {
            let mut x = usual.clone();
            x.extend(vec![odd; 64]);
            let got = multiply(&matrix, &x);
            assert_eq!(got[..16], wanted, "beside {odd}");
            // What is no number stays none: it must not become an answer.
            assert_eq!(got[16..].iter().all(|out| out.is_nan()), !odd.is_finite(), "{odd}");
        }
        assert_eq!(multiply(&matrix, &[0.0; 64]), [0.0; 16]);
    }

    #[test]
    fn maps_of_one_batch_are_multiplied_together() {
        let mut values = Values(13);
        let (quantized, _) = matrix(&mut values, Dtype::Q4_1, 35, 64);
        let (floats, _) = matrix(&mut values, Dtype::F32, 3, 64);
        let x: Vec<f32> = (0..3 * 64).map(|_| values.next()).collect();
        let (mut one, mut two) = (vec![f32::NAN; 3 * 35], vec![f32::NAN; 3 * 3]);
        let maps =
            [Map { matrix: &quantized, out: &mut one }, Map { matrix: &floats, out: &mut two }];
        Multiplier::default().multiply(&x, maps).unwrap();
        assert_eq!((one, two), (multiply(&quantized, &x), multiply(&floats, &x)));
    }

    #[test]
    fn a_batch_has_the_same_bits_on_one_thread_and_on_four_in_all_sizes() {
        let (rows, cols) = (600, 96);
        let mut values = Values(9);
        for dtype in [Dtype::Q4_1, Dtype::F16] {
            let (matrix, _) = matrix(&mut values, dtype, rows, cols);
            let x: Vec<f32> = (0..70 * cols).map(|_| values.next()).collect();
            let run = |threads: usize, m: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| multiply(&matrix, &x[..m * cols]))
            };
            let all = run(1, 70);
            for m in [1, 2, 3, 5, 6, 7, 64, 70] {
                assert_eq!(run(4, m), all[..m * rows], "{m} rows");
            }
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let matrix =
            Matrix::pack(&mut Memory::default(), Dtype::F32, 2, 3, &[0; 24], &|row| row).unwrap();
        let wrong = |result: Result<(), KernelError>| {
            assert!(matches!(result, Err(KernelError::Length { .. })))
        };
        let multiply = |x: &[f32], out: &mut [f32]| {
            Multiplier::default().multiply(x, [Map { matrix: &matrix, out }])
        };
        wrong(multiply(&[0.0; 4], &mut [0.0; 2]));
        wrong(multiply(&[0.0; 3], &mut [0.0; 3]));
        wrong(matrix.dequantize_row(0, &mut [0.0; 2]));
        assert!(matrix.dequantize_row(2, &mut [0.0; 3]).is_err());
        let other =
            Matrix::pack(&mut Memory::default(), Dtype::F32, 2, 2, &[0; 16], &|row| row).unwrap();
        let (mut one, mut two) = ([0.0; 2], [0.0; 2]);
        let maps = [Map { matrix: &matrix, out: &mut one }, Map { matrix: &other, out: &mut two }];
        wrong(Multiplier::default().multiply(&[0.0; 3], maps));
        assert!(
            Matrix::pack(&mut Memory::default(), Dtype::Q4_1, 2, 33, &[0; 40], &|row| row).is_err()
        );
        assert!(
            Matrix::pack(&mut Memory::default(), Dtype::F32, 2, 3, &[0; 23], &|row| row).is_err()
        );
        assert!(Matrix::pack(&mut Memory::default(), Dtype::F32, 2, 3, &[0; 24], &|_| 2).is_err());
    }
}
