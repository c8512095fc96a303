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
mod launch {
    use super::Linear;
    use crate::cuda::LaunchError;
    use crate::cuda::launch::{len, same, whole_eights};

    impl Linear {
        pub(in crate::cuda) fn check(&self, [x, w, out]: [usize; 3]) -> Result<(), LaunchError> {
            same("x", x, len(&[self.rows, self.inputs]))?;
            same("w", w, len(&[self.outputs, self.inputs]))?;
            same("out", out, len(&[self.rows, self.outputs]))?;
            whole_eights("inputs of", self.inputs)
        }
    }
}
