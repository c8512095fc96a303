//! A JSON body read field by field: wrong types and ranges are named, what is left over is unknown.

use std::collections::HashSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{LazyLock, Mutex};

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::prompt::List;
use crate::request::TokenId;

/// Names of unknown fields that are remembered, so that each is logged once and hostile clients fill no memory.
const MOST_UNKNOWN_NAMES: usize = 256;
/// Values of a body, beside those of its [`LISTS`]: each takes some 100 bytes, whatever it takes on the wire.
const MOST_VALUES: usize = 1 << 16;
/// Arrays that are as long as a client likes, read into less than values.
const LISTS: [&str; 2] = ["prompt", "tokens"];

/// The fields of a body that have not been read. `null` counts as absent.
#[derive(Debug)]
pub(crate) struct Fields {
    map: Map<String, Value>,
    /// What stands in `map` as an empty array.
    lists: Vec<(String, List)>,
}

impl Fields {
    /// Parses a body. Nesting is limited to 128 by the parser.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map_err(|error| ApiError::InvalidJson(error.to_string()))
    }

    pub(crate) fn of(map: Map<String, Value>) -> Self {
        Self { map, lists: Vec::new() }
    }

    fn insert(&mut self, name: String, raw: &str, budget: &mut usize) -> serde_json::Result<()> {
        let value = if LISTS.contains(&name.as_str()) && raw.starts_with('[') {
            self.lists.push((name.clone(), serde_json::from_str(raw)?));
            Value::Array(Vec::new())
        } else {
            *budget = budget.checked_sub(values_in(raw)).ok_or_else(|| {
                serde_json::Error::custom(format!("{name} makes it more than {MOST_VALUES} values"))
            })?;
            serde_json::from_str(raw)?
        };
        self.map.insert(name, value);
        Ok(())
    }

    /// One of the [`LISTS`], where it is an array.
    pub(crate) fn list(&mut self, name: &str) -> Option<List> {
        // The last of several fields of one name counts, as in the map.
        let at = self.lists.iter().rposition(|(own, _)| own == name)?;
        self.map.get(name)?.as_array()?;
        self.map.remove(name);
        Some(self.lists.swap_remove(at).1)
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn bool(&mut self, name: &str, default: bool) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(value),
            Some(other) => Err(wrong(name, "a boolean", &other)),
        }
    }

    pub(crate) fn number(
        &mut self,
        name: &str,
        range: RangeInclusive<f32>,
    ) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| wrong(name, "a number", &value))?;
        // Rounding to f32 is meant: parameters need no more digits, and what is too large is refused by the range.
        #[allow(clippy::cast_possible_truncation)]
        let number = number as f32;
        if range.contains(&number) {
            Ok(Some(number))
        } else {
            Err(out_of_range(name, range.start(), range.end(), &value))
        }
    }

    pub(crate) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let whole = value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 9.0e15);
        // Exact: the number is whole and below 2^53.
        #[allow(clippy::cast_possible_truncation)]
        let number = value.as_i64().or_else(|| whole.map(|number| number as i64));
        match number {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            Some(_) => Err(out_of_range(name, range.start(), range.end(), &value)),
            None => Err(wrong(name, "an integer", &value)),
        }
    }

    pub(crate) fn count(
        &mut self,
        name: &str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<u32>, ApiError> {
        let number = self.integer(name, i64::from(*range.start())..=i64::from(*range.end()))?;
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    pub(crate) fn string(
        &mut self,
        name: &str,
        most_bytes: usize,
    ) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) if text.len() <= most_bytes => Ok(Some(text)),
            Some(Value::String(text)) => Err(ApiError::invalid(
                name,
                format!("wanted at most {most_bytes} bytes, got {}", text.len()),
            )),
            Some(other) => Err(wrong(name, "a string", &other)),
        }
    }

    /// A string or an array of strings.
    pub(crate) fn strings(
        &mut self,
        name: &str,
        most: usize,
        most_bytes: usize,
    ) -> Result<Vec<String>, ApiError> {
        let items = match self.take(name) {
            None => return Ok(Vec::new()),
            Some(Value::String(text)) => vec![Value::String(text)],
            Some(Value::Array(items)) => items,
            Some(other) => return Err(wrong(name, "a string or an array of strings", &other)),
        };
        if items.len() > most {
            return Err(ApiError::invalid(
                name,
                format!("wanted at most {most} strings, got {}", items.len()),
            ));
        }
        let text = |item: Value| match item {
            Value::String(text) if text.is_empty() => {
                Err(ApiError::invalid(name, "wanted strings that are not empty"))
            }
            Value::String(text) if text.len() <= most_bytes => Ok(text),
            Value::String(_) => Err(ApiError::invalid(
                name,
                format!("wanted strings of at most {most_bytes} bytes"),
            )),
            other => Err(wrong(name, "strings", &other)),
        };
        items.into_iter().map(text).collect()
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong(name, "an object", &other)),
        }
    }

    pub(crate) fn tokens(
        &mut self,
        name: &str,
        most: usize,
        vocab: usize,
    ) -> Result<Vec<TokenId>, ApiError> {
        let list = match (self.list(name), self.take(name)) {
            (Some(list), _) => list,
            (None, None) => return Ok(Vec::new()),
            (None, Some(other)) if other.is_array() => serde_json::from_value(other)
                .map_err(|error| ApiError::InvalidJson(error.to_string()))?,
            (None, Some(other)) => return Err(wrong(name, "an array of token ids", &other)),
        };
        if list.len > most {
            let message = format!("wanted at most {most} token ids, got {}", list.len);
            return Err(ApiError::invalid(name, message));
        }
        token_ids(name, &list, vocab)
    }

    /// Refuses fields that ask for something that is not done here. `default` is a value that asks for nothing.
    pub(crate) fn refuse(
        &mut self,
        name: &str,
        is_default: impl Fn(&Value) -> bool,
    ) -> Result<(), ApiError> {
        match self.take(name) {
            Some(value) if !is_default(&value) => {
                Err(ApiError::Unsupported { param: name.to_owned() })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Logs what is left, each name once.
    pub(crate) fn ignore_rest(self) {
        static SEEN: LazyLock<Mutex<HashSet<String>>> = LazyLock::new(Mutex::default);
        let Ok(mut seen) = SEEN.lock() else { return };
        for name in self.map.into_iter().map(|(name, _)| name) {
            if seen.len() < MOST_UNKNOWN_NAMES && name.len() <= 64 && seen.insert(name.clone()) {
                tracing::warn!(field = name, "unknown field in a request is ignored");
            }
        }
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Top;
        impl<'de> Visitor<'de> for Top {
            type Value = Fields;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Fields, A::Error> {
                let mut fields = Fields::of(Map::new());
                let mut budget = MOST_VALUES;
                while let Some((name, raw)) = entries.next_entry::<String, &RawValue>()? {
                    fields.insert(name, raw.get(), &mut budget).map_err(A::Error::custom)?;
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Top)
    }
}

/// At least as many as the text of a value makes.
fn values_in(raw: &str) -> usize {
    let (mut values, mut in_string, mut escaped) = (1, false, false);
    for byte in raw.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values
}

/// Token ids inside a vocabulary.
pub(crate) fn token_ids(name: &str, list: &List, vocab: usize) -> Result<Vec<TokenId>, ApiError> {
    if let Some(stranger) = list.stranger.or((!list.prompts.is_empty()).then_some("more than that"))
    {
        return Err(ApiError::invalid(name, format!("wanted token ids, got {stranger}")));
    }
    let id = |&id: &u32| match (id as usize) < vocab {
        true => Ok(TokenId(id)),
        false => {
            let message = format!("token id {id} is outside the vocabulary of {vocab}");
            Err(ApiError::invalid(name, message))
        }
    };
    list.ids.iter().map(id).collect()
}

pub(crate) fn wrong(name: &str, wanted: &str, got: &Value) -> ApiError {
    ApiError::invalid(name, format!("wanted {wanted}, got {}", kind_of(got)))
}

fn out_of_range(
    name: &str,
    from: impl std::fmt::Display,
    to: impl std::fmt::Display,
    got: &Value,
) -> ApiError {
    ApiError::invalid(name, format!("wanted {from} to {to}, got {got}"))
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(body: &str) -> String {
        Fields::parse(body.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_body_of_millions_of_values_is_refused_and_one_of_as_many_token_ids_is_not() {
        let many = format!("[{}0]", "0,".repeat(200_000));
        let refused = refusal(&format!("{{\"stop\":{many}}}"));
        assert!(refused.contains("stop makes it more than 65536 values"), "{refused}");
        let each = format!("[{}0]", "0,".repeat(40_000));
        refusal(&format!("{{\"a\":{each},\"b\":{each}}}"));
        let names: String = (0..70_000).map(|i| format!("\"{i}\":0,")).collect();
        refusal(&format!("{{{names}\"a\":0}}"));
        let mut fields = Fields::parse(format!("{{\"prompt\":{many}}}").as_bytes()).unwrap();
        assert_eq!(fields.list("prompt").unwrap().ids.len(), 200_001);
    }

    #[test]
    fn commas_and_brackets_inside_strings_are_no_values() {
        assert_eq!(values_in(r#""[,{\"[,""#), 1);
        assert_eq!(values_in(r#"{"a": [1, "\\", 2]}"#), 5);
    }

    #[test]
    fn a_list_under_another_name_or_of_another_type_is_read_as_what_it_is() {
        let mut fields =
            Fields::parse(br#"{"prompt":[1],"prompt":"a","stop_token_ids":[3]}"#).unwrap();
        assert_eq!(fields.list("prompt"), None);
        assert_eq!(fields.string("prompt", 9).unwrap().as_deref(), Some("a"));
        assert_eq!(fields.tokens("stop_token_ids", 4, 9).unwrap(), [TokenId(3)]);
        let mut fields = Fields::parse(br#"{"prompt":[1]}"#).unwrap();
        assert!(fields.string("prompt", 9).is_err());
    }
}
