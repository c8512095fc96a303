//! Random cases and comparisons.

use cudarc::driver::{CudaSlice, DeviceRepr};
use fastrand::Rng;
use half::{bf16, f16};
use kernels::cuda::{Arena, ArenaShape, E4m3, Kernels, KvReal, KvValues, Real};

/// The first device with its kernels.
pub(crate) fn kernels() -> Kernels {
    Kernels::open(0).unwrap_or_else(|error| panic!("this test needs an NVIDIA GPU: {error}"))
}

/// Runs `one` on random cases; a failure names the seed that repeats it.
pub(crate) fn cases(default: u64, one: impl FnMut(&mut Rng)) {
    run(number("BINDERY_CASES").unwrap_or(default), one);
}

/// Runs `one` once, whatever number of cases is wanted: it goes through all there is by itself.
pub(crate) fn once(one: impl FnMut(&mut Rng)) {
    run(1, one);
}

fn run(count: u64, mut one: impl FnMut(&mut Rng)) {
    let first = number("BINDERY_SEED").unwrap_or_else(|| fastrand::u64(..1 << 40));
    eprintln!("{count} cases from BINDERY_SEED={first}");
    for seed in first..first + count {
        let run = std::panic::AssertUnwindSafe(|| one(&mut Rng::with_seed(seed)));
        if std::panic::catch_unwind(run).is_err() {
            panic!("failed with BINDERY_SEED={seed} BINDERY_CASES=1");
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
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

/// What K and V are stored as, beside activations of `T`.
pub(crate) trait KvNumber<T: Real>: KvReal<T> + Clone {
    /// The largest that `stored` makes of 1.
    const MOST: f32;
    const NAN: Self;
    /// A number from -1 to 1, times `MOST`.
    fn stored(value: f32) -> Self;
    fn set_scales(arena: &mut Arena<Self>, kernels: &Kernels, scales: &[f32]);
}

macro_rules! stored_as_it_is {
    ($real:ty) => {
        impl KvNumber<$real> for $real {
            const MOST: f32 = 1.0;
            const NAN: Self = Self::NAN;
            fn stored(value: f32) -> Self {
                Self::from_f32(value)
            }
            fn set_scales(_: &mut Arena<Self>, _: &Kernels, _: &[f32]) {}
        }
    };
}
stored_as_it_is!(bf16);
stored_as_it_is!(f16);

impl<T: Real> KvNumber<T> for E4m3 {
    const MOST: f32 = 448.0;
    const NAN: Self = Self(0x7F);
    fn stored(value: f32) -> Self {
        Self::from_f32(value * <Self as KvNumber<T>>::MOST)
    }
    fn set_scales(arena: &mut Arena<Self>, kernels: &Kernels, scales: &[f32]) {
        kernels.stream().memcpy_htod(scales, arena.scales_mut()).expect("upload");
    }
}

/// An arena's contents, on the host.
pub(crate) struct KvCase<KV> {
    pub(crate) shape: ArenaShape,
    pub(crate) values: Vec<KV>,
    scales: Vec<f32>,
}

impl<KV> KvCase<KV> {
    /// Random numbers up to 1 from -1, or from 0: then what is left out of a sum of weights is seen, however many are averaged.
    pub(crate) fn random<T: Real>(random: &mut Rng, shape: ArenaShape) -> Self
    where
        KV: KvNumber<T>,
    {
        let len = shape.len().unwrap_or(0);
        let least = random.choice([-1.0, 0.0]).unwrap_or(0.0);
        let number = |_| KV::stored(least + (1.0 - least) * random.f32());
        let values = (0..len).map(number).collect();
        let scale = |_| if KV::MOST == 1.0 { 1.0 } else { (0.25 + 0.75 * random.f32()) / KV::MOST };
        Self { shape, values, scales: (0..shape.layers * shape.kv_heads * 2).map(scale).collect() }
    }

    pub(crate) fn upload<T: Real>(&self, kernels: &Kernels) -> Arena<KV>
    where
        KV: KvNumber<T>,
    {
        let mut arena = Arena::new(kernels, self.shape).expect("memory");
        kernels.stream().memcpy_htod(&self.values, arena.values_mut()).expect("upload");
        KV::set_scales(&mut arena, kernels, &self.scales);
        arena
    }

    pub(crate) fn values(&self) -> KvValues<'_, KV> {
        KvValues { shape: self.shape, values: &self.values, scales: &self.scales }
    }
}

/// Runs a generic check with each pair of activations and of what K and V are stored as, at random.
macro_rules! any_kv_dtype {
    ($random:expr, $($call:tt)*) => {
        match $random.u32(..4) {
            0 => $crate::support::any_kv_dtype!(@ half::bf16, half::bf16, $($call)*),
            1 => $crate::support::any_kv_dtype!(@ half::bf16, kernels::cuda::E4m3, $($call)*),
            2 => $crate::support::any_kv_dtype!(@ half::f16, half::f16, $($call)*),
            _ => $crate::support::any_kv_dtype!(@ half::f16, kernels::cuda::E4m3, $($call)*),
        }
    };
    (@ $t:ty, $kv:ty, $check:ident($($argument:expr),*)) => { $check::<$t, $kv>($($argument),*) };
}
pub(crate) use any_kv_dtype;
