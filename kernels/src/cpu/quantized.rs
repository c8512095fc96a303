//! The product with quantized weights, by integers: each block of 32 columns gives an exact sum of products of bytes,
//! which becomes a float and is added to the output with its scale. An output is one chain over the blocks, whatever the
//! batch, the thread and the instruction set: so it is the same to the bit everywhere.

use super::activation::{BLOCK, Block};
use super::dtype::Dtype;
use super::instructions::{InstructionSet, by_lanes, instruction_set};
use super::lanes::{LANE_BYTES, Lanes, ROWS};

/// Dot products that 32 columns take.
const DOTS: usize = BLOCK / 4;

/// 32 columns of a panel: value = quant * scale + offset.
pub(crate) struct Weights<L: Lanes> {
    pub(crate) quants: [L::Bytes; DOTS],
    /// Of the first and of the second 16 columns.
    pub(crate) scale: [L::Floats; 2],
    pub(crate) offset: [L::Floats; 2],
}

/// How a dtype's panel is read: heads of so many columns, each followed by its blocks of 32 columns.
pub(crate) trait Format {
    /// Columns of a head.
    const COLUMNS: usize;
    /// Bytes of a head and of a block.
    const HEAD: usize;
    const BLOCK: usize;
    /// Bytes of a head with its blocks.
    const BYTES: usize = Self::HEAD + Self::COLUMNS / BLOCK * Self::BLOCK;
    /// Quants above 63.
    const WIDE: bool = false;
    /// The halves of a block have scales of their own.
    const HALVED: bool = false;

    fn read<L: Lanes>(head: &[u8], block: &[u8]) -> Weights<L>;
}

const HALVES: usize = 2 * ROWS;
const FIFTH: usize = 8 * DOTS;
const NIBBLES: usize = LANE_BYTES * DOTS / 2;

pub(crate) struct Q8;
pub(crate) struct Q4;
pub(crate) struct Q4WithMinimum;
pub(crate) struct Q5;
pub(crate) struct Q5WithMinimum;
pub(crate) struct Q4K;
pub(crate) struct Q5K;
pub(crate) struct Q6K;

impl Format for Q8 {
    const COLUMNS: usize = BLOCK;
    const HEAD: usize = HALVES;
    const BLOCK: usize = LANE_BYTES * DOTS;
    const WIDE: bool = true;

    #[inline(always)]
    fn read<L: Lanes>(head: &[u8], block: &[u8]) -> Weights<L> {
        let mut quants = [L::bytes(block); DOTS];
        for (i, quants) in quants.iter_mut().enumerate() {
            *quants = L::bytes(&block[i * LANE_BYTES..]);
        }
        centred(quants, L::halves(head), 128.0)
    }
}

impl Format for Q4 {
    const COLUMNS: usize = BLOCK;
    const HEAD: usize = HALVES;
    const BLOCK: usize = NIBBLES;

    #[inline(always)]
    fn read<L: Lanes>(head: &[u8], block: &[u8]) -> Weights<L> {
        centred(nibbles::<L>(block), L::halves(head), 8.0)
    }
}

impl Format for Q4WithMinimum {
    const COLUMNS: usize = BLOCK;
    const HEAD: usize = 2 * HALVES;
    const BLOCK: usize = NIBBLES;

    #[inline(always)]
    fn read<L: Lanes>(head: &[u8], block: &[u8]) -> Weights<L> {
        whole(nibbles::<L>(block), L::halves(head), L::halves(&head[HALVES..]))
    }
}

impl Format for Q5 {
    const COLUMNS: usize = BLOCK;
    const HEAD: usize = HALVES;
    const BLOCK: usize = FIFTH + NIBBLES;

    #[inline(always)]
    fn read<L: Lanes>(head: &[u8], block: &[u8]) -> Weights<L> {
        centred(fives::<L>(block), L::halves(head), 16.0)
    }
}

impl Format for Q5WithMinimum {
    const COLUMNS: usize = BLOCK;
    const HEAD: usize = 2 * HALVES;
    const BLOCK: usize = FIFTH + NIBBLES;

    #[inline(always)]
    fn read<L: Lanes>(head: &[u8], block: &[u8]) -> Weights<L> {
        whole(fives::<L>(block), L::halves(head), L::halves(&head[HALVES..]))
    }
}

impl Format for Q4K {
    const COLUMNS: usize = 256;
    const HEAD: usize = 2 * HALVES;
    const BLOCK: usize = 2 * ROWS + NIBBLES;

