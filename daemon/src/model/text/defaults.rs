//! The sampling parameters that a model's authors recommend.

use serde_json::Value;

use super::TextError;

const FILE: &str = "generation_config.json";

/// Used where a request does not say otherwise, as in vLLM.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SamplingDefaults {
    pub temperature: Option<f32>,
    /// Never 0.
    pub top_k: Option<u32>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<u32>,
}

impl SamplingDefaults {
    /// Reads the content of `generation_config.json`.
    ///
    /// # Errors
    /// A key whose value is not a number in its range.
    pub(super) fn read(config: &Value) -> Result<Self, TextError> {
        Ok(Self {
            temperature: float(config, "temperature", |number| number >= 0.0)?,
            top_k: count(config, "top_k")?,
            top_p: float(config, "top_p", |number| number > 0.0 && number <= 1.0)?,
            min_p: float(config, "min_p", |number| (0.0..=1.0).contains(&number))?,
            repetition_penalty: float(config, "repetition_penalty", |number| number > 0.0)?,
            max_new_tokens: count(config, "max_new_tokens")?,
        })
    }
}

fn refused(key: &'static str, wanted: &'static str, got: &Value) -> TextError {
    TextError::Config { file: FILE, key, wanted, got: got.to_string() }
}

fn float(
    config: &Value,
    key: &'static str,
    fits: impl Fn(f32) -> bool,
) -> Result<Option<f32>, TextError> {
    let value = match config.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value,
    };
    // Through text, since a conversion from f64 cannot be checked.
    let number = value.as_f64().and_then(|number| number.to_string().parse::<f32>().ok());
    match number {
        Some(number) if number.is_finite() && fits(number) => Ok(Some(number)),
        _ => Err(refused(key, "a number in range", value)),
    }
}

/// A count; 0 and negative ones say that there is no limit.
fn count(config: &Value, key: &'static str) -> Result<Option<u32>, TextError> {
    let value = match config.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value,
    };
    match value.as_i64() {
        Some(..=0) => Ok(None),
        Some(number) => match u32::try_from(number) {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(refused(key, "a 32-bit integer", value)),
        },
        None => Err(refused(key, "an integer", value)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::SamplingDefaults;

    #[test]
    fn only_what_is_stated_is_a_default() {
        let config = json!({"temperature": 0.7, "top_k": 20, "top_p": null, "eos_token_id": [1]});
        let wanted =
            SamplingDefaults { temperature: Some(0.7), top_k: Some(20), ..Default::default() };
        assert_eq!(SamplingDefaults::read(&config).unwrap(), wanted);
    }

    #[test]
    fn no_limit_is_no_default() {
        let config = json!({"top_k": 0, "max_new_tokens": -1});
        assert_eq!(SamplingDefaults::read(&config).unwrap(), SamplingDefaults::default());
    }

    #[test]
    fn a_value_out_of_range_is_refused_with_its_key() {
        for config in [json!({"top_p": 1.5}), json!({"top_p": "high"}), json!({"top_p": 1e39})] {
            let refused = SamplingDefaults::read(&config).unwrap_err().to_string();
            assert!(refused.starts_with("generation_config.json: top_p is"), "{refused}");
        }
    }
}
