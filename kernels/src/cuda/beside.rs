//! The one way of launching: a launch begins when there is room beside the one before it (programmatic dependent launch), so that it
//! waits neither for that one's last block nor for the device to set it up.
//!
//! The rule that kernels keep:
//! - Every thread of every block waits (`wait_for_previous`) before it touches what a launch may write or may still read, and before
//!   it returns. The wait is for the end of the one launch before, which has waited in its turn: a kernel that leaves without
//!   having waited would let what follows run beside what was before.
//! - Before the wait it reads nothing but its argument and what no launch ever writes: weights, frequencies. Tables, lengths,
//!   states, K and V are not of these.
//! - It says `let_next_begin` where measurements say: first, after its wait, or never. The next launch begins once every block has
//!   said so or ended: until then it takes no block's place.
//! - What it keeps for the next launch, such as counters that are 0 again, is safe: that one looks after its wait.
//!
//! Copies and clears are waited for in full, and wait in full, as ever. All this holds in graphs, too.

use std::ffi::c_void;
use std::ptr::{from_ref, null_mut};

use cudarc::driver::sys::{
    CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig, cuLaunchKernelEx,
    cuOccupancyMaxActiveClusters,
};
use cudarc::driver::{CudaFunction, DriverError};

use super::Kernels;

/// The first virtual architecture with an instruction that waits for the launch before.
const WAITS: i32 = 90;

/// Shared memory of a multiprocessor that has such launches.
const SHARED: u32 = 228 << 10;

/// When a launch may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begins {
    /// After the end of the one before it.
    After,
    /// When there is room beside the one before it.
    Beside,
}

impl Begins {
    /// Machine code for devices without such launches, or made of PTX for the oldest, has no instruction that waits.
    pub(super) fn of(function: &CudaFunction) -> Result<Self, DriverError> {
        Ok(if function.ptx_version()? >= WAITS { Self::Beside } else { Self::After })
    }
}

/// The shape of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    /// In x and y.
    pub(super) blocks: [u32; 2],
    /// Blocks of a cluster, in x; 1 where there are none. Only devices that have them are asked for more.
    pub(super) cluster: u32,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
}

impl Grid {
    /// Without clusters and without shared memory that is asked for.
    pub(super) fn of(blocks: [u32; 2], threads: u32) -> Self {
        Self { blocks, cluster: 1, threads, shared_bytes: 0 }
    }

    /// With so much shared memory a block, and at most so many blocks on a multiprocessor: those that begin beside others take what
    /// places there are, and would crowd on some multiprocessors while others have none.
    pub(super) fn spread(self, kernels: &Kernels, shared_bytes: u32, at_most: u32) -> Self {
        let least = match kernels.begins() {
            Begins::After => 0,
            Begins::Beside => SHARED / (at_most + 1),
        };
        Self { shared_bytes: shared_bytes.max(least), ..self }
    }

    /// How many of its clusters run at once.
    pub(super) fn clusters_at_once(
        self,
        kernels: &Kernels,
        function: &CudaFunction,
    ) -> Result<u32, DriverError> {
        let mut count = 0;
        let asked = self.with_config(kernels, |config| {
            // SAFETY: the function and what the configuration points to are live; one number is written.
            unsafe { cuOccupancyMaxActiveClusters(&raw mut count, function.cu_function(), config) }
        });
        asked.result().map(|()| count.unsigned_abs())
    }

    /// Queues a kernel of one argument.
    ///
    /// # Safety
    /// The argument is, field by field, that of the kernel, which stays within what it names and keeps the rule above.
    pub(super) unsafe fn queue<A>(
        self,
        kernels: &Kernels,
        function: &CudaFunction,
        argument: &A,
    ) -> Result<(), DriverError> {
        kernels.stream().context().bind_to_thread()?;
        let mut arguments = [from_ref(argument).cast_mut().cast::<c_void>()];
        let queued = self.with_config(kernels, |config| {
            // SAFETY: what is pointed to is live; the rest is the caller's.
            unsafe {
                cuLaunchKernelEx(config, function.cu_function(), arguments.as_mut_ptr(), null_mut())
            }
        });
        queued.result()
    }

    fn with_config<R>(self, kernels: &Kernels, used: impl FnOnce(*const CUlaunchConfig) -> R) -> R {
        let cluster = CUlaunchAttributeValue_union__bindgen_ty_1 { x: self.cluster, y: 1, z: 1 };
        let mut attributes = [
            CUlaunchAttribute {
                id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            },
            CUlaunchAttribute {
                id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                pad: [0; 4],
                value: CUlaunchAttributeValue { clusterDim: cluster },
            },
        ];
        let count = match kernels.begins() {
            Begins::After => 0,
            Begins::Beside => 1 + u32::from(self.cluster > 1),
        };
        let config = CUlaunchConfig {
            gridDimX: self.blocks[0],
            gridDimY: self.blocks[1],
            gridDimZ: 1,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes,
            hStream: kernels.stream().cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count,
        };
        used(&raw const config)
    }
}
