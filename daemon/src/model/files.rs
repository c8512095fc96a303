//! Finds and classifies the files of a model on disk. Nothing of them is read but names and `config.json`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde_json::Value as Json;

use super::error::ModelError;

/// A `config.json` larger than this is refused, and so is a shard index of 64 times as much.
const MOST_CONFIG_BYTES: u64 = 1 << 20;
/// Most files of one model.
const MOST_FILES: usize = 4096;

/// The files of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFiles {
    /// One GGUF, or all files of a split one in order.
    Gguf(Vec<PathBuf>),
    /// A folder in Hugging Face layout.
    Folder(PathBuf),
}

impl ModelFiles {
    /// Classifies `path`: a GGUF file (any one of a split), a folder with `config.json`, or a folder with one GGUF.
    ///
    /// # Errors
    /// Names the file that is missing or not what is wanted.
    pub fn find(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let kind = std::fs::metadata(path).map_err(io)?;
        if kind.is_file() {
            return gguf_files(path).map(Self::Gguf);
        }
        let mut ggufs = BTreeSet::new();
        let mut has_weights = false;
        for entry in std::fs::read_dir(path).map_err(io)?.take(MOST_FILES) {
            let found = entry.map_err(io)?.path();
            has_weights |= found.extension().is_some_and(|end| end == "safetensors");
            if found.extension().is_some_and(|end| end == "gguf") {
                ggufs.insert(found);
            }
        }
        let has_config = path.join("config.json").is_file();
        match ggufs.first() {
            Some(first) if !(has_config && has_weights) => {
                let files = gguf_files(first)?;
                match ggufs.iter().find(|other| !files.contains(other)) {
                    None => Ok(Self::Gguf(files)),
                    Some(other) => {
                        Err(not_wanted(path, "one GGUF", format!("{} too", other.display())))
                    }
                }
            }
            _ if has_config => Ok(Self::Folder(path.to_owned())),
            _ => {
                Err(not_wanted(path, "a folder with config.json or one GGUF", "neither".to_owned()))
            }
        }
    }
}

/// The file and, when its name is that of a split, its siblings in order.
fn gguf_files(path: &Path) -> Result<Vec<PathBuf>, ModelError> {
    if path.extension().is_none_or(|end| end != "gguf") {
        return Err(not_wanted(path, "a .gguf file or a folder", "another file".to_owned()));
    }
    let Some(split) = path.file_stem().and_then(|stem| stem.to_str()).and_then(Split::of) else {
        return Ok(vec![path.to_owned()]);
    };
    if split.files == 0 || split.files > MOST_FILES {
        return Err(not_wanted(path, "1 to 4096 files", split.files.to_string()));
    }
    let file = |index| {
        path.with_file_name(format!("{}-{:05}-of-{:05}.gguf", split.stem, index, split.files))
    };
    Ok((1..=split.files).map(file).collect())
}

/// `STEM-00001-of-00003`.
struct Split<'a> {
    stem: &'a str,
    files: usize,
}

impl<'a> Split<'a> {
    fn of(name: &'a str) -> Option<Self> {
        let (rest, files) = name.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        (digits(files) && digits(number)).then_some(Self { stem, files: files.parse().ok()? })
    }
}

/// Reads a JSON file of at most `MOST_CONFIG_BYTES`.
///
/// # Errors
/// Names the file.
pub(super) fn read_config(path: &Path) -> Result<Json, ModelError> {
    read_json(path, MOST_CONFIG_BYTES)
}

/// The safetensors files of a folder: one, or all that the index names.
///
/// # Errors
/// Names the file that is missing or the entry that is wrong.
pub(super) fn safetensors_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let one = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    match (index.is_file(), one.is_file()) {
        (true, _) => {}
        (false, true) => return Ok(vec![one]),
        (false, false) => {
            let wanted = "model.safetensors or model.safetensors.index.json (random weights: --load-format dummy)";
            return Err(not_wanted(folder, wanted, "neither".to_owned()));
        }
    }
    let named = named_in_index(&index, &read_json(&index, 64 * MOST_CONFIG_BYTES)?)?;
    Ok(named.into_iter().map(|name| folder.join(name)).collect())
}

/// The files that an index names, which lie beside it.
pub(crate) fn named_in_index(index: &Path, json: &Json) -> Result<BTreeSet<String>, ModelError> {
    let Some(map) = json.get("weight_map").and_then(Json::as_object) else {
        return Err(not_wanted(index, "an object weight_map", "none".to_owned()));
    };
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let Some(name) = file.as_str().filter(|file| is_plain(file)) else {
            let got = format!("{file} for {tensor}");
            return Err(not_wanted(index, "the name of a file in the folder", got));
        };
        names.insert(name.to_owned());
    }
    match names.len() {
        1..=MOST_FILES => Ok(names),
        other => Err(not_wanted(index, "1 to 4096 files", other.to_string())),
    }
}

/// Whether the name stays inside its folder.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
}

fn read_json(path: &Path, most: u64) -> Result<Json, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let mut text = Vec::new();
    File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut text)).map_err(io)?;
    if text.len() as u64 > most {
        return Err(not_wanted(path, "a smaller file", format!("more than {most} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| not_wanted(path, "JSON", error.to_string()))
}

fn not_wanted(path: &Path, wanted: &'static str, got: String) -> ModelError {
    ModelError::File { path: path.to_owned(), wanted, got }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::write(folder.path().join(name), "{}").unwrap();
        }
        folder
    }

    #[test]
    fn any_file_of_a_split_finds_all_in_order() {
        let folder = folder(&["a-00002-of-00002.gguf", "a-00001-of-00002.gguf"]);
        let files = vec![
            folder.path().join("a-00001-of-00002.gguf"),
            folder.path().join("a-00002-of-00002.gguf"),
        ];
        let found = ModelFiles::find(&files[1]).unwrap();
        assert_eq!(found, ModelFiles::Gguf(files.clone()));
        assert_eq!(ModelFiles::find(folder.path()).unwrap(), ModelFiles::Gguf(files));
    }

    #[test]
    fn folder_with_one_gguf_is_that_gguf() {
        let folder = folder(&["config.json", "b.gguf"]);
        let found = ModelFiles::find(folder.path()).unwrap();
        assert_eq!(found, ModelFiles::Gguf(vec![folder.path().join("b.gguf")]));
    }

    #[test]
    fn folder_with_two_ggufs_is_refused_with_the_second_named() {
        let error = ModelFiles::find(folder(&["a.gguf", "b.gguf"]).path()).unwrap_err();
        assert!(error.to_string().contains("b.gguf"), "{error}");
    }

    #[test]
    fn config_alone_is_a_folder() {
        let folder = folder(&["config.json"]);
        assert_eq!(
            ModelFiles::find(folder.path()).unwrap(),
            ModelFiles::Folder(folder.path().to_owned())
        );
    }

    #[test]
    fn index_that_leaves_the_folder_is_refused_with_its_tensor() {
        let folder = folder(&[]);
        let index = r#"{"weight_map": {"model.norm.weight": "../secret.safetensors"}}"#;
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let error = safetensors_files(folder.path()).unwrap_err();
        assert!(error.to_string().contains("model.norm.weight"), "{error}");
    }
}
