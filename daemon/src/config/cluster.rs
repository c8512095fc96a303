//! Flags of the two processes that run in a cluster, checked.

use std::net::SocketAddr;
use std::path::Path;

use super::{ConfigError, LogConfig, flags, invalid};
use crate::claim::{Claim, ClaimCredential, Secret, VERSION};
use crate::node::{LocalClients, NodeConfig};
use crate::replica::ReplicaConfig;
use crate::source::reach::Reach;

/// A Secret's value is at most 1 MiB; a key or token is far less.
const LONGEST_SECRET: u64 = 4096;

/// Checks the flags of `bindery node`.
pub(super) fn node(flags: flags::Node) -> Result<NodeConfig, ConfigError> {
    let cpu_memory_gib = match flags.cpu_memory {
        Some(bytes) => match bytes.whole_gib().filter(|gib| *gib > 0) {
            Some(gib) => Some(gib),
            None => {
                return invalid(format!("--cpu-memory wants whole GiB such as 16Gi, got {bytes}"));
            }
        },
        None => None,
    };
    Ok(NodeConfig {
        cpu_memory_gib,
        gpu_inventory: flags.gpu_inventory,
        model_dir: flags.model_dir,
        state_dir: flags.state_dir,
        kubelet_dir: flags.kubelet_dir,
        hub_endpoint: flags.hub_endpoint.trim_end_matches('/').to_owned(),
        reach: if flags.allow_private_sources { Reach::Everywhere } else { Reach::Public },
        cache_limit_bytes: flags.cache_size.map(|size| size.0),
        admin: SocketAddr::new(flags.host.0, flags.port),
        drain: flags.drain_seconds.0,
        local_clients: if flags.allow_local_clients {
            LocalClients::Allowed
        } else {
            LocalClients::Refused
        },
        log: LogConfig { filter: flags.log.log_level, format: flags.log.log_format },
    })
}

/// Checks the flags of `bindery replica` and reads its Secrets. What is wrong with them is also the termination message,
/// from which the operator knows that starting again does not help.
pub(super) fn replica(flags: flags::Replica) -> Result<ReplicaConfig, ConfigError> {
    let termination_log = flags.termination_log.clone();
    checked(flags).inspect_err(|error| crate::replica::refuse(&termination_log, error))
}

fn checked(flags: flags::Replica) -> Result<ReplicaConfig, ConfigError> {
    let Some(model) = flags.model else {
        return invalid("MODEL is missing: hf://org/name[/file.gguf][@revision] or file://path");
    };
    let api_keys = flags.api_keys.as_deref().map(api_keys).transpose()?.unwrap_or_default();
    let credential = flags.credential.as_deref().map(credential).transpose()?.unwrap_or_default();
    let claim = Claim {
        version: VERSION,
        served_name: flags.served_model_name.unwrap_or_else(|| model.clone()),
        model,
        sha256: flags.sha256,
        device: flags.device,
        engine: flags.engine,
        api_keys,
        credential,
    };
    claim.check().map_err(|error| ConfigError::Value(error.to_string()))?;
    Ok(ReplicaConfig {
        claim,
        grant: flags.grant,
        host: flags.host.0,
        port: flags.port,
        health_port: flags.health_port,
        drain: flags.drain_seconds.0,
        termination_log: flags.termination_log,
        log: LogConfig { filter: flags.log.log_level, format: flags.log.log_format },
    })
}

/// Every file of a mounted Secret; the names that begin with a dot are the kubelet's own.
/// A Secret without a key would let everybody in, so it is refused.
fn api_keys(folder: &Path) -> Result<Vec<Secret>, ConfigError> {
    let unreadable = |error: std::io::Error| ConfigError::File {
        path: folder.to_owned(),
        reason: error.to_string(),
    };
    let mut keys = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let is_hidden =
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !is_hidden {
            keys.extend(secret(&path)?);
        }
    }
    if keys.is_empty() {
        return invalid(format!("{}: wanted at least one API key, got none", folder.display()));
    }
    for key in &keys {
        if super::ApiKey::new(key.0.clone()).is_none() {
            return invalid(format!(
                "{}: an API key has 1 to 1024 printable ASCII characters and no spaces",
                folder.display()
            ));
        }
    }
    Ok(keys)
}

/// The files of a mounted Secret that a source may ask for.
fn credential(folder: &Path) -> Result<ClaimCredential, ConfigError> {
    let read = |name: &str| secret(&folder.join(name));
    let word = |name: &str| Ok::<_, ConfigError>(read(name)?.map(|word| word.0));
    Ok(ClaimCredential {
        token: read("token")?,
        aws_access_key_id: read("AWS_ACCESS_KEY_ID")?,
        aws_secret_access_key: read("AWS_SECRET_ACCESS_KEY")?,
        aws_region: word("AWS_REGION")?,
        aws_endpoint_url: word("AWS_ENDPOINT_URL")?,
    })
}

/// A file's text without the line break at its end; `None` when there is no file.
fn secret(path: &Path) -> Result<Option<Secret>, ConfigError> {
    let refused = |reason: String| ConfigError::File { path: path.to_owned(), reason };
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() > LONGEST_SECRET => {
            return Err(refused(format!(
                "wanted at most {LONGEST_SECRET} bytes, got {}",
                metadata.len()
            )));
        }
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(refused(error.to_string())),
    }
    let text = std::fs::read_to_string(path).map_err(|error| refused(error.to_string()))?;
    let text = text.trim();
    Ok((!text.is_empty()).then(|| Secret(text.to_owned())))
}
