//! What numbers kernels are built for.

use cudarc::driver::DeviceRepr;
use half::{bf16, f16};

use super::E4m3;

/// Numbers that arrays of activations, weights, K and V are of.
pub trait Real: DeviceRepr + Copy + Into<f32> + 'static {
    /// In the names of kernels.
    const NAME: &str;
    /// The nearest.
    fn from_f32(value: f32) -> Self;
}

impl Real for bf16 {
    const NAME: &str = "bf16";
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Real for f16 {
    const NAME: &str = "f16";
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Numbers that an arena holds beside activations of `T`: the same, or fewer bits.
pub trait KvReal<T: Real>: DeviceRepr + Copy + Into<f32> + 'static {
    /// In the names of kernels, behind the name of `T`.
    const SUFFIX: &str;
    /// Of a number.
    const BYTES: u32;
}

impl<T: Real> KvReal<T> for T {
    const SUFFIX: &str = "";
    const BYTES: u32 = 2;
}

impl<T: Real> KvReal<T> for E4m3 {
    const SUFFIX: &str = "_e4m3";
    const BYTES: u32 = 1;
}
