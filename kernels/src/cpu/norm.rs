//! Root-mean-square norm: out = x / sqrt(mean(x^2) + epsilon) * weight. Zhang and Sennrich, arXiv 1910.07467.

use super::instructions::dispatched;

/// Partial sums of a row, added up in one order.
const LANES: usize = 16;

dispatched! {
    /// Norms each row of `weight.len()` values. `x`, `out`: [rows, width].
    pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) => rms_norm_body
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len().max(1);
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean = dot(x, x) / width as f32;
        let factor = 1.0 / (mean + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * weight;
        }
    }
}

/// The sum of products in a fixed order: 16 chains by index modulo 16, then added in order.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks_a, chunks_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = chunks_a.remainder().iter().zip(chunks_b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in chunks_a.zip(chunks_b) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0] + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_norm_of_their_formula() {
        let width = 37;
        let x: Vec<f32> = (0..3 * width).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let weight: Vec<f32> = (0..width).map(|i| 1.0 + i as f32 * 0.01).collect();
        let mut out = vec![f32::NAN; x.len()];
        rms_norm(&x, &weight, 1e-5, &mut out);
        for (row, got) in x.chunks_exact(width).zip(out.chunks_exact(width)) {
            let mean: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
            for ((&x, &weight), &got) in row.iter().zip(&weight).zip(got) {
                let wanted = f64::from(x) / (mean + 1e-5).sqrt() * f64::from(weight);
                assert!((f64::from(got) - wanted).abs() < 1e-5, "{got} is not {wanted}");
            }
        }
    }
}
