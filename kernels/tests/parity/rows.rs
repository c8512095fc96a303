//! The operations over rows: norms, gates, gathering, rotary embedding with the store, copies of blocks.

use fastrand::Rng;
use half::{bf16, f16};
use kernels::cuda::{
    Arena, ArenaShape, BlockPairs, Gate, GateActivation, Gather, HeadNorms, Kernels, LaunchError,
    Real, RmsNorm, RopeInput, RopeStore, copy_blocks_reference,
};

use crate::support::{
    KvCase, KvNumber, any_kv_dtype, cases, download, expect_close, kernels, numbers, poisoned,
    tolerance, upload, widened,
};

/// Runs a generic test with one of the dtypes.
macro_rules! either_dtype {
    ($random:expr, $kernels:expr, $test:ident) => {
        if $random.bool() {
            $test::<bf16>($random, $kernels)
        } else {
            $test::<f16>($random, $kernels)
        }
    };
}

fn norm<T: Real>(random: &mut Rng, kernels: &Kernels) {
    let shape = RmsNorm { rows: random.u32(1..40), width: random.u32(1..1200) * 8, epsilon: 1e-5 };
    let len = (shape.rows * shape.width) as usize;
    let (x, weight) = (numbers::<T>(random, len), numbers::<T>(random, shape.width as usize));
    let mut wanted = vec![0.0; len];
    shape.reference(&widened(&x), &widened(&weight), &mut wanted);
    let (on_x, on_weight) = (upload(kernels, &x), upload(kernels, &weight));
    let mut out = poisoned(kernels, len);
    kernels.rms_norm(&shape, (&on_x, &on_weight), &mut out).expect("launch");
    expect_close(
        &format!("{shape:?}"),
        &widened(&download(kernels, &out)),
        &wanted,
        (tolerance::<T>(), 1e-3),
    );

    let before = numbers::<T>(random, len);
    let sum: Vec<T> = x
        .iter()
        .zip(&before)
        .map(|(x, before)| T::from_f32((*x).into() + (*before).into()))
        .collect();
    shape.reference(&widened(&sum), &widened(&weight), &mut wanted);
    let (mut residual, mut out) = (upload(kernels, &before), poisoned(kernels, len));
    kernels.add_rms_norm(&shape, (&on_x, &on_weight), &mut residual, &mut out).expect("launch");
    assert_eq!(widened(&download(kernels, &residual)), widened(&sum), "{shape:?}: the residual");
    expect_close(
        &format!("{shape:?} added"),
        &widened(&download(kernels, &out)),
        &wanted,
        (tolerance::<T>(), 1e-3),
    );
}

#[test]
fn norms_are_their_reference() {
    let kernels = kernels();
    cases(200, |random| either_dtype!(random, &kernels, norm));
}

fn gate<T: Real>(random: &mut Rng, kernels: &Kernels) {
    let activation = if random.bool() { GateActivation::Silu } else { GateActivation::Gelu };
    let few = (random.u32(1..60), random.u32(1..500) * 8);
    let (rows, width) = random.choice([few, few, few, (66_000, 8)]).unwrap_or(few);
    let shape = Gate { rows, width, activation };
    let x: Vec<T> =
        (0..2 * shape.rows * shape.width).map(|_| T::from_f32(random.f32() * 16.0 - 8.0)).collect();
    let mut wanted = vec![0.0; x.len() / 2];
    shape.reference(&widened(&x), &mut wanted);
    let mut out = poisoned(kernels, wanted.len());
    kernels.gate(&shape, &upload(kernels, &x), &mut out).expect("launch");
    // GELU of a number far below zero is the difference of two that are almost one.
    expect_close(
        &format!("{shape:?}"),
        &widened(&download(kernels, &out)),
        &wanted,
        (tolerance::<T>(), 1e-2),
    );
}

#[test]
fn gates_are_their_reference() {
    let kernels = kernels();
    cases(200, |random| either_dtype!(random, &kernels, gate));
}

fn gather<T: Real + Default>(random: &mut Rng, kernels: &Kernels) {
    let shape = Gather {
        rows: random.u32(1..80),
        table_rows: random.u32(1..300),
        width: random.u32(1..400) * 8,
    };
    let table = numbers::<T>(random, (shape.table_rows * shape.width) as usize);
    let mut ids: Vec<u32> = (0..shape.rows).map(|_| random.u32(..shape.table_rows)).collect();
    ids[0] = random.choice([ids[0], shape.table_rows, u32::MAX]).unwrap_or(0);
    let mut wanted = vec![T::default(); (shape.rows * shape.width) as usize];
    shape.reference(&table, &ids, &mut wanted);
    let mut out = poisoned(kernels, wanted.len());
    kernels
        .gather(&shape, (&upload(kernels, &table), &upload(kernels, &ids)), &mut out)
        .expect("launch");
    assert_eq!(widened(&download(kernels, &out)), widened(&wanted), "{shape:?}");
}

