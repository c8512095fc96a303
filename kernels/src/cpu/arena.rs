//! The KV arena: [blocks][layers][K, then V][kv heads]{K: [head_dim][block size], V: [block size][head_dim]}. Block-major, so
//! that one block is one piece; K by dimension, so that the scores of 16 positions are 16 lanes.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};

use super::error::{KernelError, expect_below, expect_len};
use super::lanes::{Lanes, ROWS};
use super::memory::{LINE, prefetch, want_large_pages};

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
enum Side {
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
        let mut arena = Self { shape, values };
        match &mut arena.values {
            Values::F32(values) => want_large_pages(values),
            Values::F16(values) => want_large_pages(values),
            Values::BF16(values) => want_large_pages(values),
        }
        Ok(arena)
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
        let (size, slots) = (block_size as usize, slots as usize);
        for start in (0..block).step_by(run) {
            let (source, target) = (from as usize * block + start, to as usize * block + start);
            let is_key = (start / run / kv_heads as usize).is_multiple_of(2);
            let (pieces, stride, len) = if is_key {
                (head_dim as usize, size, slots)
            } else {
                (1, run, slots * head_dim as usize)
            };
            for at in (0..pieces).map(|piece| piece * stride) {
                self.copy_values(source + at..source + at + len, target + at);
            }
        }
        Ok(())
    }

    fn copy_values(&mut self, from: Range<usize>, to: usize) {
        match &mut self.values {
            Values::F32(values) => values.copy_within(from, to),
            Values::F16(values) => values.copy_within(from, to),
            Values::BF16(values) => values.copy_within(from, to),
        }
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
        let (head_dim, size) = (self.shape.head_dim as usize, self.shape.block_size as usize);
        for (head, source) in row.chunks_exact(head_dim).enumerate() {
            let first = self.first_of(layer, block, side, head);
            let (first, step) = match side {
                Side::Key => (first + offset as usize, size),
                Side::Value => (first + offset as usize * head_dim, 1),
            };
            for (chunk, source) in source.chunks(ROWS).enumerate() {
                self.store_chunk(first + chunk * ROWS * step, step, source);
            }
        }
    }

    /// Stores up to 16 values, `step` apart.
    fn store_chunk(&mut self, first: usize, step: usize, source: &[f32]) {
        let places = (first..).step_by(step);
        match &mut self.values {
            Values::F32(values) => {
                places.zip(source).for_each(|(at, value)| values[at] = *value);
            }
            Values::F16(values) => {
                let mut narrow = [f16::ZERO; ROWS];
                let narrow = &mut narrow[..source.len()];
                narrow.convert_from_f32_slice(source);
                places.zip(narrow).for_each(|(at, value)| values[at] = *value);
            }
            Values::BF16(values) => {
                places.zip(source).for_each(|(at, value)| values[at] = bf16::from_f32(*value));
            }
        }
    }

    /// Widens slots of one head's K. `out`: [head_dim][`stride`], of which the first `slots.len()` columns are written.
    #[inline(always)]
    pub(crate) fn load_keys<L: Lanes>(
        &self,
        place: Place,
        slots: Range<usize>,
        stride: usize,
        out: &mut [f32],
    ) {
        let size = self.shape.block_size as usize;
        let first = self.first_of(place.layer, place.block, Side::Key, place.head) + slots.start;
        let source = Strided { first, step: size, len: slots.len() };
        self.widen::<L>(source, self.shape.head_dim as usize, stride, out);
    }

    /// Widens slots of one head's V. `out`: [slots][`stride`].
    #[inline(always)]
    pub(crate) fn load_values<L: Lanes>(
        &self,
        place: Place,
        slots: Range<usize>,
        stride: usize,
        out: &mut [f32],
    ) {
        let head_dim = self.shape.head_dim as usize;
        let first = self.first_of(place.layer, place.block, Side::Value, place.head);
        let first = first + slots.start * head_dim;
        self.widen::<L>(Strided { first, step: head_dim, len: head_dim }, slots.len(), stride, out);
    }

    /// The cache lines of one head of `blocks`, none of them asked for yet.
    #[inline(always)]
    pub(crate) fn ahead<'a>(&'a self, place: Place, blocks: &'a [u32]) -> Ahead<'a> {
        Ahead { arena: self, place, blocks, side: Side::Key, lines: 0..0 }
    }

    /// Widens `rows` rows. `out`: [rows][`stride`].
    #[inline(always)]
    fn widen<L: Lanes>(&self, source: Strided, rows: usize, stride: usize, out: &mut [f32]) {
        let Strided { first, step, len } = source;
        let range = first..first + rows.saturating_sub(1) * step + len;
        let out = out.chunks_mut(stride);
        match &self.values {
            Values::F32(values) => {
                for (values, out) in values[range].chunks(step).zip(out) {
                    out[..len].copy_from_slice(&values[..len]);
                }
            }
            Values::F16(values) => {
                let words: &[u16] = values[range].reinterpret_cast();
                if len == ROWS {
                    // K in blocks of 16: one vector a row.
                    for (words, out) in words.chunks(step).zip(out) {
                        L::store(L::half_words(words), out);
                    }
                    return;
                }
                for (words, out) in words.chunks(step).zip(out) {
                    widen_halves::<L>(&words[..len], &mut out[..len]);
                }
            }
            Values::BF16(values) => {
                for (values, out) in values[range].chunks(step).zip(out) {
                    for (value, out) in values[..len].iter().zip(out) {
                        *out = f32::from_bits(u32::from(value.to_bits()) << 16);
                    }
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

    fn memory(&self) -> *const u8 {
        match &self.values {
            Values::F32(values) => values.as_ptr().cast(),
            Values::F16(values) => values.as_ptr().cast(),
            Values::BF16(values) => values.as_ptr().cast(),
        }
    }

    fn len(&self) -> usize {
        match &self.values {
            Values::F32(values) => values.len(),
            Values::F16(values) => values.len(),
            Values::BF16(values) => values.len(),
        }
    }
}

/// Cache lines that will be read soon, asked for a few at a time between other work: all at once they fill the processor's
/// buffers for lines on their way, and the loads behind them wait.
pub(crate) struct Ahead<'a> {
    arena: &'a KvArena,
    place: Place,
    /// Those of which a side is still to come.
    blocks: &'a [u32],
    /// The side that comes next.
    side: Side,
    /// Bytes of the arena that are still to be asked for.
    lines: Range<usize>,
}

impl Ahead<'_> {
    /// Asks for the next `lines` lines, as far as there are any.
    #[inline(always)]
    pub(crate) fn ask(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.lines.is_empty() && !self.turn() {
                return;
            }
            prefetch(self.arena.memory().wrapping_add(self.lines.start));
            self.lines.start += LINE;
        }
    }

    /// Goes to the next side of a block; false behind the last.
    #[inline(always)]
    fn turn(&mut self) -> bool {
        let Some((&block, rest)) = self.blocks.split_first() else { return false };
        let KvShape { block_size, head_dim, dtype, .. } = self.arena.shape;
        let first = self.arena.first_of(self.place.layer, block, self.side, self.place.head);
        let len = block_size as usize * head_dim as usize;
        self.lines = first * dtype.bytes()..(first + len) * dtype.bytes();
        (self.side, self.blocks) = match self.side {
            Side::Key => (Side::Value, self.blocks),
            Side::Value => (Side::Key, rest),
        };
        true
    }
}

#[inline(always)]
fn widen_halves<L: Lanes>(words: &[u16], out: &mut [f32]) {
    let (chunks, places) = (words.chunks_exact(ROWS), out.chunks_exact_mut(ROWS));
    let rest = words.len() / ROWS * ROWS;
    for (words, out) in chunks.zip(places) {
        L::store(L::half_words(words), out);
    }
    for (word, out) in words[rest..].iter().zip(&mut out[rest..]) {
        *out = super::panel::widen_f16(*word);
    }
}

/// Writes to every page of `values`, which are zero already.
fn touch<T: Copy>(values: &mut [T], zero: T) {
    values
        .iter_mut()
        .step_by(4096 / size_of::<T>())
        .for_each(|value| *value = std::hint::black_box(zero));
}

/// Rows of `len` values, `step` apart.
#[derive(Debug, Clone, Copy)]
struct Strided {
    first: usize,
    step: usize,
    len: usize,
}

/// One head of one layer in one block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) layer: u32,
    pub(crate) block: u32,
    pub(crate) head: usize,
}
