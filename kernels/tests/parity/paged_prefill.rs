//! Paged prefill attention.

use fastrand::Rng;
use half::{bf16, f16};
use kernels::cuda::{
    Arena, ArenaShape, Chunks, E4m3, Kernels, KvHalf, PagedAttention, PagedPrefill, PrefillInput,
    Real, Slot,
};

use crate::support::{
    KvCase, KvNumber, any_kv_dtype, cases, download, expect_close, kernels, numbers, once,
    tolerance, upload, widened,
};

struct Case<T, KV> {
    shape: PagedPrefill,
    arena: KvCase<KV>,
    tables: Vec<u32>,
    begins: Vec<u32>,
    starts: Vec<u32>,
    q: Vec<T>,
}

impl<T: Real, KV: KvNumber<T>> Case<T, KV> {
    fn random(random: &mut Rng, (head_dim, is_capped): (u32, bool)) -> Self {
        let kv_heads = random.u32(1..=3);
        let block_size = random.choice([8, 16, 32, 64]).unwrap_or(16);
        let arena_shape = ArenaShape {
            blocks: random.u32(1..100),
            block_size,
            layers: random.u32(1..3),
            kv_heads,
            head_dim,
        };
        let table_width = random.u32(1..(1200 / block_size).max(2));
        let most = table_width * block_size;
        let sequences = random.u32(1..6);
        let mut begins = vec![0];
        let mut starts = Vec::new();
        for _ in 0..sequences {
            let start = random.u32(..most);
            let chunk = random.u32(1..=(most - start).min(300)) * random.u32(..4).min(1);
            starts.push(start);
            begins.push(begins[begins.len() - 1] + chunk);
        }
        let tokens = begins[begins.len() - 1] + random.u32(..3);
        let shape = PagedPrefill {
            sequences,
            tokens,
            attention: PagedAttention {
                table_width,
                layer: random.u32(..arena_shape.layers),
                heads: kv_heads * random.choice([1, 2, 3, 4, 7, 8]).unwrap_or(1),
                // With large scales, scores rise beyond what the base of the exponentials was chosen for.
                scale: random.choice([1.0, 1.0, 8.0, 60.0]).unwrap_or(1.0)
                    / (head_dim as f32).sqrt(),
                window: random.bool().then(|| random.u32(1..400)),
                soft_cap: is_capped.then(|| random.f32() * 30.0 + 0.5),
            },
        };
        let blocks = arena_shape.blocks;
        let mut tables: Vec<u32> =
            (0..sequences * table_width).map(|_| random.u32(..blocks)).collect();
        if random.bool() {
            for id in tables.iter_mut().step_by(random.usize(3..30)) {
                let beyond = random.u32(blocks..);
                *id = random.choice([blocks, u32::MAX, beyond]).unwrap_or(0);
            }
        }
        let arena = KvCase::random(random, arena_shape);
        let q = numbers(random, (tokens * shape.attention.heads * head_dim) as usize);
        Self { shape, arena, tables, begins, starts, q }
    }

    fn check(&self, kernels: &Kernels) {
        if self.q.is_empty() {
            return;
        }
        let arena = self.arena.upload(kernels);
        let (tables, begins) = (upload(kernels, &self.tables), upload(kernels, &self.begins));
        let (starts, q) = (upload(kernels, &self.starts), upload(kernels, &self.q));
        // What is of no sequence must stay as it is.
        let before = T::from_f32(7.0);
        let mut wanted = vec![before.into(); self.q.len()];
        let chunks = Chunks { tables: &self.tables, begins: &self.begins, starts: &self.starts };
        self.shape.reference(&self.arena.values(), &chunks, &widened(&self.q), &mut wanted);
        let mut poison = vec![T::from_f32(f32::NAN); self.q.len()];
        let row = (self.shape.attention.heads * self.arena.shape.head_dim) as usize;
        poison[self.begins[self.begins.len() - 1] as usize * row..].fill(before);
        let mut out = upload(kernels, &poison);
        let input = PrefillInput { tables: &tables, begins: &begins, starts: &starts };
        kernels.paged_prefill(&self.shape, &arena, &input, (&q, &mut out)).expect("launch");
        let got = widened(&download(kernels, &out));
        let what = format!(
            "{}{} {:?} {:?} {:?} {:?}",
            T::NAME,
            KV::SUFFIX,
            self.shape,
            self.arena.shape,
            self.begins,
            self.starts
        );
        expect_close(&what, &got, &wanted, (2.0 * tolerance::<T>(), 0.3));
    }
}

