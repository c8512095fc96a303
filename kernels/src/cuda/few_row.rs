//! Products of at most 16 rows, as fast as the weights arrive. The meaning is that of [`super::Linear`].

use cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

use super::beside::Grid;
use super::device::{Module, driver};
use super::launch::{at_least, launched, len};
use super::{DeviceError, Kernels, LaunchError, Linear, Onto, Real};
use crate::cpu::KernelError;

/// Rows of x at most.
pub(super) const MOST_ROWS: u32 = 16;

/// As in the kernel.
const ROWS: u32 = 16;
const COLUMNS: u32 = 8;
const WARPS: u32 = 4;
const THREADS: u32 = WARPS * 32;
const SPAN: u32 = WARPS * 128;
const APART: u32 = 64;
const TILE_BYTES: u32 = ROWS * 256 + ROWS / 2 * APART;
const PITCH: u32 = 20;
/// Tiles that a warp has on their way: as many as leave room for x.
const STAGES: [u32; 2] = [4, 2];

pub(super) const MODULE: Module = Module {
    image: include_bytes!(concat!(env!("OUT_DIR"), "/few_row.fatbin")),
    functions: &NAMES,
    most_shared: 227 << 10,
};

const NAMES: [&str; 8] = [
    "few_row_bf16_8_4",
    "few_row_bf16_16_4",
    "few_row_bf16_8_2",
    "few_row_bf16_16_2",
    "few_row_f16_8_4",
    "few_row_f16_16_4",
    "few_row_f16_8_2",
    "few_row_f16_16_2",
];

/// What a launch keeps between its blocks. As it is made, and after every launch, nothing has arrived.
#[derive(Debug)]
pub(super) struct FewRowScratch {
    parts: CudaSlice<f32>,
    arrived: CudaSlice<u32>,
    /// Bytes of shared memory that a block may have.
    most_shared: u32,
}

impl FewRowScratch {
    /// For products of these shapes, with whatever rows.
    ///
    /// # Errors
    /// When the device has not as much memory.
    pub(super) fn new(kernels: &Kernels, shapes: &[Linear]) -> Result<Self, DeviceError> {
        let most = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let most = kernels
            .stream()
            .context()
            .attribute(most)
            .map_err(driver("ask for shared memory"))?
            .unsigned_abs();
        let cuts = shapes
            .iter()
            .flat_map(|shape| (1..=MOST_ROWS).map(move |rows| Linear { rows, ..*shape }));
        let cuts = cuts
            .filter_map(|shape| Some((shape, Cut::new(&shape, kernels.multiprocessors(), most)?)));
        let parts = cuts.map(|(shape, cut)| cut.parts(&shape)).max();
        let groups = shapes.iter().map(|shape| shape.outputs.div_ceil(ROWS)).max();
        let mut arrived = kernels.memory(groups.unwrap_or(0).max(1) as usize)?;
        kernels.stream().memset_zeros(&mut arrived).map_err(driver("clear memory"))?;
        // Otherwise the driver may leave room for one block alone, and the next launch could not begin beside this one.
        let carveout = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        for function in NAMES.iter().filter_map(|name| kernels.function(name)) {
            function.set_attribute(carveout, 100).map_err(driver("prefer shared memory"))?;
        }
        Ok(Self { parts: kernels.memory(parts.unwrap_or(0).max(1))?, arrived, most_shared: most })
    }
}

/// Shared memory of a block that leaves room for another on Hopper's multiprocessors, which have 228 KiB.
const BESIDE: u32 = 113 << 10;

/// How a product is cut into items.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    stages: u32,
    /// Spans of a chunk.
    steps: u32,
    chunks: u32,
    blocks: u32,
    shared_bytes: u32,
}

impl Cut {
    /// Absent: not even a span of x fits into shared memory. Up to 4 rows leave room for the next launch to begin beside this
    /// one; of more, too little of x would be there at once.
    fn new(shape: &Linear, multiprocessors: u32, most_shared: u32) -> Option<Self> {
        let most_shared = if shape.rows <= 4 { most_shared.min(BESIDE) } else { most_shared };
        let all = shape.inputs.div_ceil(SPAN).max(1);
        let fitting = |stages| {
            let room = most_shared.checked_sub(Self::bytes_beside_x(shape, stages))? / shape.rows;
            let steps = room.saturating_sub(APART) / (SPAN * 2);
            // A ring that leaves room for little of x makes too many chunks.
            (steps >= all.min(2) || steps >= 1 && Some(&stages) == STAGES.last())
                .then_some((stages, steps))
        };
        let (stages, fitting) = STAGES.into_iter().find_map(fitting)?;
        let groups = shape.outputs.div_ceil(ROWS).max(1);
        let chunks = all.div_ceil(fitting).max(multiprocessors.div_ceil(groups)).min(all);
        let steps = all.div_ceil(chunks);
        let chunks = all.div_ceil(steps);
        let shared_bytes =
            Self::bytes_beside_x(shape, stages) + shape.rows * (steps * SPAN * 2 + APART);
        Some(Self {
            stages,
            steps,
            chunks,
            blocks: multiprocessors.min(groups.saturating_mul(chunks)),
            shared_bytes,
        })
    }

