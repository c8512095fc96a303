//! Rows of a table by their numbers: embeddings by token, last positions by row.

/// Rows to gather.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gather {
    pub rows: u32,
    pub table_rows: u32,
    /// Numbers of a row: a multiple of 8.
    pub width: u32,
}

impl Gather {
    /// The meaning of the kernel. `table`: [table_rows, width]; `ids`: [rows]; `out`: [rows, width]. A row that the table does
    /// not have is zeros.
    pub fn reference<T: Copy + Default>(&self, table: &[T], ids: &[u32], out: &mut [T]) {
        let width = self.width as usize;
        for (id, out) in ids.iter().zip(out.chunks_mut(width)) {
            match table.chunks(width).nth(*id as usize) {
                Some(row) => out.copy_from_slice(row),
                None => out.fill(T::default()),
            }
        }
    }
}

#[cfg(feature = "cuda")]
pub(super) use launch::MODULE;

#[cfg(feature = "cuda")]
mod launch {
    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

    use super::Gather;
    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{EIGHT, launched, len, same, whole_eights};
    use crate::cuda::{Kernels, LaunchError, Real};

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/gather.fatbin")),
        functions: &["gather"],
        most_shared: 0,
    };

    /// Threads of a block, and 16-byte pieces that each has on their way, as in the kernel.
    const THREADS: u32 = 128;
    const PIECES: u32 = 4;

    /// The kernel's argument, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Argument {
        table: u64,
        ids: u64,
        out: u64,
        table_rows: u32,
        width: u32,
    }

    impl Kernels {
        /// Queues the gathering. Shapes as in [`Gather::reference`].
        ///
        /// # Errors
        /// When lengths do not fit, or a row is no multiple of 8.
        pub fn gather<T: Real>(
            &self,
            shape: &Gather,
            (table, ids): (&CudaSlice<T>, &CudaSlice<u32>),
            out: &mut CudaSlice<T>,
        ) -> Result<(), LaunchError> {
            same("table", table.len(), len(&[shape.table_rows, shape.width]))?;
            same("ids", ids.len(), shape.rows as usize)?;
            same("out", out.len(), len(&[shape.rows, shape.width]))?;
            whole_eights("rows of", shape.width)?;
            if shape.rows == 0 {
                return Ok(());
            }
            let (stream, width) = (self.stream(), shape.width / EIGHT);
            let argument = Argument {
                table: table.device_ptr(stream).0,
                ids: ids.device_ptr(stream).0,
                out: out.device_ptr_mut(stream).0,
                table_rows: shape.table_rows,
                width,
            };
            let grid = Grid::of([shape.rows, width.div_ceil(THREADS * PIECES)], THREADS);
            let function = self.kernel("gather")?;
            // SAFETY: the argument is that of `gather` in gather.cu, which bounds ids, stays within the lengths checked above and
            // waits first.
            launched("gather", unsafe { grid.queue(self, function, &argument) })
        }
    }
}
