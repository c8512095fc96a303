//! Models from the Hugging Face hub, into the cache that the hub's own clients use.
//! The crate `hf-hub` 1.0 neither resumes a broken download nor compares what arrived with the hub's length and checksum, so
//! the two requests that a model needs (the list of files, and each file) are made here; the layout of the cache is the same.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RANGE, RETRY_AFTER};
use serde::Deserialize;

use super::hub_files::{Checksum, choose};
use super::progress::{Downloaded, Progress};
use super::transfer::{Retry, Transfer, disk};
use super::{FileSet, Held, HubFile, HubModel, is_relative, is_trouble, link};
use crate::config::HubConfig;

/// The largest list of files that is read.
const LARGEST_LIST: usize = 16 << 20;

/// Why a model did not come from the hub.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("{what}: the hub answered {status}: this token may not read it")]
    TokenRefused { what: String, status: StatusCode },
    #[error(
        "{what}: the hub answered {status}: it is private, gated or absent; a token that may read it comes from HF_TOKEN, in a cluster from the model's secretRef"
    )]
    TokenMissing { what: String, status: StatusCode },
    #[error("{what}: the hub has no such model, revision or file")]
    NotFound { what: String },
    #[error("{what}: the hub answered {status}")]
    Status { what: String, status: StatusCode, retry_after: Option<Duration> },
    #[error("cannot reach {endpoint}: {reason}")]
    Unreachable { endpoint: String, reason: String },
    #[error("{model} is not in the cache and HF_HUB_OFFLINE is set")]
    Offline { model: String },
    #[error("{what}: cannot read the hub's answer: {reason}")]
    BadAnswer { what: String, reason: String },
    #[error("{file} broke off: wanted {wanted} bytes, got {got}")]
    BrokeOff { file: String, wanted: u64, got: u64 },
    #[error("{file} has the wrong length: wanted {wanted} bytes, got {got}")]
    WrongLength { file: String, wanted: u64, got: u64 },
    #[error("{file} has the wrong checksum: wanted {wanted}, got {got}")]
    WrongChecksum { file: String, wanted: String, got: String },
    #[error("the repository has no {wanted}; its GGUF files: {}", found.join(", "))]
    NoSuchFile { wanted: String, found: Vec<String> },
    #[error("the repository has several GGUF files, name one as hf://org/name/FILE: {}", found.join(", "))]
    WhichGguf { found: Vec<String> },
    #[error("the repository has neither safetensors nor a whole GGUF file")]
    NoModel,
    #[error("{}: wanted {wanted} free bytes, got {free}", path.display())]
    DiskFull { path: PathBuf, wanted: u64, free: u64 },
    #[error("{}", path.display())]
    Disk { path: PathBuf, source: std::io::Error },
}

