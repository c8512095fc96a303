//! Text to tokens and back, chats to prompts: everything that a model brings about its text.
//! Nothing here knows requests, the engine or HTTP.

mod assembly;
mod defaults;
mod detokenizer;
mod folder;
mod pieces;
mod pre_tokenizer;
mod stop;
mod template;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::model::weights::gguf::{Gguf, GgufError};
use crate::request::TokenId;
pub use defaults::SamplingDefaults;
pub use detokenizer::Detokenizer;
use pieces::Pieces;
pub use stop::{Held, IncludeStop, StopStrings};
use template::Template;

/// Why text cannot be turned into tokens or a prompt.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("read {}: {reason}", path.display())]
    Read { path: PathBuf, reason: String },
    #[error("{} is {got} bytes, wanted at most {limit}", path.display())]
    FileTooLarge { path: PathBuf, got: u64, limit: u64 },
    #[error("{file}: {key} is {got}, wanted {wanted}")]
    Config { file: &'static str, key: &'static str, wanted: &'static str, got: String },
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("tokenizer.ggml.model {0:?} is not supported, wanted gpt2, llama or gemma4")]
    Model(String),
    #[error("tokenizer.ggml.pre {0:?} is not supported")]
    PreTokenizer(String),
    #[error("decoder {0} of the tokenizer is not supported")]
    Decoder(String),
    #[error("metadata {key:?} has {got} items, wanted {wanted}")]
    Length { key: &'static str, got: usize, wanted: usize },
    #[error("{key:?} names token {got}, the vocabulary has {n_tokens}")]
    UnknownToken { key: String, got: u64, n_tokens: usize },
    #[error("a vocabulary of {got} tokens is too large, wanted at most {limit}")]
    VocabularyTooLarge { got: u64, limit: usize },
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    #[error("the model has no chat template")]
    NoTemplate,
    /// The chat cannot be rendered: the fault of what the client sent, or of the model's template.
    #[error("chat template: {reason}")]
    Template { reason: String },
}

/// Whether the tokens that the model wants around a text (BOS, EOS) are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddSpecial {
    Yes,
    No,
}

/// What becomes of special tokens in text that leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    Skip,
    Keep,
}

/// A chat to be rendered into a prompt.
#[derive(Debug, Clone, Copy)]
pub struct ChatRequest<'a> {
    /// An array of messages.
    pub messages: &'a Value,
    pub add_generation_prompt: bool,
    /// The prompt ends where the final message's content ends, so that the answer goes on from there.
    pub continue_final_message: bool,
    /// Further variables of the template.
    pub kwargs: &'a Map<String, Value>,
    /// Used in place of the model's template. Only from somebody who is trusted: fuel bounds strings and steps, but
    /// lists that are doubled again and again can still take more memory than there is.
    pub template: Option<&'a str>,
}

/// The tokens that are put around a text, where the tokenizer does not do it itself.
#[derive(Debug, Clone, Default)]
struct Frame {
    before: Vec<TokenId>,
    after: Vec<TokenId>,
}

/// The special tokens' text, as chat templates see them.
#[derive(Debug, Clone, Default)]
struct SpecialTexts {
    bos: Option<String>,
    eos: Option<String>,
    unk: Option<String>,
    pad: Option<String>,
}

/// Tokenizer, chat template and special tokens of one model.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    pieces: Pieces,
    frame: Frame,
    end_tokens: Vec<TokenId>,
    template: Option<Template>,
    specials: SpecialTexts,
    defaults: SamplingDefaults,
}

impl Text {
    /// Reads a folder in Hugging Face layout. Only `tokenizer.json` must be there.
    ///
    /// # Errors
    /// A file that cannot be read or makes no sense, with its name.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        folder::read(folder)
    }

    /// Assembles the tokenizer from GGUF metadata.
    ///
    /// # Errors
    /// The key at fault; a tokenizer or pre-tokenizer that is not supported, by its name.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, TextError> {
        assembly::assemble(gguf)
    }

    /// The number of token ids: the highest one and 1.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// The tokens of `text`. Special tokens written in it are recognized.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn encode(&self, text: &str, add_special: AddSpecial) -> Result<Vec<TokenId>, TextError> {
        let add = add_special == AddSpecial::Yes;
        let encoding = self.tokenizer.encode_fast(text, add).map_err(tokenizer_error)?;
        let tokens = encoding.get_ids().iter().copied().map(TokenId);
        if !add {
            return Ok(tokens.collect());
        }
        let before = self.frame.before.iter().copied();
        Ok(before.chain(tokens).chain(self.frame.after.iter().copied()).collect())
    }

    /// The text of `tokens`. What is not valid UTF-8 becomes U+FFFD; unknown ids have no text.
    pub fn decode(&self, tokens: &[TokenId], special: SpecialTokens) -> String {
        let mut decoding = detokenizer::Decoding::new(self.pieces.strip_start());
        let mut text = String::new();
        for &token in tokens {
            decoding.push(self, token, special, &mut text);
        }
        decoding.finish(&mut text);
        text
    }

    /// The bytes that `token` stands for, without regard to its place; empty for an unknown id.
    pub fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        self.pieces.bytes(token).to_vec()
    }

    /// [`Text::token_bytes`] with U+FFFD for what is not valid UTF-8.
    pub fn token_text(&self, token: TokenId) -> String {
        String::from_utf8_lossy(self.pieces.bytes(token)).into_owned()
    }

    /// Whether `token` is a special one.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.pieces.is_special(token)
    }

    /// The tokens that end an answer, sorted, without duplicates.
    pub fn end_tokens(&self) -> &[TokenId] {
        &self.end_tokens
    }

    /// Whether the model brings a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The prompt of a chat. It holds the special tokens as text: encode it with [`AddSpecial::No`].
    ///
    /// # Errors
    /// [`TextError::NoTemplate`], or [`TextError::Template`] with the reason.
    pub fn render_chat(&self, chat: &ChatRequest<'_>) -> Result<String, TextError> {
        match (chat.template, &self.template) {
            (Some(source), _) => Template::parse(source)?.render(chat, &self.specials),
            (None, Some(template)) => template.render(chat, &self.specials),
            (None, None) => Err(TextError::NoTemplate),
        }
    }

    /// What the model's authors want sampled when a request does not say.
    pub fn sampling_defaults(&self) -> &SamplingDefaults {
        &self.defaults
    }
}

/// Renders a template that belongs to no model.
///
/// # Errors
/// [`TextError::Template`] with the reason.
pub fn render_template(source: &str, chat: &ChatRequest<'_>) -> Result<String, TextError> {
    Template::parse(source)?.render(chat, &SpecialTexts::default())
}

fn tokenizer_error(error: tokenizers::Error) -> TextError {
    TextError::Tokenizer(error.to_string())
}

/// Sorts and removes duplicates.
fn sorted(mut tokens: Vec<TokenId>) -> Vec<TokenId> {
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[cfg(test)]
mod tests;
