//! Numbers as people write them: bytes with a unit, lengths in thousands, seconds, shares.

use std::net::{IpAddr, Ipv4Addr};
use std::num::{NonZeroU32, NonZeroU64};
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes above 0: `4GiB`, `512MiB`, `4Gi`, `2GB` (decimal) or plain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub(super) NonZeroU64);

/// A count above 0 as vLLM reads it: `4096`, `1k` (1000), `25.6k` (25600), `32K` (32768).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count(pub(super) NonZeroU32);

/// A [`Count`], or `auto` (also `-1`) for what fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ModelLen(pub(super) Option<NonZeroU32>);

/// Seconds, with a fraction if need be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seconds(pub(super) Duration);

/// A share above 0 and at most 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Share(pub(super) f64);

/// An address to listen on, or `localhost`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Host(pub(super) IpAddr);

/// A whole number above 0, of a type that says so.
pub(super) fn positive<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("wanted a whole number above 0 that is not too large, got {text:?}"))
}

/// A port; 0 lets the system choose.
pub(super) fn port(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| format!("wanted a port from 0 to 65535, got {text:?}"))
}

impl ByteSize {
    /// How many bytes.
    pub fn bytes(self) -> NonZeroU64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || {
            format!("wanted bytes above 0 such as 4GiB, 512MiB, 2GB or 1073741824, got {text:?}")
        };
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let factor: u64 = match text[digits.len()..].trim() {
            "" | "B" => 1,
            "KiB" | "Ki" => 1 << 10,
            "MiB" | "Mi" => 1 << 20,
            "GiB" | "Gi" => 1 << 30,
            "TiB" | "Ti" => 1 << 40,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return Err(wanted()),
        };
        let bytes = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(factor));
        bytes.and_then(NonZeroU64::new).map(Self).ok_or_else(wanted)
    }
}

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || {
            format!(
                "wanted a whole number above 0 such as 4096, 4k (4000) or 4K (4096), got {text:?}"
            )
        };
        let (digits, factor, fraction_allowed): (&str, u64, bool) = match text.chars().last() {
            Some('k') => (&text[..text.len() - 1], 1_000, true),
            Some('m') => (&text[..text.len() - 1], 1_000_000, true),
            Some('K') => (&text[..text.len() - 1], 1 << 10, false),
            Some('M') => (&text[..text.len() - 1], 1 << 20, false),
            Some(_) | None => (text, 1, false),
        };
        let count = match digits.split_once('.') {
            Some((whole, fraction)) if fraction_allowed => decimal(whole, fraction, factor),
            Some(_) => None,
            None => digits.parse::<u64>().ok().and_then(|count| count.checked_mul(factor)),
        };
        let count = count.and_then(|count| u32::try_from(count).ok());
        count.and_then(NonZeroU32::new).map(Self).ok_or_else(wanted)
    }
}

/// `whole.fraction` × `factor`, where that is a whole number.
fn decimal(whole: &str, fraction: &str, factor: u64) -> Option<u64> {
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) {
        return None;
    }
    let scale = 10u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = fraction.parse::<u64>().ok()?.checked_mul(factor)?;
    let whole = whole.parse::<u64>().ok()?.checked_mul(factor)?;
    part.is_multiple_of(scale).then(|| whole.checked_add(part / scale))?
}

impl FromStr for ModelLen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" | "-1" => Ok(Self(None)),
            _ => text
                .parse::<Count>()
                .map(|count| Self(Some(count.0)))
                .map_err(|error| format!("{error}; or auto")),
        }
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        /// A week: more is a mistake in the unit.
        const LONGEST: f64 = 604_800.0;
        let seconds = text.parse::<f64>().ok().filter(|seconds| (0.0..=LONGEST).contains(seconds));
        seconds
            .map(|seconds| Self(Duration::from_secs_f64(seconds)))
            .ok_or_else(|| format!("wanted seconds from 0 to {LONGEST}, got {text:?}"))
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = text.parse::<f64>().ok().filter(|share| *share > 0.0 && *share <= 1.0);
        share.map(Self).ok_or_else(|| format!("wanted a share above 0 and at most 1, got {text:?}"))
    }
}

impl FromStr for Host {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "localhost" => Ok(Self(IpAddr::V4(Ipv4Addr::LOCALHOST))),
            _ => text
                .trim_start_matches('[')
                .trim_end_matches(']')
                .parse()
                .map(Self)
                .map_err(|_| format!("wanted an IP address such as 127.0.0.1, 0.0.0.0 or ::, or localhost, got {text:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> Option<u64> {
        text.parse::<ByteSize>().ok().map(|size| size.0.get())
    }

    fn count(text: &str) -> Option<u32> {
        text.parse::<Count>().ok().map(|count| count.0.get())
    }

    #[test]
    fn bytes_have_binary_and_decimal_units() {
        assert_eq!(bytes("4GiB"), Some(4 << 30));
        assert_eq!(bytes("512 MiB"), Some(512 << 20));
        assert_eq!(bytes("2Gi"), Some(2 << 30));
        assert_eq!(bytes("2GB"), Some(2_000_000_000));
        assert_eq!(bytes("1073741824"), Some(1 << 30));
    }

    #[test]
    fn bytes_that_are_zero_unknown_or_too_many_are_refused() {
        for text in ["", "0", "GiB", "-1", "1.5GiB", "4XB", "99999999999999TiB", "1e9", "٤GiB"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn a_small_k_is_a_thousand_and_a_large_one_1024() {
        assert_eq!(count("1k"), Some(1000));
        assert_eq!(count("32K"), Some(32_768));
        assert_eq!(count("25.6k"), Some(25_600));
        assert_eq!(count("1M"), Some(1 << 20));
        assert_eq!(count("4096"), Some(4096));
    }

    #[test]
    fn counts_that_are_no_whole_number_are_refused() {
        for text in
            ["", "0", "k", "1.5K", "1.5", "1.2345k", "-5", "5G", "99999999999", ".k", "1.k", "é"]
        {
            assert_eq!(count(text), None, "{text}");
        }
    }

    #[test]
    fn seconds_and_shares_know_no_nan() {
        assert!("NaN".parse::<Seconds>().is_err() && "inf".parse::<Seconds>().is_err());
        assert!("NaN".parse::<Share>().is_err() && "0".parse::<Share>().is_err());
        assert_eq!("1.5".parse::<Seconds>(), Ok(Seconds(Duration::from_millis(1500))));
        assert_eq!("0.9".parse::<Share>(), Ok(Share(0.9)));
    }

    #[test]
    fn a_host_may_be_localhost_or_bracketed() {
        assert_eq!(
            "localhost".parse::<Host>().map(|host| host.0.to_string()),
            Ok("127.0.0.1".into())
        );
        assert_eq!("[::1]".parse::<Host>().map(|host| host.0.to_string()), Ok("::1".into()));
        assert!("example.org".parse::<Host>().is_err());
    }
}
