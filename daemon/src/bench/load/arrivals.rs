//! When each request is sent: all at once (a closed loop then bounds them), or as a Poisson process.

use std::str::FromStr;
use std::time::Duration;

use super::random::Random;

/// Requests a second; `inf` sends all at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RequestRate {
    Unlimited,
    PerSecond(f64),
}

impl FromStr for RequestRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<f64>() {
            Ok(rate) if rate == f64::INFINITY => Ok(Self::Unlimited),
            Ok(rate) if (1e-6..=1e6).contains(&rate) => Ok(Self::PerSecond(rate)),
            _ => Err(format!(
                "wanted requests a second from 0.000001 to 1000000, or inf, got {text:?}"
            )),
        }
    }
}

impl std::fmt::Display for RequestRate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unlimited => f.write_str("inf"),
            Self::PerSecond(rate) => write!(f, "{rate}"),
        }
    }
}

/// The times, counted from the start, at which `count` requests are sent.
pub(in crate::bench) fn arrivals(
    rate: RequestRate,
    count: usize,
    random: &mut Random,
) -> Vec<Duration> {
    let mut at = Duration::ZERO;
    let next = |_| match rate {
        RequestRate::Unlimited => Duration::ZERO,
        RequestRate::PerSecond(rate) => {
            let now = at;
            at = at.saturating_add(
                Duration::try_from_secs_f64(random.exponential() / rate).unwrap_or(Duration::MAX),
            );
            now
        }
    };
    (0..count).map(next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unlimited_rate_sends_all_at_once() {
        let times = arrivals(RequestRate::Unlimited, 3, &mut Random::new(0));
        assert_eq!(times, [Duration::ZERO; 3]);
    }

    #[test]
    fn a_rate_is_kept_on_average_and_starts_at_once() {
        let times = arrivals(RequestRate::PerSecond(10.0), 10_001, &mut Random::new(0));
        assert_eq!(times[0], Duration::ZERO);
        assert!((900.0..1100.0).contains(&times[10_000].as_secs_f64()));
        assert!(times.is_sorted());
    }

    #[test]
    fn rates_that_are_no_rate_are_refused() {
        for text in ["0", "-1", "NaN", "", "-inf"] {
            assert!(text.parse::<RequestRate>().is_err(), "{text}");
        }
        assert_eq!("inf".parse(), Ok(RequestRate::Unlimited));
    }
}
