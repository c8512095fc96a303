//! Products of up to some hundred rows on Hopper, as fast as the weights arrive. The meaning is that of [`super::Linear`].

use std::ffi::c_void;
use std::fmt;

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};
use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DriverError};

use super::beside::Grid;
use super::device::{Module, driver};
use super::launch::{at_least, launched, len};
use super::{DeviceError, GateActivation, Kernels, LaunchError, Linear, Onto, Real};

/// Rows of x at most.
const MOST_ROWS: u32 = 1024;

/// As in the kernel.
const CLUSTER: u32 = 2;
const DEPTH: u32 = 64;
const MOST_SHARED: u32 = 227 << 10;
const MOST_STAGES: u32 = 16;

/// Into how many parts k is split.
const SPLITS: [u32; 3] = [1, 2, 4];

/// What the blocks of a cluster share: rows of x, or weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Shared {
    X,
    W,
}

/// A block's tile that there is a kernel for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Tile {
    rows: u32,
    outputs: u32,
    shared: Shared,
}

macro_rules! tiles {
    ($($rows:literal $outputs:literal $shared:ident),* $(,)?) => {
        const TILES: &[Tile] =
            &[$(Tile { rows: $rows, outputs: $outputs, shared: Shared::$shared }),*];
        const NAMES: &[&str] = &[
            $(concat!("split_k_bf16_", $rows, "x", $outputs, "_", stringify!($shared)),)*
            $(concat!("split_k_f16_", $rows, "x", $outputs, "_", stringify!($shared)),)*
        ];
    };
}

tiles!(
    64 32 X, 64 48 X, 64 64 X, 64 96 X, 64 128 X, 64 224 X,
    64 64 W, 64 96 W, 64 128 W,
    128 64 X, 128 96 X, 128 128 X, 128 192 X, 128 224 X, 128 256 X,
    128 64 W, 128 96 W, 128 128 W, 128 192 W, 128 224 W, 128 256 W,
);

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}_{:?}", self.rows, self.outputs, self.shared)
    }
}

impl Tile {
    fn cluster_rows(&self) -> u32 {
        if self.shared == Shared::W { self.rows * CLUSTER } else { self.rows }
    }

    fn cluster_outputs(&self) -> u32 {
        if self.shared == Shared::X { self.outputs * CLUSTER } else { self.outputs }
    }

    /// Rows of x that a block asks for at once, of so many.
    fn x_box(&self, rows: u32) -> u32 {
        match self.shared {
            Shared::W => self.rows,
            Shared::X => rows.div_ceil(CLUSTER).next_multiple_of(8).min(self.rows / CLUSTER),
        }
    }

    /// Rows of w that a block asks for at once.
    fn w_box(&self, onto: Onto) -> u32 {
        let is_half = self.shared == Shared::W || matches!(onto, Onto::Gate(_));
        if is_half { self.outputs / 2 } else { self.outputs }
    }

    fn shared_bytes(&self) -> u32 {
        let stage = (self.rows + self.outputs) * DEPTH * 2;
        let stages = ((MOST_SHARED - 512) / stage).min(MOST_STAGES);
        stages * stage + 512
    }

    /// Two threads a row, and the warp that asks.
    fn grid(&self, clusters: u32) -> Grid {
        Grid {
            blocks: [clusters * CLUSTER, 1],
            cluster: CLUSTER,
            threads: self.rows * 2 + 32,
            shared_bytes: self.shared_bytes(),
        }
    }

    /// Sums that the blocks of so many clusters leave for each other.
    fn parts(&self, clusters: u32) -> usize {
        len(&[clusters, CLUSTER, self.rows, self.outputs])
    }
}

pub(super) const MODULE: Module = Module {
    image: include_bytes!(concat!(env!("OUT_DIR"), "/split_k.fatbin")),
    functions: NAMES,
    most_shared: MOST_SHARED,
};

/// What a launch keeps between its blocks. As it is made, and after every launch, all of it is 0.
#[derive(Debug)]
pub(super) struct SplitKScratch {
    parts: CudaSlice<u32>,
    /// Clusters that run at once, whatever the instance: they wait for each other.
    clusters: u32,
}

impl SplitKScratch {
    /// For products of whatever shape. Empty where the device is no Hopper.
    ///
    /// # Errors
    /// When the device has not as much memory.
    pub(super) fn new(kernels: &Kernels) -> Result<Self, DeviceError> {
        let clusters = if kernels.is_hopper() { clusters(kernels)? } else { 0 };
        let parts = TILES.iter().map(|it| it.parts(clusters)).max().unwrap_or(0);
        let mut parts = kernels.memory(parts.max(1))?;
        kernels.stream().memset_zeros(&mut parts).map_err(driver("clear memory"))?;
        Ok(Self { parts, clusters })
    }

    /// Ways to cut a product, the one that should be fastest first.
    pub(super) fn cuts(&self, shape: &Linear) -> Vec<Cut> {
        let mut cuts = every_cut(shape, self.clusters);
        cuts.sort_by(|a, b| a.clocks(shape).total_cmp(&b.clocks(shape)));
        cuts
    }
}

