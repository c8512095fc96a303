//! One file from an https server or an S3 bucket, into a folder that is keyed by content. The protocols are the crate
//! `object_store`'s; resuming, checking and keeping are here.

use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use object_store::aws::AmazonS3Builder;
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpService,
};
use object_store::http::HttpBuilder;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{StatusCode, Url};
use tokio::io::AsyncWriteExt;

use super::progress::{Downloaded, Progress};
use super::reach::Reach;
use super::transfer::Retry;
use super::{Credential, Held, Room, is_trouble, link, sha256_of};

/// Why a file did not come.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    #[error("{uri}: {reason}")]
    BadAddress { uri: String, reason: String },
    #[error("{uri}: the server refuses this credential, or wants one: {reason}")]
    Refused { uri: String, reason: String },
    #[error("{uri}: there is no such file")]
    NotFound { uri: String },
    #[error("{uri}: {reason}")]
    Unreachable { uri: String, reason: String },
    #[error("{uri}: cannot use the server's answer: {reason}")]
    BadAnswer { uri: String, reason: String },
    #[error("{uri} broke off: wanted {wanted} bytes, got {got}")]
    BrokeOff { uri: String, wanted: u64, got: u64 },
    #[error("{uri}: wanted SHA-256 {wanted}, got {got}")]
    WrongChecksum { uri: String, wanted: String, got: String },
    #[error("{}: wanted {wanted} free bytes, got {free}", path.display())]
    DiskFull { path: PathBuf, wanted: u64, free: u64 },
    #[error("{}: {source}", path.display())]
    Disk { path: PathBuf, source: std::io::Error },
}

impl ObjectError {
    fn may_pass(&self) -> bool {
        self.is_away() || matches!(self, Self::BrokeOff { .. })
    }

    /// Whether the source said nothing of this file and this credential: it cannot be reached, or is in trouble itself.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

/// What is asked for, and with whose credential.
#[derive(Debug)]
pub struct Request<'a> {
    pub uri: &'a str,
    pub credential: &'a Credential,
    /// Lower-case hexadecimal digits.
    pub sha256: Option<&'a str>,
}

/// Folder, limits and patience of downloads.
#[derive(Debug, Clone)]
pub struct Objects {
    pub folder: PathBuf,
    pub reach: Reach,
    pub retry: Retry,
    pub room: Room,
}

/// A file that its source has.
struct Found {
    store: Box<dyn ObjectStore>,
    path: object_store::path::Path,
    meta: ObjectMeta,
}

impl Objects {
    /// Asks the source whether this credential may read the file, and what it has.
    async fn find(&self, request: &Request<'_>) -> Result<Found, ObjectError> {
        let url = Url::parse(request.uri).map_err(|error| bad(request.uri, &error.to_string()))?;
        let connector = Reached(self.reach);
        let (store, path) = match url.scheme() {
            "https" => https(&url, request, connector, self.reach)?,
            "s3" => s3(&url, request, connector, self.reach)?,
            // Kept out by the resource's rules; tests serve http.
            "http" if self.reach == Reach::Everywhere => {
                https(&url, request, connector, self.reach)?
            }
            _ => return Err(bad(request.uri, "wanted https:// or s3://")),
        };
        let meta = store.head(&path).await.map_err(|error| told(request.uri, error))?;
        Ok(Found { store, path, meta })
    }

