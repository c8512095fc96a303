//! From a claim's address to a path on this node that an engine can open.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use reqwest::Url;

use crate::claim::{Claim, ClaimCredential, Secret};
use crate::config::HubConfig;
use crate::source::hf::{self, HubError};
use crate::source::object::{ObjectError, Objects, Request, held_as};
use crate::source::reach::Reach;
use crate::source::{
    Credential, Downloaded, Held, HubModel, Location, Retry, Room, Token, link, sha256_of,
};

/// Files of the model folder whose SHA-256 is remembered.
const MOST_HASHED: usize = 256;
/// What parts of a credential are.
const TOKEN: &str = "a token or key has printable ASCII characters and no spaces";
const REGION: &str = "AWS_REGION has 1 to 64 letters, digits, - and _";
const ENDPOINT: &str = "AWS_ENDPOINT_URL is http://host or https://host, with at most 512 printable ASCII characters and no user, query or fragment";

/// Why an address did not become a path.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("file://{path} is not below the node's model folder {}", folder.display())]
    Outside { path: String, folder: PathBuf },
    #[error("file://{path}: {reason}")]
    Missing { path: String, reason: String },
    #[error("{uri}: wanted SHA-256 {wanted}, got {got}")]
    Checksum { uri: String, wanted: String, got: String },
    #[error("{uri}: {wanted}")]
    BadCredential { uri: String, wanted: &'static str },
    #[error(
        "{uri}: wanted file://path, hf://org/name[/file.gguf][@revision], https://host/path.gguf or s3://bucket/path.gguf"
    )]
    Unsupported { uri: String },
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Object(#[from] ObjectError),
}

impl WeightsError {
    /// What the model's condition calls it.
    pub fn reason(&self) -> crds::Reason {
        match self {
            Self::Checksum { .. }
            | Self::Hub(HubError::WrongChecksum { .. })
            | Self::Object(ObjectError::WrongChecksum { .. }) => crds::Reason::ChecksumMismatch,
            Self::BadCredential { .. }
            | Self::Hub(HubError::TokenRefused { .. } | HubError::TokenMissing { .. })
            | Self::Object(ObjectError::Refused { .. }) => crds::Reason::Unauthorized,
            Self::Hub(HubError::DiskFull { .. }) | Self::Object(ObjectError::DiskFull { .. }) => {
                crds::Reason::DiskFull
            }
            Self::Hub(HubError::Disk { source, .. })
            | Self::Object(ObjectError::Disk { source, .. })
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                crds::Reason::DiskFull
            }
            Self::Hub(HubError::NoModel) => crds::Reason::UnsupportedModel,
            Self::Unsupported { .. }
            | Self::Outside { .. }
            | Self::Hub(HubError::NoSuchFile { .. } | HubError::WhichGguf { .. })
            | Self::Object(ObjectError::BadAddress { .. }) => crds::Reason::InvalidSpec,
            Self::Missing { .. } | Self::Hub(_) | Self::Object(_) => {
                crds::Reason::SourceUnreachable
            }
        }
    }

    /// Whether the source says that this credential has nothing to read here.
    fn refuses(&self) -> bool {
        matches!(
            self,
            Self::Hub(
                HubError::TokenRefused { .. }
                    | HubError::TokenMissing { .. }
                    | HubError::NotFound { .. }
            ) | Self::Object(ObjectError::Refused { .. } | ObjectError::NotFound { .. })
        )
    }
}

/// Where weights may come from on this node, and where they are kept.
#[derive(Debug)]
pub struct Weights {
    model_folder: PathBuf,
    /// The token is each claim's own.
    hub: HubConfig,
    objects: Objects,
    root: PathBuf,
    /// A link for each address and credential that the source has accepted, to what it gave.
    readers: PathBuf,
    /// One download of an address at a time: the second finds it in the cache.
    downloading: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// SHA-256 of files of the model folder.
    hashed: Mutex<HashMap<Stamp, String>>,
}

