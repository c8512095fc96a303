//! Brings one file to disk: resumes what broke off, believes no length and no content that it has not checked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::hex;
use super::hf::{HubError, Site};
use super::hub_files::{Checksum, HubFile};
use super::progress::Progress;

/// How often a broken transfer is taken up again.
#[derive(Debug, Clone, Copy)]
pub struct Retry {
    /// Attempts in a row that bring no byte.
    pub attempts: u32,
    /// Pause after the first of them; it doubles with each, up to 30 s.
    pub first_pause: Duration,
}

impl Retry {
    /// About 15 s of an unreachable server; a transfer that moves is taken up as often as it breaks.
    pub const USUAL: Self = Self { attempts: 6, first_pause: Duration::from_millis(500) };

    /// The pause after `failures` attempts in a row, at least what the server asked for.
    pub(super) fn pause(self, failures: u32, asked: Option<Duration>) -> Duration {
        const LONGEST: Duration = Duration::from_secs(30);
        let doubled = self.first_pause.saturating_mul(1 << failures.saturating_sub(1).min(16));
        doubled.max(asked.unwrap_or_default()).min(LONGEST)
    }
}

/// One file on its way.
pub(super) struct Transfer<'a> {
    pub(super) site: &'a Site,
    pub(super) url: String,
    pub(super) file: &'a HubFile,
    /// Where the part that has arrived lies.
    pub(super) partial: PathBuf,
    /// Bytes of the files before this one.
    pub(super) bytes_before: u64,
}

/// The digest that a file must have, as it grows.
enum Hasher {
    Sha256(Sha256),
    Sha1(Sha1),
}

impl Hasher {
    fn new(file: &HubFile) -> Self {
        match file.checksum {
            Checksum::Sha256(_) => Self::Sha256(Sha256::new()),
            // git hashes the content behind a header of its own.
            Checksum::GitBlob(_) => {
                Self::Sha1(Sha1::new().chain_update(format!("blob {}\0", file.bytes)))
            }
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha1(hasher) => hasher.update(bytes),
        }
    }

    fn hex(self) -> String {
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Sha1(hasher) => hex(&hasher.finalize()),
        }
    }
}

