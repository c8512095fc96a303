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
    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

    use super::RmsNorm;
    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{EIGHT, launched, len, same, whole_eights};
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

    /// The kernels' argument, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Norm {
        x: u64,
        residual: u64,
        weight: u64,
        out: u64,
        width: u32,
        epsilon: f32,
    }

    impl Kernels {
        /// Queues the norm. Shapes as in [`RmsNorm::reference`]. The weights are read ahead of what is before in the stream: no
        /// launch may write them.
        ///
        /// # Errors
        /// When lengths do not fit, or a row is no multiple of 8 or too long.
        pub fn rms_norm<T: Real>(
            &self,
            shape: &RmsNorm,
            (x, weight): (&CudaSlice<T>, &CudaSlice<T>),
            out: &mut CudaSlice<T>,
        ) -> Result<(), LaunchError> {
            self.norm(("rms_norm", shape), (x, weight), 0, out)
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
            same("residual", residual.len(), x.len())?;
            let residual = residual.device_ptr_mut(self.stream()).0;
            self.norm(("add_rms_norm", shape), (x, weight), residual, out)
        }

        /// `residual`: none, or as long as x.
        fn norm<T: Real>(
            &self,
            (what, shape): (&'static str, &RmsNorm),
            (x, weight): (&CudaSlice<T>, &CudaSlice<T>),
            residual: u64,
            out: &mut CudaSlice<T>,
        ) -> Result<(), LaunchError> {
            shape.check([x.len(), weight.len(), out.len()])?;
            if shape.rows == 0 {
                return Ok(());
            }
            let stream = self.stream();
            let argument = Norm {
                x: x.device_ptr(stream).0,
                residual,
                weight: weight.device_ptr(stream).0,
                out: out.device_ptr_mut(stream).0,
                width: shape.eights(),
                epsilon: shape.epsilon,
            };
            let function = self.kernel(&format!("{what}_{}", T::NAME))?;
            let grid = Grid::of([shape.rows, 1], shape.threads());
            // SAFETY: the argument is that of the kernels of rms_norm.cu, which stay within the lengths checked above and touch
            // nothing but weights before they have waited.
            launched(what, unsafe { grid.queue(self, function, &argument) })
        }
    }
}