    #[inline(always)]
    fn read<L: Lanes>(head: &[u8], block: &[u8]) -> Weights<L> {
        let (scale, offset) = scale_and_offset::<L>(head, block);
        whole(nibbles::<L>(&block[2 * ROWS..]), scale, offset)
    }
}

impl Format for Q5K {
    const COLUMNS: usize = 256;
    const HEAD: usize = 2 * HALVES;
    const BLOCK: usize = 2 * ROWS + FIFTH + NIBBLES;

    #[inline(always)]
    fn read<L: Lanes>(head: &[u8], block: &[u8]) -> Weights<L> {
        let (scale, offset) = scale_and_offset::<L>(head, block);
        whole(fives::<L>(&block[2 * ROWS..]), scale, offset)
    }
}

impl Format for Q6K {
    const COLUMNS: usize = 256;
    const HEAD: usize = HALVES;
    const BLOCK: usize = 2 * ROWS + NIBBLES + 2 * LANE_BYTES;
    const HALVED: bool = true;

    #[inline(always)]
    fn read<L: Lanes>(head: &[u8], block: &[u8]) -> Weights<L> {
        let d = L::halves(head);
        let scale = [L::multiply(d, L::signed(block)), L::multiply(d, L::signed(&block[ROWS..]))];
        let minus = L::splat(-32.0);
        let offset = [L::multiply(scale[0], minus), L::multiply(scale[1], minus)];
        let mut quants = nibbles::<L>(&block[2 * ROWS..]);
        let pairs = &block[2 * ROWS + NIBBLES..];
        for (i, pairs) in [L::bytes(pairs), L::bytes(&pairs[LANE_BYTES..])].into_iter().enumerate()
        {
            quants[4 * i] = L::with_pair::<0>(quants[4 * i], pairs);
            quants[4 * i + 1] = L::with_pair::<1>(quants[4 * i + 1], pairs);
            quants[4 * i + 2] = L::with_pair::<2>(quants[4 * i + 2], pairs);
            quants[4 * i + 3] = L::with_pair::<3>(quants[4 * i + 3], pairs);
        }
        Weights { quants, scale, offset }
    }
}

#[inline(always)]
fn whole<L: Lanes>(quants: [L::Bytes; DOTS], scale: L::Floats, offset: L::Floats) -> Weights<L> {
    Weights { quants, scale: [scale; 2], offset: [offset; 2] }
}

/// Quants that stand for numbers around zero.
#[inline(always)]
fn centred<L: Lanes>(quants: [L::Bytes; DOTS], scale: L::Floats, zero: f32) -> Weights<L> {
    whole(quants, scale, L::multiply(scale, L::splat(-zero)))
}

#[inline(always)]
fn scale_and_offset<L: Lanes>(head: &[u8], block: &[u8]) -> (L::Floats, L::Floats) {
    let scale = L::multiply(L::halves(head), L::unsigned(block));
    let minimum = L::multiply(L::halves(&head[HALVES..]), L::unsigned(&block[ROWS..]));
    (scale, L::multiply(minimum, L::splat(-1.0)))
}

/// Low nibbles are the first 16 columns, high ones the others.
#[inline(always)]
fn nibbles<L: Lanes>(bytes: &[u8]) -> [L::Bytes; DOTS] {
    let mut quants = [L::bytes(bytes); DOTS];
    for i in 0..DOTS / 2 {
        let both = L::bytes(&bytes[i * LANE_BYTES..]);
        quants[i] = L::low(both);
        quants[i + DOTS / 2] = L::high(both);
    }
    quants
}

/// Fifth bits, then nibbles.
#[inline(always)]
fn fives<L: Lanes>(bytes: &[u8]) -> [L::Bytes; DOTS] {
    let (bits, bytes) = bytes.split_at(FIFTH);
    let mut quants = nibbles::<L>(bytes);
    for (quants, bits) in quants.iter_mut().zip(bits.chunks_exact(8)) {
        let bits = [bits[0], bits[1], bits[2], bits[3], bits[4], bits[5], bits[6], bits[7]];
        *quants = L::with_fifth(*quants, u64::from_le_bytes(bits));
    }
    quants
}

/// Evaluates `$body` with `$format` standing for the type that reads `$dtype`; floats have none.
macro_rules! with_format {
    ($dtype:expr, $format:ident => $body:expr) => {
        with_format!(@ $dtype, $format, $body, Q8_0 Q8, Q4_0 Q4, Q4_1 Q4WithMinimum, Q5_0 Q5, Q5_1 Q5WithMinimum, Q4K Q4K, Q5K Q5K, Q6K Q6K)
    };
    (@ $dtype:expr, $format:ident, $body:expr, $($name:ident $type:ident),*) => {
        match $dtype {
            $($crate::cpu::Dtype::$name => {
                type $format = $crate::cpu::quantized::$type;
                Some($body)
            })*
            $crate::cpu::Dtype::F32 | $crate::cpu::Dtype::F16 | $crate::cpu::Dtype::BF16 => None,
        }
    };
}
pub(crate) use with_format;

