//! A tokenizer small enough to see through, in both layouts, and the detokenizer over it.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::{AddSpecial, Detokenizer, SpecialTokens, Text, TextError};
use crate::model::weights::gguf::{Array, Gguf, Value};
use crate::request::TokenId;

fn strings(texts: &[&str]) -> Value {
    Value::Array(Array::Strings(texts.iter().map(|&text| text.to_owned()).collect()))
}

fn gguf(entries: Vec<(&str, Value)>) -> Gguf {
    let metadata = entries.into_iter().map(|(key, value)| (format!("tokenizer.{key}"), value));
    Gguf { metadata: metadata.collect(), tensors: Default::default() }
}

/// `▁`, letters and a few pieces with scores; every byte has a token.
fn sentence_piece() -> Vec<(&'static str, Value)> {
    let mut texts = vec!["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"];
    let mut kinds = vec![2, 3, 3, 1, 1, 1, 1, 1, 1];
    let mut scores = vec![0.0, 0.0, 0.0, -9.0, -8.0, -7.0, -3.0, -2.0, -1.0];
    let bytes: Vec<String> = (0..=255_u8).map(|byte| format!("<0x{byte:02X}>")).collect();
    for byte in &bytes {
        texts.push(byte);
        kinds.push(6);
        scores.push(0.0);
    }
    vec![
        ("ggml.model", Value::String("llama".to_owned())),
        ("ggml.tokens", strings(&texts)),
        ("ggml.token_type", Value::Array(Array::I32s(kinds))),
        ("ggml.scores", Value::Array(Array::F32s(scores))),
        ("ggml.bos_token_id", Value::U32(1)),
        ("ggml.eos_token_id", Value::U32(2)),
    ]
}

fn small() -> Arc<Text> {
    Arc::new(Text::from_gguf(&gguf(sentence_piece())).unwrap())
}

