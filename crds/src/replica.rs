//! What a replica says of itself: as JSON on its health port while it lives, as its termination message when it ends.

use serde::{Deserialize, Serialize};

use crate::Reason;

/// How a replica is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaState {
    /// [`Reason::AllReplicasReady`] when this replica answers.
    pub reason: Reason,
    /// For people; figures included.
    pub message: String,
}

impl ReplicaState {
    /// Longest message that is kept, in bytes; the kubelet keeps 4096 of a termination message.
    const LONGEST_MESSAGE: usize = 2048;

    /// Of a message that is too long the end is kept, where the cause is.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if message.len() > Self::LONGEST_MESSAGE {
            let cut = message.ceil_char_boundary(message.len() - Self::LONGEST_MESSAGE);
            message.replace_range(..cut, "...");
        }
        Self { reason, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_keeps_its_end() {
        let state = ReplicaState::new(Reason::EngineCrashed, "é".repeat(3000) + " the cause");
        assert!(state.message.ends_with("the cause") && state.message.len() <= 2100);
        let line = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<ReplicaState>(&line).unwrap(), state);
    }
}
