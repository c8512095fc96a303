//! Reads the keys of a model's configuration, whether they stand in `config.json` or in GGUF metadata.
//! Every figure is bounded here, so that nothing computed from it can overflow or take absurd memory.

use serde_json::Value as Json;

use super::error::ModelError;
use super::weights::gguf::{Gguf, Value};

/// Where configuration keys are read from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Keys<'a> {
    /// An object of `config.json`; `null` counts as absent.
    Json { object: &'a Json, path: &'static str },
    /// Metadata whose keys begin with the architecture's name and a dot.
    Gguf { gguf: &'a Gguf, architecture: &'a str },
}

/// A scalar, whichever format it was written in.
#[derive(Debug)]
enum Scalar {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    /// Described for the error message.
    Other(String),
}

impl Keys<'_> {
    /// The key as its file spells it.
    pub(super) fn full(&self, key: &str) -> String {
        match self {
            Self::Json { path: "", .. } => key.to_owned(),
            Self::Json { path, .. } => format!("{path}.{key}"),
            Self::Gguf { architecture, .. } => format!("{architecture}.{key}"),
        }
    }

    /// Whether the key is there and not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.scalar(key).is_some()
    }

    /// Whether the key is there and is the number 0, which some writers put for "none".
    pub(super) fn is_zero(&self, key: &str) -> bool {
        match self.scalar(key) {
            Some(Scalar::Integer(value)) => value == 0,
            Some(Scalar::Float(value)) => value == 0.0,
            Some(Scalar::Bool(_) | Scalar::Text(_) | Scalar::Other(_)) | None => false,
        }
    }

    /// A count from 1 to `most`.
    pub(super) fn count(&self, key: &str, most: usize) -> Result<usize, ModelError> {
        self.count_opt(key, most)?.ok_or_else(|| ModelError::KeyMissing { key: self.full(key) })
    }

    /// A count from 1 to `most`, or `None` where the key is absent.
    pub(super) fn count_opt(&self, key: &str, most: usize) -> Result<Option<usize>, ModelError> {
        let wanted = || format!("an integer from 1 to {most}");
        match self.scalar(key) {
            None => Ok(None),
            Some(Scalar::Integer(value)) => match usize::try_from(value) {
                Ok(count) if (1..=most).contains(&count) => Ok(Some(count)),
                _ => Err(self.wrong(key, wanted(), value)),
            },
            Some(other) => Err(self.wrong(key, wanted(), other)),
        }
    }

    /// A finite number above 0.
    pub(super) fn positive(&self, key: &str) -> Result<f32, ModelError> {
        self.positive_opt(key)?.ok_or_else(|| ModelError::KeyMissing { key: self.full(key) })
    }

    /// A finite number above 0, or `None` where the key is absent.
    pub(super) fn positive_opt(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let wanted = || "a finite number above 0".to_owned();
        let value = match self.scalar(key) {
            None => return Ok(None),
            Some(Scalar::Integer(value)) => value.to_string(),
            Some(Scalar::Float(value)) => value.to_string(),
            Some(other) => return Err(self.wrong(key, wanted(), other)),
        };
        match value.parse::<f32>() {
            Ok(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
            _ => Err(self.wrong(key, wanted(), value)),
        }
    }

    /// A flag, or `None` where the key is absent.
    pub(super) fn flag_opt(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.scalar(key) {
            None => Ok(None),
            Some(Scalar::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(key, "true or false".to_owned(), other)),
        }
    }

    /// A word, or `None` where the key is absent.
    pub(super) fn word_opt(&self, key: &str) -> Result<Option<String>, ModelError> {
        match self.scalar(key) {
            None => Ok(None),
            Some(Scalar::Text(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(key, "a string".to_owned(), other)),
        }
    }

    /// Refuses a model that has the key.
    pub(super) fn refuse(&self, key: &str) -> Result<(), ModelError> {
        match self.scalar(key) {
            None => Ok(()),
            Some(value) => {
                Err(self.wrong(key, "none: what it asks for is not supported".to_owned(), value))
            }
        }
    }

    /// The error for a key with the wrong value.
    pub(super) fn wrong(
        &self,
        key: &str,
        wanted: String,
        got: impl std::fmt::Display,
    ) -> ModelError {
        let got: String = got.to_string().chars().take(100).collect();
        ModelError::Key { key: self.full(key), wanted, got }
    }

    fn scalar(&self, key: &str) -> Option<Scalar> {
        match self {
            Self::Json { object, .. } => object.get(key).and_then(Scalar::of_json),
            Self::Gguf { gguf, .. } => gguf.metadata.get(&self.full(key)).map(Scalar::of_gguf),
        }
    }
}

impl Scalar {
    fn of_json(value: &Json) -> Option<Self> {
        Some(match value {
            Json::Null => return None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(integer), _, _) => Self::Integer(integer.into()),
                (None, Some(integer), _) => Self::Integer(integer.into()),
                (None, None, Some(float)) => Self::Float(float),
                (None, None, None) => Self::Other(number.to_string()),
            },
            Json::String(text) => Self::Text(text.clone()),
            Json::Array(_) => Self::Other("an array".to_owned()),
            Json::Object(_) => Self::Other("an object".to_owned()),
        })
    }

    fn of_gguf(value: &Value) -> Self {
        match value {
            Value::U8(value) => Self::Integer((*value).into()),
            Value::I8(value) => Self::Integer((*value).into()),
            Value::U16(value) => Self::Integer((*value).into()),
            Value::I16(value) => Self::Integer((*value).into()),
            Value::U32(value) => Self::Integer((*value).into()),
            Value::I32(value) => Self::Integer((*value).into()),
            Value::U64(value) => Self::Integer((*value).into()),
            Value::I64(value) => Self::Integer((*value).into()),
            Value::F32(value) => Self::Float((*value).into()),
            Value::F64(value) => Self::Float(*value),
            Value::Bool(value) => Self::Bool(*value),
            Value::String(text) => Self::Text(text.clone()),
            Value::Array(_) => Self::Other("an array".to_owned()),
        }
    }
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Integer(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Bool(value) => value.fmt(f),
            Self::Text(value) | Self::Other(value) => value.fmt(f),
        }
    }
}
