//! How a text is cut into words before byte-pair merges, by the name that GGUF metadata gives the rule.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::{TextError, tokenizer_error};

/// GPT-2's words.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The words of the tiktoken family, less how many digits stay together.
const CONTRACTIONS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const LETTERS: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
const REST: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DIGIT: &str = r"\p{N}";
/// Cased letters of the alphabets that DeepSeek's first tokenizers keep together.
const DEEPSEEK_LETTERS: &str = concat!(
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼι",
    "ῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ",
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
);

/// Whether a word that is a token of its own is taken as it is, without merging its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WholeWords {
    Taken,
    Merged,
}

/// What the name of a pre-tokenizer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    /// Patterns applied one after the other to what is left of the text.
    patterns: Vec<String>,
    pub(super) whole_words: WholeWords,
    /// Whether BOS is added when the metadata does not say.
    pub(super) adds_bos: bool,
}

impl Rule {
    /// The rule of that name.
    ///
    /// # Errors
    /// The name, when it is not known.
    pub(super) fn named(name: &str) -> Result<Self, TextError> {
        let patterns = match name {
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "exaone4" | "modern-bert"
            | "gigachat" | "a.x-4.0" | "mellum" | "trillion" | "granite-docling" => {
                vec![GPT2.to_owned()]
            }
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
            | "minerva-7b" => vec![DIGIT.to_owned(), GPT2.to_owned()],
            "qwen2" | "deepseek-r1-qwen" | "megrez" | "stablelm2" | "hunyuan" | "grok-2"
            | "kormo" => {
                vec![tiktoken(DIGIT)]
            }
            "qwen35" => vec![marks_with_letters()],
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "lfm2"
            | "midm-2.0" | "dbrx" | "smaug-bpe" | "glm4" | "glm5" | "chatglm-bpe" => {
                vec![tiktoken(r"\p{N}{1,3}")]
            }
            "tekken" => vec![format!("{}|{DIGIT}|{}", cased(""), slashed())],
            "gpt-4o" | "llama4" | "kanana2" => {
                let contraction = format!("{CONTRACTIONS}?");
                vec![format!(r"{}|\p{{N}}{{1,3}}|{}", cased(&contraction), slashed())]
            }
            "falcon" => falcon(),
            "default" => default(),
            "deepseek-llm" => deepseek_llm(),
            "deepseek-coder" => deepseek_coder(),
            "deepseek-v3" | "hunyuan-dense" | "joyai-llm" => deepseek_v3(),
            unknown => return Err(TextError::PreTokenizer(unknown.to_owned())),
        };
        let whole_words = match name {
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "lfm2"
            | "midm-2.0" | "glm4" | "glm5" | "tekken" => WholeWords::Taken,
            _ => WholeWords::Merged,
        };
        let adds_bos = whole_words == WholeWords::Taken && !name.starts_with("glm");
        Ok(Self { patterns, whole_words, adds_bos })
    }

    /// The words of SentencePiece-like vocabularies: lines.
    pub(super) fn lines() -> Self {
        let patterns = vec![r"[^\n]+|\n+".to_owned()];
        Self { patterns, whole_words: WholeWords::Merged, adds_bos: true }
    }

    /// The pre-tokenizer, which also writes bytes as characters when `bytes` says so.
    pub(super) fn pre_tokenizer(&self, bytes: Bytes) -> Result<Sequence, TextError> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        for pattern in &self.patterns {
            let pattern = SplitPattern::Regex(pattern.clone());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            steps.push(split.map_err(tokenizer_error)?.into());
        }
        if bytes == Bytes::AsCharacters {
            steps.push(ByteLevel::new(false, true, false).into());
        }
        Ok(Sequence::new(steps))
    }
}

/// How the vocabulary writes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bytes {
    /// Each byte as one of 256 characters, as in GPT-2.
    AsCharacters,
    /// As UTF-8 text.
    AsText,
}

fn tiktoken(digits: &str) -> String {
    format!("{CONTRACTIONS}|{LETTERS}|{digits}|{REST}")
}

/// As `qwen2`, with combining marks counted as letters.
fn marks_with_letters() -> String {
    let rest = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    format!(r"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{DIGIT}|{rest}")
}

/// Words that end where capital letters begin again, each followed by `end`.
fn cased(end: &str) -> String {
    let before = r"[^\r\n\p{L}\p{N}]?";
    let upper = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
    let lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";
    format!("{before}{upper}*{lower}+{end}|{before}{upper}+{lower}*{end}")
}

/// [`REST`] with slashes kept at the end of punctuation.
fn slashed() -> String {
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+".to_owned()
}

fn falcon() -> Vec<String> {
    [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"].map(str::to_owned).to_vec()
}

fn default() -> Vec<String> {
    [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"].map(str::to_owned).to_vec()
}

fn deepseek_llm() -> Vec<String> {
    vec![
        r"[\r\n]".to_owned(),
        format!(r"\s?[{DEEPSEEK_LETTERS}]+"),
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+".to_owned(),
        r"\s+$".to_owned(),
        "[一-龥ࠀ-一가-퟿]+".to_owned(),
        r"\p{N}+".to_owned(),
    ]
}

fn deepseek_coder() -> Vec<String> {
    [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]
        .map(str::to_owned)
        .to_vec()
}

fn deepseek_v3() -> Vec<String> {
    vec![
        r"\p{N}{1,3}".to_owned(),
        "[一-龥぀-ゟ゠-ヿ]+".to_owned(),
        concat!(
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"##,
            r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        .to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use super::Rule;
    use crate::model::text::TextError;

    #[test]
    fn an_unknown_name_is_refused_by_name() {
        let refused = Rule::named("bert-bge").unwrap_err();
        assert!(matches!(refused, TextError::PreTokenizer(name) if name == "bert-bge"));
    }
}
