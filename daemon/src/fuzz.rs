//! What the fuzzers run, and what replays their corpus as plain tests. Every function takes any bytes and must not
//! panic, hang or take memory out of proportion. Not part of the interface.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use serde_json::{Map, Value, json};
use tokio::runtime::Runtime;

use crate::api::error::ApiError;
use crate::api::state::{ApiLimits, ApiState, CacheScope, Loaded};
use crate::api::{chat, completions};
use crate::engine::handle::{Capacity, Handle};
use crate::kv::BlockSize;
use crate::metrics::Metrics;
use crate::model::config::ModelConfig;
use crate::model::files::named_in_index;
use crate::model::text::{ChatRequest, Text, render_template};
use crate::model::weights::gguf::{Array, Gguf, Value as Entry};
use crate::model::weights::{
    Catalogue, Check, Layout, Source, WantedMatrix, WantedVector, Weights, safetensors, wanted,
};
use crate::request::{Decoding, Request};

/// The GGUF reader, and the tokenizer assembled from what it read.
pub fn fuzz_gguf(data: &[u8]) {
    let Ok(gguf) = Gguf::parse(data) else { return };
    for tensor in gguf.tensors.values() {
        assert!(tensor.range.end <= data.len(), "a tensor lies outside the file");
    }
    if let Ok(text) = Text::from_gguf(&gguf) {
        // A tokenizer that was taken must work on any text.
        drop(text.encode("a b\n\u{1F600}", crate::model::text::AddSpecial::Yes));
    }
}

/// The chat-template renderer. Up to a NUL byte the data is the template, after it the messages as JSON.
pub fn fuzz_template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (source, messages) = text.split_once('\0').unwrap_or((text, ""));
    let messages: Value = serde_json::from_str(messages).unwrap_or_else(
        |_| json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]),
    );
    for continue_final_message in [true, false] {
        // Its failure is the client's to hear of.
        drop(render_template(
            source,
            &ChatRequest {
                messages: &messages,
                add_generation_prompt: !continue_final_message,
                continue_final_message,
                kwargs: &Map::new(),
                template: None,
            },
        ));
    }
}

/// The parser of completion requests, up to the engine.
pub fn fuzz_completion_request(data: &[u8]) {
    check(RUNTIME.block_on(completions::requests(&STATE, data)));
}

/// The parser of chat requests, up to the engine.
pub fn fuzz_chat_request(data: &[u8]) {
    check(RUNTIME.block_on(chat::request(&STATE, data)).map(|request| vec![request]));
}

const MAX_MODEL_LEN: u32 = 512;

/// What was read keeps its promises, and what was refused is the client's fault.
fn check(read: Result<Vec<Request>, ApiError>) {
    match read {
        Ok(requests) => {
            assert!(!requests.is_empty());
            requests.iter().for_each(check_request);
        }
        Err(error) => {
            assert!(error.status().is_client_error(), "{error} is the server's fault");
            assert!(error.body()["error"]["code"].is_string());
        }
    }
}

fn check_request(request: &Request) {
    let vocab = STATE.loaded().map_or(0, |loaded| loaded.text.vocab_size());
    assert!(!request.prompt.is_empty());
    assert!(request.prompt.iter().all(|token| (token.0 as usize) < vocab));
    assert!(request.prompt.len() + request.max_tokens.get() as usize <= MAX_MODEL_LEN as usize);
    assert!(request.stop_tokens.is_sorted() && request.width().get() <= STATE.limits.choices);
    if let Decoding::Sample { params, .. } = &request.decoding {
        let numbers = [params.temperature, params.top_p, params.min_p, params.repetition_penalty];
        assert!(numbers.iter().all(|number| number.is_finite() && *number >= 0.0));
        assert!(params.min_tokens <= request.max_tokens.get());
    }
}

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime")
});

