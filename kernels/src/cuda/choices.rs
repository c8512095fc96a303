//! The file that keeps which way to a product was the fastest on a device.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::gemm::Algorithm;

/// A way, as it is written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kept {
    /// One of ours, by its name.
    Own(String),
    /// One of the library's. Its documentation allows that the description of an algorithm is written down and used again with the
    /// same version.
    Library(Algorithm),
}

impl Kept {
    fn parse(value: &Value) -> Option<Self> {
        if let Some(name) = value.as_str() {
            return Some(Self::Own(name.to_owned()));
        }
        let words: Option<Vec<u64>> = value.as_array()?.iter().map(Value::as_u64).collect();
        Some(Self::Library(words?.try_into().ok()?))
    }

    fn value(&self) -> Value {
        match self {
            Self::Own(name) => json!(name),
            Self::Library(algorithm) => json!(algorithm),
        }
    }
}

/// What was chosen for a device and a version of the library, by the names of shapes.
#[derive(Debug)]
pub(super) struct Choices {
    path: Option<PathBuf>,
    device: String,
    version: usize,
    pub(super) ways: HashMap<String, Kept>,
}

impl Choices {
    /// A file that does not fit, or none, is as an empty one.
    pub(super) fn read(path: Option<&Path>, device: String, version: usize) -> Self {
        let empty = Self { path: path.map(Path::to_owned), device, version, ways: HashMap::new() };
        let text = path.and_then(|path| std::fs::read_to_string(path).ok());
        let ways = text.and_then(|text| empty.parse(&text)).unwrap_or_default();
        Self { ways, ..empty }
    }

    /// Absent: it is not of this device and version, or no such file.
    fn parse(&self, text: &str) -> Option<HashMap<String, Kept>> {
        let file: Value = serde_json::from_str(text).ok()?;
        if file["device"] != self.device.as_str() || file["cublaslt"] != self.version {
            return None;
        }
        let way = |(name, value): (&String, &Value)| Some((name.clone(), Kept::parse(value)?));
        file["ways"].as_object()?.iter().map(way).collect()
    }

    fn text(&self) -> String {
        let ways: Map<String, Value> =
            self.ways.iter().map(|(name, way)| (name.clone(), way.value())).collect();
        json!({ "device": self.device, "cublaslt": self.version, "ways": ways }).to_string()
    }

    /// Readers see the old file or the new one, never a part.
    pub(super) fn write(&self) -> std::io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let part = path.with_extension(format!("{}.part", std::process::id()));
        std::fs::write(&part, self.text())?;
        std::fs::rename(&part, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choices(device: &str, version: usize) -> Choices {
        Choices { path: None, device: device.to_owned(), version, ways: HashMap::new() }
    }

    #[test]
    fn choices_are_read_back_on_the_same_device_and_version_alone() {
        let mut written = choices("NVIDIA H200", 130_100);
        let algorithm = [1, 2, 3, u64::MAX, 5, 6, 7, 8];
        written.ways.insert("bf16 64x4096x4096".to_owned(), Kept::Library(algorithm));
        written.ways.insert("bf16 16x4096x4096".to_owned(), Kept::Own("few_row".to_owned()));
        let text = written.text();
        assert_eq!(choices("NVIDIA H200", 130_100).parse(&text), Some(written.ways));
        assert_eq!(choices("NVIDIA H100", 130_100).parse(&text), None);
        assert_eq!(choices("NVIDIA H200", 130_200).parse(&text), None);
    }

    #[test]
    fn a_file_that_is_none_of_ours_is_ignored() {
        let kept = choices("a", 1);
        for text in [
            "",
            "[]",
            "{}",
            r#"{"device":"a","cublaslt":1}"#,
            r#"{"device":"a","cublaslt":1,"ways":{"b":[1]}}"#,
            r#"{"device":"a","cublaslt":1,"ways":{"b":1}}"#,
        ] {
            assert_eq!(kept.parse(text), None, "{text}");
        }
    }
}
