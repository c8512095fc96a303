//! Random cases and comparisons.

use cudarc::driver::{CudaSlice, DeviceRepr};
use fastrand::Rng;
use kernels::cuda::{Kernels, Real};

/// The first device with its kernels.
pub(crate) fn kernels() -> Kernels {
    Kernels::open(0).unwrap_or_else(|error| panic!("this test needs an NVIDIA GPU: {error}"))
}

/// Runs `one` on random cases; a failure names the seed that repeats it.
pub(crate) fn cases(default: u64, mut one: impl FnMut(&mut Rng)) {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let count = number("BINDERY_CASES").unwrap_or(default);
    let first = number("BINDERY_SEED").unwrap_or_else(|| fastrand::u64(..1 << 40));
    eprintln!("{count} cases from BINDERY_SEED={first}");
    for seed in first..first + count {
        let run = std::panic::AssertUnwindSafe(|| one(&mut Rng::with_seed(seed)));
        if std::panic::catch_unwind(run).is_err() {
            panic!("failed with BINDERY_SEED={seed} BINDERY_CASES=1");
        }
    }
}

/// Numbers from -1 to 1 as the dtype holds them.
pub(crate) fn numbers<T: Real>(random: &mut Rng, len: usize) -> Vec<T> {
    (0..len).map(|_| T::from_f32(random.f32() * 2.0 - 1.0)).collect()
}

pub(crate) fn widened<T: Real>(values: &[T]) -> Vec<f32> {
    values.iter().map(|value| (*value).into()).collect()
}

pub(crate) fn upload<T: DeviceRepr>(kernels: &Kernels, values: &[T]) -> CudaSlice<T> {
    kernels.stream().clone_htod(values).expect("upload")
}

pub(crate) fn download<T: DeviceRepr>(kernels: &Kernels, values: &CudaSlice<T>) -> Vec<T> {
    let values = kernels.stream().clone_dtoh(values).expect("download");
    kernels.stream().synchronize().expect("the kernel fails");
    values
}

/// Memory full of NaN, so that what a kernel does not write is seen.
pub(crate) fn poisoned<T: Real>(kernels: &Kernels, len: usize) -> CudaSlice<T> {
    upload(kernels, &vec![T::from_f32(f32::NAN); len])
}

/// Compares element by element: within `tolerance` of the wanted value, relative to the larger of it and `scale`.
pub(crate) fn expect_close(
    what: &str,
    got: &[f32],
    wanted: &[f32],
    (tolerance, scale): (f32, f32),
) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    for (index, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let allowed = tolerance * wanted.abs().max(scale);
        assert!(
            (got - wanted).abs() <= allowed,
            "{what}[{index}]: got {got}, wanted {wanted} within {allowed}"
        );
    }
}

/// How far a dtype's rounding may move a result: 2^-8 and 2^-11, with some room.
pub(crate) fn tolerance<T: Real>() -> f32 {
    if T::NAME == "bf16" { 0.006 } else { 0.001 }
}
