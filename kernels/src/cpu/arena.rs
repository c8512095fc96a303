//! The KV arena: [blocks][layers][K and V][kv heads][block size][head_dim]. Block-major, so that one block is one piece.

use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

use super::error::{KernelError, expect_below, expect_len};

/// How K and V are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    F32,
    F16,
    BF16,
}

impl KvDtype {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

/// The shape of an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// The null block included.
    pub blocks: u32,
    /// Tokens per block.
    pub block_size: u32,
    pub layers: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub dtype: KvDtype,
}

impl KvShape {
    /// Bytes of one block; `None` when they overflow.
    pub fn block_bytes(&self) -> Option<usize> {
        let per_token = self.bytes_per_token()?;
        per_token.checked_mul(self.block_size as usize)
    }

    /// Bytes of K and V of one token in all layers; `None` when they overflow.
    pub fn bytes_per_token(&self) -> Option<usize> {
        [self.layers, self.kv_heads, self.head_dim]
            .iter()
            .try_fold(2 * self.dtype.bytes(), |bytes, &factor| bytes.checked_mul(factor as usize))
    }

    /// Bytes of all blocks; `None` when they overflow.
    pub fn bytes(&self) -> Option<usize> {
        self.block_bytes()?.checked_mul(self.blocks as usize)
    }

    pub(crate) fn width(&self) -> usize {
        self.kv_heads as usize * self.head_dim as usize
    }
}

/// Values in one of the dtypes.
#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

/// The memory that block ids index. Mapped when it is made, resident page by page as it is written.
#[derive(Debug)]
pub struct KvArena {
    shape: KvShape,
    values: Values,
}

/// K or V.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Key,
    Value,
}

impl KvArena {
    /// Maps an arena of zeros.
    ///
    /// # Errors
    /// When the sizes overflow or the memory cannot be had.
    pub fn new(shape: KvShape) -> Result<Self, KernelError> {
        let bytes = shape.bytes().ok_or(KernelError::Overflow("the KV arena"))?;
        expect_below("nothing in an arena without blocks, slots or heads", 0, bytes)?;
        let len = bytes / shape.dtype.bytes();
        let fail = |_| KernelError::OutOfMemory { what: "the KV arena", bytes };
        // Asked for first, so that too much is an error; then zeroed by the system, without touching a page.
        Vec::<u8>::new().try_reserve_exact(bytes).map_err(fail)?;
        let values = match shape.dtype {
            KvDtype::F32 => Values::F32(vec![0.0; len]),
            KvDtype::F16 => Values::F16(vec![0_u16; len].reinterpret_into()),
            KvDtype::BF16 => Values::BF16(vec![0_u16; len].reinterpret_into()),
        };
        Ok(Self { shape, values })
    }

    /// Writes to every page, so that its memory is taken now and not later.
    pub fn touch(&mut self) {
        match &mut self.values {
            Values::F32(values) => touch(values, 0.0),
            Values::F16(values) => touch(values, f16::ZERO),
            Values::BF16(values) => touch(values, bf16::ZERO),
        }
    }

