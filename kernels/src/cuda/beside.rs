//! Launches that begin while the one before them ends (programmatic dependent launch): their kernels wait for that end by themselves.

use std::ffi::c_void;
use std::ptr::{from_ref, null_mut};

use cudarc::driver::sys::{
    CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig, cuLaunchKernelEx,
    cuOccupancyMaxActiveClusters,
};
use cudarc::driver::{CudaFunction, DriverError};

use super::Kernels;

/// The first virtual architecture with an instruction that waits for the launch before.
const WAITS: i32 = 90;

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
        let version =
            function.get_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?;
        Ok(if version >= WAITS { Self::Beside } else { Self::After })
    }
}

/// The shape of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: u32,
    /// Blocks of a cluster; 1 where there are none. Those of a cluster begin beside what is before them.
    pub(super) cluster: u32,
    pub(super) threads: u32,
    pub(super) shared_bytes: u32,
    pub(super) begins: Begins,
}

impl Grid {
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
    /// The argument is, field by field, that of the kernel, which stays within what it names and touches nothing that the launch
    /// before it may write until it has waited for its end.
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
        let count = match self.begins {
            Begins::After => 0,
            Begins::Beside => 1 + u32::from(self.cluster > 1),
        };
        let config = CUlaunchConfig {
            gridDimX: self.blocks,
            gridDimY: 1,
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