    /// Columns of the kernel.
    fn columns(shape: &Linear) -> u32 {
        shape.rows.next_multiple_of(COLUMNS)
    }

    fn bytes_beside_x(shape: &Linear, stages: u32) -> u32 {
        let sums = 2 * WARPS * Self::columns(shape) * PITCH * 4;
        WARPS * stages * TILE_BYTES + sums + THREADS * 4
    }

    /// Sums that blocks leave for each other.
    fn parts(&self, shape: &Linear) -> usize {
        let groups = shape.outputs.div_ceil(ROWS);
        if self.chunks == 1 { 0 } else { len(&[self.chunks, shape.rows, groups, ROWS]) }
    }
}

/// The kernel's argument, field by field.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct FewRow {
    x: u64,
    w: u64,
    out: u64,
    parts: u64,
    arrived: u64,
    rows: u32,
    inputs: u32,
    outputs: u32,
    steps: u32,
    chunks: u32,
    adds: u32,
}

impl Kernels {
    /// Queues a product of at most 16 rows. Shapes as in [`Linear::reference`].
    ///
    /// The weights are read ahead of what is before in the stream: they must not be what a launch before it writes.
    ///
    /// # Errors
    /// When lengths do not fit, there are more rows, or a row of x is no multiple of 8.
    pub(super) fn few_row<T: Real>(
        &self,
        shape: &Linear,
        (x, w): (&CudaSlice<T>, &CudaSlice<T>),
        out: &mut CudaSlice<T>,
        scratch: &mut FewRowScratch,
    ) -> Result<(), LaunchError> {
        shape.check([x.len(), w.len(), out.len()])?;
        if shape.rows == 0 || shape.outputs == 0 {
            return Ok(());
        }
        let unsupported =
            || LaunchError::Unsupported(format!("{shape:?} as a product of few rows"));
        let cut = Cut::new(shape, self.multiprocessors(), scratch.most_shared);
        let cut = cut.filter(|_| shape.rows <= MOST_ROWS).ok_or_else(unsupported)?;
        let groups = shape.outputs.div_ceil(ROWS);
        groups.checked_mul(cut.chunks).ok_or(KernelError::Overflow("the items of a product"))?;
        at_least("parts", scratch.parts.len(), cut.parts(shape))?;
        at_least("arrived", scratch.arrived.len(), groups as usize)?;
        let stream = self.stream();
        let argument = FewRow {
            x: x.device_ptr(stream).0,
            w: w.device_ptr(stream).0,
            out: out.device_ptr_mut(stream).0,
            parts: scratch.parts.device_ptr_mut(stream).0,
            arrived: scratch.arrived.device_ptr_mut(stream).0,
            rows: shape.rows,
            inputs: shape.inputs,
            outputs: shape.outputs,
            steps: cut.steps,
            chunks: cut.chunks,
            adds: u32::from(shape.onto == Onto::Residual),
        };
        let function =
            self.kernel(&format!("few_row_{}_{}_{}", T::NAME, Cut::columns(shape), cut.stages))?;
        let grid = Grid { shared_bytes: cut.shared_bytes, ..Grid::of([cut.blocks, 1], THREADS) };
        // SAFETY: the argument is that of `few_row_*` in few_row.cu, which stays within the lengths that are checked above and
        // touches nothing but weights before it has waited.
        launched("few_row", unsafe { grid.queue(self, function, &argument) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(rows: u32, inputs: u32, outputs: u32, most_shared: u32) -> Cut {
        let shape = Linear { rows, inputs, outputs, onto: Onto::Nothing };
        let cut = Cut::new(&shape, 132, most_shared).unwrap();
        assert!(cut.shared_bytes <= most_shared, "{cut:?}");
        assert!(
            cut.chunks * cut.steps * SPAN >= inputs && (cut.chunks - 1) * cut.steps * SPAN < inputs,
            "{cut:?}"
        );
        cut
    }

    #[test]
    fn x_of_one_row_is_not_cut_and_leaves_room_for_the_next_launch() {
        for (inputs, outputs) in [(4096, 6144), (4096, 4096), (4096, 28_672), (14_336, 4096)] {
            let cut = cut(1, inputs, outputs, 227 << 10);
            assert_eq!((cut.stages, cut.chunks), (4, 1));
            assert!(2 * (cut.shared_bytes + 1024) <= 228 << 10, "{cut:?}");
        }
    }

    #[test]
    fn every_shape_fits_into_the_shared_memory_of_every_device() {
        for most_shared in [99 << 10, 163 << 10, 227 << 10] {
            for rows in 1..=16 {
                for inputs in [8, 504, 512, 520, 4096, 14_336, 53_248] {
                    for outputs in [1, 16, 17, 1024, 128_256] {
                        cut(rows, inputs, outputs, most_shared);
                    }
                }
            }
        }
    }

    #[test]
    fn few_outputs_are_cut_so_that_every_multiprocessor_has_some() {
        assert_eq!(cut(1, 4096, 1024, 227 << 10).chunks, 3);
        assert_eq!(cut(16, 14_336, 4096, 227 << 10).chunks, 4);
    }
}