fn every_cut(shape: &Linear, clusters: u32) -> Vec<Cut> {
    let all = TILES.iter().flat_map(|tile| SPLITS.map(|splits| (*tile, splits)));
    all.filter_map(|(tile, splits)| Cut::of(shape, tile, splits, clusters)).collect()
}

/// How many clusters run at once, whatever the tile.
fn clusters(kernels: &Kernels) -> Result<u32, DeviceError> {
    let mut least = kernels.multiprocessors() / CLUSTER;
    for (name, tile) in NAMES.iter().zip(TILES.iter().cycle()) {
        let Some(function) = kernels.function(name) else { continue };
        let count = tile.grid(least).clusters_at_once(kernels, function);
        least = least.min(count.map_err(driver("ask how many clusters run at once"))?);
    }
    Ok(least)
}

/// How a product is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Cut {
    tile: Tile,
    /// Tiles of a cluster that the rows are cut into.
    row_tiles: u32,
    /// Steps of k.
    steps: u32,
    splits: u32,
    /// Tiles of a cluster times splits.
    units: u32,
    clusters: u32,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.tile, self.splits)
    }
}

impl Cut {
    /// Absent: clusters that wait for each other would not run at once, or there are too many rows.
    fn of(shape: &Linear, tile: Tile, splits: u32, most_clusters: u32) -> Option<Self> {
        let row_tiles = shape.rows.div_ceil(tile.cluster_rows());
        let steps = shape.inputs.div_ceil(DEPTH);
        let outputs = tile.cluster_outputs() / shape.onto.projections();
        let units = shape.outputs.div_ceil(outputs).checked_mul(row_tiles * splits)?;
        // The kernel counts up to here.
        steps.checked_mul(splits)?;
        let clusters = units.min(most_clusters);
        let runs_at_once = splits == 1 || units <= most_clusters && steps >= splits;
        // A block has both halves of a gate, in whole sixteens, and all of k.
        let has_gate = matches!(shape.onto, Onto::Gate(_));
        let fits_gate = !has_gate || splits == 1 && tile.outputs.is_multiple_of(32);
        let is_moved = shape.outputs.is_multiple_of(8) && shape.rows <= MOST_ROWS;
        let fits = runs_at_once && fits_gate && is_moved && clusters > 0;
        fits.then_some(Self { tile, row_tiles, steps, splits, units, clusters })
    }

    /// About how many clocks of an H200 it takes: products, what the second cache gives or what memory gives, whichever is most;
    /// then the exchange and the writes. Fitted to measurements (PERFORMANCE.md).
    fn clocks(&self, shape: &Linear) -> f64 {
        let [rows, outputs, clusters, splits] =
            [self.tile.rows, self.tile.outputs, self.clusters, self.splits].map(f64::from);
        let waves = f64::from(self.units.div_ceil(self.clusters));
        let steps = waves * f64::from(self.steps.div_ceil(self.splits));
        let multiplied = steps * ((rows * outputs / 32.0).max(180.0) + 100.0);
        let shared = if self.tile.shared == Shared::X { rows } else { outputs };
        let step_bytes = f64::from(DEPTH * 2) * (2.0 * (rows + outputs) - shared);
        let loaded = steps * clusters * step_bytes / 5500.0;
        let weights = f64::from(shape.inputs) * f64::from(shape.w_rows()) * 2.0;
        let read = weights / (clusters * 44.0).min(2400.0);
        let left = (splits - 1.0) / splits * rows * outputs * 4.0;
        let exchanged = if self.splits > 1 { 2000.0 + left / 8.0 } else { 0.0 };
        let written = waves * (1500.0 + rows * outputs / 8.0);
        multiplied.max(loaded).max(read) + exchanged + written
    }
}

/// The kernel's argument, field by field.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct SplitK {
    w: CUtensorMap,
    x: CUtensorMap,
    out: u64,
    parts: u64,
    rows: u32,
    outputs: u32,
    x_box: u32,
    steps: u32,
    row_tiles: u32,
    splits: u32,
    units: u32,
    adds: u32,
    gate: u32,
}

