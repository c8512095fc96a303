//! Products of up to some hundred rows on Hopper, as fast as the weights arrive. The meaning is that of [`super::Linear`].

use std::ffi::c_void;
use std::ptr::{from_ref, null_mut};

use cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig, CUtensorMap, CUtensorMapDataType,
    CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle,
    cuLaunchKernelEx, cuOccupancyMaxActiveClusters, cuTensorMapEncodeTiled,
};
use cudarc::driver::{CudaFunction, CudaSlice, DevicePtr, DevicePtrMut, DriverError};

use super::device::{Module, driver};
use super::launch::{at_least, launched, len};
use super::{DeviceError, Kernels, LaunchError, Linear, Onto, Real};

/// Rows of x at most.
const MOST_ROWS: u32 = 512;
/// Rows that [`super::few_row`] is faster for, and those up to which this is faster than the library: measured on an H200.
const FEW_ROWS: u32 = 4;
const BEST_ROWS: u32 = 32;

/// As in the kernel.
const CLUSTER: u32 = 2;
const DEPTH: u32 = 64;
/// Steps of a piece at least: fewer are not worth a part of their own.
const LEAST_STEPS: u32 = 4;

/// What is compiled for a number of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instance {
    /// Rows and outputs of a tile.
    rows: u32,
    outputs: u32,
    w_stages: u32,
    x_stages: u32,
}

const INSTANCES: [Instance; 6] = [
    Instance { rows: 32, outputs: 128, w_stages: 8, x_stages: 8 },
    Instance { rows: 64, outputs: 128, w_stages: 8, x_stages: 8 },
    Instance { rows: 96, outputs: 128, w_stages: 8, x_stages: 7 },
    Instance { rows: 128, outputs: 128, w_stages: 7, x_stages: 6 },
    Instance { rows: 192, outputs: 128, w_stages: 6, x_stages: 5 },
    Instance { rows: 256, outputs: 128, w_stages: 6, x_stages: 4 },
];
const MOST_TILE_ROWS: u32 = INSTANCES[INSTANCES.len() - 1].rows;

impl Instance {
    fn shared_bytes(&self) -> u32 {
        let stages = (self.w_stages * self.outputs + self.x_stages * self.rows) * DEPTH * 2;
        let barriers = (2 * self.w_stages + self.x_stages) * 8;
        stages + barriers.next_multiple_of(1024)
    }

    /// Two threads an output, and the warp that asks.
    fn threads(&self) -> u32 {
        self.outputs * 2 + 32
    }

    /// Into how many pieces the line of tiles is cut. Pieces that begin and end with tiles leave less to each other, which is
    /// worth some idle clusters: the more the larger parts are.
    fn clusters(&self, tiles: u32, most: u32) -> u32 {
        let busy = if self.rows <= 32 { 9 } else { 8 };
        let fits = |it: &u32| tiles.is_multiple_of(*it) || it.is_multiple_of(tiles);
        (1..=most).rev().find(fits).filter(|it| it * 10 >= most * busy).unwrap_or(most)
    }

    /// Sums that blocks leave for each other: of two tiles each.
    fn parts(&self, clusters: u32) -> usize {
        len(&[clusters, CLUSTER, 2, self.rows, self.outputs])
    }
}

pub(super) const MODULE: Module = Module {
    image: include_bytes!(concat!(env!("OUT_DIR"), "/stream_k.fatbin")),
    functions: &NAMES,
    most_shared: 227 << 10,
};

const NAMES: [&str; 12] = [
    "stream_k_bf16_32",
    "stream_k_bf16_64",
    "stream_k_bf16_96",
    "stream_k_bf16_128",
    "stream_k_bf16_192",
    "stream_k_bf16_256",
    "stream_k_f16_32",
    "stream_k_f16_64",
    "stream_k_f16_96",
    "stream_k_f16_128",
    "stream_k_f16_192",
    "stream_k_f16_256",
];

/// What a launch keeps between its blocks. As it is made, and after every launch, all of it is 0.
#[derive(Debug)]
pub struct StreamKScratch {
    parts: CudaSlice<u32>,
    /// Clusters that run at once, whatever the instance: they wait for each other.
    clusters: u32,
}

