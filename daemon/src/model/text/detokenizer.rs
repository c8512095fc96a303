//! Tokens to text, one at a time: each token costs its own bytes, and no character is ever split.

use std::sync::Arc;

use super::{SpecialTokens, Text};
use crate::request::TokenId;

/// Bytes on their way to text.
#[derive(Debug, Clone)]
pub(super) struct Decoding {
    /// The beginning of a character that is not complete: at most 3 bytes between tokens.
    pending: Vec<u8>,
    /// How many spaces at the start are still to be dropped.
    strip: usize,
}

impl Decoding {
    pub(super) fn new(strip: usize) -> Self {
        Self { pending: Vec::new(), strip }
    }

    /// Appends to `ready` what `token` completes.
    pub(super) fn push(
        &mut self,
        text: &Text,
        token: TokenId,
        special: SpecialTokens,
        ready: &mut String,
    ) {
        if special == SpecialTokens::Skip && text.is_special(token) {
            return;
        }
        let mut bytes = text.pieces.bytes(token);
        while self.strip > 0
            && let Some((&first, rest)) = bytes.split_first()
        {
            if first != b' ' {
                self.strip = 0;
                break;
            }
            self.strip -= 1;
            bytes = rest;
        }
        self.pending.extend_from_slice(bytes);
        self.take_whole(ready);
    }

    /// Moves whole characters out of `pending`, with U+FFFD for what can never become one.
    fn take_whole(&mut self, ready: &mut String) {
        let mut taken = 0;
        for chunk in self.pending.utf8_chunks() {
            ready.push_str(chunk.valid());
            taken += chunk.valid().len();
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            let last = taken + invalid.len() == self.pending.len();
            if last && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none())
            {
                break;
            }
            ready.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
        self.pending.drain(..taken);
    }

    /// Appends what stayed incomplete, as U+FFFD.
    pub(super) fn finish(&mut self, ready: &mut String) {
        if !self.pending.is_empty() {
            ready.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

/// Bytes of tokens go in, whole UTF-8 comes out.
/// The pieces in a row equal [`Text::decode`] of the output, but for one thing: a space at the start of the
/// output is kept when there is a prompt, since it stands between the two.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    text: Arc<Text>,
    special: SpecialTokens,
    decoding: Decoding,
}

impl Detokenizer {
    /// Starts behind `prompt`.
    pub fn new(text: Arc<Text>, prompt: &[TokenId], special: SpecialTokens) -> Self {
        let strip = if prompt.is_empty() { text.pieces.strip_start() } else { 0 };
        Self { text, special, decoding: Decoding::new(strip) }
    }

    /// Takes one token and returns the text that it completes, which may be empty.
    pub fn push(&mut self, token: TokenId) -> String {
        let mut ready = String::new();
        self.decoding.push(&self.text, token, self.special, &mut ready);
        ready
    }

    /// The rest: U+FFFD for a character that stayed incomplete.
    pub fn finish(&mut self) -> String {
        let mut ready = String::new();
        self.decoding.finish(&mut ready);
        ready
    }
}
