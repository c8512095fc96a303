//! Rotary position embedding (Su et al., 2021): which angle each pair of a head's dimensions turns by.
//! The rotation itself is a kernel.

/// How far positions turn the pairs of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Often called theta.
    pub base: f32,
    pub scaling: RopeScaling,
}

/// How a model trained on short contexts was stretched to longer ones.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// All frequencies divided by `factor`.
    Linear {
        factor: f32,
    },
    /// Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between interpolated.
    Llama3 {
        factor: f32,
        low_frequency: f32,
        high_frequency: f32,
        original_context: f32,
    },
    /// Each pair's frequency divided by a factor of its own, `[head_dim / 2]`: `rope_freqs.weight` of a GGUF.
    Factors(Vec<f32>),
}

impl Rope {
    /// Angle a position turns each pair by, `[head_dim / 2]`, in radians.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let dim = head_dim as f64;
        let base = f64::from(self.base);
        (0..head_dim / 2)
            .map(|pair| base.powf(-2.0 * pair as f64 / dim))
            .enumerate()
            .map(|(pair, frequency)| narrow(self.scaling.apply(pair, frequency)))
            .collect()
    }
}

impl RopeScaling {
    fn apply(&self, pair: usize, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / f64::from(*factor),
            Self::Factors(factors) => {
                frequency / factors.get(pair).map_or(1.0, |factor| f64::from(*factor))
            }
            Self::Llama3 { factor, low_frequency, high_frequency, original_context } => {
                let turns = f64::from(*original_context) * frequency / std::f64::consts::TAU;
                let (low, high) = (f64::from(*low_frequency), f64::from(*high_frequency));
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / f64::from(*factor))
            }
        }
    }
}

/// Fills `cos` and `sin`, `[positions, head_dim / 2]`, for the frequencies of one [`Rope`].
/// Angles are single precision products, as in the implementations that the models were trained with.
pub fn rotations(positions: &[u32], frequencies: &[f32], cos: &mut [f32], sin: &mut [f32]) {
    let pairs = frequencies.len().max(1);
    let rows = cos.chunks_exact_mut(pairs).zip(sin.chunks_exact_mut(pairs));
    for (position, (cos, sin)) in positions.iter().zip(rows) {
        for (pair, frequency) in frequencies.iter().enumerate() {
            let angle = narrow(f64::from(*position)) * frequency;
            (sin[pair], cos[pair]) = angle.sin_cos();
        }
    }
}

/// The nearest single; the frequencies here lie within its range.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to single precision is what is wanted"
)]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama3() -> Rope {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_frequency: 1.0,
            high_frequency: 4.0,
            original_context: 8192.0,
        };
        Rope { base: 500_000.0, scaling }
    }

    #[test]
    fn llama3_keeps_fast_pairs_and_slows_the_slowest_by_its_factor() {
        let plain = Rope { base: 500_000.0, scaling: RopeScaling::None }.frequencies(128);
        let scaled = llama3().frequencies(128);
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[63] * 8.0 / plain[63] - 1.0).abs() < 1e-6);
        assert!(scaled.windows(2).all(|pair| pair[1] < pair[0]));
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let rope = |scaling| Rope { base: 1e4, scaling }.frequencies(64);
        let (plain, scaled) = (rope(RopeScaling::None), rope(RopeScaling::Linear { factor: 4.0 }));
        assert!(
            plain.iter().zip(&scaled).all(|(plain, scaled)| (plain / scaled - 4.0).abs() < 1e-5)
        );
    }

    #[test]
    fn position_zero_does_not_turn() {
        let (mut cos, mut sin) = (vec![9.0; 8], vec![9.0; 8]);
        rotations(&[0, 1], &llama3().frequencies(8), &mut cos, &mut sin);
        assert_eq!((&cos[..4], &sin[..4]), (&[1.0; 4][..], &[0.0; 4][..]));
        assert_eq!((cos[4], sin[4]), (1f32.cos(), 1f32.sin()));
    }
}
