//! Paged decode attention on 32 query and 8 KV heads of 128, blocks of 16 in random order. "Contiguous" is the largest block that
//! there is a kernel for, in order: K and V of a sequence lie behind each other, and few ids are read.

use std::error::Error;

use half::bf16;
use kernels::cuda::{
    ArenaShape, DecodeInput, DecodeScratch, E4m3, KvReal, PagedAttention, PagedDecode, PrefixInput,
};

use crate::table::Row;
use crate::timer::Timer;

const HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
const BLOCK: u32 = 16;
const LARGEST_BLOCK: u32 = 64;
/// So many bytes of K and V at least are gone through in turn: several times the second cache.
const SPREAD: usize = 400 << 20;

/// Sequences, context and what FlashAttention 3 reaches on an H200, in GB/s.
const CASES: [(u32, u32, f64); 9] = [
    (1, 4096, 881.0),
    (1, 32_768, 2460.0),
    (16, 1024, 1953.0),
    (16, 8192, 3810.0),
    (64, 1024, 3071.0),
    (64, 4096, 4137.0),
    (256, 512, 3463.0),
    (256, 1024, 3801.0),
    (256, 4096, 4408.0),
];

/// Sequences, in so many groups, that share so many first tokens and have so many of their own.
const SHARED: [(u32, u32, u32, u32); 4] =
    [(16, 1, 4096, 256), (64, 1, 4096, 256), (64, 8, 4096, 256), (256, 1, 2048, 256)];

/// What is attended to.
struct Batch {
    lengths: Vec<u32>,
    /// Groups, and the tokens that the sequences of each share.
    groups: (u32, u32),
    /// Whether what is shared is read once.
    is_read_once: bool,
    block: u32,
    is_in_order: bool,
}

impl Batch {
    fn of(lengths: Vec<u32>) -> Self {
        let groups = (1, 0);
        Self { lengths, groups, is_read_once: false, block: BLOCK, is_in_order: false }
    }

    fn contiguous(lengths: Vec<u32>) -> Self {
        Self { block: LARGEST_BLOCK, is_in_order: true, ..Self::of(lengths) }
    }

    /// The block ids of all rows; id 0 is nobody's.
    fn tables(&self, width: u32) -> Vec<u32> {
        let per_group = self.lengths.len() / self.groups.0 as usize;
        let shared = self.groups.1.div_ceil(self.block);
        let mut ids: Vec<u32> = (1..=self.blocks()).collect();
        if !self.is_in_order {
            fastrand::Rng::with_seed(3).shuffle(&mut ids);
        }
        let mut ids = ids.into_iter();
        let (mut tables, mut prefix) = (Vec::new(), Vec::new());
        for (index, length) in self.lengths.iter().enumerate() {
            if index % per_group == 0 {
                prefix = ids.by_ref().take(shared as usize).collect();
            }
            let begin = tables.len();
            tables.extend(&prefix);
            tables.extend(ids.by_ref().take((length.div_ceil(self.block) - shared) as usize));
            tables.resize(begin + width as usize, 0);
        }
        tables
    }

    /// Different blocks of all sequences.
    fn blocks(&self) -> u32 {
        let (groups, shared) = (self.groups.0, self.groups.1.div_ceil(self.block));
        let own = |length: &u32| length.div_ceil(self.block) - shared;
        self.lengths.iter().map(own).sum::<u32>() + groups * shared
    }

    /// Positions of different tokens.
    fn tokens(&self) -> usize {
        let (groups, shared) = (self.groups.0 as usize, self.groups.1 as usize);
        let all: usize = self.lengths.iter().map(|length| *length as usize).sum();
        all - (self.lengths.len() - groups) * shared
    }
}