#[test]
fn gathered_rows_are_their_reference() {
    let kernels = kernels();
    cases(200, |random| either_dtype!(random, &kernels, gather));
}

/// What a launch of `rope_store` gets, and the arena before it.
struct Rope<T, KV> {
    shape: RopeStore,
    qkv: Vec<T>,
    weights: Option<[Vec<T>; 2]>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    frequencies: Vec<f32>,
    before: KvCase<KV>,
}

impl<T: Real, KV: KvNumber<T>> Rope<T, KV> {
    fn random(random: &mut Rng) -> Self {
        let head_dim = random.choice([64, 96, 128, 256]).unwrap_or(64);
        let arena_shape = ArenaShape {
            blocks: random.u32(4..40),
            block_size: random.choice([8, 16, 32, 64]).unwrap_or(16),
            layers: random.u32(1..3),
            kv_heads: random.u32(1..5),
            head_dim,
        };
        let shape = RopeStore {
            tokens: random.u32(1..30),
            heads: random.u32(1..70),
            layer: random.u32(..arena_shape.layers),
            rotary: random.choice([head_dim, head_dim / 2, 0]).unwrap_or(0),
            epsilon: 1e-6,
        };
        let all = shape.heads + 2 * arena_shape.kv_heads;
        let width = head_dim as usize;
        let mut slots: Vec<u32> = (0..arena_shape.blocks * arena_shape.block_size).collect();
        random.shuffle(&mut slots);
        slots.truncate(shape.tokens as usize);
        slots[0] = random.choice([slots[0], u32::MAX]).unwrap_or(0);
        let frequency = |pair: u32| 10_000_f32.powf(-2.0 * pair as f32 / shape.rotary as f32);
        Self {
            shape,
            qkv: numbers(random, (shape.tokens * all * head_dim) as usize),
            weights: random.bool().then(|| [numbers(random, width), numbers(random, width)]),
            positions: (0..shape.tokens).map(|_| random.u32(..40_000)).collect(),
            slots,
            frequencies: (0..shape.rotary / 2).map(frequency).collect(),
            before: KvCase::random(random, arena_shape),
        }
    }

    /// Q, and the arena before anything is rounded: a value that was there before is meant as it is.
    fn wanted(&self) -> [Vec<f32>; 2] {
        let (before, shape) = (self.before.values(), self.before.shape);
        let bytes = u32::try_from(size_of::<KV>()).unwrap_or(0);
        let mut arena: Vec<f32> = before.values.iter().map(|value| (*value).into()).collect();
        let mut q = vec![0.0; (self.shape.tokens * self.shape.heads * shape.head_dim) as usize];
        let wide = self.weights.as_ref().map(|all| all.each_ref().map(|weight| widened(weight)));
        let norms = wide.as_ref().map(|[q, k]| HeadNorms { q: q.as_slice(), k: k.as_slice() });
        let most: f32 = KV::stored(f32::INFINITY).into();
        self.shape.reference(
            &shape,
            (&widened(&self.qkv), norms),
            (&self.positions, &self.slots, &self.frequencies),
            &mut q,
            |slot, value| {
                let stored = value / before.scales[shape.scale_index(slot)];
                arena[shape.index(slot, bytes)] = stored.clamp(-most, most);
            },
        );
        [q, arena]
    }

    fn check(&self, kernels: &Kernels) {
        let [wanted, wanted_arena] = self.wanted();
        let mut arena = self.before.upload(kernels);
        let weights = self.weights.as_ref();
        let weights = weights.map(|all| all.each_ref().map(|weight| upload(kernels, weight)));
        let norms = weights.as_ref().map(|[q, k]| HeadNorms { q, k });
        let mut q = poisoned(kernels, wanted.len());
        let (positions, slots) = (upload(kernels, &self.positions), upload(kernels, &self.slots));
        // The device has no memory of length 0.
        let frequencies = if self.frequencies.is_empty() {
            kernels.stream().null().expect("memory")
        } else {
            upload(kernels, &self.frequencies)
        };
        let input = RopeInput { positions: &positions, slots: &slots, frequencies: &frequencies };
        let qkv = upload(kernels, &self.qkv);
        kernels.rope_store(&self.shape, (&qkv, norms), &input, &mut arena, &mut q).expect("launch");
        let what = format!("{}{} {:?} {:?}", T::NAME, KV::SUFFIX, self.shape, self.before.shape);
        let allowed = (2.0 * tolerance::<T>(), 0.05);
        expect_close(&what, &widened(&download(kernels, &q)), &wanted, allowed);
        let stored: Vec<f32> =
            download(kernels, arena.values_mut()).iter().map(|value| (*value).into()).collect();
        // Half a step of 3 bits of mantissa, and of those below the lowest exponent.
        let allowed = if KV::MOST == 1.0 { allowed } else { (0.064, 2_f32.powi(-6)) };
        expect_close(&format!("{what}: the arena"), &stored, &wanted_arena, allowed);
    }
}

