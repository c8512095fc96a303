//! Paged decode attention.

use fastrand::Rng;
use half::bf16;
use kernels::cuda::{
    Arena, ArenaShape, DecodeInput, DecodeScratch, Kernels, KvHalf, PagedAttention, PagedDecode,
    PrefixInput, Real, SharedPrefixes, Slot,
};

use crate::support::{
    KvCase, KvNumber, any_kv_dtype, cases, download, expect_close, kernels, numbers, poisoned,
    upload, widened,
};

/// What a launch gets.
struct Case<T, KV> {
    shape: PagedDecode,
    arena: KvCase<KV>,
    tables: Vec<u32>,
    lengths: Vec<u32>,
    q: Vec<T>,
    /// Begins and blocks of the groups that share a prefix.
    prefixes: Option<[Vec<u32>; 2]>,
}

impl<T: Real, KV: KvNumber<T>> Case<T, KV> {
    fn random(random: &mut Rng) -> Self {
        let head_dim = random.choice([64, 96, 128, 256]).unwrap_or(64);
        let kv_heads = random.u32(1..=4);
        let block_size = random.choice([8, 16, 32, 64]).unwrap_or(16);
        let arena_shape = ArenaShape {
            blocks: random.u32(1..200),
            block_size,
            layers: random.u32(1..3),
            kv_heads,
            head_dim,
        };
        let shape = PagedDecode {
            sequences: random.u32(1..20),
            attention: PagedAttention {
                table_width: random.u32(1..40),
                layer: random.u32(..arena_shape.layers),
                heads: kv_heads * random.u32(1..=16),
                scale: 1.0 / (head_dim as f32).sqrt(),
                window: random.bool().then(|| random.u32(1..400)),
                soft_cap: random.bool().then(|| random.f32() * 30.0 + 0.5),
            },
        };
        let mut case = Self::filled(random, shape, arena_shape);
        // Some rows are no sequence, some ids are no block's, some lengths are beyond the table.
        for length in &mut case.lengths {
            *length = match random.u32(..10) {
                0 => 0,
                1 => u32::MAX - random.u32(..10),
                _ => *length,
            };
        }
        for id in &mut case.tables {
            if random.u32(..20) == 0 {
                let beyond = random.u32(arena_shape.blocks..);
                *id = random.choice([arena_shape.blocks, u32::MAX, beyond]).unwrap_or(0);
            }
        }
        case
    }

    fn filled(random: &mut Rng, shape: PagedDecode, arena_shape: ArenaShape) -> Self {
        let most = shape.attention.table_width * arena_shape.block_size;
        Self {
            shape,
            arena: KvCase::random(random, arena_shape),
            tables: (0..shape.sequences * shape.attention.table_width)
                .map(|_| random.u32(..arena_shape.blocks))
                .collect(),
            lengths: (0..shape.sequences).map(|_| random.u32(1..=most)).collect(),
            q: numbers(
                random,
                (shape.sequences * shape.attention.heads * arena_shape.head_dim) as usize,
            ),
            prefixes: None,
        }
    }

    /// Random groups, of which some are empty, share nothing, or more than the shortest of them has.
    fn share(mut self, random: &mut Rng) -> Self {
        let groups = random.usize(1..6);
        let mut begins: Vec<u32> =
            (0..=groups).map(|_| random.u32(..=self.shape.sequences)).collect();
        begins.sort_unstable();
        let most = self.shape.attention.table_width + 2;
        let blocks = (0..groups).map(|_| random.u32(..=most) * random.u32(..4).min(1)).collect();
        self.prefixes = Some([begins, blocks]);
        self
    }

    /// The tables as they are meant.
    fn meant(&self) -> Vec<u32> {
        let groups = self.prefixes.as_ref().filter(|[begins, _]| begins.is_sorted());
        let Some([begins, blocks]) = groups else { return self.tables.clone() };
        SharedPrefixes { begins, blocks }.spread(&self.tables, self.shape.attention.table_width)
    }

