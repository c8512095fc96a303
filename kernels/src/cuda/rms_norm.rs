//! Root-mean-square norm of rows (Zhang and Sennrich, arXiv 1910.07467), alone or of a residual that something is added to.

/// The norm of each row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmsNorm {
    pub rows: u32,
    /// Numbers of a row: a multiple of 8, at most 32,768.
    pub width: u32,
    pub epsilon: f32,
}

impl RmsNorm {
    /// The meaning of the kernel. `x`, `out`: [rows, width]; `weight`: [width].
    pub fn reference(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let width = self.width as usize;
        for (x, out) in x.chunks(width).zip(out.chunks_mut(width)) {
            let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
            let factor = 1.0 / (squares / f64::from(self.width) + f64::from(self.epsilon)).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = (f64::from(*x) * factor) as f32 * weight;
            }
        }
    }
}

#[cfg(feature = "cuda")]
pub(super) use launch::MODULE;

#[cfg(feature = "cuda")]
mod launch {
    use cudarc::driver::{CudaSlice, PushKernelArg};

    use super::RmsNorm;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{EIGHT, grid, launched, len, same, whole_eights};
    use crate::cuda::{Kernels, LaunchError, Real};

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/rms_norm.fatbin")),
        functions: &["rms_norm_bf16", "rms_norm_f16", "add_rms_norm_bf16", "add_rms_norm_f16"],
        most_shared: 0,
    };

    /// Eights of a row that a thread has, as in the kernel.
    const PIECES: u32 = 4;

    impl RmsNorm {
        fn check(&self, [x, weight, out]: [usize; 3]) -> Result<(), LaunchError> {
            same("x", x, len(&[self.rows, self.width]))?;
            same("weight", weight, self.width as usize)?;
            same("out", out, x)?;
            whole_eights("rows of", self.width)?;
            if self.width > 1024 * EIGHT * PIECES {
                return Err(LaunchError::Unsupported(format!("rows of {}", self.width)));
            }
            Ok(())
        }

        /// Eights of a row.
        fn eights(&self) -> u32 {
            self.width / EIGHT
        }

        fn threads(&self) -> u32 {
            self.eights().div_ceil(PIECES).next_multiple_of(32)
        }
    }

    impl Kernels {
        /// Queues the norm. Shapes as in [`RmsNorm::reference`].
        ///
        /// # Errors
        /// When lengths do not fit, or a row is no multiple of 8 or too long.
        pub fn rms_norm<T: Real>(
            &self,
            shape: &RmsNorm,
            (x, weight): (&CudaSlice<T>, &CudaSlice<T>),
            out: &mut CudaSlice<T>,
        ) -> Result<(), LaunchError> {
            shape.check([x.len(), weight.len(), out.len()])?;
            if shape.rows == 0 {
                return Ok(());
            }
            let function = self.kernel(&format!("rms_norm_{}", T::NAME))?;
            let width = shape.eights();
            let mut launch = self.stream().launch_builder(function);
            launch.arg(x).arg(weight).arg(out).arg(&width).arg(&shape.epsilon);
            // SAFETY: arguments match `rms_norm_*` in rms_norm.cu, which stays within the lengths checked above.
            launched("rms_norm", unsafe { launch.launch(grid(shape.rows, shape.threads())) })
        }

        /// Queues residual += x, out = norm(residual). Shapes as in [`RmsNorm::reference`]; `residual` as `x`.
        ///
        /// # Errors
        /// As [`Self::rms_norm`].
        pub fn add_rms_norm<T: Real>(
            &self,
            shape: &RmsNorm,
            (x, weight): (&CudaSlice<T>, &CudaSlice<T>),
            residual: &mut CudaSlice<T>,
            out: &mut CudaSlice<T>,
        ) -> Result<(), LaunchError> {
            shape.check([x.len(), weight.len(), out.len()])?;
            same("residual", residual.len(), x.len())?;
            if shape.rows == 0 {
                return Ok(());
            }
            let function = self.kernel(&format!("add_rms_norm_{}", T::NAME))?;
            let width = shape.eights();
            let mut launch = self.stream().launch_builder(function);
            launch.arg(x).arg(residual).arg(weight).arg(out).arg(&width).arg(&shape.epsilon);
            // SAFETY: arguments match `add_rms_norm_*` in rms_norm.cu, which stays within the lengths checked above.
            launched("add_rms_norm", unsafe { launch.launch(grid(shape.rows, shape.threads())) })
        }
    }
}
