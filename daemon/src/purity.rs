//! Test only: `kv`, `scheduler` and `sampling` mention no I/O, no clock, no task and no device.

use std::path::{Path, PathBuf};

const PURE: [&str; 3] = ["kv", "scheduler", "sampling"];
const FORBIDDEN: [&str; 14] = [
    "tokio",
    "std::time",
    "Instant",
    "std::fs",
    "std::net",
    "std::io",
    "std::thread",
    "async fn",
    "serde_json",
    "tracing",
    "prometheus",
    "candle",
    "kernels::",
    "std::env",
];

/// Arithmetic over a row of logits in the widest instructions: a function of its arguments, the same bits everywhere.
const EXCEPTION: (&str, &str) = ("sampling/survey.rs", "kernels::");

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        match entry.path() {
            path if path.is_dir() => sources(&path, found),
            path if path.file_name().is_some_and(|name| name != "tests.rs") => found.push(path),
            _ => {}
        }
    }
}

#[test]
fn pure_rooms_mention_nothing_impure() {
    let mut found = Vec::new();
    for room in PURE {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(room), &mut found);
    }
    assert!(found.len() > 15, "the rooms have moved: {found:?}");
    for path in found {
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for (line, word) in code.flat_map(|line| FORBIDDEN.map(|word| (line, word))) {
            let allowed = path.ends_with(EXCEPTION.0) && word == EXCEPTION.1;
            assert!(allowed || !line.contains(word), "{} mentions {word}: {line}", path.display());
        }
    }
}