fn ids(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

#[test]
fn the_best_scores_are_merged_and_bos_is_added_when_asked() {
    let text = small();
    assert_eq!(text.encode("ab", AddSpecial::No).unwrap(), ids(&[8]));
    assert_eq!(text.encode("ab", AddSpecial::Yes).unwrap(), ids(&[1, 8]));
    assert_eq!(text.encode("</s>a", AddSpecial::No).unwrap(), ids(&[2, 6]));
    assert_eq!(text.end_tokens(), ids(&[2]));
    assert_eq!(text.vocab_size(), 9 + 256);
}

#[test]
fn of_two_pieces_that_overlap_the_better_one_is_merged() {
    let mut gguf = gguf(sentence_piece());
    if let Some(Value::Array(Array::Strings(texts))) =
        gguf.metadata.get_mut("tokenizer.ggml.tokens")
    {
        texts[8] = "no piece of this".to_owned();
    }
    let text = Text::from_gguf(&gguf).unwrap();
    assert_eq!(text.encode("ab", AddSpecial::No).unwrap(), ids(&[3, 7]));
}

#[test]
fn what_is_no_token_is_written_as_bytes_and_read_back() {
    let text = small();
    let tokens = text.encode("aé", AddSpecial::No).unwrap();
    assert_eq!(tokens, ids(&[6, 9 + 0xc3, 9 + 0xa9]));
    assert_eq!(text.decode(&tokens, SpecialTokens::Skip), "aé");
    assert_eq!(text.token_bytes(TokenId(9 + 0xc3)), [0xc3]);
    assert_eq!(text.token_text(TokenId(6)), " a");
    assert_eq!(text.token_text(TokenId(9999)), "");
}

fn stream(text: &Arc<Text>, prompt: &[TokenId], tokens: &[TokenId]) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(text), prompt, SpecialTokens::Skip);
    let mut pieces: Vec<String> = tokens.iter().map(|&token| detokenizer.push(token)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

#[test]
fn a_character_of_several_tokens_comes_out_whole() {
    let text = small();
    let tokens = ids(&[9 + 0xf0, 9 + 0x9f, 2, 9 + 0x98, 9 + 0x80, 4]);
    assert_eq!(stream(&text, &[], &tokens), ["", "", "", "", "😀", "a", ""]);
}

#[test]
fn bytes_that_are_no_text_become_replacement_characters() {
    let text = small();
    let tokens = ids(&[9 + 0xff, 4, 9 + 0xe2, 9 + 0x82, 4, 9 + 0xe2]);
    let wanted = "\u{fffd}a\u{fffd}a\u{fffd}";
    assert_eq!(stream(&text, &[], &tokens).concat(), wanted);
    assert_eq!(text.decode(&tokens, SpecialTokens::Skip), wanted);
}

#[test]
fn the_space_before_the_output_stays_only_behind_a_prompt() {
    let text = small();
    let tokens = ids(&[8, 6]);
    assert_eq!(text.decode(&tokens, SpecialTokens::Skip), "ab a");
    assert_eq!(stream(&text, &[], &tokens).concat(), "ab a");
    assert_eq!(stream(&text, &ids(&[1]), &tokens).concat(), " ab a");
}

#[test]
fn special_tokens_are_kept_or_skipped() {
    let text = small();
    let tokens = ids(&[1, 4, 2]);
    assert_eq!(text.decode(&tokens, SpecialTokens::Keep), "<s>a</s>");
    assert_eq!(text.decode(&tokens, SpecialTokens::Skip), "a");
    assert!(text.is_special(TokenId(2)) && !text.is_special(TokenId(4)));
}

fn refused(change: impl FnOnce(&mut Gguf)) -> TextError {
    let mut gguf = gguf(sentence_piece());
    change(&mut gguf);
    Text::from_gguf(&gguf).unwrap_err()
}

fn set(gguf: &mut Gguf, key: &str, value: Value) {
    gguf.metadata.insert(key.to_owned(), value);
}

#[test]
fn inconsistent_metadata_is_refused_with_the_key_at_fault() {
    let error = refused(|gguf| set(gguf, "tokenizer.ggml.eos_token_id", Value::U32(999)));
    assert!(error.to_string().contains("tokenizer.ggml.eos_token_id"), "{error}");
    let short = || Value::Array(Array::F32s(vec![0.0]));
    let error = refused(|gguf| set(gguf, "tokenizer.ggml.scores", short()));
    assert!(matches!(error, TextError::Length { key: "tokenizer.ggml.scores", got: 1, .. }));
    let error = refused(|gguf| set(gguf, "tokenizer.ggml.model", Value::String("bert".to_owned())));
    assert!(matches!(error, TextError::Model(model) if model == "bert"));
    let error = refused(|gguf| {
        gguf.metadata.remove("tokenizer.ggml.tokens");
    });
    assert!(error.to_string().contains("tokenizer.ggml.tokens"), "{error}");
}

#[test]
fn a_turns_end_is_an_end_token_even_when_the_metadata_does_not_say() {
    let mut gguf = gguf(sentence_piece());
    if let Some(Value::Array(Array::Strings(texts))) =
        gguf.metadata.get_mut("tokenizer.ggml.tokens")
    {
        texts[0] = "<|im_end|>".to_owned();
    }
    if let Some(Value::Array(Array::I32s(kinds))) =
        gguf.metadata.get_mut("tokenizer.ggml.token_type")
    {
        kinds[0] = 3;
    }
    assert_eq!(Text::from_gguf(&gguf).unwrap().end_tokens(), ids(&[0, 2]));
    set(&mut gguf, "tokenizer.ggml.eot_token_id", Value::U32(5));
    assert_eq!(Text::from_gguf(&gguf).unwrap().end_tokens(), ids(&[2, 5]));
}

fn write(folder: &Path, name: &str, content: &serde_json::Value) {
    std::fs::write(folder.join(name), content.to_string()).unwrap();
}

/// A folder whose vocabulary is `a`, `b`, `ab`, `Ġ` and two special tokens.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
    };
    write(
        folder.path(),
        "tokenizer.json",
        &json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [special(4, "<end>"), special(5, "<turn>")],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "<end>": 4, "<turn>": 5}, "merges": [["a", "b"]]},
        }),
    );
    folder
}

#[test]
fn a_folder_brings_end_tokens_from_every_file_and_sampling_defaults() {
    let folder = folder();
    write(
        folder.path(),
        "generation_config.json",
        &json!({"eos_token_id": [5, 9], "temperature": 0.6}),
    );
    write(folder.path(), "config.json", &json!({"eos_token_id": 4}));
    write(
        folder.path(),
        "tokenizer_config.json",
        &json!({
            "eos_token": {"content": "<turn>"},
            "chat_template": [{"name": "tool_use", "template": "no"},
                {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"}],
        }),
    );
    let text = Text::from_folder(folder.path()).unwrap();
    assert_eq!(text.encode("ab <end>", AddSpecial::No).unwrap(), ids(&[2, 3, 4]));
    assert_eq!(text.end_tokens(), ids(&[4, 5, 9]));
    assert_eq!(text.sampling_defaults().temperature, Some(0.6));
    let chat = super::ChatRequest {
        messages: &json!([{"role": "user", "content": "ab"}]),
        add_generation_prompt: true,
        continue_final_message: false,
        kwargs: &serde_json::Map::new(),
        template: None,
    };
    assert_eq!(text.render_chat(&chat).unwrap(), "ab<turn>");
    let own = super::ChatRequest { template: Some("mine"), ..chat };
    assert_eq!(text.render_chat(&own).unwrap(), "mine");
    std::fs::write(folder.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(Text::from_folder(folder.path()).unwrap().render_chat(&chat).unwrap(), "file");
}

#[test]
fn a_folder_without_a_template_has_none() {
    let folder = folder();
    let text = Text::from_folder(folder.path()).unwrap();
    assert!(!text.has_chat_template());
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(Text::from_folder(empty.path()), Err(TextError::Read { .. })));
}
