//! What a model's conditions can say, after kstatus: `Ready` sums up; `Reconciling` and `Stalled` are absent when all
//! is well.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The type of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ConditionType {
    /// As many replicas of the present generation answer as are wanted.
    Ready,
    /// The operator or a node still works towards what is wanted.
    Reconciling,
    /// Nothing will change until somebody acts; the message says who and how.
    Stalled,
}

/// Why a condition is what it is. Written as the variant's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Reason {
    /// Every wanted replica answers.
    AllReplicasReady,
    /// No replica is wanted.
    ScaledToZero,
    /// Replicas are being started or replaced, and nothing is known to be wrong.
    Progressing,
    /// No matching node has as much memory to grant. The message has what was asked and what each node has free.
    InsufficientMemory,
    /// Nodes have the memory, but not on one device. The message has the free memory per device.
    Fragmented,
    /// A replica has its grant and waits: for memory that is not yet returned, or for the node agent.
    Waiting,
    /// Weights are on their way to a node. The message has the bytes that came and the total.
    Downloading,
    /// An engine brings weights into memory. The message has the bytes that are there and the total.
    Loading,
    /// An engine ended by itself. The message has its last words.
    EngineCrashed,
    /// The model's architecture or a tensor's type is not supported.
    UnsupportedModel,
    /// The device that is asked for cannot run this engine.
    UnsupportedDevice,
    /// The weights' server does not answer or breaks off; it is tried again.
    SourceUnreachable,
    /// A node has no room for the weights: on its disk, or in what its cache may take. The message has what is wanted and what
    /// is free.
    DiskFull,
    /// What came from the source is not what its checksum says.
    ChecksumMismatch,
    /// The source refuses the credential, or wants one.
    Unauthorized,
    /// The model needs more memory than its grant. The message has what is wanted and what is given.
    MemoryGrantTooSmall,
    /// An engine used more memory than its grant and was ended.
    MemoryGrantExceeded,
    /// New replicas do not become ready. The message has what holds them up; the old ones serve on.
    RolloutStuck,
    /// The resource cannot be acted on as it is. The message has the field and what is wanted there.
    InvalidSpec,
    /// The API server refuses a child. The message is the server's.
    ApplyFailed,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 20] = [
        Self::AllReplicasReady,
        Self::ScaledToZero,
        Self::Progressing,
        Self::InsufficientMemory,
        Self::Fragmented,
        Self::Waiting,
        Self::Downloading,
        Self::Loading,
        Self::EngineCrashed,
        Self::UnsupportedModel,
        Self::UnsupportedDevice,
        Self::SourceUnreachable,
        Self::DiskFull,
        Self::ChecksumMismatch,
        Self::Unauthorized,
        Self::MemoryGrantTooSmall,
        Self::MemoryGrantExceeded,
        Self::RolloutStuck,
        Self::InvalidSpec,
        Self::ApplyFailed,
    ];

    /// Whether the same replica cannot succeed until somebody changes something.
    pub fn is_terminal(self) -> bool {
        match self {
            Self::EngineCrashed
            | Self::UnsupportedModel
            | Self::UnsupportedDevice
            | Self::ChecksumMismatch
            | Self::Unauthorized
            | Self::MemoryGrantTooSmall
            | Self::MemoryGrantExceeded
            | Self::InvalidSpec => true,
            Self::AllReplicasReady
            | Self::ScaledToZero
            | Self::Progressing
            | Self::InsufficientMemory
            | Self::Fragmented
            | Self::Waiting
            | Self::Downloading
            | Self::Loading
            | Self::SourceUnreachable
            | Self::DiskFull
            | Self::RolloutStuck
            | Self::ApplyFailed => false,
        }
    }
}

impl fmt::Display for ConditionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_words_that_conditions_allow() {
        for reason in Reason::ALL {
            let word = reason.to_string();
            assert!(
                word.chars().all(char::is_alphanumeric) && word.starts_with(char::is_uppercase)
            );
            assert_eq!(serde_json::to_string(&reason).unwrap(), format!("\"{word}\""));
        }
        assert!(Reason::ALL.is_sorted(), "each once, in the order of their definition");
    }
}
