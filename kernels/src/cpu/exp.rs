//! The exponential function, the same bits everywhere and free of branches, so that it vectorizes.

/// e^x with a relative error below 3e-7; 0 below -87, saturated above 88. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // ln 2 in two parts, so that n * ln 2 is subtracted without an error.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number, whose bits are then the low ones of the sum.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    // The Taylor series to the 7th power: |r| is at most ln 2 / 2.
    let mut p = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, coefficient);
    }
    // 2^n by its exponent bits: n is a whole number between -126 and 127.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    let value = p * power;
    if x < -87.0 { 0.0 } else { value }
}

/// 2^x with a relative error below 3e-7 for x at most 127; 0 below -126 and for NaN.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    // (ln 2)^k / k! for k from 5 down.
    const TAYLOR: [f32; 6] =
        [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, std::f32::consts::LN_2, 1.0];
    let shifted = x + ROUND;
    let f = x - (shifted - ROUND);
    let mut p = 1.540_353e-4;
    for coefficient in TAYLOR {
        p = f.mul_add(p, coefficient);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x >= -126.0 { p * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_have_a_relative_error_below_3e_7() {
        for i in -1_259_999..1_270_000 {
            let x = i as f32 * 1e-4;
            let ratio = f64::from(exp2(x)) / f64::from(x).exp2();
            assert!((ratio - 1.0).abs() < 3e-7, "2^{x} is off by {ratio}");
        }
        let edges = [0.0, 1.0, -1.0, -126.0, -127.0, f32::NEG_INFINITY, f32::NAN].map(exp2);
        assert_eq!(edges, [1.0, 2.0, 0.5, f32::MIN_POSITIVE, 0.0, 0.0, 0.0]);
    }

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
