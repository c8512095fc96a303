//! The exponential function, the same bits everywhere and free of branches, so that it vectorizes.

/// e^x with a relative error below 3e-7; 0 below -87, saturated above 88. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, so that n * ln 2 is subtracted without an error.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    // The Taylor series to the 7th power: |r| is at most ln 2 / 2.
    let mut p = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, coefficient);
    }
    // 2^n by its exponent bits: n is a whole number between -126 and 127.
    #[allow(clippy::cast_possible_truncation)]
    let power = f32::from_bits(((n as i32 + 127) << 23).cast_unsigned());
    let value = p * power;
    if x < -87.0 { 0.0 } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relative_error_is_below_3e_7() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let wanted = f64::from(x).exp();
            assert!(
                (f64::from(exp(x)) / wanted - 1.0).abs() < 3e-7,
                "e^{x}: {} is not {wanted}",
                exp(x)
            );
        }
        assert_eq!((exp(f32::NEG_INFINITY), exp(0.0)), (0.0, 1.0));
        assert!(exp(f32::NAN).is_nan());
    }
}
