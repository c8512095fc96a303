//! How arrays are computed: what the engine sees of a device.

pub mod cpu;
#[cfg(test)]
pub(crate) mod fake;
pub mod reference;

use crate::model::batch::{Batch, BlockCopy, Output};

/// A device that computes batches in the order they are launched.
/// It owns the model's weights, the KV arena and the sampling state of the rows.
pub trait Backend: Send {
    /// How many batches may be launched before the oldest is collected.
    fn depth(&self) -> usize;

    /// Queues copies of slots, after all that was launched before and before all that is launched later.
    ///
    /// # Errors
    /// When the device failed or a block is outside the arena.
    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<(), BackendError>;

    /// Queues one forward pass. K and V of the whole batch are stored before any of it is attended to, layer by layer.
    ///
    /// # Errors
    /// When the device failed or the batch is larger than the workspace.
    fn launch(&mut self, batch: &Batch) -> Result<(), BackendError>;

    /// Waits for the oldest batch that was launched and not collected, and fills `output`.
    ///
    /// # Errors
    /// When the device failed.
    fn collect(&mut self, output: &mut Output) -> Result<(), BackendError>;
}

/// A backend that cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("{what}: wanted at most {limit}, got {got}")]
    OutOfRange { what: &'static str, limit: usize, got: usize },
    #[error("nothing was launched")]
    NothingLaunched,
    #[error("{operation} failed: {reason}")]
    Device { operation: &'static str, reason: String },
}
