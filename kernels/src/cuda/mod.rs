//! Operations on a GPU. Each has a shape, its meaning (`reference`, the oracle of its test) and, with feature `cuda`, a checked
//! launch; its kernel is in the `.cu` of the same name. Launches are queued on one stream into buffers that exist: they allocate
//! nothing, wait for nothing and can be captured in a graph. What changes from step to step is read from device memory and
//! bounded there by the sizes that the host checked.
#![allow(clippy::cast_possible_truncation, reason = "references round their results to f32")]

mod arena;
mod attention;
mod copy_blocks;
mod e4m3;
mod gate;
mod gather;
mod linear;
mod paged_decode;
mod paged_prefill;
mod rms_norm;
mod rope_store;
mod sample;
mod sampling_rows;
mod shared_prefix;

#[cfg(feature = "cuda")]
mod beside;
#[cfg(feature = "cuda")]
mod choices;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
mod error;
#[cfg(feature = "cuda")]
mod few_row;
#[cfg(feature = "cuda")]
mod gemm;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
mod products;
#[cfg(feature = "cuda")]
mod real;
#[cfg(feature = "cuda")]
mod split_k;

pub use arena::{ArenaShape, KvHalf, KvValues, Slot};
pub use attention::PagedAttention;
pub use copy_blocks::copy_blocks_reference;
pub use e4m3::E4m3;
pub use gate::{Gate, GateActivation};
pub use gather::Gather;
pub use linear::{Linear, Onto};
pub use paged_decode::PagedDecode;
pub use paged_prefill::{Chunks, PagedPrefill};
pub use rms_norm::RmsNorm;
pub use rope_store::{HeadNorms, RopeStore};
pub use sample::TokenScore;
pub use sampling_rows::{SamplingParams, SamplingState};
pub use shared_prefix::SharedPrefixes;

#[cfg(feature = "cuda")]
pub use arena::Arena;
#[cfg(feature = "cuda")]
pub use copy_blocks::BlockPairs;
#[cfg(feature = "cuda")]
pub use device::Kernels;
#[cfg(feature = "cuda")]
pub use error::{DeviceError, LaunchError};
#[cfg(feature = "cuda")]
pub use paged_decode::{DecodeInput, DecodeScratch};
#[cfg(feature = "cuda")]
pub use paged_prefill::PrefillInput;
#[cfg(feature = "cuda")]
pub use products::{Products, Way};
#[cfg(feature = "cuda")]
pub use real::{KvReal, Real};
#[cfg(feature = "cuda")]
pub use rope_store::RopeInput;
#[cfg(feature = "cuda")]
pub use sample::{Draw, Logit, Sample, SampleOutput, SampleScratch};
#[cfg(feature = "cuda")]
pub use sampling_rows::{Admission, SamplingRows, SamplingShape};
#[cfg(feature = "cuda")]
pub use shared_prefix::PrefixInput;
