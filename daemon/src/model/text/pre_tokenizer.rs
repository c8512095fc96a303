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
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}",
    r"\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}",
    r"\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}",
    r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}",
    r"\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}",
    r"\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}",
    r"\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}",
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}",
    r"\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}",
    r"\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}",
    r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}",
    r"\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}",
    r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
    r"\x{1E900}-\x{1E943}",
);

/// Han, Hangul and the scripts between them, as the same tokenizers keep them together.
const CJK: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";

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
        r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"
            .to_owned(),
        r"\s+$".to_owned(),
        CJK.to_owned(),
        r"\p{N}+".to_owned(),
    ]
}

fn deepseek_coder() -> Vec<String> {
    [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"].map(str::to_owned).to_vec()
}

fn deepseek_v3() -> Vec<String> {
    vec![
        r"\p{N}{1,3}".to_owned(),
        r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+".to_owned(),
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
