//! The tokenizer that GGUF metadata describes: byte-level merges (`gpt2`), SentencePiece scores (`llama`),
//! or merges over plain text (`gemma4`).

use std::collections::HashMap;

use serde_json::{Value, json};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence};
use tokenizers::{AddedToken, Tokenizer};

use super::pieces::{MAX_VOCABULARY, Pieces};
use super::pre_tokenizer::{Bytes, Rule, WholeWords};
use super::template::Template;
use super::{Frame, SamplingDefaults, SpecialTexts, Text, TextError, sorted, tokenizer_error};
use crate::model::weights::gguf::{Array, Gguf};
use crate::request::TokenId;

/// How SentencePiece writes a space.
const SPACE: &str = "\u{2581}";
/// Longest text of one token, in bytes: bounds the work of deriving merges.
const MAX_TOKEN_BYTES: usize = 1024;
/// Texts of tokens that end a turn, in models whose metadata does not name theirs.
const TURN_ENDS: [&str; 5] = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>"];

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
}

/// The tokens of the metadata, checked against each other.
struct Vocabulary<'a> {
    texts: &'a [String],
    kinds: Vec<Kind>,
}

/// Builds everything from the metadata.
pub(super) fn assemble(gguf: &Gguf) -> Result<Text, TextError> {
    let vocabulary = Vocabulary::read(gguf)?;
    let model = gguf.get_str("tokenizer.ggml.model")?;
    let mut built = match model {
        "gpt2" => byte_level(gguf, &vocabulary)?,
        "llama" => sentence_piece(gguf, &vocabulary)?,
        "gemma4" => plain_merges(gguf, &vocabulary)?,
        other => return Err(TextError::Model(other.to_owned())),
    };
    built.tokenizer.add_tokens(vocabulary.added()).map_err(tokenizer_error)?;
    let specials = vocabulary.special_texts(gguf)?;
    let source = gguf.get_str_opt("tokenizer.chat_template")?;
    Ok(Text {
        pieces: Pieces::of(&built.tokenizer)?,
        frame: vocabulary.frame(gguf, built.adds_bos)?,
        end_tokens: vocabulary.end_tokens(gguf)?,
        template: source.map(Template::parse).transpose()?,
        specials,
        defaults: SamplingDefaults::default(),
        tokenizer: built.tokenizer,
    })
}

/// A tokenizer without its special tokens.
struct Built {
    tokenizer: Tokenizer,
    /// Whether BOS is added when the metadata does not say.
    adds_bos: bool,
}

fn byte_level(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Built, TextError> {
    let name = gguf.get_str_opt("tokenizer.ggml.pre")?.unwrap_or_else(|| {
        tracing::warn!("the model does not name its pre-tokenizer, its words may be cut wrongly");
        "default"
    });
    let rule = Rule::named(name)?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges(gguf)?)
        .ignore_merges(rule.whole_words == WholeWords::Taken)
        .build()
        .map_err(tokenizer_error)?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(rule.pre_tokenizer(Bytes::AsCharacters)?));
    tokenizer.with_decoder(Some(decoder(json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    }))?));
    Ok(Built { tokenizer, adds_bos: rule.adds_bos })
}