    fn check(&self, kernels: &Kernels) {
        let (arena, arena_shape) = (self.arena.upload(kernels), self.arena.shape);
        let (tables, lengths) = (upload(kernels, &self.tables), upload(kernels, &self.lengths));
        let q = upload(kernels, &self.q);
        let scratch = DecodeScratch::new(kernels, arena_shape, self.shape.sequences);
        let rows = (self.shape.sequences, self.shape.attention.heads);
        let mut scratch =
            scratch.expect("memory").with_prefixes(kernels, arena_shape, rows).expect("memory");
        let mut wanted = vec![0.0; self.q.len()];
        self.shape.reference(
            &self.arena.values(),
            (&self.meant(), &self.lengths),
            &widened(&self.q),
            &mut wanted,
        );
        let prefixes = self.prefixes.as_ref();
        let prefixes = prefixes.map(|all| all.each_ref().map(|values| upload(kernels, values)));
        let prefixes = prefixes.as_ref().map(|[begins, blocks]| PrefixInput { begins, blocks });
        // Twice: what the first leaves must be what the second needs.
        for run in 0..2 {
            let mut out = poisoned(kernels, self.q.len());
            let input = DecodeInput { tables: &tables, lengths: &lengths, prefixes };
            kernels
                .paged_decode(&self.shape, &arena, &input, (&q, &mut out), &mut scratch)
                .expect("launch");
            let got = widened(&download(kernels, &out));
            let what =
                format!("{}{} {:?} {arena_shape:?} run {run}", T::NAME, KV::SUFFIX, self.shape);
            // Weights and results are rounded to the dtype: 2^-8 and 2^-11.
            let tolerance = if T::NAME == "bf16" { 0.012 } else { 0.002 };
            expect_close(&what, &got, &wanted, (tolerance, 0.3));
        }
    }
}

#[test]
fn paged_decode_is_its_reference() {
    let kernels = kernels();
    cases(300, |random| any_kv_dtype!(random, check_random(random, &kernels)));
}

fn check_random<T: Real, KV: KvNumber<T>>(random: &mut Rng, kernels: &Kernels) {
    Case::<T, KV>::random(random).check(kernels);
}

#[test]
fn shared_prefixes_are_seen_by_all_of_their_group() {
    let kernels = kernels();
    cases(300, |random| any_kv_dtype!(random, check_shared(random, &kernels)));
}

fn check_shared<T: Real, KV: KvNumber<T>>(random: &mut Rng, kernels: &Kernels) {
    Case::<T, KV>::random(random).share(random).check(kernels);
}

/// Rows lie across as many pieces of the line as are put together.
#[test]
fn long_prefixes_are_read_whole() {
    let kernels = kernels();
    cases(20, |random| any_kv_dtype!(random, check_long(random, &kernels)));
}

fn check_long<T: Real, KV: KvNumber<T>>(random: &mut Rng, kernels: &Kernels) {
    let head_dim = random.choice([64, 128]).unwrap_or(64);
    let kv_heads = random.u32(2..=8);
    let arena_shape = ArenaShape { blocks: 150, block_size: 64, layers: 1, kv_heads, head_dim };
    let attention = PagedAttention {
        table_width: random.u32(129..=148),
        layer: 0,
        heads: kv_heads,
        scale: 0.1,
        window: None,
        soft_cap: None,
    };
    let mut case =
        Case::<T, KV>::filled(random, PagedDecode { sequences: 1, attention }, arena_shape);
    case.lengths.fill(attention.table_width * 64);
    case.prefixes = Some([vec![0, 1], vec![attention.table_width]]);
    case.check(kernels);
}

/// Groups that do not follow each other share nothing.
#[test]
fn overlapping_groups_are_none() {
    let kernels = kernels();
    cases(20, |random| {
        let mut case = Case::<bf16, bf16>::random(random);
        case.prefixes = Some([vec![0, u32::MAX, 0, 1], vec![2, u32::MAX, 1]]);
        case.check(&kernels);
    });
}