/// What stays the same for as long as nobody writes to a file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Stamp {
    path: PathBuf,
    inode: u64,
    bytes: u64,
    modified: SystemTime,
}

/// What a node's weights are made of.
#[derive(Debug, Clone)]
pub struct WeightsConfig {
    /// What `file://` is below.
    pub model_folder: PathBuf,
    /// Where downloads are kept.
    pub root: PathBuf,
    pub hub_endpoint: String,
    pub reach: Reach,
    /// Bytes of all downloads together.
    pub limit_bytes: Option<u64>,
    pub retry: Retry,
}

/// Weights that are on this node for as long as this lives.
#[derive(Debug)]
pub struct Fetched {
    pub path: PathBuf,
    _held: Option<Held>,
}

impl Weights {
    pub fn new(config: WeightsConfig) -> Self {
        let WeightsConfig { root, reach, retry, .. } = config;
        let (hub, objects, readers) =
            (root.join("hub"), root.join("objects"), root.join("readers"));
        let kept = vec![hub.clone(), objects.join("partial"), objects.join("sha256")];
        let links = vec![objects.join("versions"), readers.clone()];
        let room = Room::new(kept, links, config.limit_bytes);
        Self {
            model_folder: config.model_folder,
            hub: HubConfig {
                endpoint: config.hub_endpoint,
                token: None,
                cache: hub,
                offline: false,
                trusts_cache: false,
                reach,
                room: room.clone(),
            },
            objects: Objects { folder: objects, reach, retry, room },
            root,
            readers,
            downloading: Mutex::default(),
            hashed: Mutex::default(),
        }
    }

