//! Replays the corpus of every fuzz target whose body is in `daemon::fuzz`: what once went wrong stays fixed.
#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot read")]

use std::path::Path;

/// Runs every file of a target's corpus.
fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut n_files = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        eprintln!("{}", path.display());
        run(&std::fs::read(&path).unwrap());
        n_files += 1;
    }
    assert!(n_files > 0, "{} is empty", folder.display());
}

#[test]
fn the_gguf_reader_survives_its_corpus() {
    replay("gguf", daemon::fuzz::fuzz_gguf);
}

#[test]
fn the_template_renderer_survives_its_corpus() {
    replay("template", daemon::fuzz::fuzz_template);
}

#[test]
fn the_completion_parser_survives_its_corpus() {
    replay("completion_request", daemon::fuzz::fuzz_completion_request);
}

#[test]
fn the_chat_parser_survives_its_corpus() {
    replay("chat_request", daemon::fuzz::fuzz_chat_request);
}

#[test]
fn the_safetensors_reader_survives_its_corpus() {
    replay("safetensors", daemon::fuzz::fuzz_safetensors);
}

#[test]
fn the_reader_of_an_index_survives_its_corpus() {
    replay("safetensors_index", daemon::fuzz::fuzz_safetensors_index);
}
