//! Matrix products: by each way, and by the one that is chosen.

use std::path::PathBuf;

use cudarc::driver::CudaSlice;
use fastrand::Rng;
use half::{bf16, f16};
use kernels::cuda::{GateActivation, Kernels, LaunchError, Linear, Onto, Products, Real, RmsNorm};

use crate::support::{
    cases, download, expect_close, kernels, numbers, poisoned, tolerance, upload, widened,
};

/// What a launch gets.
struct Case<T> {
    shape: Linear,
    x: Vec<T>,
    w: Vec<T>,
    /// What is in the output before: numbers where they are added to, otherwise NaN.
    before: Vec<T>,
}

impl<T: Real> Case<T> {
    fn filled(random: &mut Rng, shape: Linear) -> Self {
        let [x, w, out] = [
            (shape.rows, shape.inputs),
            (shape.w_rows(), shape.inputs),
            (shape.rows, shape.outputs),
        ]
        .map(|(rows, width)| rows as usize * width as usize);
        let before = match shape.onto {
            Onto::Nothing | Onto::Gate(_) => vec![T::from_f32(f32::NAN); out],
            Onto::Residual => numbers(random, out),
        };
        Self { shape, x: numbers(random, x), w: numbers(random, w), before }
    }

    /// Runs `launch` twice: what the first leaves must be what the second needs.
    fn check(
        &self,
        kernels: &Kernels,
        mut launch: impl FnMut(&[CudaSlice<T>; 2], &mut CudaSlice<T>) -> Result<(), LaunchError>,
    ) {
        let mut wanted = widened(&self.before);
        self.shape.reference(&widened(&self.x), &widened(&self.w), &mut wanted);
        let given = [upload(kernels, &self.x), upload(kernels, &self.w)];
        for run in 0..2 {
            let mut out = upload(kernels, &self.before);
            launch(&given, &mut out).expect("launch");
            let what = format!("{} {:?} run {run}", T::NAME, self.shape);
            // Sums of so many products are rounded in f32; terms are below 1. The library rounds some products to the dtype
            // before it adds them to the residual, and the sum once more. A gate's error is multiplied by the other product.
            let root = (self.shape.inputs as f32).sqrt();
            let (times, scale) = match self.shape.onto {
                Onto::Nothing => (1.0, 0.1 + 0.02 * root),
                Onto::Residual => (2.0, 1.0 + 0.1 * root),
                Onto::Gate(_) => (1.0, (0.1 + 0.02 * root) * (1.0 + 1.5 * root)),
            };
            expect_close(
                &what,
                &widened(&download(kernels, &out)),
                &wanted,
                (times * tolerance::<T>(), scale),
            );
        }
    }
}

fn onto(random: &mut Rng) -> Onto {
    if random.bool() { Onto::Nothing } else { Onto::Residual }
}

/// Small and odd, or as models have them.
fn few_row_shape(random: &mut Rng) -> Linear {
    let (rows, onto) = (random.u32(1..=16), onto(random));
    let inputs =
        if random.u32(..4) == 0 { 8 * random.u32(400..2000) } else { 8 * random.u32(1..200) };
    let outputs = if random.u32(..4) == 0 { random.u32(2000..6000) } else { random.u32(1..300) };
    // The reference takes a while.
    let outputs = outputs.min(40_000_000 / (inputs * rows)).max(1);
    Linear { rows, inputs, outputs, onto }
}

/// Takes one of the ways to a shape whose name begins like this; none if there is none.
fn check_way<T: Real>(random: &mut Rng, kernels: &Kernels, shape: Linear, name: &str) -> bool {
    let mut products = Products::open(kernels, &[shape], None).expect("the library");
    let ways = products.ways::<T>(&shape).expect("the library");
    let ways: Vec<_> = ways.into_iter().filter(|way| way.to_string().starts_with(name)).collect();
    let Some(way) = random.choice(&ways) else { return false };
    eprintln!("{shape:?} by {way}");
    let case = Case::<T>::filled(random, shape);
    case.check(kernels, |[x, w], out| kernels.linear_by(*way, &shape, (x, w), out, &mut products));
    true
}

fn check_any_way(random: &mut Rng, kernels: &Kernels, shape: Linear, name: &str) -> bool {
    if random.bool() {
        check_way::<bf16>(random, kernels, shape, name)
    } else {
        check_way::<f16>(random, kernels, shape, name)
    }
}

#[test]
fn products_of_few_rows_are_their_reference() {
    let kernels = kernels();
    cases(200, |random| {
        let shape = few_row_shape(random);
        assert!(check_any_way(random, &kernels, shape, "few_row"));
    });
}

/// A few of its rows or many, of tiles that are whole, in several parts, or cut off by the matrix's end.
fn split_k_shape(random: &mut Rng) -> Linear {
    let rows = random.u32(1..=600);
    let onto = match random.u32(..4) {
        0 => Onto::Gate(GateActivation::Silu),
        1 => Onto::Gate(GateActivation::Gelu),
        _ => onto(random),
    };
    let inputs = 8 * if random.u32(..4) == 0 { random.u32(400..2000) } else { random.u32(1..200) };
    let outputs = 8 * if random.u32(..4) == 0 { random.u32(250..1200) } else { random.u32(1..40) };
    // The reference takes a while.
    let outputs = outputs.min(40_000_000 / (inputs * rows)).next_multiple_of(8).max(8);
    Linear { rows, inputs, outputs, onto }
}

#[test]
fn products_in_tiles_of_clusters_are_their_reference() {
    let kernels = kernels();
    let mut checked = 0;
    cases(300, |random| {
        let shape = split_k_shape(random);
        checked += u32::from(check_any_way(random, &kernels, shape, "split_k"));
    });
    if checked == 0 {
        eprintln!("not tested: the device is no Hopper, or nothing was built for it");
    }
}