impl StreamKScratch {
    /// For products of whatever shape. Empty where the device is no Hopper.
    ///
    /// # Errors
    /// When the device has not as much memory.
    pub fn new(kernels: &Kernels) -> Result<Self, DeviceError> {
        let clusters = if kernels.is_hopper() { clusters(kernels)? } else { 0 };
        let parts = INSTANCES.iter().map(|it| it.parts(clusters)).max().unwrap_or(0);
        let mut parts = kernels.memory(parts.max(1))?;
        kernels.stream().memset_zeros(&mut parts).map_err(driver("clear memory"))?;
        Ok(Self { parts, clusters })
    }

    /// Whether the device has the kernel.
    pub fn is_usable(&self) -> bool {
        self.clusters > 0
    }

    /// Whether this is the fastest way to such a product.
    pub(super) fn is_best(&self, shape: &Linear) -> bool {
        (FEW_ROWS + 1..=BEST_ROWS).contains(&shape.rows)
            && shape.outputs.is_multiple_of(8)
            && Cut::new(shape, self.clusters).is_some()
    }
}

/// How many clusters run at once.
fn clusters(kernels: &Kernels) -> Result<u32, DeviceError> {
    let mut least = kernels.multiprocessors() / CLUSTER;
    for (name, instance) in NAMES.iter().zip(INSTANCES.iter().cycle()) {
        let Some(function) = kernels.function(name) else { continue };
        let mut attributes = attributes();
        let config = config(kernels, (least, instance), &mut attributes);
        let mut count = 0;
        // SAFETY: the function and what the configuration points to are live; one number is written.
        let asked = unsafe {
            cuOccupancyMaxActiveClusters(&raw mut count, function.cu_function(), &raw const config)
        };
        asked.result().map_err(driver("ask how many clusters run at once"))?;
        least = least.min(count.unsigned_abs());
    }
    Ok(least)
}

/// Clusters of blocks, beside the launch before: the kernel waits for that one's end by itself.
fn attributes() -> [CUlaunchAttribute; 2] {
    let cluster = CUlaunchAttributeValue_union__bindgen_ty_1 { x: CLUSTER, y: 1, z: 1 };
    [
        CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { clusterDim: cluster },
        },
        CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        },
    ]
}

fn config(
    kernels: &Kernels,
    (clusters, instance): (u32, &Instance),
    attributes: &mut [CUlaunchAttribute; 2],
) -> CUlaunchConfig {
    CUlaunchConfig {
        gridDimX: clusters * CLUSTER,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: instance.threads(),
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: instance.shared_bytes(),
        hStream: kernels.stream().cu_stream(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: 2,
    }
}

/// How a product is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    instance: Instance,
    /// Tiles that the rows are cut into.
    columns: u32,
    tiles: u32,
    /// Steps of a tile.
    steps: u32,
    clusters: u32,
}

impl Cut {
    /// Absent: there are too many rows, or steps.
    fn new(shape: &Linear, most_clusters: u32) -> Option<Self> {
        let columns = shape.rows.div_ceil(MOST_TILE_ROWS).max(1);
        let rows = shape.rows.div_ceil(columns);
        let instance = *INSTANCES.iter().find(|it| it.rows >= rows)?;
        let tiles = shape.outputs.div_ceil(CLUSTER * instance.outputs).checked_mul(columns)?;
        let steps = shape.inputs.div_ceil(DEPTH);
        let all = tiles.checked_mul(steps)?;
        let most_clusters = most_clusters.min(all.div_ceil(LEAST_STEPS));
        // The kernel counts up to here.
        all.checked_add(1)?.checked_mul(most_clusters)?;
        let clusters = instance.clusters(tiles, most_clusters);
        (shape.rows <= MOST_ROWS && clusters > 0).then_some(Self {
            instance,
            columns,
            tiles,
            steps,
            clusters,
        })
    }
}