/// A model without an engine.
static STATE: LazyLock<ApiState> = LazyLock::new(|| {
    let metrics = Arc::new(Metrics::new("tiny").expect("constant names"));
    let limits = ApiLimits::with_body_bytes(1 << 20);
    let state = ApiState::new(vec!["tiny".to_owned()], vec![], limits, CacheScope::Key, metrics);
    let text = Arc::new(Text::from_gguf(&vocabulary()).expect("a constant vocabulary"));
    let block_size = BlockSize(NonZeroU32::MIN.saturating_add(15));
    let capacity =
        Capacity { max_model_len: MAX_MODEL_LEN, max_num_seqs: 64, block_size, blocks: 64 };
    let longest_token = crate::api::ask::longest_token(&text);
    let handle = Handle::detached(capacity);
    state.set_loaded(Loaded {
        handle,
        text,
        fingerprint: "fuzz".to_owned(),
        longest_token,
        readers: Loaded::readers(),
    });
    state
});

/// Every byte is a token, and there is a chat template.
fn vocabulary() -> Gguf {
    let mut texts = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    texts.extend((0..=255_u8).map(|byte| format!("<0x{byte:02X}>")));
    let kinds = [2, 3, 3].into_iter().chain(std::iter::repeat_n(6, 256)).collect();
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let entries = [
        ("ggml.model", Entry::String("llama".to_owned())),
        ("ggml.scores", Entry::Array(Array::F32s(vec![0.0; texts.len()]))),
        ("ggml.tokens", Entry::Array(Array::Strings(texts))),
        ("ggml.token_type", Entry::Array(Array::I32s(kinds))),
        ("ggml.bos_token_id", Entry::U32(1)),
        ("ggml.eos_token_id", Entry::U32(2)),
        ("chat_template", Entry::String(template.to_owned())),
    ];
    let metadata = entries.into_iter().map(|(key, value)| (format!("tokenizer.{key}"), value));
    Gguf { metadata: metadata.collect(), tensors: Default::default() }
}

/// The reader of safetensors files, and the check of what it read against the configuration of a tiny model.
pub fn fuzz_safetensors(data: &[u8]) {
    let _: Option<usize> = checked_bytes(data);
}

/// The bytes that the tiny model's weights take; `None` when the file is refused.
fn checked_bytes(data: &[u8]) -> Option<usize> {
    let tensors = safetensors(data, 0).ok()?;
    assert!(tensors.values().all(|tensor| tensor.range.end <= data.len()), "outside the file");
    // No file: a check reads no tensor.
    let source = Source::Files(Catalogue { files: Vec::new(), tensors });
    let mut check = Check::new(&source, None);
    TINY.read(&mut check).and_then(|_| check.finish()).ok()
}

/// What a model of one layer wants of its file.
static TINY: LazyLock<Weights<WantedMatrix, WantedVector>> = LazyLock::new(|| {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 4, "intermediate_size": 2, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 3,
        "max_position_embeddings": 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
    });
    wanted(&ModelConfig::from_json(&config).expect("a constant configuration"), Layout::Safetensors)
});

/// The reader of the index of a model in several safetensors files.
pub fn fuzz_safetensors_index(data: &[u8]) {
    let Ok(json) = serde_json::from_slice(data) else { return };
    for name in named_in_index(Path::new("index"), &json).into_iter().flatten() {
        assert_eq!(Path::new("folder").join(&name).parent(), Some(Path::new("folder")), "{name}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The corpus reaches behind the header: this file passes, and each of the others is one step from it.
    #[test]
    fn only_the_whole_file_of_the_tiny_model_passes_the_check() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/safetensors");
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let bytes = checked_bytes(&std::fs::read(&path).unwrap());
            let whole = path.file_name().is_some_and(|name| name == "tiny_whole");
            // 7 matrices of 4 columns and one of 2, in panels of 16 rows; 3 norms of 4 and biases of 4 + 2 + 2.
            let wanted = whole.then_some(2 * 16 * (7 * 4 + 2) + 4 * (3 * 4 + 8));
            assert_eq!(bytes, wanted, "{}", path.display());
        }
    }
}
