//! CPU kernels. All arrays are row-major f32 unless said otherwise; work is spread over rayon's current pool.
//!
//! Batch-invariant: each output is accumulated in one order that depends on neither the batch, the chunk, the number of
//! threads nor the instruction set, so a result is the same to the bit alone and in a crowd.

mod activation;
mod arena;
mod attention;
mod dtype;
mod elementwise;
mod error;
mod exp;
mod instructions;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod lanes_x86;
mod logits;
mod matrix;
mod memory;
mod multiply;
mod norm;
mod out;
mod panel;
mod quantized;
mod rope;

pub use arena::{KvArena, KvDtype, KvShape};
pub use attention::{AttendSpan, Attention};
pub use dtype::Dtype;
pub use elementwise::{Activation, add, add_rows, gate, scale};
pub use error::KernelError;
pub use instructions::{InstructionSet, instruction_set, limit_instruction_set};
pub use logits::{
    LOGIT_BLOCK, LOGIT_LANES, count_above, count_reaching, exp_sums, exp_weights, lane_maxima,
    sum_reaching,
};
pub use matrix::Matrix;
pub use memory::Memory;
pub use multiply::{Map, Multiplier};
pub use norm::rms_norm;
pub use rope::rope;
