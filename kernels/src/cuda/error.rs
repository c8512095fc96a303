//! What a device and a launch refuse.

use cudarc::cublaslt::result::CublasError;
use cudarc::driver::DriverError;

use crate::cpu::KernelError;

/// A device that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error(
        "no NVIDIA driver: libcuda.so.1 is not there. An NVIDIA GPU with driver 580 or later is needed"
    )]
    NoDriver,
    #[error("the driver speaks CUDA {major}.{minor}, CUDA 13.0 is needed: driver 580 or later")]
    OldDriver { major: i32, minor: i32 },
    #[error("GPU {ordinal} is not there, the driver has {count}")]
    NoDevice { ordinal: usize, count: usize },
    #[error(
        "GPU {ordinal} ({name}) has compute capability {major}.{minor}, 8.0 or higher is needed"
    )]
    OldDevice { ordinal: usize, name: String, major: i32, minor: i32 },
    #[error("{bytes} bytes of device memory cannot be had, {free} are free")]
    OutOfMemory { bytes: usize, free: usize },
    #[error("{what} wants {wanted}")]
    Shape { what: &'static str, wanted: &'static str },
    #[error("{what}: {source:?}")]
    Driver { what: &'static str, source: DriverError },
    #[error(
        "no cuBLASLt: libcublasLt.so.13 is not where the loader looks. It is part of CUDA 13 (`nvidia-cublas`)"
    )]
    NoLibrary,
    #[error("{what}: {source}")]
    Library { what: &'static str, source: CublasError },
}

/// A launch that was refused.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error(transparent)]
    Lengths(#[from] KernelError),
    #[error("no kernel for {0}")]
    Unsupported(String),
    #[error("the device refuses {what}: {source:?}")]
    Driver { what: &'static str, source: DriverError },
    #[error("cuBLASLt refuses {what}: {source}")]
    Library { what: &'static str, source: CublasError },
}
