//! Tokenizer files in Hugging Face layout.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::pieces::Pieces;
use super::template::Template;
use super::{Frame, SamplingDefaults, SpecialTexts, Text, TextError, sorted, tokenizer_error};
use crate::request::TokenId;

/// Largest file that is read. Published `tokenizer.json` files stay below 40 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Reads the tokenizer and what stands beside it.
pub(super) fn read(folder: &Path) -> Result<Text, TextError> {
    let path = folder.join("tokenizer.json");
    let bytes = read_file(&path)?
        .ok_or_else(|| TextError::Read { path: path.clone(), reason: "no such file".to_owned() })?;
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(tokenizer_error)?;
    // Limits of length belong to the engine, not to a file that trained a model.
    tokenizer.with_truncation(None).map_err(tokenizer_error)?;
    tokenizer.with_padding(None);
    let pieces = Pieces::of(&tokenizer)?;
    let config = json(folder, "tokenizer_config.json")?;
    let map = json(folder, "special_tokens_map.json")?;
    let generation = json(folder, "generation_config.json")?;
    let model = json(folder, "config.json")?;
    let specials = SpecialTexts {
        bos: special(&config, &map, "bos_token"),
        eos: special(&config, &map, "eos_token"),
        unk: special(&config, &map, "unk_token"),
        pad: special(&config, &map, "pad_token"),
    };
    let mut end_tokens = Vec::new();
    end_tokens.extend(end_ids(&generation, "generation_config.json", pieces.len())?);
    end_tokens.extend(end_ids(&model, "config.json", pieces.len())?);
    if let Some(text) = model.get("text_config") {
        end_tokens.extend(end_ids(text, "config.json", pieces.len())?);
    }
    let eos = specials.eos.as_deref().and_then(|text| tokenizer.token_to_id(text));
    end_tokens.extend(eos.map(TokenId));
    Ok(Text {
        template: template(folder, &config)?,
        defaults: SamplingDefaults::read(&generation)?,
        end_tokens: sorted(end_tokens),
        frame: Frame::default(),
        specials,
        pieces,
        tokenizer,
    })
}

/// The content of a file; `None` when there is none.
fn read_file(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    let failed = |error: std::io::Error| TextError::Read {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    let got = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if got > MAX_FILE_BYTES {
        return Err(TextError::FileTooLarge { path: path.to_owned(), got, limit: MAX_FILE_BYTES });
    }
    Ok(Some(bytes))
}

/// A JSON file; null when there is none.
fn json(folder: &Path, name: &str) -> Result<Value, TextError> {
    let path = folder.join(name);
    let Some(bytes) = read_file(&path)? else { return Ok(Value::Null) };
    serde_json::from_slice(&bytes)
        .map_err(|error| TextError::Read { path, reason: error.to_string() })
}

/// The text of a special token, which is written as a string or as an object.
fn special(config: &Value, map: &Value, key: &str) -> Option<String> {
    [config, map].into_iter().find_map(|file| {
        let value = file.get(key)?;
        let text = value.as_str().or_else(|| value.get("content").and_then(Value::as_str))?;
        Some(text.to_owned())
    })
}

/// The ids of `eos_token_id`, one or a list. An id that the tokenizer has no text for can still be drawn.
fn end_ids(config: &Value, file: &'static str, n_tokens: usize) -> Result<Vec<TokenId>, TextError> {
    let key = "eos_token_id";
    let refused = |got: &Value| TextError::Config {
        file,
        key,
        wanted: "a token or a list of tokens",
        got: got.to_string(),
    };
    let one = |value: &Value| {
        let id = value.as_u64().ok_or_else(|| refused(value))?;
        let token = u32::try_from(id).map_err(|_| TextError::UnknownToken {
            key: key.to_owned(),
            got: id,
            n_tokens,
        })?;
        Ok(TokenId(token))
    };
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(one).collect(),
        Some(value) => Ok(vec![one(value)?]),
    }
}

/// The chat template: a file of its own before the one in the tokenizer's configuration.
fn template(folder: &Path, config: &Value) -> Result<Option<Template>, TextError> {
    if let Some(bytes) = read_file(&folder.join("chat_template.jinja"))? {
        return Template::parse(&String::from_utf8_lossy(&bytes)).map(Some);
    }
    let own = json(folder, "chat_template.json")?;
    let source =
        [&own, config].into_iter().find_map(|file| default_template(file.get("chat_template")?));
    source.map(Template::parse).transpose()
}

/// One template, or the one named `default` of several.
fn default_template(value: &Value) -> Option<&str> {
    if let Some(source) = value.as_str() {
        return Some(source);
    }
    let named = value
        .as_array()?
        .iter()
        .find(|named| named.get("name").and_then(Value::as_str) == Some("default"))?;
    named.get("template").and_then(Value::as_str)
}
