//! From a claim's address to a path on this node that an engine can open.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::claim::Claim;
use crate::config::HubConfig;
use crate::source::hf::{self, HubError};
use crate::source::{Downloaded, HubModel, Location, Retry, Token};

/// Why an address did not become a path.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("file://{path} is not below the node's model folder {}", folder.display())]
    Outside { path: String, folder: PathBuf },
    #[error("file://{path}: {reason}")]
    Missing { path: String, reason: String },
    #[error("{uri}: wanted SHA-256 {wanted}, got {got}")]
    Checksum { uri: String, wanted: String, got: String },
    #[error("{uri}: a token has printable ASCII characters and no spaces")]
    BadToken { uri: String },
    #[error("{uri}: wanted file://path or hf://org/name[/file.gguf][@revision]")]
    Unsupported { uri: String },
    #[error(transparent)]
    Hub(#[from] HubError),
}

impl WeightsError {
    /// What the model's condition calls it.
    pub fn reason(&self) -> crds::Reason {
        match self {
            Self::Checksum { .. } | Self::Hub(HubError::WrongChecksum { .. }) => {
                crds::Reason::ChecksumMismatch
            }
            Self::BadToken { .. }
            | Self::Hub(HubError::TokenRefused { .. } | HubError::TokenMissing { .. }) => {
                crds::Reason::Unauthorized
            }
            Self::Unsupported { .. } | Self::Outside { .. } => crds::Reason::InvalidSpec,
            Self::Missing { .. } | Self::Hub(_) => crds::Reason::SourceUnreachable,
        }
    }
}

/// Where weights may come from on this node.
#[derive(Debug)]
pub struct Weights {
    /// What `file://` is below.
    pub model_folder: PathBuf,
    /// Endpoint and cache; the token is each claim's own.
    pub hub: HubConfig,
    /// One download at a time: they share the node's line, and the second of the same model finds it in the cache.
    pub downloading: tokio::sync::Mutex<()>,
}

impl Weights {
    /// Brings a claim's weights to this node. `report` hears of a download.
    ///
    /// # Errors
    /// When the source refuses, is away, or is not what its checksum says.
    pub async fn fetch(
        self: &Arc<Self>,
        claim: &Claim,
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<PathBuf, WeightsError> {
        let path = match claim.model.strip_prefix("file://") {
            Some(path) => self.local(path)?,
            None => match claim.model.parse() {
                Ok(Location::Hub(model)) => self.download(&model, claim, report).await?,
                Ok(Location::Path(_)) | Err(_) => {
                    return Err(WeightsError::Unsupported { uri: claim.model.clone() });
                }
            },
        };
        if let Some(wanted) = &claim.sha256 {
            verify(&claim.model, &path, wanted).await?;
        }
        Ok(path)
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

    async fn download(
        &self,
        model: &HubModel,
        claim: &Claim,
        report: &(dyn Fn(Downloaded) + Send + Sync),
    ) -> Result<PathBuf, WeightsError> {
        let bad = || WeightsError::BadToken { uri: claim.model.clone() };
        let token = claim.token.as_ref().map(|token| Token::new(token.0.clone()).ok_or_else(bad));
        let config = HubConfig { token: token.transpose()?, ..self.hub.clone() };
        let _alone = self.downloading.lock().await;
        Ok(hf::fetch(model, &config, Retry::USUAL, report).await?)
    }
}

async fn verify(uri: &str, path: &Path, wanted: &str) -> Result<(), WeightsError> {
    let read = path.to_owned();
    let hashed = tokio::task::spawn_blocking(move || {
        let mut hash = Sha256::new();
        let mut file = std::fs::File::open(read)?;
        let mut piece = vec![0; 1 << 20];
        loop {
            let n_bytes = file.read(&mut piece)?;
            if n_bytes == 0 {
                break;
            }
            hash.update(&piece[..n_bytes]);
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    });
    let hashed: std::io::Result<String> = hashed.await.unwrap_or_else(|error| Err(error.into()));
    let got = hashed.map_err(|error| WeightsError::Missing {
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
    use crate::claim::VERSION;

    fn weights(folder: &Path) -> Arc<Weights> {
        let hub = HubConfig {
            endpoint: "http://127.0.0.1:1".into(),
            token: None,
            cache: folder.join("cache"),
            offline: true,
        };
        Arc::new(Weights {
            model_folder: folder.join("models"),
            hub,
            downloading: tokio::sync::Mutex::default(),
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
            token: None,
        }
    }

    async fn reason(weights: &Arc<Weights>, model: &str, sha256: Option<&str>) -> crds::Reason {
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
        assert!(found.ends_with("models/m.gguf"));
        use crds::Reason;
        assert_eq!(reason(&weights, "file://../secret", None).await, Reason::InvalidSpec);
        assert_eq!(reason(&weights, "file://link", None).await, Reason::InvalidSpec);
        assert_eq!(reason(&weights, "file://absent", None).await, Reason::SourceUnreachable);
        assert_eq!(reason(&weights, "/etc/passwd", None).await, Reason::InvalidSpec);
        assert_eq!(reason(&weights, "hf://org/name", None).await, Reason::SourceUnreachable);
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
