//! The `bindery` binary over HTTP with a real model.
#![forbid(unsafe_code)]

mod api;
mod departures;
mod errors;
mod fields;
mod identity;
mod lifecycle;
mod sources;

use std::path::PathBuf;

use serde_json::{Value, json};

/// A greedy completion of a text.
fn completion(prompt: impl Into<Value>, max_tokens: u32) -> Value {
    json!({"model": "tiny", "prompt": prompt.into(), "max_tokens": max_tokens, "temperature": 0})
}

/// The model, or `None` after a loud line.
fn model(test: &str) -> Option<PathBuf> {
    harness::model(test)
}

/// The text of a stream's choice.
fn streamed(chunks: &[Value], index: usize) -> String {
    let choices = chunks.iter().filter_map(|chunk| chunk["choices"].as_array()).flatten();
    let own = choices.filter(|choice| choice["index"] == index);
    own.filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str()))
        .collect()
}
