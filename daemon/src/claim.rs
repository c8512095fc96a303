//! The words between a replica and the node agent: one JSON document a line, both ways, over the socket of a grant.
//! The connection is the claim: when it closes, the engine ends. Nothing of it stands anywhere else.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The version that this side speaks; the agent also takes the one before.
pub const VERSION: u32 = 1;
/// Longest line that either side reads, in bytes.
pub const LONGEST_LINE: usize = 256 << 10;

/// What a replica says. The first line is the claim.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ReplicaLine {
    Claim(Box<Claim>),
    /// Finish the running requests; new ones are still answered.
    Drain {},
}

/// What is to be served on the memory of the grant. Paths, sockets and memory are the agent's to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    pub version: u32,
    /// As in the resource: `hf://`, `https://`, `s3://` or `file://`.
    pub model: String,
    /// Of a single file, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    pub served_name: String,
    pub device: crds::Device,
    #[serde(default)]
    pub engine: crds::Engine,
    /// Keys that clients may show; none: every client may ask.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub api_keys: Vec<Secret>,
    /// What the source asks for.
    #[serde(default)]
    pub credential: ClaimCredential,
}

/// The keys of a source's Secret.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimCredential {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Secret>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aws_access_key_id: Option<Secret>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aws_secret_access_key: Option<Secret>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aws_region: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aws_endpoint_url: Option<String>,
}

impl ClaimCredential {
    /// What says who somebody is.
    pub fn secrets(&self) -> [Option<&Secret>; 3] {
        [&self.token, &self.aws_access_key_id, &self.aws_secret_access_key].map(Option::as_ref)
    }

    /// Whether it says who somebody is.
    pub fn is_secret(&self) -> bool {
        self.secrets().iter().any(Option::is_some)
    }

    /// Bytes of its longest part.
    fn longest(&self) -> usize {
        let words = [&self.aws_region, &self.aws_endpoint_url];
        let secrets = self.secrets().into_iter().flatten().map(|secret| secret.0.len());
        secrets.chain(words.into_iter().flatten().map(String::len)).max().unwrap_or(0)
    }
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentLine {
    /// The claim cannot go on yet and is tried again.
    Waiting { reason: crds::Reason, message: String },
    /// Weights that are on the node, of all.
    Downloading { bytes: u64, total_bytes: u64 },
    /// Weights that are in memory, of all.
    Loading { bytes: u64, total_bytes: u64 },
    /// The engine answers on this socket, below the grant's folder.
    Ready { socket: String },
    /// Requests inside the engine.
    InFlight { requests: u64 },
    /// A line of the engine's log.
    Log { line: String },
    /// The agent is about to end and the engine with it; running requests are finished first.
    Draining {},
    /// The claim has failed and is closed; the same claim would fail again.
    Failed { reason: crds::Reason, message: String },
}

/// Why a claim is refused at once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    #[error(
        "wanted version {VERSION} of the claim, got {0}: update the node agents first, then the operator"
    )]
    Version(u32),
    #[error("{field} has {got} bytes, wanted at most {most}")]
    TooLong { field: &'static str, got: usize, most: usize },
    #[error("wanted at most {most} API keys, got {got}")]
    TooManyKeys { got: usize, most: usize },
}

impl Claim {
    /// # Errors
    /// When a part is larger than any that makes sense.
    pub fn check(&self) -> Result<(), ClaimError> {
        const MOST_KEYS: usize = 256;
        if self.version != VERSION {
            return Err(ClaimError::Version(self.version));
        }
        if self.api_keys.len() > MOST_KEYS {
            return Err(ClaimError::TooManyKeys { got: self.api_keys.len(), most: MOST_KEYS });
        }
        let longest_key = self.api_keys.iter().map(|key| key.0.len()).max().unwrap_or(0);
        for (field, got, most) in [
            ("the model's address", self.model.len(), 2048),
            ("the served name", self.served_name.len(), 256),
            ("the checksum", self.sha256.as_ref().map_or(0, String::len), 64),
            ("the credential", self.credential.longest(), 4096),
            ("an API key", longest_key, 1024),
        ] {
            if got > most {
                return Err(ClaimError::TooLong { field, got, most });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn claim() -> Claim {
        Claim {
            version: VERSION,
            model: "file://m.gguf".into(),
            sha256: None,
            served_name: "m".into(),
            device: crds::Device::Cpu,
            engine: crds::Engine::default(),
            api_keys: vec![Secret("sk-secret".into())],
            credential: ClaimCredential {
                token: Some(Secret("hf-secret".into())),
                ..ClaimCredential::default()
            },
        }
    }

    #[test]
    fn a_claim_survives_its_line_and_prints_no_secret() {
        let line = serde_json::to_string(&ReplicaLine::Claim(Box::new(claim()))).unwrap();
        let Ok(ReplicaLine::Claim(read)) = serde_json::from_str(&line) else { panic!("{line}") };
        assert_eq!(*read, claim());
        let printed = format!("{read:?}");
        assert!(!printed.contains("sk-secret") && !printed.contains("hf-secret"), "{printed}");
    }

    #[test]
    fn claims_that_make_no_sense_are_refused() {
        let check = |change: &dyn Fn(&mut Claim)| {
            let mut claim = claim();
            change(&mut claim);
            claim.check()
        };
        assert_eq!(check(&|_| {}), Ok(()));
        assert_eq!(check(&|claim| claim.version = 2), Err(ClaimError::Version(2)));
        assert!(check(&|claim| claim.model = "x".repeat(3000)).is_err());
        assert!(check(&|claim| claim.api_keys = vec![Secret("k".into()); 257]).is_err());
        assert!(check(&|claim| claim.api_keys = vec![Secret("k".repeat(1025))]).is_err());
        for line in [
            "{\"claim\":{\"version\":1}}",
            "{\"claim\":{\"version\":1,\"model\":\"m\",\"served_name\":\"m\",\"device\":\"cpu\",\"path\":\"/etc\"}}",
            "{\"stop\":{}}",
        ] {
            assert!(serde_json::from_str::<ReplicaLine>(line).is_err(), "{line}");
        }
    }
}
