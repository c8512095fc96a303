//! Numbers of 8 bits for K and V: 4 bits of exponent, 3 of mantissa, no infinity ("FP8 Formats for Deep Learning",
//! arXiv 2209.05433).

/// The largest number.
const MOST: f32 = 448.0;
const EXPONENT_BIAS: i32 = 7;
const MANTISSA_BITS: u32 = 3;
const NAN: u8 = 0x7F;
const SIGN: u8 = 0x80;

/// One such number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct E4m3(pub u8);

impl E4m3 {
    /// The nearest, of two the even one; what is too large becomes the largest.
    pub fn from_f32(value: f32) -> Self {
        if value.is_nan() {
            return Self(NAN);
        }
        let sign = if value.is_sign_negative() { SIGN } else { 0 };
        let magnitude = value.abs().min(MOST);
        let exponent = exponent_of(magnitude).max(1 - EXPONENT_BIAS);
        let eighths = (magnitude * 2_f32.powi(MANTISSA_BITS as i32 - exponent)).round_ties_even();
        // The first eight steps of the lowest exponent are those below it; rounding up to 16 carries into the exponent.
        let code = (exponent + EXPONENT_BIAS - 1) * 8 + eighths as i32;
        Self(sign | code as u8)
    }
}

/// The exponent of the power of two at or below a number; that of 0 is far below all others.
fn exponent_of(magnitude: f32) -> i32 {
    (magnitude.to_bits() >> 23) as i32 - 127
}

impl From<E4m3> for f32 {
    fn from(E4m3(code): E4m3) -> Self {
        let sign = if code & SIGN == 0 { 1.0 } else { -1.0 };
        let (exponent, mantissa) = (i32::from(code & !SIGN) >> MANTISSA_BITS, f32::from(code & 7));
        let unit = |exponent: i32| 2_f32.powi(exponent - EXPONENT_BIAS - MANTISSA_BITS as i32);
        match (exponent, code & !SIGN) {
            (_, NAN) => f32::NAN,
            (0, _) => sign * mantissa * unit(1),
            _ => sign * (8.0 + mantissa) * unit(exponent),
        }
    }
}

// SAFETY: eight bits, each pattern a value.
#[cfg(feature = "cuda")]
unsafe impl cudarc::driver::DeviceRepr for E4m3 {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_read_back() {
        for code in 0..=u8::MAX {
            let value = f32::from(E4m3(code));
            let again = E4m3::from_f32(value);
            if value.is_nan() {
                assert_eq!(again, E4m3(NAN))
            } else {
                assert_eq!(again, E4m3(code))
            }
        }
    }

    /// Figures of table 1 of the paper.
    #[test]
    fn its_ends_are_those_of_the_format() {
        for (code, value) in [
            (0x7E, 448.0),
            (0x08, 2_f32.powi(-6)),
            (0x07, 0.875 * 2_f32.powi(-6)),
            (0x01, 2_f32.powi(-9)),
        ] {
            assert_eq!(f32::from(E4m3(code)), value);
        }
    }

    #[test]
    fn what_lies_between_goes_to_the_nearest() {
        let numbers: Vec<f32> = (0..=0x7E).map(|code| E4m3(code).into()).collect();
        for pair in numbers.windows(2) {
            let middle = f32::midpoint(pair[0], pair[1]);
            assert_eq!(f32::from(E4m3::from_f32(middle.next_down())), pair[0]);
            assert_eq!(f32::from(E4m3::from_f32(-middle.next_up())), -pair[1]);
            // Of two the even one.
            assert_eq!(E4m3::from_f32(middle).0 % 2, 0);
        }
        assert_eq!(E4m3::from_f32(1e30), E4m3(0x7E));
        assert_eq!(E4m3::from_f32(f32::NEG_INFINITY), E4m3(0xFE));
    }
}