/// Products of a panel with up to 16 rows of a batch. `out`: [rows of the batch].
/// `false`: the dtype is no quantized one.
pub(crate) fn multiply(dtype: Dtype, panel: &[u8], x: &[Block], out: &mut [[f32; ROWS]]) -> bool {
    multiply_with(instruction_set(), dtype, panel, x, out)
}

pub(crate) fn multiply_with(
    set: InstructionSet,
    dtype: Dtype,
    panel: &[u8],
    x: &[Block],
    out: &mut [[f32; ROWS]],
) -> bool {
    with_format!(dtype, F => rows::<F>(set, panel, x, out)).is_some()
}

/// The batch in pieces of 16, 8, 4, 2 and 1 rows: each keeps its outputs in registers.
fn rows<F: Format>(set: InstructionSet, panel: &[u8], x: &[Block], out: &mut [[f32; ROWS]]) {
    let mut done = 0;
    while done < out.len() {
        let left = out.len() - done;
        let rest = &mut out[done..];
        done += match left {
            16.. => piece::<F, 16>(set, panel, x, done, rest),
            8.. => piece::<F, 8>(set, panel, x, done, rest),
            4.. => piece::<F, 4>(set, panel, x, done, rest),
            2.. => piece::<F, 2>(set, panel, x, done, rest),
            _ => piece::<F, 1>(set, panel, x, done, rest),
        };
    }
}

/// `T` rows of the batch from row `first` of the tile on; returns `T`.
fn piece<F: Format, const T: usize>(
    set: InstructionSet,
    panel: &[u8],
    x: &[Block],
    first: usize,
    out: &mut [[f32; ROWS]],
) -> usize {
    by_lanes!(
        set, [F: Format, const T: usize] [F, T]
        body(panel: &[u8], x: &[Block], first: usize, out: &mut [[f32; ROWS]])
    );
    T
}

#[inline(always)]
fn body<L: Lanes, F: Format, const T: usize>(
    panel: &[u8],
    x: &[Block],
    first: usize,
    out: &mut [[f32; ROWS]],
) {
    let mut sums = [L::splat(0.0); T];
    let heads = panel.chunks_exact(F::BYTES);
    for (head, x) in heads.zip(x.chunks_exact(F::COLUMNS / BLOCK)) {
        let (head, blocks) = head.split_at(F::HEAD);
        for (block, x) in blocks.chunks_exact(F::BLOCK).zip(x) {
            let weights = F::read::<L>(head, block);
            for (t, sum) in sums.iter_mut().enumerate() {
                *sum = add_block::<L, F>(&weights, x, first + t, *sum);
            }
        }
    }
    for (sum, out) in sums.into_iter().zip(out) {
        L::store(sum, out);
    }
}

/// One row of the batch with 32 columns.
#[inline(always)]
fn add_block<L: Lanes, F: Format>(
    weights: &Weights<L>,
    x: &Block,
    row: usize,
    sum: L::Floats,
) -> L::Floats {
    let scale = L::splat(x.scale[row]);
    if !F::HALVED {
        let dot = dot::<L, F>(&weights.quants, &x.quants[row]);
        let sum = L::multiply_add(dot, L::multiply(weights.scale[0], scale), sum);
        return L::multiply_add(weights.offset[0], L::splat(x.total[row]), sum);
    }
    let mut sum = sum;
    let halves = weights.quants.chunks_exact(DOTS / 2).zip(x.quants[row].chunks_exact(DOTS / 2));
    for (half, (quants, x_quants)) in halves.enumerate() {
        let dot = dot::<L, F>(quants, x_quants);
        sum = L::multiply_add(dot, L::multiply(weights.scale[half], scale), sum);
        sum = L::multiply_add(weights.offset[half], L::splat(x.sum[half][row]), sum);
    }
    sum
}

#[inline(always)]
fn dot<L: Lanes, F: Format>(quants: &[L::Bytes], x: &[i32]) -> L::Floats {
    let mut sum = L::no_sum();
    for (quants, x) in quants.iter().zip(x) {
        sum = L::dot(sum, *quants, *x, F::WIDE);
    }
    L::to_floats(sum)
}
