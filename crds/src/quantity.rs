//! Amounts of memory as Kubernetes writes them. The only parser of quantities.

use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// Bytes of a GiB, the unit of a grant.
const GIB: u64 = 1 << 30;

/// What [`Bytes`] reads, for the schema: Kubernetes' own quantities may also have signs, points and exponents.
const PATTERN: &str = "^[0-9]+(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?$";

/// A number of bytes, written as `24Gi`, `24576Mi` or `25769803776`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub struct Bytes(pub u64);

/// A quantity that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("wanted an amount such as 24Gi, got {got:?}")]
pub struct QuantityError {
    pub got: String,
}

/// What the API server lets through where it wants a quantity.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

/// Suffixes and what they stand for.
const UNITS: [(&str, u64); 12] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
];

impl Bytes {
    /// So many GiB.
    pub fn from_gib(gib: u32) -> Self {
        Self(u64::from(gib) * GIB)
    }

    /// The whole GiB that this is; `None` when there is a rest or too much.
    pub fn whole_gib(self) -> Option<u32> {
        u32::try_from(self.0 / GIB).ok().filter(|_| self.0.is_multiple_of(GIB))
    }
}

impl FromStr for Bytes {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let error = || QuantityError { got: text.chars().take(40).collect() };
        let unit = UNITS.iter().find(|(suffix, _)| text.ends_with(suffix));
        let (suffix, factor) = unit.copied().unwrap_or(("", 1));
        let digits = &text[..text.len() - suffix.len()];
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(error());
        }
        let number = digits.parse::<u64>().map_err(|_| error())?;
        number.checked_mul(factor).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for Bytes {
    /// In the largest binary unit that leaves no rest.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = UNITS[..6].iter().rev();
        let fits = |(_, factor): &&(&str, u64)| self.0 > 0 && self.0.is_multiple_of(*factor);
        match { binary }.find(fits) {
            Some((suffix, factor)) => write!(f, "{}{suffix}", self.0 / factor),
            None => write!(f, "{}", self.0),
        }
    }
}

impl TryFrom<Written> for Bytes {
    type Error = QuantityError;

    fn try_from(written: Written) -> Result<Self, QuantityError> {
        match written {
            Written::Number(number) => Ok(Self(number)),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        bytes.to_string()
    }
}

impl JsonSchema for Bytes {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Bytes".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"x-kubernetes-int-or-string": true, "maxLength": 24, "pattern": PATTERN})
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_are_read_as_kubernetes_reads_them() {
        for (text, bytes) in
            [("24Gi", 24 << 30), ("1536Mi", 1536 << 20), ("2G", 2_000_000_000), ("7", 7), ("0", 0)]
        {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in [
            "",
            "Gi",
            "-1Gi",
            "+1Gi",
            "1.5Gi",
            "1gi",
            " 1Gi",
            "1Gi ",
            "99999999999Ei",
            "1e3",
            "１Gi",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        assert_eq!(Bytes(24 << 30).whole_gib(), Some(24));
        assert_eq!(Bytes((24 << 30) + 1).whole_gib(), None);
        assert_eq!(serde_json::from_str::<Bytes>("1024").unwrap(), Bytes(1024));
        assert_eq!(serde_json::to_string(&Bytes(1 << 31)).unwrap(), "\"2Gi\"");
    }

    #[test]
    fn the_schema_refuses_what_is_not_read() {
        let pattern = regex::Regex::new(PATTERN).unwrap();
        for text in
            ["+2Gi", "2147483648.", "2147483648e0", "2147483648E0", ".5Gi", "-2Gi", "1m", ""]
        {
            assert!(text.parse::<Bytes>().is_err() && !pattern.is_match(text), "{text}");
        }
        let mut generator = SchemaGenerator::default();
        let schema = Bytes::json_schema(&mut generator).to_value();
        assert_eq!(schema["pattern"], PATTERN);
    }

    /// What the schema takes, of one digit: more of them may be too large, which the API server refuses by the model's rule.
    fn one_digit() -> impl Strategy<Value = String> {
        let pattern = PATTERN.replace(['^', '+', '$'], "");
        prop::string::string_regex(&pattern).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_written_is_read_back(bytes in any::<u64>(), shift in 0..50_u32) {
            let bytes = Bytes(bytes >> shift << (shift / 2));
            prop_assert_eq!(bytes.to_string().parse(), Ok(bytes));
        }

        #[test]
        fn what_the_schema_takes_is_read(text in one_digit()) {
            prop_assert!(text.parse::<Bytes>().is_ok(), "{}", text);
        }

        #[test]
        fn no_text_is_a_panic(text in ".{0,30}") {
            drop(text.parse::<Bytes>());
        }
    }
}