#[test]
fn paged_prefill_is_its_reference() {
    let kernels = kernels();
    cases(100, |random| {
        let which = (random.choice([64, 96, 128, 128, 256]).unwrap_or(64), random.bool());
        any_kv_dtype!(random, check_random(random, &kernels, which));
    });
}

/// Each of those with Hopper's matrix instructions runs, whatever is drawn.
#[test]
fn every_kernel_is_its_reference() {
    let kernels = kernels();
    once(|random| {
        for which in [(64, false), (64, true), (128, false), (128, true)] {
            check_random::<bf16, bf16>(random, &kernels, which);
            check_random::<bf16, E4m3>(random, &kernels, which);
            check_random::<f16, f16>(random, &kernels, which);
            check_random::<f16, E4m3>(random, &kernels, which);
        }
    });
}

fn check_random<T: Real, KV: KvNumber<T>>(random: &mut Rng, kernels: &Kernels, which: (u32, bool)) {
    Case::<T, KV>::random(random, which).check(kernels);
}

/// Positions that nobody has written hold anything, also what is no number.
#[test]
fn what_is_beyond_a_chunk_is_not_seen() {
    let kernels = kernels();
    cases(20, |random| any_kv_dtype!(random, check_unwritten(random, &kernels)));
}

fn check_unwritten<T: Real, KV: KvNumber<T>>(random: &mut Rng, kernels: &Kernels) {
    let head_dim = random.choice([64, 128, 256]).unwrap_or(64);
    let arena_shape = ArenaShape { blocks: 40, block_size: 16, layers: 1, kv_heads: 1, head_dim };
    let (start, chunk) = (random.u32(..300), random.u32(1..300));
    let shape = PagedPrefill {
        sequences: 1,
        tokens: chunk,
        attention: PagedAttention {
            table_width: 40,
            layer: 0,
            heads: 4,
            scale: 0.1,
            window: None,
            soft_cap: None,
        },
    };
    let mut arena = KvCase::<KV>::random(random, arena_shape);
    for position in start + chunk..640 {
        let (block, row) = (position / 16, position % 16);
        for (half, dim) in [KvHalf::K, KvHalf::V]
            .into_iter()
            .flat_map(|half| (0..head_dim).map(move |dim| (half, dim)))
        {
            let slot = Slot { block, layer: 0, half, head: 0, row, dim };
            let bytes = u32::try_from(size_of::<KV>()).unwrap_or(0);
            arena.values[arena_shape.index(slot, bytes)] = KV::NAN;
        }
    }
    let q = numbers(random, (chunk * 4 * head_dim) as usize);
    let (tables, begins, starts) = ((0..40).collect(), vec![0, chunk], vec![start]);
    Case::<T, KV> { shape, arena, tables, begins, starts, q }.check(kernels);
}

#[test]
fn chunks_that_do_not_fit_are_refused() {
    let kernels = kernels();
    let arena_shape =
        ArenaShape { blocks: 4, block_size: 16, layers: 1, kv_heads: 2, head_dim: 64 };
    let arena = Arena::<bf16>::new(&kernels, arena_shape).expect("memory");
    let attention = PagedAttention {
        table_width: 2,
        layer: 0,
        heads: 4,
        scale: 1.0,
        window: None,
        soft_cap: None,
    };
    let shape = PagedPrefill { sequences: 1, tokens: 3, attention };
    let (tables, begins) = (upload(&kernels, &[0_u32, 1]), upload(&kernels, &[0_u32, 3]));
    let starts = upload(&kernels, &[0_u32]);
    let q = upload(&kernels, &[bf16::ONE; 3 * 4 * 64]);
    let mut out = upload(&kernels, &[bf16::ONE; 3 * 4 * 64]);
    let mut refuses = |shape: PagedPrefill, word: &str| {
        let input = PrefillInput { tables: &tables, begins: &begins, starts: &starts };
        let done = kernels.paged_prefill(&shape, &arena, &input, (&q, &mut out));
        let words = done.expect_err(word).to_string();
        assert!(words.contains(word), "{words}");
    };
    let attending = |attention| PagedPrefill { attention, ..shape };
    refuses(PagedPrefill { tokens: 4, ..shape }, "q");
    let narrow = PagedAttention { table_width: 1, ..attention };
    refuses(PagedPrefill { sequences: 2, attention: narrow, ..shape }, "begins");
    refuses(attending(PagedAttention { table_width: 3, ..attention }), "tables");
    refuses(attending(PagedAttention { layer: 1, ..attention }), "layer");
    refuses(attending(PagedAttention { heads: 3, ..attention }), "query heads");
    refuses(PagedPrefill { sequences: 5000, ..shape }, "sequences");
    refuses(attending(PagedAttention { scale: -1.0, ..attention }), "scale");
}