    /// Brings a claim's weights to this node. `namespace`: that of its Pod, where it is known; while the source is away, what its
    /// credential brought before is for the same namespace alone. `report` hears of a download.
    ///
    /// # Errors
    /// When the source refuses, is away, or is not what its checksum says.
    pub async fn fetch(
        &self,
        claim: &Claim,
        namespace: Option<&str>,
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<Fetched, WeightsError> {
        let readers = Readers::of(claim, namespace);
        let alone = self.one_of(&claim.model);
        let _alone = alone.lock().await;
        if let Some(path) = claim.model.strip_prefix("file://") {
            let path = self.local(path)?;
            if let Some(wanted) = &claim.sha256 {
                self.verify(&claim.model, &path, wanted).await?;
            }
            return Ok(Fetched { path, _held: None });
        }
        let fetched = match claim.model.parse() {
            Ok(Location::Hub(model)) => self.hub_model(&model, (claim, &readers), report).await,
            Ok(Location::Path(_)) => Err(WeightsError::Unsupported { uri: claim.model.clone() }),
            Err(_) => self.one_object((claim, &readers), report).await,
        };
        self.note(&readers, &fetched);
        fetched
    }

    /// The lock of an address.
    fn one_of(&self, address: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.downloading.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(all.entry(address.to_owned()).or_default())
    }

    /// Links are followed before the folder is compared, so that none leads out of it.
    fn local(&self, path: &str) -> Result<PathBuf, WeightsError> {
        let missing = |error: std::io::Error| WeightsError::Missing {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let folder = self.model_folder.canonicalize().map_err(missing)?;
        let found = folder.join(path.trim_start_matches('/')).canonicalize().map_err(missing)?;
        if found.starts_with(&folder) {
            Ok(found)
        } else {
            Err(WeightsError::Outside { path: path.to_owned(), folder })
        }
    }

    async fn hub_model(
        &self,
        model: &HubModel,
        (claim, readers): (&Claim, &Readers),
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<Fetched, WeightsError> {
        let token = credential(claim)?.token;
        // Held before it is filled: making room for it must not take it away.
        let held = self.objects.room.hold(&hf::folder(&self.hub.cache, model));
        let whole = hf::remembered(&self.hub.cache, model);
        let trusts_cache = whole.is_some_and(|path| self.given(readers).any(|given| given == path));
        let config = HubConfig { token, trusts_cache, ..self.hub.clone() };
        let path = hf::fetch(model, &config, self.objects.retry, report).await?;
        Ok(Fetched { path, _held: Some(held) })
    }

    async fn one_object(
        &self,
        (claim, readers): (&Claim, &Readers),
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<Fetched, WeightsError> {
        let is_gguf = claim.model.to_ascii_lowercase().ends_with(".gguf");
        if !is_gguf {
            return Err(WeightsError::Unsupported { uri: claim.model.clone() });
        }
        let credential = credential(claim)?;
        let sha256 = claim.sha256.as_deref();
        let request = Request { uri: &claim.model, credential: &credential, sha256 };
        let held = match self.objects.fetch(&request, report).await {
            Err(error) if error.is_away() => {
                let mut given = self.given(readers).map(|path| self.objects.room.hold(&path));
                let Some(held) = given.find_map(|held| held_as(held, sha256)) else {
                    return Err(error.into());
                };
                tracing::warn!(%error, path = %held.entry().display(), "using the model that is in the cache");
                held
            }
            fetched => fetched?,
        };
        Ok(Fetched { path: held.entry().to_owned(), _held: Some(held) })
    }

    /// What the source gave for this address to this reader, and what to everybody. While it is away, that is used.
    fn given(&self, readers: &Readers) -> impl Iterator<Item = PathBuf> {
        readers.own.iter().chain([&readers.everybody]).filter_map(|reader| {
            let target = std::fs::read_link(self.readers.join(reader)).ok()?;
            Some(self.root.join(target.strip_prefix("..").ok()?))
        })
    }

    /// Notes what the source gave to whom, and forgets it when it refuses.
    fn note(&self, readers: &Readers, fetched: &Result<Fetched, WeightsError>) {
        let Some(own) = &readers.own else { return };
        let name = self.readers.join(own);
        match fetched {
            Ok(Fetched { path, .. }) => {
                let inside = path.strip_prefix(&self.root).unwrap_or(path);
                if let Err(error) = link(Path::new("..").join(inside), &name) {
                    tracing::warn!(%error, "cannot note who may read a model");
                }
            }
            // Mostly there is none.
            Err(error) if error.refuses() => drop(std::fs::remove_file(name)),
            Err(_) => {}
        }
    }

    async fn verify(&self, uri: &str, path: &Path, wanted: &str) -> Result<(), WeightsError> {
        let got = self.sha256(path).await.map_err(|error| WeightsError::Missing {
            path: path.display().to_string(),
            reason: error.to_string(),
        })?;
        if got == wanted {
            return Ok(());
        }
        Err(WeightsError::Checksum { uri: uri.to_owned(), wanted: wanted.to_owned(), got })
    }

    async fn sha256(&self, path: &Path) -> std::io::Result<String> {
        let found = std::fs::metadata(path)?;
        let (inode, bytes, modified) = (found.ino(), found.len(), found.modified()?);
        let stamp = Stamp { path: path.to_owned(), inode, bytes, modified };
        let hashed = || self.hashed.lock().unwrap_or_else(PoisonError::into_inner);
        let known = hashed().get(&stamp).cloned();
        if let Some(known) = known {
            return Ok(known);
        }
        let sha256 = sha256_of(path).await?;
        let mut hashed = hashed();
        if hashed.len() >= MOST_HASHED {
            hashed.clear();
        }
        hashed.insert(stamp, sha256.clone());
        Ok(sha256)
    }
}

/// Who reads an address: names that say neither the address nor the credential.
struct Readers {
    /// Absent: whose credential it is is not known.
    own: Option<String>,
    /// Whoever shows no credential.
    everybody: String,
}

impl Readers {
    fn of(claim: &Claim, namespace: Option<&str>) -> Self {
        let ClaimCredential { aws_region, aws_endpoint_url, .. } = claim.credential.clone();
        let nobody = ClaimCredential { aws_region, aws_endpoint_url, ..ClaimCredential::default() };
        let everybody = reader(claim, &nobody, "");
        let own = if claim.credential.is_secret() {
            namespace.map(|namespace| reader(claim, &claim.credential, namespace))
        } else {
            Some(everybody.clone())
        };
        Self { own, everybody }
    }
}

fn reader(claim: &Claim, credential: &ClaimCredential, namespace: &str) -> String {
    let secrets = credential.secrets().map(|secret| secret.map(|secret| &secret.0));
    let server = (&credential.aws_region, &credential.aws_endpoint_url);
    let words = format!("{:?} {secrets:?} {server:?} {namespace:?}", claim.model);
    blake3::hash(words.as_bytes()).to_hex().to_string()
}

fn credential(claim: &Claim) -> Result<Credential, WeightsError> {
    let bad = |wanted| WeightsError::BadCredential { uri: claim.model.clone(), wanted };
    let checked = |secret: &Option<Secret>| match secret {
        Some(secret) => Token::new(secret.0.clone()).map(Some).ok_or_else(|| bad(TOKEN)),
        None => Ok(None),
    };
    let given = &claim.credential;
    if !given.aws_region.as_deref().is_none_or(is_region) {
        return Err(bad(REGION));
    }
    if !given.aws_endpoint_url.as_deref().is_none_or(is_endpoint) {
        return Err(bad(ENDPOINT));
    }
    Ok(Credential {
        token: checked(&given.token)?,
        aws_access_key_id: checked(&given.aws_access_key_id)?,
        aws_secret_access_key: checked(&given.aws_secret_access_key)?,
        aws_region: given.aws_region.clone(),
        aws_endpoint_url: given.aws_endpoint_url.clone(),
    })
}

/// A region becomes a part of a host's name, in which other characters would name another host.
fn is_region(region: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    (1..=64).contains(&region.len()) && region.bytes().all(allowed)
}

fn is_endpoint(endpoint: &str) -> bool {
    let is_plain = |url: Url| {
        ["http", "https"].contains(&url.scheme())
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none()
    };
    endpoint.len() <= 512
        && endpoint.bytes().all(|b| b.is_ascii_graphic())
        && Url::parse(endpoint).is_ok_and(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::claim::{ClaimCredential, VERSION};

    fn config(folder: &Path) -> WeightsConfig {
        WeightsConfig {
            model_folder: folder.join("models"),
            root: folder.to_owned(),
            hub_endpoint: "http://127.0.0.1:1".into(),
            reach: Reach::Public,
            limit_bytes: None,
            retry: Retry { attempts: 1, first_pause: std::time::Duration::ZERO },
        }
    }

    fn weights(folder: &Path) -> Weights {
        Weights::new(config(folder))
    }

    fn claim(model: &str, sha256: Option<&str>) -> Claim {
        Claim {
            version: VERSION,
            model: model.into(),
            sha256: sha256.map(str::to_owned),
            served_name: "m".into(),
            device: crds::Device::Cpu,
            engine: crds::Engine::default(),
            api_keys: Vec::new(),
            credential: ClaimCredential::default(),
        }
    }

    async fn reason(weights: &Weights, model: &str, sha256: Option<&str>) -> crds::Reason {
        weights.fetch(&claim(model, sha256), NAMESPACE, &|_| {}).await.unwrap_err().reason()
    }

    #[tokio::test]
    async fn files_are_taken_from_the_model_folder_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("models")).unwrap();
        std::fs::write(folder.path().join("models/m.gguf"), "x").unwrap();
        std::fs::write(folder.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(folder.path().join("secret"), folder.path().join("models/link"))
            .unwrap();
        let weights = weights(folder.path());
        let found = weights.fetch(&claim("file://m.gguf", None), NAMESPACE, &|_| {}).await.unwrap();
        assert!(found.path.ends_with("models/m.gguf"));
        use crds::Reason;
        assert_eq!(reason(&weights, "file://../secret", None).await, Reason::InvalidSpec);
        assert_eq!(reason(&weights, "file://link", None).await, Reason::InvalidSpec);
        assert_eq!(reason(&weights, "file://absent", None).await, Reason::SourceUnreachable);
        assert_eq!(reason(&weights, "/etc/passwd", None).await, Reason::InvalidSpec);
        assert_eq!(reason(&weights, "hf://org/name", None).await, Reason::SourceUnreachable);
        for inside in [
            "https://127.0.0.1/m.gguf",
            "https://[::1]/m.gguf",
            "http://a/m.gguf",
            "https://a/m.bin",
        ] {
            assert_eq!(reason(&weights, inside, None).await, Reason::InvalidSpec, "{inside}");
        }
        assert_eq!(
            reason(&weights, "https://localhost/m.gguf", None).await,
            Reason::SourceUnreachable
        );
    }

    #[tokio::test]
    async fn a_checksum_is_compared() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("models")).unwrap();
        std::fs::write(folder.path().join("models/m"), "abc").unwrap();
        let weights = weights(folder.path());
        assert!(weights.fetch(&claim("file://m", Some(ABC)), NAMESPACE, &|_| {}).await.is_ok());
        let wrong = "0".repeat(64);
        let reason = reason(&weights, "file://m", Some(&wrong)).await;
        assert_eq!(reason, crds::Reason::ChecksumMismatch);
    }
    #[tokio::test]
    async fn a_file_is_hashed_once_for_as_long_as_it_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("models/m");
        std::fs::create_dir(folder.path().join("models")).unwrap();
        std::fs::write(&path, "abc").unwrap();
        let weights = weights(folder.path());
        let claim = claim("file://m", Some(ABC));
        weights.fetch(&claim, NAMESPACE, &|_| {}).await.unwrap();
        let written = std::fs::metadata(&path).unwrap().modified().unwrap();
        let write = |content: &str, modified| {
            std::fs::write(&path, content).unwrap();
            std::fs::File::open(&path).unwrap().set_modified(modified).unwrap();
        };
        write("xyz", written);
        weights.fetch(&claim, NAMESPACE, &|_| {}).await.expect("nothing says that it is another");
        write("xyz", written + std::time::Duration::from_secs(1));
        let error = weights.fetch(&claim, NAMESPACE, &|_| {}).await.unwrap_err();
        assert_eq!(error.reason(), crds::Reason::ChecksumMismatch);
    }

    /// Of `abc`: FIPS 180-2, appendix B.1.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    const HUB: &str = "hf://org/name";
    const NAMESPACE: Option<&str> = Some("tenant");

    /// A hub and a file server with one file.
    #[derive(Default)]
    struct Source {
        /// What it answers in place of content.
        status: Mutex<Option<u16>>,
        /// What it wants to be shown.
        token: Mutex<Option<&'static str>>,
        asked: Mutex<usize>,
    }

    async fn answer(
        axum::extract::State(source): axum::extract::State<Arc<Source>>,
        request: axum::extract::Request,
    ) -> axum::response::Response {
        use axum::response::IntoResponse;
        *source.asked.lock().unwrap() += 1;
        let status = |code: u16| axum::http::StatusCode::from_u16(code).unwrap().into_response();
        if let Some(code) = *source.status.lock().unwrap() {
            return status(code);
        }
        let shown = request.headers().get("authorization").map(|value| value.to_str().unwrap());
        if let Some(token) = *source.token.lock().unwrap()
            && shown != Some(&format!("Bearer {token}"))
        {
            return status(401);
        }
        if request.uri().path().starts_with("/api/") {
            let file =
                serde_json::json!({"rfilename": "m.gguf", "lfs": {"sha256": ABC, "size": 3}});
            return axum::Json(serde_json::json!({"sha": "c0ffee", "siblings": [file]}))
                .into_response();
        }
        "abc".into_response()
    }

    /// Weights from a source of the test's own.
    struct Bench {
        source: Arc<Source>,
        server: tokio::task::JoinHandle<()>,
        weights: Weights,
        /// An address of the hub and one of the file server.
        addresses: [String; 2],
        folder: tempfile::TempDir,
    }

    impl Bench {
        async fn new() -> Self {
            Self::with_limit(None).await
        }

        async fn with_limit(limit_bytes: Option<u64>) -> Self {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let source = Arc::new(Source::default());
            let router = axum::Router::new().fallback(answer).with_state(Arc::clone(&source));
            let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
            let folder = tempfile::tempdir().unwrap();
            let weights = Weights::new(WeightsConfig {
                hub_endpoint: url.clone(),
                reach: Reach::Everywhere,
                limit_bytes,
                retry: Retry { attempts: 2, first_pause: std::time::Duration::ZERO },
                ..config(folder.path())
            });
            let addresses = [HUB.to_owned(), format!("{url}/m.gguf")];
            Self { source, server, weights, addresses, folder }
        }

        fn answers(&self, status: Option<u16>) {
            *self.source.status.lock().unwrap() = status;
        }

        fn wants(&self, token: Option<&'static str>) {
            *self.source.token.lock().unwrap() = token;
        }

        async fn fetch(&self, model: &str, token: Option<&str>) -> Result<(), crds::Reason> {
            let mut claim = claim(model, None);
            claim.credential.token = token.map(|token| Secret(token.into()));
            let fetched = self.weights.fetch(&claim, NAMESPACE, &|_| {}).await;
            let fetched = fetched.map_err(|error| error.reason())?;
            assert_eq!(std::fs::read(&fetched.path).unwrap(), b"abc");
            Ok(())
        }
    }

    #[tokio::test]
    async fn while_a_source_is_away_only_who_was_accepted_is_served() {
        use crds::Reason::{SourceUnreachable, Unauthorized};
        let bench = Bench::new().await;
        bench.wants(Some("good"));
        for model in &bench.addresses {
            bench.answers(None);
            bench.fetch(model, Some("good")).await.unwrap();
            assert_eq!(bench.fetch(model, Some("bad")).await, Err(Unauthorized));
            for away in [500, 503, 429] {
                bench.answers(Some(away));
                assert_eq!(bench.fetch(model, Some("good")).await, Ok(()), "{model} {away}");
                for other in [Some("bad"), None] {
                    assert_eq!(bench.fetch(model, other).await, Err(SourceUnreachable));
                }
            }
            for (no, reason) in
                [(400, SourceUnreachable), (404, SourceUnreachable), (403, Unauthorized)]
            {
                bench.answers(Some(no));
                assert_eq!(bench.fetch(model, Some("good")).await, Err(reason), "{model} {no}");
            }
            bench.answers(Some(503));
            assert_eq!(
                bench.fetch(model, Some("good")).await,
                Err(SourceUnreachable),
                "it was refused since"
            );
            bench.answers(None);
            bench.fetch(model, Some("good")).await.unwrap();
        }
        bench.server.abort();
        drop(bench.server.await);
        let (source, weights) = (bench.source, bench.weights);
        let asked = *source.asked.lock().unwrap();
        for model in &bench.addresses {
            let mut claim = claim(model, None);
            assert!(weights.fetch(&claim, NAMESPACE, &|_| {}).await.is_err());
            claim.credential.token = Some(Secret("good".into()));
            weights.fetch(&claim, NAMESPACE, &|_| {}).await.unwrap();
            if model != HUB {
                claim.sha256 = Some("0".repeat(64));
                assert!(
                    weights.fetch(&claim, NAMESPACE, &|_| {}).await.is_err(),
                    "it is not what is wanted"
                );
            }
        }
        assert_eq!(*source.asked.lock().unwrap(), asked, "nothing answers");
    }

    #[tokio::test]
    async fn what_a_credential_brought_is_for_its_namespace_alone_while_its_source_is_away() {
        let bench = Bench::new().await;
        bench.wants(Some("good"));
        for model in &bench.addresses {
            bench.answers(None);
            let mut claim = claim(model, None);
            claim.credential.token = Some(Secret("good".into()));
            let fetch = async |namespace| {
                bench.weights.fetch(&claim, namespace, &|_| {}).await.map(drop).is_ok()
            };
            // Whose it is was not known: nobody is served by that.
            assert!(fetch(None).await, "{model}: the source takes the credential");
            bench.answers(Some(503));
            for other in [None, NAMESPACE] {
                assert!(!fetch(other).await, "{model} {other:?}");
            }
            bench.answers(None);
            assert!(fetch(NAMESPACE).await);
            bench.answers(Some(503));
            assert!(fetch(NAMESPACE).await, "{model}");
            for other in [None, Some("other"), Some("")] {
                assert!(!fetch(other).await, "{model} {other:?}");
            }
        }
    }

    #[tokio::test]
    async fn what_everybody_was_given_is_everybodys_while_its_source_is_away() {
        let bench = Bench::new().await;
        for model in &bench.addresses {
            bench.answers(None);
            bench.fetch(model, None).await.unwrap();
            bench.answers(Some(503));
            assert_eq!(bench.fetch(model, Some("any")).await, Ok(()), "{model}");
            // It is no longer for everybody.
            bench.answers(Some(401));
            assert!(bench.fetch(model, None).await.is_err());
            bench.answers(Some(503));
            assert!(bench.fetch(model, None).await.is_err());
        }
    }

    #[tokio::test]
    async fn parts_that_nobody_continues_make_room() {
        let bench = Bench::with_limit(Some(300)).await;
        let partial = bench.folder.path().join("objects/partial");
        std::fs::create_dir_all(&partial).unwrap();
        std::fs::write(partial.join("left"), [0; 298]).unwrap();
        let [hub, file] = &bench.addresses;
        bench.fetch(file, None).await.unwrap();
        assert_eq!(std::fs::read_dir(partial).unwrap().count(), 0);
        bench.fetch(hub, None).await.unwrap();
    }

    #[tokio::test]
    async fn a_source_is_asked_as_often_as_is_configured() {
        let bench = Bench::new().await;
        bench.answers(Some(503));
        for model in &bench.addresses {
            *bench.source.asked.lock().unwrap() = 0;
            assert!(bench.fetch(model, None).await.is_err());
            assert_eq!(*bench.source.asked.lock().unwrap(), 2, "{model}");
        }
    }

    #[test]
    fn regions_and_endpoints_that_are_none_are_refused() {
        let check = |region: Option<&str>, endpoint: Option<&str>| {
            let mut claim = claim("s3://bucket/m.gguf", None);
            claim.credential.aws_region = region.map(str::to_owned);
            claim.credential.aws_endpoint_url = endpoint.map(str::to_owned);
            credential(&claim).map(drop).map_err(|error| error.to_string())
        };
        for (region, endpoint) in [
            (Some("eu-central-1"), None),
            (Some("auto"), Some("https://minio.example:9000/")),
            (None, Some("http://10.0.0.1")),
        ] {
            assert_eq!(check(region, endpoint), Ok(()), "{region:?} {endpoint:?}");
        }
        for region in ["", "x@10.0.0.1/#", "eu central", "eu\n", "é", "a.example", &"x".repeat(65)]
        {
            let error = check(Some(region), None).unwrap_err();
            assert!(error.contains("AWS_REGION"), "{region}: {error}");
        }
        for endpoint in [
            "",
            "minio.example",
            "file:///etc",
            "https://",
            "https://user:secret@minio.example",
            "https://minio.example/?secret",
            "https://minio.example/\n",
            &format!("https://{}", "x".repeat(512)),
        ] {
            let error = check(None, Some(endpoint)).unwrap_err();
            assert!(error.contains("AWS_ENDPOINT_URL") && !error.contains("secret"), "{error}");
        }
    }
}