    /// Brings the file, unless it is here, and holds it. The source is asked in either case: what another credential
    /// brought here is not served to one that may not read it.
    ///
    /// # Errors
    /// When the source refuses, is away, or gives something else than it promised.
    pub async fn fetch(
        &self,
        request: &Request<'_>,
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<Held, ObjectError> {
        let found = self.find_patiently(request).await?;
        let version = version(request, &found.meta);
        let known = self.folder.join("versions").join(&version);
        if let Some(held) = self.known(&known, request.sha256) {
            return Ok(held);
        }
        let partial = self.folder.join("partial").join(&version);
        for path in [&known, &partial, &self.object("")] {
            let folder = path.parent().unwrap_or(path);
            std::fs::create_dir_all(folder).map_err(|source| disk(folder, source))?;
        }
        let _reserved = self.reserve(&partial, found.meta.size)?;
        self.fill(request, &found, &partial, report).await?;
        let sha256 = sha256_of(&partial).await.map_err(|source| disk(&partial, source))?;
        if let Some(wanted) = request.sha256.filter(|wanted| *wanted != sha256) {
            // It is of no use to anybody.
            drop(std::fs::remove_file(&partial));
            let (uri, wanted) = (request.uri.to_owned(), wanted.to_owned());
            return Err(ObjectError::WrongChecksum { uri, wanted, got: sha256 });
        }
        // Held before it is there: no other download removes it in between.
        let held = self.room.hold(&self.object(&sha256));
        std::fs::rename(&partial, held.entry()).map_err(|source| disk(held.entry(), source))?;
        // A link leads to the content and is removed with it.
        let target = format!("../sha256/{sha256}.gguf");
        link(&target, &known).map_err(|source| disk(&known, source))?;
        Ok(held)
    }

    async fn find_patiently(&self, request: &Request<'_>) -> Result<Found, ObjectError> {
        let mut failures = 0;
        loop {
            match self.find(request).await {
                Err(error) if error.may_pass() && failures + 1 < self.retry.attempts => {
                    failures += 1;
                    tokio::time::sleep(self.retry.pause(failures, None)).await;
                }
                found => return found,
            }
        }
    }

    fn object(&self, sha256: &str) -> PathBuf {
        self.folder.join("sha256").join(format!("{sha256}.gguf"))
    }

    /// Holds what was brought before, if it is still here and is what is wanted.
    fn known(&self, link: &Path, sha256: Option<&str>) -> Option<Held> {
        let target = std::fs::read_link(link).ok()?;
        let held = self.room.hold(&self.object(target.file_stem()?.to_str()?));
        held_as(held, sha256)
    }

    fn reserve(&self, partial: &Path, bytes: u64) -> Result<Held, ObjectError> {
        let have = std::fs::metadata(partial).map_or(0, |part| part.len());
        let wanted = bytes.saturating_sub(have);
        self.room.reserve(partial, wanted).map_err(|free| ObjectError::DiskFull {
            path: self.folder.clone(),
            wanted,
            free,
        })
    }

    /// Fetches until the length is right, taking up what broke off where it ended.
    async fn fill(
        &self,
        request: &Request<'_>,
        found: &Found,
        partial: &Path,
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<(), ObjectError> {
        let mut progress = Progress::new(found.meta.size, report);
        progress.file(request.uri);
        let mut failures = 0;
        loop {
            let before = std::fs::metadata(partial).map_or(0, |part| part.len());
            progress.set(before);
            if before == found.meta.size {
                return Ok(());
            }
            if before > found.meta.size {
                std::fs::remove_file(partial).map_err(|source| disk(partial, source))?;
                continue;
            }
            let error = match piece(request.uri, found, partial, before, &mut progress).await {
                Ok(()) => continue,
                Err(error) if error.may_pass() => error,
                Err(error) => return Err(error),
            };
            let after = std::fs::metadata(partial).map_or(0, |part| part.len());
            failures = if after > before { 1 } else { failures + 1 };
            if failures >= self.retry.attempts {
                return Err(error);
            }
            tracing::warn!(%error, "the download broke off, taking it up again");
            tokio::time::sleep(self.retry.pause(failures, None)).await;
        }
    }
}

/// What is held, if it is there and has the checksum that is its name.
pub fn held_as(held: Held, sha256: Option<&str>) -> Option<Held> {
    let is_wanted = sha256.is_none_or(|wanted| held.entry().ends_with(format!("{wanted}.gguf")));
    (is_wanted && held.entry().exists()).then_some(held)
}

/// One request for what is missing.
async fn piece(
    uri: &str,
    found: &Found,
    partial: &Path,
    have: u64,
    progress: &mut Progress<'_>,
) -> Result<(), ObjectError> {
    let options = GetOptions {
        range: (have > 0).then_some(GetRange::Offset(have)),
        // Another version must not be put behind the first half of this one.
        if_match: found.meta.e_tag.clone().filter(|tag| !tag.starts_with("W/")),
        ..GetOptions::default()
    };
    let answer = found.store.get_opts(&found.path, options).await;
    let mut body = answer.map_err(|error| told(uri, error))?.into_stream();
    let failed = |source| disk(partial, source);
    let file = tokio::fs::OpenOptions::new().create(true).append(true).open(partial).await;
    let mut file = file.map_err(failed)?;
    let mut got = have;
    while let Some(bytes) = body.next().await {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) => {
                file.flush().await.map_err(failed)?;
                return Err(told(uri, error));
            }
        };
        got = got.saturating_add(bytes.len() as u64);
        if got > found.meta.size {
            return Err(ObjectError::BrokeOff {
                uri: uri.to_owned(),
                wanted: found.meta.size,
                got,
            });
        }
        file.write_all(&bytes).await.map_err(failed)?;
        progress.set(got);
    }
    file.flush().await.map_err(failed)?;
    if got < found.meta.size {
        return Err(ObjectError::BrokeOff { uri: uri.to_owned(), wanted: found.meta.size, got });
    }
    Ok(())
}

type Store = (Box<dyn ObjectStore>, object_store::path::Path);

