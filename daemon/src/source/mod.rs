//! Where weights come from: a path on disk, or the hub. Brings files to disk, does not read them.

pub mod hf;
mod hub_files;
pub mod object;
mod progress;
pub mod reach;
mod room;
mod transfer;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use sha2::{Digest, Sha256};

pub use hub_files::{FileSet, HubFile};
pub use progress::Downloaded;
pub use room::{Held, Room};
pub use transfer::Retry;

/// What MODEL names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A GGUF file or a folder in Hugging Face layout.
    Path(PathBuf),
    Hub(HubModel),
}

/// A repository of the hub: `hf://org/name[@revision][/file.gguf]` or `hf://org/name[/file.gguf][@revision]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubModel {
    pub org: String,
    pub name: String,
    /// A branch, tag or commit; absent: `main`.
    pub revision: Option<String>,
    /// One GGUF file of several; absent: what the repository holds.
    pub file: Option<String>,
}

/// A credential for the hub; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Takes a token that fits in a header.
    pub fn new(token: String) -> Option<Self> {
        let fits =
            !token.is_empty() && token.len() <= 4096 && token.bytes().all(|b| b.is_ascii_graphic());
        fits.then_some(Self(token))
    }

    /// The token itself, for the Authorization header.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// What a source may ask for. Keys are as printable as tokens and as secret.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credential {
    pub token: Option<Token>,
    pub aws_access_key_id: Option<Token>,
    pub aws_secret_access_key: Option<Token>,
    pub aws_region: Option<String>,
    pub aws_endpoint_url: Option<String>,
}

/// SHA-256 of a file, in lower-case hexadecimal digits.
pub(crate) async fn sha256_of(path: &Path) -> std::io::Result<String> {
    let path = path.to_owned();
    let hashed = tokio::task::spawn_blocking(move || {
        use std::io::Read;
        let mut hasher = Sha256::new();
        let mut file = std::fs::File::open(path)?;
        let mut piece = vec![0; 1 << 20];
        loop {
            let n_bytes = file.read(&mut piece)?;
            if n_bytes == 0 {
                return Ok(hex(&hasher.finalize()));
            }
            hasher.update(&piece[..n_bytes]);
        }
    });
    hashed.await.unwrap_or_else(|error| Err(error.into()))
}

/// Whether a status says that the server is in trouble, and nothing of the file or of who asks.
fn is_trouble(status: reqwest::StatusCode) -> bool {
    status.is_server_error()
        || [reqwest::StatusCode::TOO_MANY_REQUESTS, reqwest::StatusCode::REQUEST_TIMEOUT]
            .contains(&status)
}

/// Makes a link in place of what had its name.
pub(crate) fn link(target: impl AsRef<Path>, name: &Path) -> std::io::Result<()> {
    if let Some(folder) = name.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match std::fs::remove_file(name) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    std::os::unix::fs::symlink(target, name)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl HubModel {
    /// The revision asked for, or the hub's default.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("hf://") {
            Some(rest) => hub_model(rest).map(Self::Hub).ok_or_else(|| {
                format!("wanted hf://org/name[@revision][/file.gguf], got {text:?}")
            }),
            None if text.is_empty() => Err("wanted a path or hf://org/name, got nothing".into()),
            None if text.contains("://") => {
                Err(format!("wanted a path or hf://org/name, got {text:?}"))
            }
            None => Ok(Self::Path(PathBuf::from(text))),
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Hub(model) => write!(f, "{model}"),
        }
    }
}

impl std::fmt::Display for HubModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.org, self.name)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

/// Parses what follows `hf://`. Every part is checked, since all of them become parts of paths and URLs.
fn hub_model(rest: &str) -> Option<HubModel> {
    let (repository, after) = match rest.split_once('@') {
        Some((repository, after)) => (repository, Some(after)),
        None => (rest, None),
    };
    let mut parts = repository.splitn(3, '/');
    let (org, name, mut file) = (parts.next()?, parts.next()?, parts.next());
    let mut revision = after;
    if let (None, Some(after)) = (file, after)
        && let Some((before, path)) = after.split_once('/')
        && is_gguf(path)
    {
        (revision, file) = (Some(before), Some(path));
    }
    let sound = is_name(org)
        && is_name(name)
        && revision.is_none_or(is_relative)
        && file.is_none_or(is_relative);
    (sound && file.is_none_or(is_gguf)).then(|| HubModel {
        org: org.to_owned(),
        name: name.to_owned(),
        revision: revision.map(str::to_owned),
        file: file.map(str::to_owned),
    })
}

fn is_gguf(path: &str) -> bool {
    path.to_ascii_lowercase().ends_with(".gguf")
}

fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !name.is_empty()
        && name.len() <= 96
        && !name.starts_with(['.', '-'])
        && name.bytes().all(allowed)
}

/// Whether a path stays below the folder it is joined to and may stand in a URL as it is.
pub(crate) fn is_relative(path: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-+=/ ".contains(&b);
    path.len() <= 512
        && path.bytes().all(allowed)
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(text: &str) -> Option<HubModel> {
        match text.parse() {
            Ok(Location::Hub(model)) => Some(model),
            Ok(Location::Path(_)) | Err(_) => None,
        }
    }

    #[test]
    fn revision_and_file_stand_in_either_order() {
        let one = hub("hf://org/name@v1/sub/m.gguf").unwrap();
        assert_eq!(one, hub("hf://org/name/sub/m.gguf@v1").unwrap());
        assert_eq!((one.revision(), one.file.as_deref()), ("v1", Some("sub/m.gguf")));
    }

    #[test]
    fn a_revision_may_hold_slashes() {
        assert_eq!(hub("hf://org/name@refs/pr/1").unwrap().revision(), "refs/pr/1");
        assert_eq!(hub("hf://org/name").unwrap().revision(), "main");
    }

    #[test]
    fn parts_that_would_leave_their_folder_are_refused() {
        for text in [
            "hf://",
            "hf://org",
            "hf://../name",
            "hf://org/..",
            "hf://org/name/../x.gguf",
            "hf://org/name@../x",
            "hf://org/name@",
            "hf://org/name/",
            "hf://org//m.gguf",
            "hf://o?g/name",
            "hf://org/name/m.bin",
            "s3://b/p",
        ] {
            assert_eq!(text.parse::<Location>().ok(), None, "{text}");
        }
    }

    #[test]
    fn what_was_parsed_prints_as_a_name() {
        assert_eq!("hf://a/b@c".parse::<Location>().unwrap().to_string(), "a/b@c");
        assert_eq!("./x.gguf".parse::<Location>().unwrap().to_string(), "./x.gguf");
    }
}
