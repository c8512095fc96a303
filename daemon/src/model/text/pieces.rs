//! What bytes each token stands for, told once from the tokenizer's decoder.

use serde_json::Value;
use tokenizers::Tokenizer;

use super::TextError;
use crate::request::TokenId;

/// Most token ids of a vocabulary. The largest published ones have a few hundred thousand.
pub(super) const MAX_VOCABULARY: usize = 1 << 22;

/// The bytes of every token, one after the other.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// Token `i` has `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<usize>,
    special: Vec<bool>,
    strip_start: usize,
}

/// How a decoder turns the text of a token into bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Scheme {
    /// Each character stands for one byte, as in GPT-2.
    byte_level: bool,
    /// `<0x0A>` stands for one byte.
    byte_fallback: bool,
    replacements: Vec<Replacement>,
    /// Spaces dropped at the start of a text.
    strip_start: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Replacement {
    from: String,
    to: String,
}

impl Pieces {
    /// Reads every token of `tokenizer`.
    ///
    /// # Errors
    /// A decoder that is not supported, or a vocabulary that is too large.
    pub(super) fn of(tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let scheme = Scheme::of(tokenizer)?;
        let vocabulary = tokenizer.get_vocab(true);
        let n_tokens = vocabulary.values().max().map_or(0, |&highest| u64::from(highest) + 1);
        let too_large = TextError::VocabularyTooLarge { got: n_tokens, limit: MAX_VOCABULARY };
        let n_tokens = match usize::try_from(n_tokens) {
            Ok(n_tokens) if n_tokens <= MAX_VOCABULARY => n_tokens,
            _ => return Err(too_large),
        };
        let mut texts: Vec<Option<&str>> = vec![None; n_tokens];
        for (text, &token) in &vocabulary {
            if let Some(place) = usize::try_from(token).ok().and_then(|at| texts.get_mut(at)) {
                *place = Some(text);
            }
        }
        let mut pieces = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(n_tokens),
            special: vec![false; n_tokens],
            strip_start: scheme.strip_start,
        };
        for text in texts {
            scheme.write(text.unwrap_or_default(), &mut pieces.bytes);
            pieces.ends.push(pieces.bytes.len());
        }
        for (token, added) in tokenizer.get_added_tokens_decoder() {
            if let Some(special) = pieces.special.get_mut(index(TokenId(token))) {
                *special = added.special;
            }
        }
        Ok(pieces)
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn bytes(&self, token: TokenId) -> &[u8] {
        let at = index(token);
        let start = at.checked_sub(1).and_then(|before| self.ends.get(before)).copied();
        match self.ends.get(at) {
            Some(&end) => self.bytes.get(start.unwrap_or(0)..end).unwrap_or_default(),
            None => &[],
        }
    }

    pub(super) fn is_special(&self, token: TokenId) -> bool {
        self.special.get(index(token)).copied().unwrap_or(false)
    }

    pub(super) fn strip_start(&self) -> usize {
        self.strip_start
    }
}

fn index(token: TokenId) -> usize {
    usize::try_from(token.0).unwrap_or(usize::MAX)
}

impl Scheme {
    fn of(tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let Some(decoder) = tokenizer.get_decoder() else {
            return Err(TextError::Decoder("none".to_owned()));
        };
        let decoder = serde_json::to_value(decoder)
            .map_err(|error| TextError::Tokenizer(error.to_string()))?;
        let mut scheme = Self::default();
        scheme.take(&decoder)?;
        Ok(scheme)
    }

    fn take(&mut self, decoder: &Value) -> Result<(), TextError> {
        let kind = text(decoder, "type");
        match kind {
            "ByteLevel" => self.byte_level = true,
            "ByteFallback" => self.byte_fallback = true,
            "Fuse" => {}
            "Sequence" => {
                let decoders = decoder.get("decoders").and_then(Value::as_array);
                for decoder in decoders.into_iter().flatten() {
                    self.take(decoder)?;
                }
            }
            "Replace" => {
                let from = decoder.get("pattern").map_or("", |pattern| text(pattern, "String"));
                if from.is_empty() {
                    return Err(TextError::Decoder("Replace of a pattern".to_owned()));
                }
                self.replace(from, text(decoder, "content"));
            }
            "Metaspace" => {
                self.replace(text(decoder, "replacement"), " ");
                self.strip_start = usize::from(text(decoder, "prepend_scheme") != "never");
            }
            "Strip" => {
                let count = |key| decoder.get(key).and_then(Value::as_u64).unwrap_or(0);
                if text(decoder, "content") != " " || count("stop") != 0 {
                    return Err(TextError::Decoder(
                        "Strip of other than leading spaces".to_owned(),
                    ));
                }
                self.strip_start = usize::try_from(count("start")).unwrap_or(usize::MAX);
            }
            other => return Err(TextError::Decoder(other.to_owned())),
        }
        Ok(())
    }

    fn replace(&mut self, from: &str, to: &str) {
        self.replacements.push(Replacement { from: from.to_owned(), to: to.to_owned() });
    }

    /// Appends the bytes of a token's text.
    fn write(&self, text: &str, bytes: &mut Vec<u8>) {
        if self.byte_fallback
            && let Some(byte) = fallback_byte(text)
        {
            return bytes.push(byte);
        }
        let mut text = std::borrow::Cow::Borrowed(text);
        for Replacement { from, to } in &self.replacements {
            text = text.replace(from, to).into();
        }
        if self.byte_level
            && let Some(mapped) = text.chars().map(level_byte).collect::<Option<Vec<u8>>>()
        {
            return bytes.extend(mapped);
        }
        bytes.extend_from_slice(text.as_bytes());
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// The byte of `<0x0A>`.
fn fallback_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// The byte that GPT-2 writes as `character`: printable Latin-1 stands for itself, the others count up from U+0100.
fn level_byte(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::{fallback_byte, level_byte};

    #[test]
    fn the_byte_alphabet_stands_for_every_byte_once() {
        let alphabet = ByteLevel::alphabet();
        let bytes: BTreeSet<u8> =
            alphabet.iter().filter_map(|&letter| level_byte(letter)).collect();
        assert_eq!((alphabet.len(), bytes.len()), (256, 256));
        assert_eq!(level_byte('Ġ'), Some(b' '));
        assert_eq!(level_byte('Ċ'), Some(b'\n'));
        assert_eq!(level_byte('｜'), None);
    }

    #[test]
    fn only_two_hexadecimal_digits_are_a_byte() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        for text in ["<0x0>", "<0x+1>", "<0x00A>", "0x0A", "<0xGG>", ""] {
            assert_eq!(fallback_byte(text), None);
        }
    }
}