/// Positions that nobody has written hold anything, also what is no number.
#[test]
fn what_is_beyond_a_sequence_is_not_seen() {
    let kernels = kernels();
    cases(20, |random| any_kv_dtype!(random, check_unwritten(random, &kernels)));
}

fn check_unwritten<T: Real, KV: KvNumber<T>>(random: &mut Rng, kernels: &Kernels) {
    let arena_shape =
        ArenaShape { blocks: 64, block_size: 16, layers: 1, kv_heads: 2, head_dim: 128 };
    let shape = PagedDecode {
        sequences: 4,
        attention: PagedAttention {
            table_width: 8,
            layer: 0,
            heads: 8,
            scale: 0.1,
            window: None,
            soft_cap: None,
        },
    };
    let mut case = Case::<T, KV>::filled(random, shape, arena_shape);
    case.tables = (0..32).collect();
    for (index, length) in (0..).zip(&case.lengths) {
        for position in *length..128 {
            let (block, row) = (index * 8 + position / 16, position % 16);
            for (half, head) in [(KvHalf::K, 0), (KvHalf::K, 1), (KvHalf::V, 0), (KvHalf::V, 1)] {
                for dim in 0..128 {
                    let slot = Slot { block, layer: 0, half, head, row, dim };
                    let bytes = u32::try_from(size_of::<KV>()).unwrap_or(0);
                    case.arena.values[arena_shape.index(slot, bytes)] = KV::NAN;
                }
            }
        }
    }
    case.check(kernels);
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let kernels = kernels();
    let mut random = Rng::with_seed(1);
    let arena_shape =
        ArenaShape { blocks: 4, block_size: 16, layers: 1, kv_heads: 2, head_dim: 64 };
    let attention = PagedAttention {
        table_width: 2,
        layer: 0,
        heads: 4,
        scale: 1.0,
        window: None,
        soft_cap: None,
    };
    let shape = PagedDecode { sequences: 2, attention };
    let case = Case::<bf16, bf16>::filled(&mut random, shape, arena_shape);
    let arena = Arena::<bf16>::new(&kernels, arena_shape).expect("memory");
    let mut scratch = DecodeScratch::new(&kernels, arena_shape, 2).expect("memory");
    let (tables, lengths) = (upload(&kernels, &case.tables), upload(&kernels, &case.lengths));
    let (q, mut out) = (upload(&kernels, &case.q), poisoned(&kernels, case.q.len()));
    let mut refuses = |shape: PagedDecode, word: &str| {
        let input = DecodeInput { tables: &tables, lengths: &lengths, prefixes: None };
        let error =
            kernels.paged_decode(&shape, &arena, &input, (&q, &mut out), &mut scratch).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    let attending = |attention| PagedDecode { attention, ..shape };
    refuses(PagedDecode { sequences: 3, ..shape }, "q");
    refuses(attending(PagedAttention { table_width: 3, ..attention }), "tables");
    refuses(attending(PagedAttention { layer: 1, ..attention }), "layer");
    refuses(attending(PagedAttention { heads: 5, ..attention }), "query heads");
    refuses(attending(PagedAttention { heads: 64, ..attention }), "query heads of a KV head");
    refuses(attending(PagedAttention { window: Some(0), ..attention }), "window");
    refuses(attending(PagedAttention { soft_cap: Some(0.0), ..attention }), "soft cap");
    refuses(PagedDecode { sequences: 5000, ..shape }, "sequences");
    let narrow = ArenaShape { head_dim: 8, ..arena_shape };
    let mut scratch = DecodeScratch::new(&kernels, narrow, 2).expect("memory");
    let input = DecodeInput { tables: &tables, lengths: &lengths, prefixes: None };
    let done = kernels.paged_decode(&shape, &arena, &input, (&q, &mut out), &mut scratch);
    assert!(done.unwrap_err().to_string().contains("parts"), "scratch of smaller heads");
}