impl Transfer<'_> {
    /// Brings the whole file to `partial` and checks it.
    ///
    /// # Errors
    /// When the server refuses or lies, when it stays broken after every attempt, or when the disk does not take it.
    pub(super) async fn run(&self, progress: &mut Progress<'_>) -> Result<(), HubError> {
        progress.file(&self.file.path);
        let resumed = self.fill(progress).await?;
        match (self.verify().await, resumed) {
            // What lay there from an earlier run may be the wrong part: once more from the start.
            (Err(HubError::WrongChecksum { .. }), true) => {
                self.discard().await?;
                self.fill(progress).await?;
                self.verify().await
            }
            (result, _) => result,
        }
    }

    /// Fetches until the length is right; says whether a part lay there before.
    async fn fill(&self, progress: &mut Progress<'_>) -> Result<bool, HubError> {
        let found = self.length().await;
        if found > self.file.bytes {
            self.discard().await?;
        }
        let mut failures = 0;
        loop {
            let before = self.length().await;
            if before == self.file.bytes {
                self.create_empty_file().await?;
                progress.set(self.bytes_before + before);
                return Ok(found > 0);
            }
            let error = match self.attempt(before, progress).await {
                Ok(()) => continue,
                Err(error) if error.may_pass() => error,
                Err(error) => return Err(error),
            };
            failures = if self.length().await > before { 1 } else { failures + 1 };
            if failures >= self.site.retry.attempts {
                return Err(error);
            }
            tracing::warn!(file = self.file.path, %error, "the download broke off, taking it up again");
            tokio::time::sleep(self.site.retry.pause(failures, error.retry_after())).await;
        }
    }

    async fn attempt(&self, have: u64, progress: &mut Progress<'_>) -> Result<(), HubError> {
        let mut request = self.site.get(&self.url);
        if have > 0 {
            request = request.header(RANGE, format!("bytes={have}-"));
        }
        let response = request.send().await.map_err(|error| self.site.unreachable(&error))?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            self.discard().await?;
            return Err(self.site.refused(&response, &self.file.path));
        }
        if !response.status().is_success() {
            return Err(self.site.refused(&response, &self.file.path));
        }
        let start = self.start_of(&response, have)?;
        if let Some(length) = response.content_length()
            && start.checked_add(length) != Some(self.file.bytes)
        {
            return Err(self.wrong_length(start.saturating_add(length)));
        }
        self.append(response, start, progress).await
    }

    /// Where the body begins: a server that ignores ranges sends the whole file.
    fn start_of(&self, response: &reqwest::Response, have: u64) -> Result<u64, HubError> {
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok(0);
        }
        let range = response
            .headers()
            .get(CONTENT_RANGE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let first = range
            .strip_prefix("bytes ")
            .and_then(|range| range.split('-').next()?.parse::<u64>().ok());
        match first {
            Some(first) if first == have => Ok(have),
            _ => Err(HubError::BadAnswer {
                what: self.file.path.clone(),
                reason: format!("wanted the range from byte {have} on, got {range:?}"),
            }),
        }
    }

    async fn append(
        &self,
        response: reqwest::Response,
        start: u64,
        progress: &mut Progress<'_>,
    ) -> Result<(), HubError> {
        let mut options = tokio::fs::OpenOptions::new();
        match start {
            0 => options.create(true).write(true).truncate(true),
            _ => options.append(true),
        };
        let mut out = options.open(&self.partial).await.map_err(|error| self.disk(error))?;
        let mut body = response.bytes_stream();
        let mut have = start;
        while let Some(bytes) = body.next().await {
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(error) => {
                    out.flush().await.map_err(|error| self.disk(error))?;
                    return Err(self.site.unreachable(&error));
                }
            };
            have = have.saturating_add(bytes.len() as u64);
            if have > self.file.bytes {
                drop(out);
                self.discard().await?;
                return Err(self.wrong_length(have));
            }
            out.write_all(&bytes).await.map_err(|error| self.disk(error))?;
            progress.set(self.bytes_before + have);
        }
        out.flush().await.map_err(|error| self.disk(error))?;
        out.sync_all().await.map_err(|error| self.disk(error))?;
        if have < self.file.bytes {
            Err(HubError::BrokeOff {
                file: self.file.path.clone(),
                wanted: self.file.bytes,
                got: have,
            })
        } else {
            Ok(())
        }
    }

    /// Compares the content with what the hub said; what differs is removed.
    async fn verify(&self) -> Result<(), HubError> {
        let mut file =
            tokio::fs::File::open(&self.partial).await.map_err(|error| self.disk(error))?;
        let mut hasher = Hasher::new(self.file);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut buffer).await.map_err(|error| self.disk(error))?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
        }
        let (wanted, got) = (self.file.checksum.hex(), hasher.hex());
        if got.eq_ignore_ascii_case(wanted) {
            return Ok(());
        }
        self.discard().await?;
        Err(HubError::WrongChecksum {
            file: self.file.path.clone(),
            wanted: wanted.to_owned(),
            got,
        })
    }

    async fn length(&self) -> u64 {
        tokio::fs::metadata(&self.partial).await.map_or(0, |metadata| metadata.len())
    }

    /// A file without bytes is never fetched, and must be there all the same.
    async fn create_empty_file(&self) -> Result<(), HubError> {
        if self.file.bytes == 0 {
            tokio::fs::write(&self.partial, []).await.map_err(|error| self.disk(error))?;
        }
        Ok(())
    }

    async fn discard(&self) -> Result<(), HubError> {
        match tokio::fs::remove_file(&self.partial).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(self.disk(error)),
            _ => Ok(()),
        }
    }

    fn wrong_length(&self, got: u64) -> HubError {
        HubError::WrongLength { file: self.file.path.clone(), wanted: self.file.bytes, got }
    }

    fn disk(&self, error: std::io::Error) -> HubError {
        disk(&self.partial, error)
    }
}

pub(super) fn disk(path: &Path, error: std::io::Error) -> HubError {
    HubError::Disk { path: path.to_owned(), source: error }
}
