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

/// One thread owns the engine: nothing in these rooms is shared under a lock.
const UNLOCKED: [&str; 4] = ["kv", "scheduler", "sampling", "engine"];
const LOCKS: [&str; 2] = ["Mutex", "RwLock"];

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

fn sources_of(rooms: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for room in rooms {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(room), &mut found);
    }
    found
}

/// The file's lines that are not comments alone.
fn code_of(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    text.lines().filter(is_code).map(str::to_owned).collect()
}

#[test]
fn pure_rooms_mention_nothing_impure() {
    let found = sources_of(&PURE);
    assert!(found.len() > 15, "the rooms have moved: {found:?}");
    for path in found {
        for (line, word) in code_of(&path).iter().flat_map(|line| FORBIDDEN.map(|w| (line, w))) {
            let allowed = path.ends_with(EXCEPTION.0) && word == EXCEPTION.1;
            assert!(allowed || !line.contains(word), "{} mentions {word}: {line}", path.display());
        }
    }
}

#[test]
fn the_engines_rooms_hold_no_lock() {
    let found = sources_of(&UNLOCKED);
    assert!(found.iter().any(|path| path.ends_with("engine/run.rs")), "{found:?}");
    for path in found {
        for (line, word) in code_of(&path).iter().flat_map(|line| LOCKS.map(|w| (line, w))) {
            assert!(!line.contains(word), "{} mentions {word}: {line}", path.display());
        }
    }
}
