//! Tokenizers and chat templates against the conformance set that `tests/conformance/fetch.py` caches.
//! It runs when `BINDERY_CONFORMANCE_DIR` names the folder, and says loudly when it does not.
#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot read")]

use std::path::{Path, PathBuf};

use daemon::model::text::{
    AddSpecial, ChatRequest, SpecialTokens, Text, TextError, render_template,
};
use daemon::model::weights::gguf::Gguf;
use daemon::request::TokenId;
use serde_json::{Map, Value, json};

/// Vocabularies with expected ids that must be reproduced.
const SUPPORTED: [&str; 14] = [
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
];
/// Vocabularies that must be refused, with what the refusal names.
const REFUSED: [(&str, &str); 2] = [("bert-bge", "bert"), ("nomic-bert-moe", "t5")];
/// Templates that cannot do without variables which a plain chat does not have.
const WANT_MORE: [&str; 1] = ["fireworks-ai-llama-3-firefunction-v2"];
const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

/// The folder of the set; `None` after saying that the test does not run.
fn folder(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("BINDERY_CONFORMANCE_DIR").map(PathBuf::from);
    if folder.is_none() {
        eprintln!(
            "NOT RUN: {test}: BINDERY_CONFORMANCE_DIR is not set (tests/conformance/fetch.py prints it)"
        );
    }
    folder
}

fn load(folder: &Path, name: &str) -> Result<Text, TextError> {
    let bytes = std::fs::read(folder.join(format!("ggml-vocab-{name}.gguf"))).unwrap();
    Text::from_gguf(&Gguf::parse(&bytes).unwrap())
}

/// What differs between the tokens found and wanted, one line each.
fn differences(folder: &Path, name: &str) -> Vec<String> {
    let text = load(folder, name).unwrap_or_else(|error| panic!("{name}: {error}"));
    let read = |end: &str| {
        std::fs::read_to_string(folder.join(format!("ggml-vocab-{name}.gguf.{end}"))).unwrap()
    };
    let (inputs, outputs) = (read("inp"), read("out"));
    let mut inputs: Vec<&str> = inputs.split(SEPARATOR).collect();
    inputs.pop_if(|last| last.trim_end_matches('\n').is_empty());
    let outputs: Vec<&str> = outputs.lines().collect();
    assert_eq!(inputs.len(), outputs.len(), "{name}: texts and lines of ids");
    let mut found = Vec::new();
    for (input, output) in inputs.iter().zip(outputs) {
        let wanted: Vec<TokenId> =
            output.split_whitespace().map(|id| TokenId(id.parse().unwrap())).collect();
        let got = text.encode(input, AddSpecial::No).unwrap();
        if got != wanted {
            found.push(format!("{name}: {input:?}: got {got:?}, wanted {wanted:?}"));
        }
        let decoded = text.decode(&got, SpecialTokens::Keep);
        if decoded != *input {
            found.push(format!("{name}: {input:?} comes back as {decoded:?}"));
        }
    }
    found
}

#[test]
fn supported_vocabularies_give_the_expected_tokens() {
    let Some(folder) = folder("supported_vocabularies_give_the_expected_tokens") else { return };
    let names = SUPPORTED.iter();
    let found: Vec<String> = names.flat_map(|name| differences(&folder, name)).collect();
    assert!(found.is_empty(), "{} differences:\n{}", found.len(), found.join("\n"));
}

#[test]
fn other_vocabularies_are_refused_by_name() {
    let Some(folder) = folder("other_vocabularies_are_refused_by_name") else { return };
    for (name, named) in REFUSED {
        let error = load(&folder, name).unwrap_err().to_string();
        assert!(error.contains(named), "{name}: {error}");
    }
}

fn two_turns() -> Value {
    json!([
        {"role": "user", "content": "What is a block?"},
        {"role": "assistant", "content": "A fixed number of token slots."},
        {"role": "user", "content": "And a page?"},
    ])
}

fn render(source: &str) -> Result<String, TextError> {
    let (messages, kwargs) = (two_turns(), Map::new());
    render_template(
        source,
        &ChatRequest {
            messages: &messages,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: &kwargs,
            template: None,
        },
    )
}

#[test]
fn published_templates_render_a_chat_of_two_turns() {
    let Some(folder) = folder("published_templates_render_a_chat_of_two_turns") else { return };
    let mut failed = Vec::new();
    let mut n_templates = 0;
    for entry in std::fs::read_dir(folder.join("templates")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "jinja") {
            continue;
        }
        n_templates += 1;
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        match render(&std::fs::read_to_string(&path).unwrap()) {
            Ok(prompt) => assert!(prompt.contains("And a page?"), "{name} lost the chat: {prompt}"),
            Err(TextError::Template { reason }) => failed.push(format!("{name}: {reason}")),
            Err(other) => panic!("{name}: {other}"),
        }
    }
    eprintln!("{n_templates} templates, {} fail:\n{}", failed.len(), failed.join("\n"));
    let unexpected =
        failed.iter().filter(|line| !WANT_MORE.iter().any(|name| line.starts_with(name))).count();
    assert!(n_templates > 50 && unexpected == 0, "{}", failed.join("\n"));
}