fn rope<T: Real, KV: KvNumber<T>>(random: &mut Rng, kernels: &Kernels) {
    Rope::<T, KV>::random(random).check(kernels);
}

#[test]
fn turned_and_stored_heads_are_their_reference() {
    let kernels = kernels();
    cases(300, |random| any_kv_dtype!(random, rope(random, &kernels)));
}

#[test]
fn copied_blocks_are_their_reference_and_go_to_the_host_and_back() {
    let kernels = kernels();
    cases(60, |random| {
        let shape = ArenaShape {
            blocks: random.u32(8..30),
            block_size: random.choice([8, 16]).unwrap_or(8),
            layers: random.u32(1..5),
            kv_heads: random.u32(1..4),
            head_dim: random.choice([64, 96, 128]).unwrap_or(64),
        };
        let mut arena = Arena::<bf16>::new(&kernels, shape).expect("memory");
        let mut values = numbers::<bf16>(random, arena.values_mut().len());
        kernels.stream().memcpy_htod(&values, arena.values_mut()).expect("upload");
        let mut ids: Vec<u32> = (0..shape.blocks).collect();
        random.shuffle(&mut ids);
        let mut pairs = vec![(ids[0], ids[1]), (ids[0], ids[2]), (ids[3], ids[4])];
        pairs.push(
            random
                .choice([(shape.blocks, ids[5]), (ids[5], shape.blocks), (ids[5], u32::MAX)])
                .unwrap_or_default(),
        );
        copy_blocks_reference(&mut values, arena.block_len(), &pairs);
        let flat: Vec<u32> = pairs.iter().flat_map(|(from, to)| [*from, *to]).collect();
        let pairs = upload(&kernels, &flat);
        kernels.copy_blocks(&mut arena, &BlockPairs { pairs: &pairs, count: 4 }).expect("launch");
        assert_eq!(widened(&download(&kernels, arena.values_mut())), widened(&values));

        let mut host = kernels.pinned::<bf16>(arena.block_len()).expect("memory");
        kernels.block_to_host(&arena, ids[6], &mut host).expect("launch");
        kernels.block_from_host(&mut arena, ids[7], &host).expect("launch");
        copy_blocks_reference(&mut values, arena.block_len(), &[(ids[6], ids[7])]);
        assert_eq!(widened(&download(&kernels, arena.values_mut())), widened(&values));
        assert!(kernels.block_to_host(&arena, shape.blocks, &mut host).is_err());
    });
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let kernels = kernels();
    let x = upload(&kernels, &[bf16::ONE; 64]);
    let (ids, mut out) = (upload(&kernels, &[0_u32; 4]), poisoned::<bf16>(&kernels, 64));
    let refused = |result: Result<(), LaunchError>, word: &str| {
        let words = result.expect_err(word).to_string();
        assert!(words.contains(word), "{words}");
    };
    let norm = |rows, width| RmsNorm { rows, width, epsilon: 1e-5 };
    refused(kernels.rms_norm(&norm(2, 64), (&x, &x), &mut out), "x has length 64, wanted 128");
    refused(kernels.rms_norm(&norm(2, 32), (&x, &x), &mut out), "weight");
    refused(kernels.rms_norm(&norm(u32::MAX, u32::MAX), (&x, &x), &mut out), "x");
    let gate = |rows, width| Gate { rows, width, activation: GateActivation::Silu };
    refused(kernels.gate(&gate(1, 64), &x, &mut out), "x has length 64, wanted 128");
    refused(kernels.gate(&gate(1, 32), &x, &mut out), "out has length 64, wanted 32");
    let gather = |rows, width| Gather { rows, table_rows: 8, width };
    refused(kernels.gather(&gather(4, 16), (&x, &ids), &mut out), "table");
    refused(kernels.gather(&gather(3, 8), (&x, &ids), &mut out), "ids");
    let shape = ArenaShape { blocks: 2, block_size: 8, layers: 1, kv_heads: 1, head_dim: 64 };
    let mut arena = Arena::<bf16>::new(&kernels, shape).expect("memory");
    let pairs = BlockPairs { pairs: &ids, count: 3 };
    refused(kernels.copy_blocks(&mut arena, &pairs), "pairs has length 4, wanted 6");
    let rope = RopeStore { tokens: 1, heads: 2, layer: 0, rotary: 24, epsilon: 1e-6 };
    let one = upload(&kernels, &[0_u32]);
    let frequencies = upload(&kernels, &[1.0_f32; 12]);
    let input = RopeInput { positions: &one, slots: &one, frequencies: &frequencies };
    let (qkv, mut q) = (upload(&kernels, &[bf16::ONE; 256]), poisoned::<bf16>(&kernels, 128));
    refused(kernels.rope_store(&rope, (&qkv, None), &input, &mut arena, &mut q), "in sixteens");
    let odd = ArenaShape { block_size: 12, ..shape };
    assert!(Arena::<bf16>::new(&kernels, odd).is_err(), "blocks of 12");
}
