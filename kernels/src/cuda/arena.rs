//! The KV arena on a device: [blocks][layers][kv heads][K, V][block size / 8][panels][8 rows][a panel's bytes]. A panel is 128
//! bytes of a row, or 64 or 32 where rows are no multiple of more. Inside an atom of 8 rows the 16-byte chunks of row `r` are
//! exchanged (`c ^ r`, or `c ^ r / 2` and `c ^ r / 4` in panels of 64 and 32), the order in which matrix instructions read shared
//! memory without conflicts: so a head's block is one copy, ready to use. `kv.cuh` says the same for kernels.
//!
//! Numbers of 8 bits have a scale for each layer, head, and K or V: what is meant is the number times its scale.

#[cfg(feature = "cuda")]
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};

#[cfg(feature = "cuda")]
use super::device::driver;
#[cfg(feature = "cuda")]
use super::{DeviceError, E4m3, Kernels};

/// Rows of an atom.
const ATOM_ROWS: u32 = 8;

/// K or V.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvHalf {
    K,
    V,
}

/// The shape of an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaShape {
    /// The null block included.
    pub blocks: u32,
    /// Tokens per block: a multiple of 8.
    pub block_size: u32,
    pub layers: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
}

/// Where a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    pub block: u32,
    pub layer: u32,
    pub half: KvHalf,
    pub head: u32,
    /// Of the block.
    pub row: u32,
    pub dim: u32,
}

impl ArenaShape {
    /// Values of all blocks; `None` when they overflow.
    pub fn len(&self) -> Option<usize> {
        [self.block_size, self.layers, 2, self.kv_heads, self.head_dim]
            .iter()
            .try_fold(self.blocks as usize, |len, &factor| len.checked_mul(factor as usize))
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// The index of a value of `bytes` bytes among the arena's values.
    pub fn index(&self, slot: Slot, bytes: u32) -> usize {
        let row_bytes = self.head_dim * bytes;
        let panel = 1 << row_bytes.trailing_zeros().clamp(5, 7);
        let chunks = panel / 16;
        let (byte, row) = (slot.dim * bytes, slot.row % ATOM_ROWS);
        let mixed = row / (ATOM_ROWS / chunks) % chunks;
        let chunk = (byte / 16 % chunks) ^ mixed;
        let in_rows = slot.row / ATOM_ROWS * ATOM_ROWS * row_bytes
            + byte / panel * ATOM_ROWS * panel
            + row * panel
            + chunk * 16
            + byte % 16;
        let per_block = self.layers as usize * self.kv_heads as usize * 2;
        let head = slot.block as usize * per_block + self.scale_index(slot);
        head * self.block_size as usize * self.head_dim as usize + (in_rows / bytes) as usize
    }

    /// The index of a slot's scale among [layers][kv heads][K, V].
    pub fn scale_index(&self, slot: Slot) -> usize {
        let head = slot.layer as usize * self.kv_heads as usize + slot.head as usize;
        head * 2 + if slot.half == KvHalf::K { 0 } else { 1 }
    }
}

/// What an arena holds, on the host: for references.
#[derive(Debug, Clone, Copy)]
pub struct KvValues<'a, T> {
    pub shape: ArenaShape,
    /// In the arena's order.
    pub values: &'a [T],
    /// [layers][kv heads][K, V].
    pub scales: &'a [f32],
}

impl<T: Copy + Into<f32>> KvValues<'_, T> {
    pub(super) fn get(&self, slot: Slot) -> f64 {
        let bytes = u32::try_from(size_of::<T>()).unwrap_or(0);
        let stored: f32 = self.values[self.shape.index(slot, bytes)].into();
        f64::from(stored) * f64::from(self.scales[self.shape.scale_index(slot)])
    }
}

/// The device memory that block ids index. As it is made, its contents are undefined and its scales 1.
#[cfg(feature = "cuda")]
#[derive(Debug)]
pub struct Arena<T> {
    pub(super) shape: ArenaShape,
    pub(super) values: CudaSlice<T>,
    scales: CudaSlice<f32>,
}

