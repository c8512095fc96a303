//! Seeded random weights for load tests: the right shapes, meaningless numbers that keep activations finite.

use half::bf16;
use kernels::cpu::Dtype;
use rayon::prelude::*;

use super::wanted::{VectorKind, WantedMatrix, WantedVector};
use crate::model::error::ModelError;

/// Makes weights up. A tensor's numbers depend on the seed and its name alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dummy {
    pub(crate) seed: u64,
}

impl Dummy {
    /// `[rows, cols]` as little-endian bf16: uniform, with the variance 1 / cols that keeps the size of what it maps.
    ///
    /// # Errors
    /// When the memory cannot be had: a configuration alone may ask for any size.
    pub(crate) fn matrix(self, wanted: &WantedMatrix) -> Result<Vec<u8>, ModelError> {
        let scale = (3.0 / wanted.cols as f32).sqrt();
        let size = Dtype::BF16.bytes_for(wanted.rows, wanted.cols).ok_or(ModelError::TooLarge)?;
        let mut bytes = zeroed(&wanted.name, size)?;
        let key = self.key(&wanted.name);
        bytes.par_chunks_mut(wanted.cols * 2).enumerate().for_each(|(row, bytes)| {
            let first = (row * wanted.cols) as u64;
            for (index, value) in bytes.chunks_exact_mut(2).enumerate() {
                let number = scale * uniform(key, first + index as u64);
                value.copy_from_slice(&bf16::from_f32(number).to_le_bytes());
            }
        });
        Ok(bytes)
    }

    /// `[len]`: norms near 1, biases near 0, as the file would hold them.
    pub(crate) fn vector(self, wanted: &WantedVector) -> Vec<f32> {
        let centre = match wanted.kind {
            VectorKind::Norm => 1.0,
            VectorKind::NormLessOne | VectorKind::Bias => 0.0,
        };
        let key = self.key(&wanted.name);
        (0..wanted.len as u64).map(|index| centre + 0.1 * uniform(key, index)).collect()
    }

    fn key(self, name: &str) -> u64 {
        name.bytes().fold(mix(self.seed), |key, byte| mix(key ^ u64::from(byte)))
    }
}

/// Room for a tensor's bytes, or an error where there is none.
pub(super) fn zeroed(name: &str, size: usize) -> Result<Vec<u8>, ModelError> {
    let mut bytes = Vec::new();
    let no_room = |_| ModelError::Memory { name: name.to_owned(), bytes: size };
    bytes.try_reserve_exact(size).map_err(no_room)?;
    bytes.resize(size, 0);
    Ok(bytes)
}

/// From -1 to 1.
fn uniform(key: u64, index: u64) -> f32 {
    let [a, b, c, ..] = mix(key.wrapping_add(index)).to_le_bytes();
    let bits = u32::from_le_bytes([a, b, c, 0]);
    bits as f32 / 8_388_608.0 - 1.0
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
