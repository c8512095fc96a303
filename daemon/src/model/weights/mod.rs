//! Where a model's numbers come from: file formats, read without trust.

pub mod gguf;
