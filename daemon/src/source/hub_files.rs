//! Which files of a repository a model needs. Pure: names in, names out.

use super::hf::HubError;

/// One file of a repository, as the hub describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubFile {
    pub path: String,
    pub bytes: u64,
    pub checksum: Checksum,
}

/// What the hub says of a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checksum {
    /// Large files: SHA-256 of the content, in hex.
    Sha256(String),
    /// Small files: git's object id, SHA-1 over a header and the content, in hex.
    GitBlob(String),
}

impl Checksum {
    /// The digest in hex; it also names the file in the cache.
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }
}

/// The files to bring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileSet {
    /// Configuration, tokenizer and safetensors: a folder is the model.
    Folder(Vec<HubFile>),
    /// One GGUF, or all parts of a split one in order: the first file is the model.
    Gguf(Vec<HubFile>),
}

impl FileSet {
    /// All files, in the order in which they are brought.
    pub fn files(&self) -> &[HubFile] {
        match self {
            Self::Folder(files) | Self::Gguf(files) => files,
        }
    }
}

/// Chooses what a model needs from everything that the repository holds.
///
/// # Errors
/// When the wanted file is not there, when several GGUF files are and none was named, or when there is no model.
pub(super) fn choose(files: Vec<HubFile>, wanted: Option<&str>) -> Result<FileSet, HubError> {
    if let Some(wanted) = wanted {
        let parts = parts_of(wanted, &files);
        return if parts.is_empty() {
            Err(HubError::NoSuchFile { wanted: wanted.to_owned(), found: ggufs(&files) })
        } else {
            Ok(FileSet::Gguf(parts))
        };
    }
    if files.iter().any(|file| is_weights(&file.path)) {
        let mut chosen: Vec<HubFile> =
            files.into_iter().filter(|file| is_part_of_folder(&file.path)).collect();
        chosen.sort_by_key(|file| (file.bytes, file.path.clone()));
        return Ok(FileSet::Folder(chosen));
    }
    let mut sets: Vec<Vec<HubFile>> = Vec::new();
    for path in ggufs(&files) {
        let parts = parts_of(&path, &files);
        if !parts.is_empty() && !sets.contains(&parts) {
            sets.push(parts);
        }
    }
    match (sets.pop(), sets.is_empty()) {
        (Some(only), true) => Ok(FileSet::Gguf(only)),
        (Some(_), false) => Err(HubError::WhichGguf { found: ggufs(&files) }),
        (None, _) => Err(HubError::NoModel),
    }
}

fn ggufs(files: &[HubFile]) -> Vec<String> {
    let paths = files.iter().map(|file| file.path.clone());
    paths
        .filter(|path| path.to_ascii_lowercase().ends_with(".gguf") && !path.contains("mmproj"))
        .collect()
}

/// The file itself, or every part of the split file that it belongs to; empty when one is missing.
fn parts_of(path: &str, files: &[HubFile]) -> Vec<HubFile> {
    let find = |path: &str| files.iter().find(|file| file.path == path).cloned();
    let Some((stem, count)) = split_name(path) else { return find(path).into_iter().collect() };
    let parts = (1..=count).map(|part| find(&format!("{stem}-{part:05}-of-{count:05}.gguf")));
    parts.collect::<Option<Vec<_>>>().unwrap_or_default()
}

/// Stem and number of parts of `stem-00001-of-00003.gguf`.
fn split_name(path: &str) -> Option<(&str, u32)> {
    /// The most parts that one model is looked for in.
    const MOST_PARTS: u32 = 1024;
    let stem = path.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse::<u32>().ok())?;
    number(part)?;
    number(count).filter(|count| (1..=MOST_PARTS).contains(count)).map(|count| (stem, count))
}

fn is_weights(path: &str) -> bool {
    !path.contains('/') && path.ends_with(".safetensors") && !path.starts_with("consolidated")
}

fn is_part_of_folder(path: &str) -> bool {
    const NAMES: [&str; 5] = [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ];
    let described =
        path.starts_with("tokenizer") || path.starts_with("chat_template") || path == "merges.txt";
    let index = path.ends_with(".safetensors.index.json") && !path.starts_with("consolidated");
    !path.contains('/') && (NAMES.contains(&path) || described || index || is_weights(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> Vec<HubFile> {
        let file = |path: &&str| HubFile {
            path: (*path).to_owned(),
            bytes: 1,
            checksum: Checksum::Sha256(String::new()),
        };
        paths.iter().map(file).collect()
    }

    fn chosen(paths: &[&str], wanted: Option<&str>) -> Vec<String> {
        choose(files(paths), wanted).unwrap().files().iter().map(|file| file.path.clone()).collect()
    }

    #[test]
    fn a_folder_brings_no_readme_no_pytorch_and_no_duplicate_weights() {
        let all = [
            "README.md",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "onnx/model.safetensors",
            "chat_template.jinja",
        ];
        let wanted = [
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        assert_eq!(chosen(&all, None), wanted);
    }

    #[test]
    fn one_gguf_is_chosen_and_of_several_one_must_be_named() {
        assert_eq!(chosen(&["a.gguf", "README.md"], None), ["a.gguf"]);
        let error = choose(files(&["a.gguf", "b.gguf"]), None).unwrap_err().to_string();
        assert!(error.contains("a.gguf") && error.contains("b.gguf"), "{error}");
        assert_eq!(chosen(&["a.gguf", "b.gguf"], Some("b.gguf")), ["b.gguf"]);
    }

    #[test]
    fn a_split_gguf_comes_whole_and_in_order() {
        let all = ["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"];
        assert_eq!(chosen(&all, None), ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]);
        assert_eq!(chosen(&all, Some("m-00002-of-00002.gguf")).len(), 2);
        assert!(matches!(choose(files(&all[..1]), None), Err(HubError::NoModel)));
    }

    #[test]
    fn a_repository_without_weights_is_no_model() {
        assert!(matches!(
            choose(files(&["README.md", "pytorch_model.bin"]), None),
            Err(HubError::NoModel)
        ));
        let error = choose(files(&["a.gguf"]), Some("c.gguf")).unwrap_err().to_string();
        assert!(error.contains("c.gguf") && error.contains("a.gguf"), "{error}");
    }
}
