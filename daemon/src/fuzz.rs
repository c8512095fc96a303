//! What the fuzzers run, and what replays their corpus as plain tests. Every function takes any bytes and must not
//! panic, hang or take memory out of proportion. Not part of the interface.

use serde_json::{Map, Value, json};

use crate::model::text::{ChatRequest, Text, render_template};
use crate::model::weights::gguf::Gguf;

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

/// The reader of safetensors headers and of the index of a model in several files.
pub fn fuzz_safetensors(data: &[u8]) {
    drop(safetensors::SafeTensors::read_metadata(data).map(|(header, metadata)| {
        for tensor in metadata.tensors().values() {
            let (start, end) = tensor.data_offsets;
            assert!(start <= end && header.checked_add(end).is_some());
        }
    }));
}
