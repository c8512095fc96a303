//! Why a model is refused. Every variant names the file, key or tensor at fault.

use std::path::PathBuf;

use kernels::cpu::KernelError;

use super::weights::gguf::GgufError;

/// A model that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: wanted {wanted}, got {got}", path.display())]
    File { path: PathBuf, wanted: &'static str, got: String },
    #[error("{}", path.display())]
    Gguf { path: PathBuf, source: GgufError },
    #[error("{}", path.display())]
    Safetensors { path: PathBuf, source: safetensors::SafeTensorError },
    #[error("key {key} is missing")]
    KeyMissing { key: String },
    #[error("key {key}: wanted {wanted}, got {got}")]
    Key { key: String, wanted: String, got: String },
    #[error("architecture {got} is not supported, wanted one of {wanted}")]
    Architecture { got: String, wanted: String },
    #[error("tensor {name} is missing")]
    TensorMissing { name: String },
    #[error("tensor {name} is no part of the model that the configuration describes")]
    TensorUnknown { name: String },
    #[error("tensor {name}: wanted shape {wanted:?}, got {got:?}")]
    TensorShape { name: String, wanted: Vec<usize>, got: Vec<usize> },
    #[error("tensor {name}: wanted dtype {wanted}, got {got}")]
    TensorDtype { name: String, wanted: &'static str, got: String },
    #[error("tensor {name}: wanted {wanted} bytes, got {got}")]
    TensorBytes { name: String, wanted: usize, got: usize },
    #[error("tensor {name}: wanted finite factors above 0, got {got}")]
    TensorValue { name: String, got: f32 },
    #[error("tensor {name}")]
    Kernel { name: String, source: KernelError },
    #[error("tensor {name}")]
    Candle { name: String, source: candle_core::Error },
    #[error("tensor {name}: there is no memory for its {bytes} bytes")]
    Memory { name: String, bytes: usize },
    #[error("the sizes of the weights overflow")]
    TooLarge,
    #[error("the tokenizer")]
    Text(#[from] super::text::TextError),
}