impl HubError {
    /// Whether the same request may succeed a little later.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::BrokeOff { .. } => true,
            Self::Status { status, .. } => {
                is_trouble(*status) || *status == StatusCode::RANGE_NOT_SATISFIABLE
            }
            Self::TokenRefused { .. }
            | Self::TokenMissing { .. }
            | Self::NotFound { .. }
            | Self::Offline { .. }
            | Self::BadAnswer { .. }
            | Self::WrongLength { .. }
            | Self::WrongChecksum { .. }
            | Self::NoSuchFile { .. }
            | Self::WhichGguf { .. }
            | Self::NoModel
            | Self::DiskFull { .. }
            | Self::Disk { .. } => false,
        }
    }

    /// Whether the hub said nothing of this model and this token: it cannot be reached, or is in trouble itself.
    fn is_away(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
            || matches!(self, Self::Status { status, .. } if is_trouble(*status))
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// The hub and how it is spoken to.
pub(super) struct Site {
    client: reqwest::Client,
    config: HubConfig,
    pub(super) retry: Retry,
}

/// The hub's description of a revision; unknown keys are passed over.
#[derive(Debug, Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
    /// False, or how access is given.
    #[serde(default)]
    gated: serde_json::Value,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// The folders of one model in the cache.
struct Cache {
    root: PathBuf,
}

/// What belongs to a model in the hub's cache.
pub fn folder(cache: &Path, model: &HubModel) -> PathBuf {
    cache.join(format!("models--{}--{}", model.org, model.name))
}

/// Brings a model to disk and gives the path to load: a folder, or a GGUF file (the first part of a split one).
/// `report` is called as bytes arrive.
///
/// # Errors
/// When the hub refuses, cannot be reached or lies, or when the disk does not take the files.
pub async fn fetch(
    model: &HubModel,
    config: &HubConfig,
    retry: Retry,
    report: &(dyn Fn(Downloaded) + Send + Sync),
) -> Result<PathBuf, HubError> {
    if config.offline {
        return remembered(&config.cache, model)
            .ok_or_else(|| HubError::Offline { model: model.to_string() });
    }
    match bring(model, config, retry, report).await {
        Err(error) if config.trusts_cache && error.is_away() => {
            let Some(path) = remembered(&config.cache, model) else { return Err(error) };
            tracing::warn!(%error, path = %path.display(), "using the model that is in the cache");
            Ok(path)
        }
        brought => brought,
    }
}

async fn bring(
    model: &HubModel,
    config: &HubConfig,
    retry: Retry,
    report: &(dyn Fn(Downloaded) + Send + Sync),
) -> Result<PathBuf, HubError> {
    let site = Site::new(config, retry)?;
    let revision = site.revision(model).await?;
    let commit = revision.sha.clone();
    if !is_relative(&commit) || commit.contains('/') {
        return Err(HubError::BadAnswer {
            what: model.to_string(),
            reason: format!("{commit:?} is no commit"),
        });
    }
    let is_gated = revision.is_gated();
    let files = choose(revision.files()?, model.file.as_deref())?;
    if let Some(file) = files.files().first().filter(|_| is_gated) {
        site.check_access(&site.content_url(model, &commit, file), model).await?;
    }
    let cache = Cache::new(&config.cache, model);
    cache.fill(&site, model, &commit, &files, report).await?;
    cache.remember(model, &commit, &files)
}

/// The path of a model that was brought whole before.
pub fn remembered(cache: &Path, model: &HubModel) -> Option<PathBuf> {
    let cache = Cache::new(cache, model);
    let noted = std::fs::read_to_string(cache.note(model)).ok().filter(|path| is_relative(path))?;
    let path = cache.root.join("snapshots").join(noted);
    path.exists().then_some(path)
}

impl Revision {
    /// Whether everybody may see the list of files, and only some may read them.
    fn is_gated(&self) -> bool {
        !matches!(self.gated, serde_json::Value::Null | serde_json::Value::Bool(false))
    }

    fn files(self) -> Result<Vec<HubFile>, HubError> {
        self.siblings.into_iter().filter_map(Sibling::file).collect()
    }
}

impl Sibling {
    /// `None` for a name that no model file has; an error for a file that cannot be checked.
    fn file(self) -> Option<Result<HubFile, HubError>> {
        let path = self.rfilename;
        if !is_relative(&path) {
            return None;
        }
        let is_hex = |hex: &str, length: usize| {
            hex.len() == length && hex.bytes().all(|b| b.is_ascii_hexdigit())
        };
        let described = match (self.lfs, self.blob_id, self.size) {
            (Some(lfs), _, _) if is_hex(&lfs.sha256, 64) => {
                Some((lfs.size, Checksum::Sha256(lfs.sha256)))
            }
            (None, Some(id), Some(size)) if is_hex(&id, 40) => Some((size, Checksum::GitBlob(id))),
            _ => None,
        };
        Some(match described {
            Some((bytes, checksum)) => Ok(HubFile { path, bytes, checksum }),
            None => {
                Err(HubError::BadAnswer { what: path, reason: "no length or no checksum".into() })
            }
        })
    }
}

impl Site {
    fn new(config: &HubConfig, retry: Retry) -> Result<Self, HubError> {
        let unreachable =
            |reason| HubError::Unreachable { endpoint: config.endpoint.clone(), reason };
        let url = reqwest::Url::parse(&config.endpoint);
        let url = url.map_err(|error| unreachable(error.to_string()))?;
        config.reach.check(&url).map_err(unreachable)?;
        let client = config.reach.client().build();
        let client = client.map_err(|error| unreachable(chain(&error)))?;
        Ok(Self { client, config: config.clone(), retry })
    }

    pub(super) fn get(&self, url: &str) -> reqwest::RequestBuilder {
        let request = self.client.get(url);
        match &self.config.token {
            Some(token) => request.bearer_auth(token.expose()),
            None => request,
        }
    }

    async fn revision(&self, model: &HubModel) -> Result<Revision, HubError> {
        let HubModel { org, name, .. } = model;
        // A slash inside a revision must not end the path's segment.
        let revision = model.revision().replace('/', "%2F");
        let url = format!(
            "{}/api/models/{org}/{name}/revision/{revision}?blobs=true",
            self.config.endpoint
        );
        let mut failures = 0;
        loop {
            let error = match self.ask(&url, model).await {
                Ok(revision) => return Ok(revision),
                Err(error) if error.may_pass() => error,
                Err(error) => return Err(error),
            };
            failures += 1;
            if failures >= self.retry.attempts {
                return Err(error);
            }
            tokio::time::sleep(self.retry.pause(failures, error.retry_after())).await;
        }
    }

    async fn ask(&self, url: &str, model: &HubModel) -> Result<Revision, HubError> {
        let what = model.to_string();
        let mut response = self.get(url).send().await.map_err(|error| self.unreachable(&error))?;
        if !response.status().is_success() {
            return Err(self.refused(&response, &what));
        }
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|error| self.unreachable(&error))? {
            if body.len() + bytes.len() > LARGEST_LIST {
                return Err(HubError::BadAnswer {
                    what,
                    reason: format!("more than {LARGEST_LIST} bytes"),
                });
            }
            body.extend_from_slice(&bytes);
        }
        serde_json::from_slice(&body)
            .map_err(|error| HubError::BadAnswer { what, reason: error.to_string() })
    }

    fn content_url(&self, model: &HubModel, commit: &str, file: &HubFile) -> String {
        let HubModel { org, name, .. } = model;
        let endpoint = &self.config.endpoint;
        format!("{endpoint}/{org}/{name}/resolve/{commit}/{}", file.path).replace(' ', "%20")
    }

    /// Asks for the first byte of a file: what is in the cache was perhaps brought with another's token.
    async fn check_access(&self, url: &str, model: &HubModel) -> Result<(), HubError> {
        let request = self.get(url).header(RANGE, "bytes=0-0");
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        match response.status() {
            // The file is empty.
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(()),
            status if status.is_success() => Ok(()),
            _ => Err(self.refused(&response, &model.to_string())),
        }
    }

    pub(super) fn unreachable(&self, error: &reqwest::Error) -> HubError {
        let (endpoint, reason) = (self.config.endpoint.clone(), chain(error));
        match error.is_redirect() {
            true => HubError::BadAnswer { what: endpoint, reason },
            false => HubError::Unreachable { endpoint, reason },
        }
    }

    /// What an answer that is no success means.
    pub(super) fn refused(&self, response: &reqwest::Response, what: &str) -> HubError {
        let (what, status) = (what.to_owned(), response.status());
        match (status, &self.config.token) {
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, Some(_)) => {
                HubError::TokenRefused { what, status }
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, None) => {
                HubError::TokenMissing { what, status }
            }
            (StatusCode::NOT_FOUND, _) => HubError::NotFound { what },
            _ => HubError::Status { what, status, retry_after: retry_after(response.headers()) },
        }
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok().map(Duration::from_secs)
}