/// Each product reads its weights ahead, beside the launch before it, whose result is its input: a norm, or a product.
#[test]
fn a_chain_of_products_is_the_same_every_time() {
    let kernels = kernels();
    cases(10, |random| {
        let rows = random.u32(1..=150);
        let shape = |inputs, outputs, onto| Linear { rows, inputs, outputs, onto };
        let shapes = [shape(1024, 6144, Onto::Nothing), shape(6144, 1024, Onto::Residual)];
        let mut products = Products::open(&kernels, &shapes, None).unwrap();
        let weights: Vec<_> =
            (0..2).map(|_| upload(&kernels, &scaled(random, 1024 * 6144))).collect();
        let x = scaled(random, rows as usize * 1024);
        let norm = RmsNorm { rows, width: 1024, epsilon: 1e-5 };
        let scales = upload(&kernels, &vec![bf16::from_f32(0.5); 1024]);
        let mut run = |waits: bool| {
            let mut residual = upload(&kernels, &x);
            let mut normed = poisoned::<bf16>(&kernels, rows as usize * 1024);
            let mut inner = poisoned::<bf16>(&kernels, rows as usize * 6144);
            for _ in 0..20 {
                kernels.rms_norm(&norm, (&residual, &scales), &mut normed).unwrap();
                if waits {
                    kernels.stream().synchronize().unwrap();
                }
                kernels
                    .linear(&shapes[0], (&normed, &weights[0]), &mut inner, &mut products)
                    .unwrap();
                if waits {
                    kernels.stream().synchronize().unwrap();
                }
                kernels
                    .linear(&shapes[1], (&inner, &weights[1]), &mut residual, &mut products)
                    .unwrap();
                if waits {
                    kernels.stream().synchronize().unwrap();
                }
            }
            widened(&download(&kernels, &residual))
        };
        let wanted = run(true);
        assert!(wanted.iter().all(|value| value.is_finite()), "{rows} rows");
        for _ in 0..10 {
            assert_eq!(run(false), wanted, "{rows} rows");
        }
    });
}

/// So small that products of products neither vanish nor grow.
fn scaled(random: &mut Rng, len: usize) -> Vec<bf16> {
    (0..len).map(|_| bf16::from_f32((random.f32() * 2.0 - 1.0) * 0.02)).collect()
}

#[test]
fn products_of_the_library_are_their_reference() {
    let kernels = kernels();
    cases(60, |random| {
        let shape = Linear {
            rows: random.u32(1..300),
            inputs: 8 * random.u32(1..100),
            outputs: random.u32(1..400),
            onto: onto(random),
        };
        assert!(check_any_way(random, &kernels, shape, "cublaslt"));
    });
}

#[test]
fn choices_are_kept_in_the_file() {
    let kernels = kernels();
    let path: PathBuf =
        std::env::temp_dir().join(format!("bindery-choices-{}.json", std::process::id()));
    std::fs::write(&path, "not JSON").unwrap();
    let shape = Linear { rows: 64, inputs: 512, outputs: 768, onto: Onto::Nothing };
    let case = Case::<bf16>::filled(&mut Rng::with_seed(1), shape);
    let mut first = Products::open(&kernels, &[shape], Some(&path)).unwrap();
    let [x, w] = [upload(&kernels, &case.x), upload(&kernels, &case.w)];
    let mut out = poisoned(&kernels, case.before.len());
    first.tune(&kernels, &shape, (&x, &[&w]), &mut out).unwrap();
    first.save().unwrap();
    let kept = std::fs::read_to_string(&path).unwrap();
    assert!(kept.contains("bf16 64x768x512"), "{kept}");
    let mut second = Products::open(&kernels, &[shape], Some(&path)).unwrap();
    case.check(&kernels, |[x, w], out| kernels.linear(&shape, (x, w), out, &mut second));
    second.save().unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), kept);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_shape_that_was_not_timed_has_a_way() {
    let kernels = kernels();
    cases(20, |random| {
        let shape =
            Linear { rows: random.u32(1..200), inputs: 1024, outputs: 520, onto: onto(random) };
        let mut products = Products::open(&kernels, &[shape], None).unwrap();
        let case = Case::<bf16>::filled(random, shape);
        case.check(&kernels, |[x, w], out| kernels.linear(&shape, (x, w), out, &mut products));
    });
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let kernels = kernels();
    let shape = Linear { rows: 4, inputs: 64, outputs: 32, onto: Onto::Nothing };
    let case = Case::<bf16>::filled(&mut Rng::with_seed(1), shape);
    let [x, w] = [upload(&kernels, &case.x), upload(&kernels, &case.w)];
    let mut out = poisoned(&kernels, case.before.len());
    let mut products = Products::open(&kernels, &[Linear { outputs: 16, ..shape }], None).unwrap();
    let few_row = products.ways::<bf16>(&shape).unwrap()[0];
    assert_eq!(few_row.to_string(), "few_row");
    let mut refuses = |shape: Linear, word: &str| {
        let done = kernels.linear_by(few_row, &shape, (&x, &w), &mut out, &mut products);
        let error = done.unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refuses(Linear { rows: 5, ..shape }, "x");
    refuses(Linear { outputs: 33, ..shape }, "w");
    refuses(Linear { rows: 8, inputs: 32, outputs: 64, ..shape }, "out");
    refuses(Linear { rows: 64, inputs: 4, outputs: 512, ..shape }, "out");
    refuses(shape, "arrived");
    refuses(Linear { outputs: 16, onto: Onto::Gate(GateActivation::Silu), ..shape }, "few_row");
}