pub(crate) fn rows(timer: &Timer) -> Result<Vec<Row>, Box<dyn Error>> {
    let mut rows = Vec::new();
    for (sequences, context, rival) in CASES {
        let batch = Batch::of(vec![context; sequences as usize]);
        let (time, bytes) = measure(timer, &batch, bf16::from_f32)?;
        let name = format!("{sequences} x {context}");
        let rival = (bytes / rival / 1e3, "FlashAttention 3");
        rows.push(row(timer, name.clone(), (time, bytes), Some(rival)));
        if context >= 4096 {
            let contiguous = Batch::contiguous(batch.lengths.clone());
            let (rival, _) = measure(timer, &contiguous, bf16::from_f32)?;
            let rival = Some((rival, "contiguous"));
            rows.push(row(timer, format!("{name}, paged"), (time, bytes), rival));
            let half = measure(timer, &batch, E4m3::from_f32)?;
            rows.push(row(timer, format!("{name}, e4m3"), half, Some((time, "bf16"))));
        }
    }
    let mut random = fastrand::Rng::with_seed(5);
    let ragged = (0..128).map(|_| (16.0 * 1024_f64.powf(random.f64())) as u32).collect();
    let measured = measure(timer, &Batch::of(ragged), bf16::from_f32)?;
    rows.push(row(timer, "128 x 16 to 16k".to_owned(), measured, None));
    for (sequences, groups, shared, own) in SHARED {
        let lengths = vec![shared + own; sequences as usize];
        let mut batch = Batch { groups: (groups, shared), ..Batch::of(lengths) };
        let (again, _) = measure(timer, &batch, bf16::from_f32)?;
        batch.is_read_once = true;
        let once = measure(timer, &batch, bf16::from_f32)?;
        let name = format!("{sequences} x ({shared} of {groups} + {own})");
        rows.push(row(timer, name, once, Some((again, "without groups"))));
    }
    Ok(rows)
}

fn row(
    timer: &Timer,
    shape: String,
    (time, bytes): (f64, f64),
    rival: Option<(f64, &'static str)>,
) -> Row {
    Row {
        operation: "paged_decode",
        shape,
        time,
        floor: bytes / timer.copy_rate / 1e3,
        rival,
        figure: format!("{:.0} GB/s", bytes / time / 1e3),
    }
}

/// Microseconds of a launch and the bytes of K and V of different tokens.
fn measure<KV: KvReal<bf16>>(
    timer: &Timer,
    batch: &Batch,
    stored: fn(f32) -> KV,
) -> Result<(f64, f64), Box<dyn Error>> {
    let (kernels, stream) = (&timer.kernels, timer.kernels.stream());
    let sequences = u32::try_from(batch.lengths.len())?;
    let width = batch.lengths.iter().max().ok_or("no sequences")?.div_ceil(batch.block);
    let bytes = batch.tokens() * (KV_HEADS * HEAD_DIM * 2) as usize * size_of::<KV>();
    let layers = u32::try_from(SPREAD.div_ceil(bytes))?;
    let shape = ArenaShape {
        blocks: batch.blocks() + 1,
        block_size: batch.block,
        layers,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
    };
    let arena = timer.arena(shape, stored)?;
    let tables = stream.clone_htod(&batch.tables(width))?;
    let lengths = stream.clone_htod(&batch.lengths)?;
    let (groups, shared) = (batch.groups.0, batch.groups.1 / batch.block);
    let begins: Vec<u32> = (0..=groups).map(|group| group * sequences / groups).collect();
    let begins = stream.clone_htod(&begins)?;
    let blocks = stream.clone_htod(&vec![shared; groups as usize])?;
    let prefixes = batch.is_read_once.then_some(PrefixInput { begins: &begins, blocks: &blocks });
    let rows = (sequences * HEADS * HEAD_DIM) as usize;
    let (q, mut out) = (timer.numbers(rows, 4)?, kernels.memory(rows)?);
    let scratch = DecodeScratch::new(kernels, shape, sequences)?;
    let mut scratch = scratch.with_prefixes(kernels, shape, (sequences, HEADS))?;
    let time = timer.time(layers.max(2) as usize, |index| {
        let attention = PagedDecode {
            sequences,
            attention: PagedAttention {
                table_width: width,
                layer: u32::try_from(index)? % layers,
                heads: HEADS,
                scale: 1.0 / f64::from(HEAD_DIM).sqrt() as f32,
                window: None,
                soft_cap: None,
            },
        };
        let input = DecodeInput { tables: &tables, lengths: &lengths, prefixes };
        Ok(kernels.paged_decode(&attention, &arena, &input, (&q, &mut out), &mut scratch)?)
    })?;
    Ok((time, bytes as f64))
}