fn https(
    url: &Url,
    request: &Request<'_>,
    connector: Reached,
    reach: Reach,
) -> Result<Store, ObjectError> {
    if url.query().is_some() {
        return Err(bad(
            request.uri,
            "a query may hold a secret and would stand in the resource: use secretRef",
        ));
    }
    reach.check(url).map_err(|reason| bad(request.uri, &reason))?;
    let mut headers = HeaderMap::new();
    if let Some(token) = &request.credential.token {
        let value = HeaderValue::from_str(&format!("Bearer {}", token.expose()));
        let mut value = value.map_err(|_| bad(request.uri, "the token does not fit a header"))?;
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    let options = ClientOptions::new().with_default_headers(headers).with_allow_http(true);
    let path = object_store::path::Path::from_url_path(url.path());
    let path = path.map_err(|error| bad(request.uri, &error.to_string()))?;
    let mut origin = url.clone();
    origin.set_path("");
    let store = HttpBuilder::new()
        .with_url(origin.as_str())
        .with_client_options(options)
        .with_retry(once())
        .with_http_connector(connector)
        .build()
        .map_err(|error| bad(request.uri, &error.to_string()))?;
    Ok((Box::new(store), path))
}

fn s3(
    url: &Url,
    request: &Request<'_>,
    connector: Reached,
    reach: Reach,
) -> Result<Store, ObjectError> {
    let credential = request.credential;
    let mut builder = AmazonS3Builder::new()
        .with_url(request.uri)
        .with_retry(once())
        .with_http_connector(connector)
        .with_region(credential.aws_region.as_deref().unwrap_or("us-east-1"));
    match (&credential.aws_access_key_id, &credential.aws_secret_access_key) {
        (Some(id), Some(key)) => {
            builder = builder.with_access_key_id(id.expose()).with_secret_access_key(key.expose());
        }
        (None, None) => builder = builder.with_skip_signature(true),
        _ => {
            let reason = "wanted both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, got one".into();
            return Err(ObjectError::Refused { uri: request.uri.to_owned(), reason });
        }
    }
    if let Some(endpoint) = &credential.aws_endpoint_url {
        let parsed = Url::parse(endpoint).map_err(|error| bad(request.uri, &error.to_string()))?;
        reach.check(&parsed).map_err(|reason| bad(request.uri, &reason))?;
        let plain = parsed.scheme() == "http";
        builder = builder.with_endpoint(endpoint.trim_end_matches('/')).with_allow_http(plain);
    }
    let path = object_store::path::Path::from_url_path(url.path());
    let path = path.map_err(|error| bad(request.uri, &error.to_string()))?;
    let store = builder.build().map_err(|error| bad(request.uri, &error.to_string()))?;
    Ok((Box::new(store), path))
}

/// Trying again is done here, where it is told.
fn once() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

/// Connects by a client that goes only where downloads may.
#[derive(Debug)]
struct Reached(Reach);

impl HttpConnector for Reached {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let error = |source: reqwest::Error| object_store::Error::Generic {
            store: "http",
            source: source.into(),
        };
        let headers = options.get_default_headers().cloned().unwrap_or_default();
        let client = self.0.client().default_headers(headers).build().map_err(error)?;
        Ok(HttpClient::new(Steady(HttpClient::new(client))))
    }
}

/// A client for which the answer of a server in trouble is no answer. `object_store` does not tell what the status was.
#[derive(Debug)]
struct Steady(HttpClient);

#[derive(Debug, thiserror::Error)]
#[error("the server answered {0}")]
struct InTrouble(StatusCode);

type Answer = Result<HttpResponse, HttpError>;

impl HttpService for Steady {
    fn call<'a, 'b>(&'a self, request: HttpRequest) -> BoxFuture<'b, Answer>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let answer = self.0.execute(request).await?;
            match answer.status() {
                status if is_trouble(status) => {
                    Err(HttpError::new(HttpErrorKind::Unknown, InTrouble(status)))
                }
                _ => Ok(answer),
            }
        })
    }
}

/// Names this very content of this address, as far as the server says. Who names the server could make up the rest.
fn version(request: &Request<'_>, meta: &ObjectMeta) -> String {
    let Request { uri, credential: Credential { aws_region, aws_endpoint_url, .. }, .. } = request;
    let said = (&meta.e_tag, meta.size, meta.last_modified);
    let words = format!("{uri}\n{aws_region:?}\n{aws_endpoint_url:?}\n{said:?}");
    blake3::hash(words.as_bytes()).to_hex().to_string()
}

fn bad(uri: &str, reason: &str) -> ObjectError {
    ObjectError::BadAddress { uri: uri.to_owned(), reason: reason.to_owned() }
}

fn disk(path: &Path, source: std::io::Error) -> ObjectError {
    ObjectError::Disk { path: path.to_owned(), source }
}

/// What an error of the protocol means.
fn told(uri: &str, error: object_store::Error) -> ObjectError {
    let uri = uri.to_owned();
    let is_away = cause::<HttpError>(&error).is_some()
        && !cause::<reqwest::Error>(&error).is_some_and(reqwest::Error::is_redirect);
    match error {
        object_store::Error::NotFound { .. } => ObjectError::NotFound { uri },
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. } => {
            ObjectError::Refused { uri, reason: chain(&error) }
        }
        error if is_away => ObjectError::Unreachable { uri, reason: chain(&error) },
        error => ObjectError::BadAnswer { uri, reason: chain(&error) },
    }
}

/// The cause of this kind, where there is one.
fn cause<E: std::error::Error + 'static>(error: &object_store::Error) -> Option<&E> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    std::iter::from_fn(|| {
        let error = next?;
        next = error.source();
        Some(error)
    })
    .find_map(|error| error.downcast_ref())
}

/// The innermost cause, which is the one that says what happened.
fn chain(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests;
