//! Paged decode attention on 32 query and 8 KV heads of 128, blocks of 16 in random order.

use std::error::Error;

use half::bf16;
use kernels::cuda::{ArenaShape, DecodeInput, DecodeScratch, E4m3, KvReal, PagedDecode};

use crate::table::Row;
use crate::timer::Timer;

const HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
const BLOCK: u32 = 16;
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

pub(crate) fn rows(timer: &Timer) -> Result<Vec<Row>, Box<dyn Error>> {
    let mut rows = Vec::new();
    for (sequences, context, rival) in CASES {
        let lengths = vec![context; sequences as usize];
        let (time, bytes) = measure(timer, &lengths, bf16::from_f32)?;
        let name = format!("{sequences} x {context}");
        let rival = (bytes / rival / 1e3, "FlashAttention 3");
        rows.push(row(timer, name.clone(), (time, bytes), Some(rival)));
        if context >= 4096 {
            let half = measure(timer, &lengths, E4m3::from_f32)?;
            rows.push(row(timer, format!("{name}, e4m3"), half, Some((time, "bf16"))));
        }
    }
    let mut random = fastrand::Rng::with_seed(5);
    let ragged: Vec<u32> = (0..128).map(|_| (16.0 * 1024_f64.powf(random.f64())) as u32).collect();
    let measured = measure(timer, &ragged, bf16::from_f32)?;
    rows.push(row(timer, "128 x 16 to 16k".to_owned(), measured, None));
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

/// Microseconds of a launch and the bytes of K and V that it reads.
fn measure<KV: KvReal<bf16>>(
    timer: &Timer,
    lengths: &[u32],
    stored: fn(f32) -> KV,
) -> Result<(f64, f64), Box<dyn Error>> {
    let kernels = &timer.kernels;
    let sequences = u32::try_from(lengths.len())?;
    let width = lengths.iter().max().ok_or("no sequences")?.div_ceil(BLOCK);
    let blocks: u32 = lengths.iter().map(|length| length.div_ceil(BLOCK)).sum();
    let bytes = lengths.iter().map(|length| *length as usize).sum::<usize>()
        * (KV_HEADS * HEAD_DIM * 2) as usize
        * size_of::<KV>();
    let layers = u32::try_from(SPREAD.div_ceil(bytes))?;
    let shape = ArenaShape {
        blocks: blocks + 1,
        block_size: BLOCK,
        layers,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
    };
    let arena = timer.arena(shape, stored)?;
    let mut random = fastrand::Rng::with_seed(3);
    let mut ids: Vec<u32> = (1..=blocks).collect();
    random.shuffle(&mut ids);
    let mut ids = ids.into_iter();
    let mut tables = Vec::new();
    for length in lengths {
        let begin = tables.len();
        tables.extend(ids.by_ref().take(length.div_ceil(BLOCK) as usize));
        tables.resize(begin + width as usize, 0);
    }
    let (tables, on_device) =
        (kernels.stream().clone_htod(&tables)?, kernels.stream().clone_htod(lengths)?);
    let rows = (sequences * HEADS * HEAD_DIM) as usize;
    let (q, mut out) = (timer.numbers(rows, 4)?, kernels.memory(rows)?);
    let mut scratch = DecodeScratch::new(kernels, shape, sequences)?;
    let scale = 1.0 / f64::from(HEAD_DIM).sqrt() as f32;
    let time = timer.time(layers.max(2) as usize, |index| {
        let layer = u32::try_from(index)? % layers;
        let attention = PagedDecode {
            sequences,
            table_width: width,
            layer,
            heads: HEADS,
            scale,
            window: None,
            soft_cap: None,
        };
        let input = DecodeInput { tables: &tables, lengths: &on_device };
        Ok(kernels.paged_decode(&attention, &arena, &input, (&q, &mut out), &mut scratch)?)
    })?;
    Ok((time, bytes as f64))
}