/// The kernel's argument, field by field.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct StreamK {
    w: CUtensorMap,
    x: CUtensorMap,
    out: u64,
    parts: u64,
    rows: u32,
    outputs: u32,
    steps: u32,
    columns: u32,
    tiles: u32,
    adds: u32,
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
    /// Queues a product of at most 512 rows, on Hopper. Shapes as in [`Linear::reference`].
    ///
    /// The weights are read ahead of what is before in the stream: they must not be what the launch just before writes. Blocks
    /// wait for each other: nothing else may keep multiprocessors until this launch has ended.
    ///
    /// # Errors
    /// When lengths do not fit, the device is no Hopper, there are more rows, or rows of x or outputs are no multiple of 8.
    pub fn stream_k<T: Real>(
        &self,
        shape: &Linear,
        (x, w): (&CudaSlice<T>, &CudaSlice<T>),
        out: &mut CudaSlice<T>,
        scratch: &mut StreamKScratch,
    ) -> Result<(), LaunchError> {
        shape.check([x.len(), w.len(), out.len()])?;
        if shape.rows == 0 || shape.outputs == 0 {
            return Ok(());
        }
        let unsupported = || LaunchError::Unsupported(format!("{shape:?} by equal shares of k"));
        let cut = Cut::new(shape, scratch.clusters).filter(|_| shape.outputs.is_multiple_of(8));
        let cut = cut.ok_or_else(unsupported)?;
        at_least("parts", scratch.parts.len(), cut.instance.parts(cut.clusters))?;
        let stream = self.stream();
        let (x, w) = (x.device_ptr(stream).0, w.device_ptr(stream).0);
        let described = |source| LaunchError::Driver { what: "to describe a matrix", source };
        let argument = StreamK {
            w: tensor_map::<T>(w, (shape.outputs, shape.inputs), cut.instance.outputs)
                .map_err(described)?,
            x: tensor_map::<T>(x, (shape.rows, shape.inputs), cut.instance.rows / CLUSTER)
                .map_err(described)?,
            out: out.device_ptr_mut(stream).0,
            parts: scratch.parts.device_ptr_mut(stream).0,
            rows: shape.rows,
            outputs: shape.outputs,
            steps: cut.steps,
            columns: cut.columns,
            tiles: cut.tiles,
            adds: u32::from(shape.onto == Onto::Residual),
        };
        let function = self.kernel(&format!("stream_k_{}_{}", T::NAME, cut.instance.rows))?;
        launched("stream_k", self.queue_clusters(function, &cut, &argument))
    }

    fn queue_clusters(
        &self,
        function: &CudaFunction,
        cut: &Cut,
        argument: &StreamK,
    ) -> Result<(), DriverError> {
        self.stream().context().bind_to_thread()?;
        let mut attributes = attributes();
        let config = config(self, (cut.clusters, &cut.instance), &mut attributes);
        let mut arguments = [from_ref(argument).cast_mut().cast::<c_void>()];
        // SAFETY: the argument is that of `stream_k_*` in stream_k.cu, which stays within the lengths that `stream_k` checks and
        // touches nothing but weights before it has waited.
        unsafe {
            cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                arguments.as_mut_ptr(),
                null_mut(),
            )
        }
        .result()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(rows: u32, inputs: u32, outputs: u32) -> Option<Cut> {
        Cut::new(&Linear { rows, inputs, outputs, onto: Onto::Nothing }, 66)
    }

    #[test]
    fn every_number_of_rows_has_an_instance_with_a_row_in_every_tile() {
        for rows in 1..=MOST_ROWS {
            let cut = cut(rows, 4096, 4096).unwrap();
            assert!(cut.columns * cut.instance.rows >= rows, "{cut:?}");
            assert!((cut.columns - 1) * cut.instance.rows < rows, "{cut:?}");
        }
        assert_eq!(cut(MOST_ROWS + 1, 4096, 4096), None);
    }

    #[test]
    fn every_instance_fits_into_the_shared_memory_of_a_multiprocessor() {
        for instance in INSTANCES {
            assert!(instance.shared_bytes() <= MODULE.most_shared, "{instance:?}");
        }
    }

    #[test]
    fn pieces_begin_with_tiles_where_that_leaves_few_clusters_idle() {
        let clusters = |rows, inputs, outputs| cut(rows, inputs, outputs).unwrap().clusters;
        assert_eq!([clusters(32, 4096, 6144), clusters(64, 4096, 6144)], [66, 66]);
        assert_eq!([clusters(32, 4096, 4096), clusters(64, 14_336, 4096)], [64, 64]);
        assert_eq!([clusters(32, 4096, 28_672), clusters(64, 4096, 28_672)], [66, 56]);
    }

    #[test]
    fn a_small_product_is_not_cut_into_too_small_pieces() {
        assert_eq!(cut(64, 256, 8).unwrap().clusters, 1);
        assert_eq!(cut(64, 512, 8).unwrap().clusters, 2);
    }
}