/// An error with its causes, since reqwest's own message leaves them out. URLs may carry a signature and are left out.
fn chain(error: &reqwest::Error) -> String {
    let mut reasons = Vec::new();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        reasons.push(error.to_string());
        cause = error.source();
    }
    if reasons.is_empty() { "the request failed".to_owned() } else { reasons.join(": ") }
}

impl Cache {
    fn new(cache: &Path, model: &HubModel) -> Self {
        Self { root: folder(cache, model) }
    }

    fn blob(&self, file: &HubFile) -> PathBuf {
        self.root.join("blobs").join(file.checksum.hex())
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// Says which commit a revision was, and that the files which were asked for are whole.
    fn note(&self, model: &HubModel) -> PathBuf {
        let asked = format!("{}@{}", model.file.as_deref().unwrap_or("folder"), model.revision());
        self.root.join(".bindery").join(asked.replace('/', "--"))
    }

    /// Brings every file that is not there yet.
    async fn fill(
        &self,
        site: &Site,
        model: &HubModel,
        commit: &str,
        files: &FileSet,
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<(), HubError> {
        self.make_folders(commit)?;
        // One process at a time fills a repository; the lock ends with the file.
        let _lock = self.lock().await?;
        let total_bytes = files.files().iter().map(|file| file.bytes).fold(0, u64::saturating_add);
        let _reserved = self.reserve(site, files)?;
        let mut progress = Progress::new(total_bytes, report);
        let mut bytes_before = 0u64;
        for file in files.files() {
            let blob = self.blob(file);
            if !is_whole(&blob, file) {
                let url = site.content_url(model, commit, file);
                let partial = blob.with_extension("incomplete");
                let transfer = Transfer { site, url, file, partial, bytes_before };
                transfer.run(&mut progress).await?;
                std::fs::rename(&transfer.partial, &blob).map_err(|error| disk(&blob, error))?;
            }
            self.link(commit, file)?;
            bytes_before = bytes_before.saturating_add(file.bytes);
            progress.set(bytes_before);
        }
        Ok(())
    }

    fn make_folders(&self, commit: &str) -> Result<(), HubError> {
        for folder in [
            self.root.join("blobs"),
            self.snapshot(commit),
            self.root.join(".bindery"),
            self.root.join("refs"),
        ] {
            std::fs::create_dir_all(&folder).map_err(|error| disk(&folder, error))?;
        }
        Ok(())
    }

    async fn lock(&self) -> Result<std::fs::File, HubError> {
        let path = self.root.join(".bindery").join("lock");
        let locked = tokio::task::spawn_blocking({
            let path = path.clone();
            move || {
                let file = std::fs::File::create(&path)?;
                file.lock()?;
                Ok(file)
            }
        });
        match locked.await {
            Ok(result) => result.map_err(|error| disk(&path, error)),
            Err(error) => Err(disk(&path, std::io::Error::other(error))),
        }
    }

    fn reserve(&self, site: &Site, files: &FileSet) -> Result<Held, HubError> {
        let missing =
            files.files().iter().filter(|file| !is_whole(&self.blob(file), file)).map(|file| {
                let have = std::fs::metadata(self.blob(file).with_extension("incomplete"))
                    .map_or(0, |part| part.len());
                file.bytes.saturating_sub(have)
            });
        let wanted = missing.fold(0, u64::saturating_add);
        let full = |free| HubError::DiskFull { path: self.root.clone(), wanted, free };
        site.config.room.reserve(&self.root, wanted).map_err(full)
    }

    /// Names a blob in the snapshot, as the hub's own clients do.
    fn link(&self, commit: &str, file: &HubFile) -> Result<(), HubError> {
        let name = self.snapshot(commit).join(&file.path);
        let folders = file.path.matches('/').count();
        let target = Path::new(&"../".repeat(folders + 2)).join("blobs").join(file.checksum.hex());
        link(target, &name).map_err(|error| disk(&name, error))
    }

    /// Notes that the model is whole and gives the path to load.
    fn remember(
        &self,
        model: &HubModel,
        commit: &str,
        files: &FileSet,
    ) -> Result<PathBuf, HubError> {
        let path = match files {
            FileSet::Folder(_) => commit.to_owned(),
            FileSet::Gguf(files) => match files.first() {
                Some(first) => format!("{commit}/{}", first.path),
                None => return Err(HubError::NoModel),
            },
        };
        let note = self.note(model);
        std::fs::write(&note, &path).map_err(|error| disk(&note, error))?;
        let reference = self.root.join("refs").join(model.revision());
        if let Some(folder) = reference.parent() {
            std::fs::create_dir_all(folder).map_err(|error| disk(folder, error))?;
        }
        std::fs::write(&reference, commit).map_err(|error| disk(&reference, error))?;
        Ok(self.root.join("snapshots").join(path))
    }
}

/// Blobs get their name only once they were checked, so the length is enough.
fn is_whole(blob: &Path, file: &HubFile) -> bool {
    std::fs::metadata(blob).is_ok_and(|metadata| metadata.len() == file.bytes)
}

#[cfg(test)]
mod tests;