/// An arena as kernels take it: `KvArena` in kv.cuh, field by field.
#[cfg(feature = "cuda")]
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct ArenaArgument {
    data: u64,
    scales: u64,
    blocks: u32,
    block_size: u32,
    layers: u32,
    kv_heads: u32,
}

#[cfg(feature = "cuda")]
impl<T: DeviceRepr> Arena<T> {
    /// Takes the memory of an arena.
    ///
    /// # Errors
    /// When the shape is no arena's, or the device has not as much memory.
    pub fn new(kernels: &Kernels, shape: ArenaShape) -> Result<Self, DeviceError> {
        let len = shape.len().filter(|_| shape.block_size.is_multiple_of(ATOM_ROWS));
        let len = len.ok_or(DeviceError::Shape {
            what: "a KV arena",
            wanted: "whole groups of 8 tokens that fit in memory",
        })?;
        let scales = vec![1.0; shape.layers as usize * shape.kv_heads as usize * 2];
        let scales = kernels.stream().clone_htod(&scales);
        let scales = scales.map_err(driver("write the scales of an arena"))?;
        Ok(Self { shape, values: kernels.memory(len)?, scales })
    }

    /// The shape.
    pub fn shape(&self) -> ArenaShape {
        self.shape
    }

    pub(super) fn argument(&self, kernels: &Kernels) -> ArenaArgument {
        let ArenaShape { blocks, block_size, layers, kv_heads, .. } = self.shape;
        let data = self.values.device_ptr(kernels.stream()).0;
        let scales = self.scales.device_ptr(kernels.stream()).0;
        ArenaArgument { data, scales, blocks, block_size, layers, kv_heads }
    }

    /// All values, in the arena's order.
    pub fn values_mut(&mut self) -> &mut CudaSlice<T> {
        &mut self.values
    }
}

#[cfg(feature = "cuda")]
impl Arena<E4m3> {
    /// The scales of K and V: [layers][kv heads][K, V], above 0.
    pub fn scales_mut(&mut self) -> &mut CudaSlice<f32> {
        &mut self.scales
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_place_of_its_own() {
        for (block_size, head_dim, bytes) in [
            (8, 64, 2),
            (16, 128, 2),
            (32, 96, 2),
            (64, 256, 2),
            (16, 128, 1),
            (8, 64, 1),
            (16, 96, 1),
        ] {
            let shape = ArenaShape { blocks: 2, block_size, layers: 2, kv_heads: 2, head_dim };
            let mut seen = vec![false; shape.len().unwrap()];
            for block in 0..2 {
                for (layer, half) in
                    [(0, KvHalf::K), (0, KvHalf::V), (1, KvHalf::K), (1, KvHalf::V)]
                {
                    for (head, row) in
                        (0..2).flat_map(|head| (0..block_size).map(move |row| (head, row)))
                    {
                        for dim in 0..head_dim {
                            let index =
                                shape.index(Slot { block, layer, half, head, row, dim }, bytes);
                            assert!(!std::mem::replace(&mut seen[index], true), "{index} twice");
                        }
                    }
                }
            }
            assert!(seen.iter().all(|seen| *seen));
        }
    }

    #[test]
    fn a_block_is_one_piece_and_a_chunk_of_16_bytes_stays_together() {
        let shape = ArenaShape { blocks: 3, block_size: 16, layers: 2, kv_heads: 2, head_dim: 128 };
        let slot = Slot { block: 1, layer: 0, half: KvHalf::K, head: 0, row: 3, dim: 8 };
        // Row 3 of the first atom, chunk 1 at place 1 ^ 3.
        assert_eq!(shape.index(slot, 2), 2 * 2 * 2 * 16 * 128 + (3 * 128 + 2 * 16) / 2);
        assert_eq!(shape.index(Slot { dim: 9, ..slot }, 2), shape.index(slot, 2) + 1);
    }
}
