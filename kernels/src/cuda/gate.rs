//! The gate of a feed-forward layer (Shazeer, arXiv 2002.05202): activation(gate) * up.

/// What the gate goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GateActivation {
    Silu,
    /// With the hyperbolic tangent.
    Gelu,
}

/// The gate of each row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    pub rows: u32,
    /// Numbers of a row of the result: a multiple of 8.
    pub width: u32,
    pub activation: GateActivation,
}

impl Gate {
    /// The meaning of the kernel. `x`: [rows, 2 width], the gate's projection first; `out`: [rows, width].
    pub fn reference(&self, x: &[f32], out: &mut [f32]) {
        let width = self.width as usize;
        for (x, out) in x.chunks(2 * width).zip(out.chunks_mut(width)) {
            let (gates, ups) = x.split_at(width);
            for ((out, gate), up) in out.iter_mut().zip(gates).zip(ups) {
                *out = (self.activation.of(f64::from(*gate)) * f64::from(*up)) as f32;
            }
        }
    }
}

impl GateActivation {
    pub(super) fn of(self, x: f64) -> f64 {
        match self {
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Gelu => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                0.5 * x * (1.0 + inner.tanh())
            }
        }
    }
}

#[cfg(feature = "cuda")]
pub(super) use launch::MODULE;

#[cfg(feature = "cuda")]
mod launch {
    use cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};

    use super::{Gate, GateActivation};
    use crate::cuda::beside::Grid;
    use crate::cuda::device::Module;
    use crate::cuda::launch::{EIGHT, THREADS, launched, len, same, whole_eights};
    use crate::cuda::{Kernels, LaunchError, Real};

    pub(in crate::cuda) const MODULE: Module = Module {
        image: include_bytes!(concat!(env!("OUT_DIR"), "/gate.fatbin")),
        functions: &["silu_mul_bf16", "silu_mul_f16", "gelu_mul_bf16", "gelu_mul_f16"],
        most_shared: 0,
    };

    /// Blocks a grid has in its second dimension at most.
    const MOST_ROWS: u32 = 65_535;

    /// The kernels' argument, field by field.
    #[repr(C)]
    #[derive(Debug, Clone, Copy)]
    struct Argument {
        x: u64,
        out: u64,
        rows: u32,
        width: u32,
    }

    impl Kernels {
        /// Queues the gate. Shapes as in [`Gate::reference`].
        ///
        /// # Errors
        /// When lengths do not fit, or a row is no multiple of 8.
        pub fn gate<T: Real>(
            &self,
            shape: &Gate,
            x: &CudaSlice<T>,
            out: &mut CudaSlice<T>,
        ) -> Result<(), LaunchError> {
            same("x", x.len(), len(&[2, shape.rows, shape.width]))?;
            same("out", out.len(), len(&[shape.rows, shape.width]))?;
            whole_eights("rows of", shape.width)?;
            if shape.rows == 0 {
                return Ok(());
            }
            let word = match shape.activation {
                GateActivation::Silu => "silu",
                GateActivation::Gelu => "gelu",
            };
            let function = self.kernel(&format!("{word}_mul_{}", T::NAME))?;
            let width = shape.width / EIGHT;
            let grid = Grid::of([width.div_ceil(THREADS), shape.rows.min(MOST_ROWS)], THREADS);
            let (x, out) = (x.device_ptr(self.stream()).0, out.device_ptr_mut(self.stream()).0);
            let argument = Argument { x, out, rows: shape.rows, width };
            // SAFETY: the argument is that of `*_mul_*` in gate.cu, which stays within the lengths checked above and waits first.
            launched("gate", unsafe { grid.queue(self, function, &argument) })
        }
    }
}
