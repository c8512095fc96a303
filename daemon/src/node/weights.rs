//! From a claim's address to a path on this node that an engine can open.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::cache::{Cache, Held};
use crate::claim::{Claim, Secret};
use crate::config::HubConfig;
use crate::source::hf::{self, HubError};
use crate::source::object::{ObjectError, Objects, Request};
use crate::source::reach::Reach;
use crate::source::{Credential, Downloaded, HubModel, Location, Retry, Room, Token, sha256_of};

/// Why an address did not become a path.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("file://{path} is not below the node's model folder {}", folder.display())]
    Outside { path: String, folder: PathBuf },
    #[error("file://{path}: {reason}")]
    Missing { path: String, reason: String },
    #[error("{uri}: wanted SHA-256 {wanted}, got {got}")]
    Checksum { uri: String, wanted: String, got: String },
    #[error("{uri}: a token or key has printable ASCII characters and no spaces")]
    BadToken { uri: String },
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
            Self::BadToken { .. }
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
}

/// Where weights may come from on this node, and where they are kept.
#[derive(Debug)]
pub struct Weights {
    model_folder: PathBuf,
    /// The token is each claim's own.
    hub: HubConfig,
    objects: Objects,
    cache: Arc<Cache>,
    /// An empty file for each address and credential that the source has accepted.
    readers: PathBuf,
    /// One download of an address at a time: the second finds it in the cache.
    downloading: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
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
        let (hub, objects) = (config.root.join("hub"), config.root.join("objects"));
        let kept = vec![hub.clone(), objects.join("sha256")];
        let cache = Cache::new(&config.root, kept, config.limit_bytes);
        let room = Room::new({
            let cache = Arc::clone(&cache);
            move |wanted| cache.make_room(wanted)
        });
        let (reach, retry) = (config.reach, config.retry);
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
            cache,
            readers: config.root.join("readers"),
            downloading: Mutex::default(),
        }
    }

    /// Brings a claim's weights to this node. `report` hears of a download.
    ///
    /// # Errors
    /// When the source refuses, is away, or is not what its checksum says.
    pub async fn fetch(
        &self,
        claim: &Claim,
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<Fetched, WeightsError> {
        if let Some(path) = claim.model.strip_prefix("file://") {
            let path = self.local(path)?;
            if let Some(wanted) = &claim.sha256 {
                verify(&claim.model, &path, wanted).await?;
            }
            return Ok(Fetched { path, _held: None });
        }
        let alone = self.one_of(&claim.model);
        let alone = alone.lock().await;
        let fetched = match claim.model.parse() {
            Ok(Location::Hub(model)) => {
                // Held before it is filled: making room for it must not take it away.
                let held = self.cache.hold(&hf::folder(&self.hub.cache, &model));
                Fetched { path: self.hub_model(&model, claim, report).await?, _held: held }
            }
            Ok(Location::Path(_)) => {
                return Err(WeightsError::Unsupported { uri: claim.model.clone() });
            }
            Err(_) => {
                let path = self.one_object(claim, report).await?;
                let held = self.cache.hold(&path);
                Fetched { path, _held: held }
            }
        };
        drop(alone);
        Ok(fetched)
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
        claim: &Claim,
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<PathBuf, WeightsError> {
        let credential = credential(claim)?;
        let mark = self.readers.join(reader(claim));
        // While the hub is away, what it gave this credential before is used, and what it gave everybody.
        let config =
            HubConfig { token: credential.token, trusts_cache: mark.exists(), ..self.hub.clone() };
        let path = hf::fetch(model, &config, Retry::USUAL, report).await?;
        let noted = std::fs::create_dir_all(&self.readers).and_then(|()| std::fs::write(&mark, ""));
        if let Err(error) = noted {
            tracing::warn!(%error, "cannot note who may read a model");
        }
        Ok(path)
    }

    async fn one_object(
        &self,
        claim: &Claim,
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<PathBuf, WeightsError> {
        let is_gguf = claim.model.to_ascii_lowercase().ends_with(".gguf");
        if !is_gguf {
            return Err(WeightsError::Unsupported { uri: claim.model.clone() });
        }
        let credential = credential(claim)?;
        let sha256 = claim.sha256.as_deref();
        let request = Request { uri: &claim.model, credential: &credential, sha256 };
        Ok(self.objects.fetch(&request, report).await?)
    }
}

/// Names an address and a credential without saying either.
fn reader(claim: &Claim) -> String {
    let token = claim.credential.token.as_ref().map_or("", |token| &token.0);
    blake3::hash(format!("{}\n{token}", claim.model).as_bytes()).to_hex().to_string()
}

fn credential(claim: &Claim) -> Result<Credential, WeightsError> {
    let bad = || WeightsError::BadToken { uri: claim.model.clone() };
    let checked = |secret: &Option<Secret>| {
        secret.as_ref().map(|secret| Token::new(secret.0.clone()).ok_or_else(bad)).transpose()
    };
    let given = &claim.credential;
    Ok(Credential {
        token: checked(&given.token)?,
        aws_access_key_id: checked(&given.aws_access_key_id)?,
        aws_secret_access_key: checked(&given.aws_secret_access_key)?,
        aws_region: given.aws_region.clone(),
        aws_endpoint_url: given.aws_endpoint_url.clone(),
    })
}

async fn verify(uri: &str, path: &Path, wanted: &str) -> Result<(), WeightsError> {
    let got = sha256_of(path).await.map_err(|error| WeightsError::Missing {
        path: path.display().to_string(),
        reason: error.to_string(),
    })?;
    if got == wanted {
        return Ok(());
    }
    Err(WeightsError::Checksum { uri: uri.to_owned(), wanted: wanted.to_owned(), got })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::claim::{ClaimCredential, VERSION};

    fn weights(folder: &Path) -> Weights {
        Weights::new(WeightsConfig {
            model_folder: folder.join("models"),
            root: folder.to_owned(),
            hub_endpoint: "http://127.0.0.1:1".into(),
            reach: Reach::Public,
            limit_bytes: None,
            retry: Retry { attempts: 1, first_pause: std::time::Duration::ZERO },
        })
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
        weights.fetch(&claim(model, sha256), &|_| {}).await.unwrap_err().reason()
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
        let found = weights.fetch(&claim("file://m.gguf", None), &|_| {}).await.unwrap();
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
        // FIPS 180-2, appendix B.1.
        let right = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(weights.fetch(&claim("file://m", Some(right)), &|_| {}).await.is_ok());
        let wrong = "0".repeat(64);
        let reason = reason(&weights, "file://m", Some(&wrong)).await;
        assert_eq!(reason, crds::Reason::ChecksumMismatch);
    }
}