fn sentence_piece(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Built, TextError> {
    let merges = vocabulary.merges_by_score(gguf)?;
    let mut tokenizer = Tokenizer::new(text_merges(vocabulary, merges)?);
    let prefix = gguf.get_bool_opt("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    write_spaces(&mut tokenizer, prefix)?;
    Ok(Built { tokenizer, adds_bos: true })
}

fn plain_merges(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Built, TextError> {
    let rule = Rule::lines();
    let mut tokenizer = Tokenizer::new(text_merges(vocabulary, merges(gguf)?)?);
    tokenizer.with_pre_tokenizer(Some(rule.pre_tokenizer(Bytes::AsText)?));
    write_spaces(&mut tokenizer, false)?;
    Ok(Built { tokenizer, adds_bos: rule.adds_bos })
}

/// Merges over text in which a character that is no token is written as its bytes.
fn text_merges(vocabulary: &Vocabulary<'_>, merges: Merges) -> Result<BPE, TextError> {
    let mut builder = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges)
        .byte_fallback(true)
        .fuse_unk(true);
    let unknown = vocabulary.kinds.iter().position(|&kind| kind == Kind::Unknown);
    if let Some(text) = unknown.and_then(|at| vocabulary.texts.get(at)) {
        builder = builder.unk_token(text.clone());
    }
    builder.build().map_err(tokenizer_error)
}

/// Writes spaces as U+2581, with one before the text when `prefix`, and takes that back when decoding.
fn write_spaces(tokenizer: &mut Tokenizer, prefix: bool) -> Result<(), TextError> {
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        steps.push(Prepend::new(SPACE.to_owned()).into());
    }
    steps.push(Replace::new(" ", SPACE).map_err(tokenizer_error)?.into());
    tokenizer.with_normalizer(Some(Sequence::new(steps))).map_err(tokenizer_error)?;
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    tokenizer.with_decoder(Some(decoder(json!({"type": "Sequence", "decoders": decoders}))?));
    Ok(())
}

fn decoder(description: Value) -> Result<DecoderWrapper, TextError> {
    serde_json::from_value(description).map_err(|error| TextError::Tokenizer(error.to_string()))
}

fn merges(gguf: &Gguf) -> Result<Merges, TextError> {
    let merges = gguf.get_strings("tokenizer.ggml.merges")?;
    let pair = |merge: &String| {
        // The first part may itself begin with a space.
        let after_first = merge.chars().next().map_or(0, char::len_utf8);
        let space = merge.get(after_first..).and_then(|rest| rest.find(' '));
        let split = space.and_then(|space| merge.split_at_checked(after_first + space));
        let (left, right) = split?;
        Some((left.to_owned(), right.get(1..)?.to_owned()))
    };
    let bad = |merge: &String| TextError::Tokenizer(format!("merge {merge:?} is not two parts"));
    merges.iter().map(|merge| pair(merge).ok_or_else(|| bad(merge))).collect()
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self, TextError> {
        let texts = gguf.get_strings("tokenizer.ggml.tokens")?;
        if texts.len() > MAX_VOCABULARY {
            let got = u64::try_from(texts.len()).unwrap_or(u64::MAX);
            return Err(TextError::VocabularyTooLarge { got, limit: MAX_VOCABULARY });
        }
        if let Some(long) = texts.iter().find(|text| text.len() > MAX_TOKEN_BYTES) {
            let got = long.len();
            return Err(TextError::Tokenizer(format!(
                "a token of {got} bytes is too long, wanted at most {MAX_TOKEN_BYTES}"
            )));
        }
        let kinds = match gguf.get_array_opt("tokenizer.ggml.token_type")? {
            None => vec![Kind::Normal; texts.len()],
            Some(Array::I32s(codes)) => codes.iter().copied().map(Kind::of).collect(),
            Some(Array::U32s(codes)) => {
                codes.iter().map(|&code| Kind::of(i32::try_from(code).unwrap_or(0))).collect()
            }
            Some(_) => {
                return Err(TextError::Tokenizer("token types are not 32-bit integers".to_owned()));
            }
        };
        same_length("tokenizer.ggml.token_type", kinds.len(), texts.len())?;
        Ok(Self { texts, kinds })
    }

    fn ids(&self) -> Vocab {
        let mut ids = Vocab::default();
        for (text, id) in self.texts.iter().zip(0..) {
            ids.entry(text.clone()).or_insert(id);
        }
        ids
    }

    fn with_kinds(&self) -> impl Iterator<Item = (&'a String, Kind)> {
        self.texts.iter().zip(self.kinds.iter().copied())
    }

    /// The tokens that are recognized in text before anything else.
    fn added(&self) -> Vec<AddedToken> {
        let added = self.with_kinds().filter_map(|(text, kind)| match kind {
            Kind::Control | Kind::Unknown => Some(AddedToken::from(text.clone(), true)),
            Kind::UserDefined => Some(AddedToken::from(text.clone(), false).normalized(false)),
            Kind::Normal | Kind::Byte => None,
        });
        added.filter(|token| !token.content.is_empty()).collect()
    }

    /// SentencePiece joins the neighbours whose piece scores best: the same as merges ranked by their piece's score.
    fn merges_by_score(&self, gguf: &Gguf) -> Result<Merges, TextError> {
        let Array::F32s(scores) = gguf.get_array("tokenizer.ggml.scores")? else {
            return Err(TextError::Tokenizer("scores are not 32-bit floats".to_owned()));
        };
        same_length("tokenizer.ggml.scores", scores.len(), self.texts.len())?;
        let pieces: HashMap<&str, u32> = self
            .with_kinds()
            .zip(0..)
            .filter(|((_, kind), _)| matches!(kind, Kind::Normal | Kind::UserDefined))
            .map(|((text, _), id)| (text.as_str(), id))
            .collect();
        let mut ranked = Vec::new();
        for ((text, kind), &score) in self.with_kinds().zip(scores) {
            if !matches!(kind, Kind::Normal | Kind::UserDefined) {
                continue;
            }
            for (at, _) in text.char_indices().skip(1) {
                let (left, right) = text.split_at(at);
                if let (Some(&left_id), Some(&right_id)) = (pieces.get(left), pieces.get(right)) {
                    ranked.push((score, left_id, right_id, left, right));
                }
            }
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let owned = |(_, _, _, left, right): (f32, u32, u32, &str, &str)| {
            (left.to_owned(), right.to_owned())
        };
        Ok(ranked.into_iter().map(owned).collect())
    }

    /// The token that metadata `key` names.
    fn named(&self, gguf: &Gguf, key: &str) -> Result<Option<TokenId>, TextError> {
        let Some(id) = gguf.get_u64_opt(key)? else { return Ok(None) };
        let n_tokens = self.texts.len();
        match u32::try_from(id) {
            Ok(token) if usize::try_from(id).is_ok_and(|id| id < n_tokens) => {
                Ok(Some(TokenId(token)))
            }
            _ => Err(TextError::UnknownToken { key: key.to_owned(), got: id, n_tokens }),
        }
    }

    fn special_texts(&self, gguf: &Gguf) -> Result<SpecialTexts, TextError> {
        let text = |key: &str| -> Result<Option<String>, TextError> {
            let token = self.named(gguf, key)?;
            let at = token.and_then(|token| usize::try_from(token.0).ok());
            Ok(at.and_then(|at| self.texts.get(at)).cloned())
        };
        Ok(SpecialTexts {
            bos: text("tokenizer.ggml.bos_token_id")?,
            eos: text("tokenizer.ggml.eos_token_id")?,
            unk: text("tokenizer.ggml.unknown_token_id")?,
            pad: text("tokenizer.ggml.padding_token_id")?,
        })
    }

    fn frame(&self, gguf: &Gguf, adds_bos: bool) -> Result<Frame, TextError> {
        let mut frame = Frame::default();
        if gguf.get_bool_opt("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos) {
            frame.before.extend(self.named(gguf, "tokenizer.ggml.bos_token_id")?);
        }
        if gguf.get_bool_opt("tokenizer.ggml.add_eos_token")?.unwrap_or(false) {
            frame.after.extend(self.named(gguf, "tokenizer.ggml.eos_token_id")?);
        }
        Ok(frame)
    }

    fn end_tokens(&self, gguf: &Gguf) -> Result<Vec<TokenId>, TextError> {
        let mut tokens = Vec::new();
        tokens.extend(self.named(gguf, "tokenizer.ggml.eos_token_id")?);
        tokens.extend(self.named(gguf, "tokenizer.ggml.eom_token_id")?);
        match self.named(gguf, "tokenizer.ggml.eot_token_id")? {
            Some(token) => tokens.push(token),
            None => tokens.extend(self.turn_ends()),
        }
        Ok(sorted(tokens))
    }

    /// The tokens that end a turn, told by their text.
    fn turn_ends(&self) -> impl Iterator<Item = TokenId> {
        let ids = self.with_kinds().zip(0..);
        ids.filter(|((text, kind), _)| {
            matches!(kind, Kind::Control | Kind::UserDefined) && TURN_ENDS.contains(&text.as_str())
        })
        .map(|(_, id)| TokenId(id))
    }
}

impl Kind {
    fn of(code: i32) -> Self {
        match code {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

fn same_length(key: &'static str, got: usize, wanted: usize) -> Result<(), TextError> {
    if got == wanted { Ok(()) } else { Err(TextError::Length { key, got, wanted }) }
}
