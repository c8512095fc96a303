//! Percentiles of measured values, interpolated linearly as numpy does by default.

use std::str::FromStr;
use std::time::Duration;

/// A percentile from 0 to 100 in thousandths, so that ranks are computed in whole numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Percentile {
    thousandths: u32,
}

impl Percentile {
    /// The middle value.
    pub(super) const MEDIAN: Self = Self { thousandths: 50_000 };

    /// What only one value in a hundred passes.
    pub(super) const P99: Self = Self { thousandths: 99_000 };

    /// The value below which this share of `sorted` lies; `None` without values.
    pub(super) fn of(self, sorted: &[f64]) -> Option<f64> {
        const WHOLE: usize = 100_000;
        let last = sorted.len().checked_sub(1)?;
        let scaled = last.checked_mul(usize::try_from(self.thousandths).ok()?)?;
        let fraction = f64::from(u32::try_from(scaled % WHOLE).ok()?) / 100_000.0;
        let low = sorted.get(scaled / WHOLE)?;
        let high = sorted.get(scaled / WHOLE + 1).unwrap_or(low);
        Some(low + (high - low) * fraction)
    }
}

/// The values in ascending order, as [`Percentile::of`] wants them.
pub(super) fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Times as milliseconds.
pub(super) fn milliseconds(times: impl Iterator<Item = Duration>) -> impl Iterator<Item = f64> {
    times.map(|time| time.as_secs_f64() * 1000.0)
}

/// The mean of `values`; `None` without any.
pub(super) fn mean(values: &[f64]) -> Option<f64> {
    let count = u32::try_from(values.len()).ok().filter(|count| *count > 0)?;
    Some(values.iter().sum::<f64>() / f64::from(count))
}

impl FromStr for Percentile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || {
            format!("wanted a percentile from 0 to 100 with at most three decimals, got {text:?}")
        };
        let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
        if decimals.is_empty()
            || decimals.len() > 3
            || !decimals.bytes().all(|b| b.is_ascii_digit())
        {
            return Err(wanted());
        }
        let whole: u32 = whole.parse().ok().filter(|whole| *whole <= 100).ok_or_else(wanted)?;
        let decimals: u32 = format!("{decimals:0<3}").parse().map_err(|_| wanted())?;
        let thousandths = whole * 1000 + decimals;
        if thousandths > 100_000 { Err(wanted()) } else { Ok(Self { thousandths }) }
    }
}

impl std::fmt::Display for Percentile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let decimals = format!("{:03}", self.thousandths % 1000);
        match decimals.trim_end_matches('0') {
            "" => write!(f, "{}", self.thousandths / 1000),
            decimals => write!(f, "{}.{decimals}", self.thousandths / 1000),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str, values: &[f64]) -> Option<f64> {
        text.parse::<Percentile>().unwrap().of(values)
    }

    #[test]
    fn values_between_ranks_are_interpolated() {
        assert_eq!(of("50", &[1.0, 2.0, 3.0, 4.0]), Some(2.5));
        assert_eq!(of("25", &[1.0, 2.0, 3.0, 4.0, 5.0]), Some(2.0));
        assert_eq!(of("99", &[0.0, 100.0]), Some(99.0));
    }

    #[test]
    fn the_ends_are_the_smallest_and_the_largest() {
        assert_eq!(of("0", &[1.0, 5.0]), Some(1.0));
        assert_eq!(of("100", &[1.0, 5.0]), Some(5.0));
        assert_eq!(of("99.9", &[7.0]), Some(7.0));
        assert_eq!(of("50", &[]), None);
    }

    #[test]
    fn what_is_no_percentile_is_refused() {
        for text in ["", "101", "100.1", "-1", "9.9999", "9.", "x", "NaN"] {
            assert!(text.parse::<Percentile>().is_err(), "{text}");
        }
        assert_eq!("99.90".parse::<Percentile>().unwrap().to_string(), "99.9");
    }
}
