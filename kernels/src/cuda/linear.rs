//! Matrix products with weights as checkpoints have them: out = x w^T, or out += x w^T.

/// A product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Linear {
    pub rows: u32,
    /// Numbers of a row of x and of w: a multiple of 8.
    pub inputs: u32,
    pub outputs: u32,
    pub onto: Onto,
}

/// What a product does with what is in its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Onto {
    /// The output becomes the product.
    Nothing,
    /// The product is added to the output, which is rounded once: a residual.
    Residual,
}

impl Linear {
    /// The meaning of the kernels. `x`: [rows, inputs]; `w`: [outputs, inputs]; `out`: [rows, outputs].
    pub fn reference(&self, x: &[f32], w: &[f32], out: &mut [f32]) {
        let (inputs, outputs) = (self.inputs as usize, self.outputs as usize);
        for (x, out) in x.chunks(inputs).zip(out.chunks_mut(outputs)) {
            for (w, out) in w.chunks(inputs).zip(out) {
                let product: f64 =
                    x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                *out = match self.onto {
                    Onto::Nothing => product as f32,
                    Onto::Residual => (f64::from(*out) + product) as f32,
                };
            }
        }
    }
}

#[cfg(feature = "cuda")]
pub use launch::Products;

#[cfg(feature = "cuda")]
mod launch {
    use std::path::Path;

    use cudarc::driver::CudaSlice;

    use super::Linear;
    use crate::cuda::few_row::{FewRowScratch, MOST_ROWS};
    use crate::cuda::gemm::Gemm;
    use crate::cuda::launch::{len, same, whole_eights};
    use crate::cuda::stream_k::StreamKScratch;
    use crate::cuda::{DeviceError, Kernels, LaunchError, Real};

    impl Linear {
        pub(in crate::cuda) fn check(&self, [x, w, out]: [usize; 3]) -> Result<(), LaunchError> {
            same("x", x, len(&[self.rows, self.inputs]))?;
            same("w", w, len(&[self.outputs, self.inputs]))?;
            same("out", out, len(&[self.rows, self.outputs]))?;
            whole_eights("inputs of", self.inputs)
        }
    }

    /// What products keep: memory between blocks, and the choices of the library.
    #[derive(Debug)]
    pub struct Products {
        pub few_row: FewRowScratch,
        pub stream_k: StreamKScratch,
        pub gemm: Gemm,
    }

    impl Products {
        /// For products of these shapes, with whatever rows. `choices`: where the choices of the library are kept.
        ///
        /// # Errors
        /// When the device has not as much memory, or cuBLASLt is not there.
        pub fn open(
            kernels: &Kernels,
            shapes: &[Linear],
            choices: Option<&Path>,
        ) -> Result<Self, DeviceError> {
            Ok(Self {
                few_row: FewRowScratch::new(kernels, shapes)?,
                stream_k: StreamKScratch::new(kernels)?,
                gemm: Gemm::open(kernels, choices)?,
            })
        }
    }

    impl Kernels {
        /// Queues the product, by the way that is best for so many rows. Shapes as in [`Linear::reference`].
        ///
        /// The weights may be read ahead of what is before in the stream: they must not be what the launch just before writes.
        ///
        /// # Errors
        /// When lengths do not fit, a row of x is no multiple of 8, or the library refuses.
        pub fn linear<T: Real>(
            &self,
            shape: &Linear,
            (x, w): (&CudaSlice<T>, &CudaSlice<T>),
            out: &mut CudaSlice<T>,
            products: &mut Products,
        ) -> Result<(), LaunchError> {
            if products.stream_k.is_best(shape) {
                self.stream_k(shape, (x, w), out, &mut products.stream_k)
            } else if shape.rows <= MOST_ROWS {
                self.few_row(shape, (x, w), out, &mut products.few_row)
            } else {
                self.gemm(shape, (x, w), out, &mut products.gemm)
            }
        }
    }
}
