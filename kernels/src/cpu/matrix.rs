//! Weights, packed for products: resident once, never expanded.

use bytes::Bytes;

use super::dtype::Dtype;
use super::error::{KernelError, expect_below, expect_len};
use super::lanes::ROWS;
use super::memory::Memory;
use super::panel;

/// A [rows, cols] matrix in panels of 16 rows. Owns its part of a [`Memory`], about as many bytes as its source has.
#[derive(Debug, Clone)]
pub struct Matrix {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    panel_bytes: usize,
    packed: Bytes,
}

impl Matrix {
    /// Packs `rows` rows of `cols` values into `memory`. `bytes`: the rows in GGUF's layout of the dtype.
    /// Row `i` of the result is row `order(i)` of the source.
    ///
    /// # Errors
    /// When the length of `bytes` is not that of the shape, or `order` names a row that is not there.
    pub fn pack(
        memory: &mut Memory,
        dtype: Dtype,
        rows: usize,
        cols: usize,
        bytes: &[u8],
        order: &(dyn Fn(usize) -> usize + Sync),
    ) -> Result<Self, KernelError> {
        let wanted = dtype.bytes_for(rows, cols).ok_or(KernelError::Overflow("a matrix"))?;
        expect_below("no row in a matrix without rows", 0, rows)?;
        expect_below("no column in a matrix without columns", 0, cols)?;
        expect_len("the matrix's bytes", bytes.len(), wanted)?;
        let total = Self::bytes_for(dtype, rows, cols).ok_or(KernelError::Overflow("a matrix"))?;
        let panel_bytes = total / rows.div_ceil(ROWS);
        (0..rows).try_for_each(|row| expect_below("a row of the order", order(row), rows))?;
        let mut packed = memory.take(total)?;
        let row_bytes = wanted.checked_div(rows).unwrap_or(0);
        for (index, panel) in packed.chunks_exact_mut(panel_bytes.max(1)).enumerate() {
            let source = |r: usize| {
                let row = index * ROWS + r;
                (row < rows).then(|| &bytes[order(row) * row_bytes..(order(row) + 1) * row_bytes])
            };
            panel::pack(dtype, &std::array::from_fn(source), panel);
        }
        Ok(Self { dtype, rows, cols, panel_bytes, packed: packed.freeze() })
    }

    /// Resident bytes of a matrix; `None` when `cols` is not a multiple of the block or the sizes overflow.
    pub fn bytes_for(dtype: Dtype, rows: usize, cols: usize) -> Option<usize> {
        rows.div_ceil(ROWS).checked_mul(panel::panel_bytes(dtype, cols)?)
    }

    /// Outputs of a product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs of a product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the values are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        self.packed.len()
    }

    /// The values of one row. `out`: [cols].
    ///
    /// # Errors
    /// When the row is not there or `out` has another length.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<(), KernelError> {
        expect_below("a row", row, self.rows)?;
        expect_len("a row's values", out.len(), self.cols)?;
        panel::row_of(self.dtype, self.panel(row / ROWS), row % ROWS, out);
        Ok(())
    }

    pub(crate) fn panel(&self, index: usize) -> &[u8] {
        &self.packed[index * self.panel_bytes..(index + 1) * self.panel_bytes]
    }

    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }
}
