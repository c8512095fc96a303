//! Matrix products with weights as checkpoints have them: out = x w^T, or out += x w^T.

use super::GateActivation;

/// A product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Linear {
    pub rows: u32,
    /// Numbers of a row of x and of w: a multiple of 8.
    pub inputs: u32,
    /// Numbers of a row of the result.
    pub outputs: u32,
    pub onto: Onto,
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Onto {
    /// The output becomes the product.
    Nothing,
    /// The product is added to the output, which is rounded once: a residual.
    Residual,
    /// The output becomes activation(x gates^T) * (x ups^T): w has the rows of the gates and then as many of the ups.
    Gate(GateActivation),
}

impl Onto {
    /// Rows of w for each number of a row of the result.
    pub(super) fn projections(self) -> u32 {
        if matches!(self, Self::Gate(_)) { 2 } else { 1 }
    }
}

impl Linear {
    /// Rows of w.
    pub fn w_rows(&self) -> u32 {
        self.outputs.saturating_mul(self.onto.projections())
    }

    /// The meaning of the kernels. `x`: [rows, inputs]; `w`: [[`Self::w_rows`], inputs]; `out`: [rows, outputs].
    pub fn reference(&self, x: &[f32], w: &[f32], out: &mut [f32]) {
        let (inputs, outputs) = (self.inputs as usize, self.outputs as usize);
        let (gates, ups) = w.split_at(outputs * inputs);
        for (x, out) in x.chunks(inputs).zip(out.chunks_mut(outputs)) {
            for (index, (w, out)) in gates.chunks(inputs).zip(out).enumerate() {
                let product = dot(x, w);
                *out = match self.onto {
                    Onto::Nothing => product as f32,
                    Onto::Residual => (f64::from(*out) + product) as f32,
                    Onto::Gate(activation) => {
                        (activation.of(product) * dot(x, &ups[index * inputs..][..inputs])) as f32
                    }
                };
            }
        }
    }
}

fn dot(x: &[f32], w: &[f32]) -> f64 {
    x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
}

#[cfg(feature = "cuda")]
mod launch {
    use super::Linear;
    use crate::cuda::LaunchError;
    use crate::cuda::launch::{len, same, whole_eights};

    impl Linear {
        pub(in crate::cuda) fn check(&self, [x, w, out]: [usize; 3]) -> Result<(), LaunchError> {
            same("x", x, len(&[self.rows, self.inputs]))?;
            same("w", w, len(&[self.onto.projections(), self.outputs, self.inputs]))?;
            same("out", out, len(&[self.rows, self.outputs]))?;
            whole_eights("inputs of", self.inputs)
        }
    }
}