/// Describes a matrix of `rows` rows of `width` numbers to the copy engine, in boxes of `box_rows` by `DEPTH`. What is beyond the
/// matrix is zero. Asks the host alone.
fn tensor_map<T: Real>(
    address: u64,
    (rows, width): (u32, u32),
    box_rows: u32,
) -> Result<CUtensorMap, DriverError> {
    let dtype = if T::NAME == "bf16" {
        CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    } else {
        CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    };
    let mut map = CUtensorMap { opaque: [0; 16] };
    let (sizes, pitch) = ([u64::from(width), u64::from(rows)], u64::from(width) * 2);
    let (lengths, strides) = ([DEPTH, box_rows], [1, 1]);
    // SAFETY: writes the map; reads two sizes, one pitch, two lengths and two strides, as a matrix has.
    let made = unsafe {
        cuTensorMapEncodeTiled(
            &raw mut map,
            dtype,
            2,
            address as *mut c_void,
            sizes.as_ptr(),
            &raw const pitch,
            lengths.as_ptr(),
            strides.as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    made.result().map(|()| map)
}

impl Kernels {
    /// Queues a product of at most 1,024 rows, on Hopper. Shapes as in [`Linear::reference`]; `cut`: one of
    /// [`SplitKScratch::cuts`] of this shape.
    ///
    /// The weights are read ahead of what is before in the stream: they must not be what a launch before it writes. Blocks
    /// wait for each other: nothing else may keep multiprocessors until this launch has ended.
    ///
    /// # Errors
    /// When lengths do not fit, or the cut is of another shape.
    pub(super) fn split_k<T: Real>(
        &self,
        (shape, cut): (&Linear, &Cut),
        (x, w): (&CudaSlice<T>, &CudaSlice<T>),
        out: &mut CudaSlice<T>,
        scratch: &mut SplitKScratch,
    ) -> Result<(), LaunchError> {
        shape.check([x.len(), w.len(), out.len()])?;
        if Cut::of(shape, cut.tile, cut.splits, scratch.clusters) != Some(*cut) {
            return Err(LaunchError::Unsupported(format!("{shape:?} by split_k {cut}")));
        }
        let parts = if cut.splits > 1 { cut.tile.parts(cut.clusters) } else { 0 };
        at_least("parts", scratch.parts.len(), parts)?;
        let stream = self.stream();
        let (x, w) = (x.device_ptr(stream).0, w.device_ptr(stream).0);
        let described = |source| LaunchError::Driver { what: "to describe a matrix", source };
        let x_box = cut.tile.x_box(shape.rows);
        let w_box = cut.tile.w_box(shape.onto);
        let argument = SplitK {
            w: tensor_map::<T>(w, (shape.w_rows(), shape.inputs), w_box).map_err(described)?,
            x: tensor_map::<T>(x, (shape.rows, shape.inputs), x_box).map_err(described)?,
            out: out.device_ptr_mut(stream).0,
            parts: scratch.parts.device_ptr_mut(stream).0,
            rows: shape.rows,
            outputs: shape.outputs,
            x_box,
            steps: cut.steps,
            row_tiles: cut.row_tiles,
            splits: cut.splits,
            units: cut.units,
            adds: u32::from(shape.onto == Onto::Residual),
            gate: match shape.onto {
                Onto::Nothing | Onto::Residual => 0,
                Onto::Gate(GateActivation::Silu) => 1,
                Onto::Gate(GateActivation::Gelu) => 2,
            },
        };
        let function = self.kernel(&format!("split_k_{}_{}", T::NAME, cut.tile))?;
        let grid = cut.tile.grid(cut.clusters);
        // SAFETY: the argument is that of `split_k_*` in split_k.cu, which stays within the lengths that are checked above and
        // touches nothing but weights before it has waited.
        launched("split_k", unsafe { grid.queue(self, function, &argument) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTERS: u32 = 66;

    fn cuts(rows: u32, inputs: u32, outputs: u32) -> Vec<Cut> {
        let shape = Linear { rows, inputs, outputs, onto: Onto::Nothing };
        every_cut(&shape, CLUSTERS)
    }

    #[test]
    fn every_cut_has_every_row_once_and_no_more_waiting_clusters_than_run() {
        for (rows, outputs) in
            [(1, 8), (63, 4096), (64, 6144), (65, 28_672), (300, 4096), (1024, 64)]
        {
            let found = cuts(rows, 4096, outputs);
            assert!(!found.is_empty());
            for cut in found {
                assert!(cut.row_tiles * cut.tile.cluster_rows() >= rows, "{cut:?}");
                assert!((cut.row_tiles - 1) * cut.tile.cluster_rows() < rows, "{cut:?}");
                assert!(cut.clusters <= CLUSTERS, "{cut:?}");
                assert!(cut.splits == 1 || cut.units == cut.clusters, "{cut:?}");
            }
        }
        assert!(cuts(MOST_ROWS + 1, 4096, 4096).is_empty());
        assert!(cuts(16, 4096, 4095).is_empty(), "rows that are not moved 16 bytes at a time");
    }

    #[test]
    fn every_step_is_of_one_split() {
        for cut in cuts(16, 8, 64) {
            assert_eq!(cut.splits, 1, "{cut:?}");
        }
    }

    #[test]
    fn every_tile_fits_into_the_shared_memory_of_a_multiprocessor() {
        for tile in TILES {
            assert!(tile.shared_bytes() <= MODULE.most_shared, "{tile:?}");
        }
    }

    #[test]
    fn names_are_those_of_the_tiles() {
        for (name, tile) in NAMES.iter().zip(TILES.iter().cycle()) {
            assert!(name.ends_with(&format!("_{tile}")), "{name} {tile}");
        }
    }
}