    /// The arena's shape.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> usize {
        self.len() * self.shape.dtype.bytes()
    }

    /// Copies the first `slots` slots of block `from` over those of block `to`, in all layers.
    ///
    /// # Errors
    /// When a block or a slot is not there.
    pub fn copy_slots(&mut self, from: u32, to: u32, slots: u32) -> Result<(), KernelError> {
        let KvShape { blocks, block_size, layers, kv_heads, head_dim, .. } = self.shape;
        expect_below("the source block", from as usize, blocks as usize)?;
        expect_below("the target block", to as usize, blocks as usize)?;
        expect_below("the slots to copy", slots as usize, block_size as usize + 1)?;
        let run = block_size as usize * head_dim as usize;
        let block = run * 2 * layers as usize * kv_heads as usize;
        let len = slots as usize * head_dim as usize;
        for start in (0..block).step_by(run) {
            let (source, target) = (from as usize * block + start, to as usize * block + start);
            match &mut self.values {
                Values::F32(values) => values.copy_within(source..source + len, target),
                Values::F16(values) => values.copy_within(source..source + len, target),
                Values::BF16(values) => values.copy_within(source..source + len, target),
            }
        }
        Ok(())
    }

    /// Stores a layer's K and V. `k`, `v`: [tokens, kv_heads * head_dim]; `slots`: [tokens], block x block size + offset.
    ///
    /// # Errors
    /// When lengths do not fit or a slot or the layer is not there.
    pub fn store(
        &mut self,
        layer: u32,
        slots: &[u32],
        k: &[f32],
        v: &[f32],
    ) -> Result<(), KernelError> {
        let width = self.shape.width();
        expect_below("the layer", layer as usize, self.shape.layers as usize)?;
        expect_len("K", k.len(), slots.len() * width)?;
        expect_len("V", v.len(), slots.len() * width)?;
        let all = self.shape.blocks as usize * self.shape.block_size as usize;
        slots.iter().try_for_each(|&slot| expect_below("a slot", slot as usize, all))?;
        for (token, &slot) in slots.iter().enumerate() {
            let row = token * width..(token + 1) * width;
            self.store_token(layer, slot, Side::Key, &k[row.clone()]);
            self.store_token(layer, slot, Side::Value, &v[row]);
        }
        Ok(())
    }

    fn store_token(&mut self, layer: u32, slot: u32, side: Side, row: &[f32]) {
        let (block, offset) = (slot / self.shape.block_size, slot % self.shape.block_size);
        let head_dim = self.shape.head_dim as usize;
        for (head, source) in row.chunks_exact(head_dim).enumerate() {
            let at = self.first_of(layer, block, side, head) + offset as usize * head_dim;
            match &mut self.values {
                Values::F32(values) => values[at..at + head_dim].copy_from_slice(source),
                Values::F16(values) => values[at..at + head_dim].convert_from_f32_slice(source),
                Values::BF16(values) => values[at..at + head_dim].convert_from_f32_slice(source),
            }
        }
    }

    /// Copies `len` slots of one head, from slot `offset` of a block, into `out`: [len, head_dim].
    #[inline(always)]
    pub(crate) fn load(&self, place: Place, offset: usize, len: usize, out: &mut [f32]) {
        let head_dim = self.shape.head_dim as usize;
        let at =
            self.first_of(place.layer, place.block, place.side, place.head) + offset * head_dim;
        let range = at..at + len * head_dim;
        match &self.values {
            Values::F32(values) => out.copy_from_slice(&values[range]),
            Values::F16(values) => values[range].convert_to_f32_slice(out),
            Values::BF16(values) => {
                for (out, value) in out.iter_mut().zip(&values[range]) {
                    *out = f32::from_bits(u32::from(value.to_bits()) << 16);
                }
            }
        }
    }

    fn first_of(&self, layer: u32, block: u32, side: Side, head: usize) -> usize {
        let KvShape { block_size, layers, kv_heads, head_dim, .. } = self.shape;
        let side = usize::from(side == Side::Value);
        let heads = kv_heads as usize;
        let index = ((block as usize * layers as usize + layer as usize) * 2 + side) * heads + head;
        index * block_size as usize * head_dim as usize
    }

    fn len(&self) -> usize {
        match &self.values {
            Values::F32(values) => values.len(),
            Values::F16(values) => values.len(),
            Values::BF16(values) => values.len(),
        }
    }
}

/// Writes to every page of `values`, which are zero already.
fn touch<T: Copy>(values: &mut [T], zero: T) {
    values
        .iter_mut()
        .step_by(4096 / size_of::<T>())
        .for_each(|value| *value = std::hint::black_box(zero));
}

/// One head of one layer in one block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) layer: u32,
    pub(crate) block: u32,
    pub(crate) side: Side,
    pub(crate) head: usize,
}
