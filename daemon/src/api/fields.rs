//! A JSON body read field by field: wrong types and ranges are named, what is left over is unknown.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::sync::{LazyLock, Mutex};

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::request::TokenId;

/// Names of unknown fields that are remembered, so that each is logged once and hostile clients fill no memory.
const MOST_UNKNOWN_NAMES: usize = 256;

/// The fields of a body that have not been read. `null` counts as absent.
#[derive(Debug)]
pub(crate) struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    /// Parses a body. Nesting is limited to 128 by the parser.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { map }),
            Ok(other) => {
                Err(ApiError::InvalidJson(format!("wanted an object, got {}", kind_of(&other))))
            }
            Err(error) => Err(ApiError::InvalidJson(error.to_string())),
        }
    }

    pub(crate) fn of(map: Map<String, Value>) -> Self {
        Self { map }
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
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) if items.len() > most => Err(ApiError::invalid(
                name,
                format!("wanted at most {most} token ids, got {}", items.len()),
            )),
            Some(Value::Array(items)) => token_ids(name, &items, vocab),
            Some(other) => Err(wrong(name, "an array of token ids", &other)),
        }
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

/// Token ids inside a vocabulary.
pub(crate) fn token_ids(
    name: &str,
    items: &[Value],
    vocab: usize,
) -> Result<Vec<TokenId>, ApiError> {
    let id = |item: &Value| {
        let id = item.as_u64().ok_or_else(|| wrong(name, "token ids", item))?;
        match u32::try_from(id) {
            Ok(id) if (id as usize) < vocab => Ok(TokenId(id)),
            Ok(_) | Err(_) => Err(ApiError::invalid(
                name,
                format!("token id {id} is outside the vocabulary of {vocab}"),
            )),
        }
    };
    items.iter().map(id).collect()
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
