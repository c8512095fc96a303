//! Sums, scales and gates, element by element.

use super::exp::exp;
use super::instructions::dispatched;

/// The non-linearity of a feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e^-x)
    Silu,
    /// GELU by the tanh formula, as Gemma has it.
    GeluTanh,
}

/// x += y, as far as the shorter one goes.
pub fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// x *= by.
pub fn scale(x: &mut [f32], by: f32) {
    x.iter_mut().for_each(|x| *x *= by);
}

/// Adds `bias` to every row of `x`: [rows, bias length].
pub fn add_rows(x: &mut [f32], bias: &[f32]) {
    x.chunks_exact_mut(bias.len().max(1)).for_each(|row| add(row, bias));
}

dispatched! {
    /// gate = activation(gate) * up. `gate`, `up`: [tokens, ffn].
    pub fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) => gate_body
}

#[inline(always)]
fn gate_body(activation: Activation, gate: &mut [f32], up: &[f32]) {
    let pairs = gate.iter_mut().zip(up);
    match activation {
        Activation::Silu => pairs.for_each(|(gate, up)| *gate = *gate / (1.0 + exp(-*gate)) * up),
        Activation::GeluTanh => pairs.for_each(|(gate, up)| {
            const SQRT_2_OVER_PI: f32 = 0.797_884_6;
            let inner = SQRT_2_OVER_PI * (*gate + 0.044_715 * *gate * *gate * *gate);
            // tanh(y) = 1 - 2 / (e^2y + 1)
            let tanh = 1.0 - 2.0 / (exp(2.0 * inner) + 1.0);
            *gate = 0.5 * *gate * (1.0 + tanh) * up;
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_their_formulas() {
        let values: Vec<f32> = (-100..100).map(|i| i as f32 * 0.1).collect();
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let mut gated = values.clone();
            gate(activation, &mut gated, &vec![2.0; values.len()]);
            for (&x, &got) in values.iter().zip(&gated) {
                let x = f64::from(x);
                let wanted = 2.0
                    * match activation {
                        Activation::Silu => x / (1.0 + (-x).exp()),
                        Activation::GeluTanh => {
                            0.5 * x
                                * (1.0
                                    + ((2.0 / std::f64::consts::PI).sqrt()
                                        * (x + 0.044_715 * x.powi(3)))
                                    .tanh())
                        }
                    };
                assert!(
                    (f64::from(got) - wanted).abs() < 2e-6 * (1.0 + wanted.abs()),
                    "{activation:?}({x}): {got}, {wanted}"
                );
            }
        }
    }

    #[test]
    fn biases_are_added_to_every_row() {
        let mut x = [1.0, 2.0, 3.0, 4.0];
        add_rows(&mut x, &[10.0, 20.0]);
        scale(&mut x, 0.5);
        assert_eq!(x, [5.5, 11.0, 6.5, 12.0]);
    }
}
