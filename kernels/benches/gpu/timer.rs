//! Times what the device does, without what the host does.

use std::error::Error;

use cudarc::driver::{CudaGraph, CudaSlice, DeviceRepr};
use half::bf16;
use kernels::cuda::{Arena, ArenaShape, Kernels};

const REPLAYS: usize = 15;
/// Replays that do not count.
const WARM_UP: usize = 3;
/// Bytes of the copy that says how fast memory is.
const COPY: usize = 4 << 30;

pub(crate) struct Timer {
    pub(crate) kernels: Kernels,
    /// GB/s, read and written.
    pub(crate) copy_rate: f64,
}

/// Launches that are replayed together.
pub(crate) struct Captured {
    graph: CudaGraph,
    launches: usize,
}

impl Timer {
    pub(crate) fn new() -> Result<Self, Box<dyn Error>> {
        let mut timer = Self { kernels: Kernels::open(0)?, copy_rate: 0.0 };
        let from = timer.kernels.memory::<u8>(COPY)?;
        let mut to = timer.kernels.memory::<u8>(COPY)?;
        timer.copy_rate = 2.0 * COPY as f64 / timer.copy(&from, &mut to)? / 1e3;
        Ok(timer)
    }

    /// Microseconds of a copy, the least of some: not from a graph, which has another engine do it.
    fn copy(&self, from: &CudaSlice<u8>, to: &mut CudaSlice<u8>) -> Result<f64, Box<dyn Error>> {
        let stream = self.kernels.stream();
        let mut least = f64::INFINITY;
        for _ in 0..REPLAYS {
            let time = self.kernels.timed(|| stream.memcpy_dtod(from, to))?;
            least = least.min(f64::from(time) * 1e3);
        }
        Ok(least)
    }

    /// Microseconds of one of `launches` launches: the median of replays of a graph that has them all.
    pub(crate) fn time(
        &self,
        launches: usize,
        launch: impl FnMut(usize) -> Result<(), Box<dyn Error>>,
    ) -> Result<f64, Box<dyn Error>> {
        let [time] = self.in_turns([&self.captured(launches, launch)?])?;
        Ok(time)
    }

    /// Launches in a graph, one of which has run.
    pub(crate) fn captured(
        &self,
        launches: usize,
        mut launch: impl FnMut(usize) -> Result<(), Box<dyn Error>>,
    ) -> Result<Captured, Box<dyn Error>> {
        launch(0)?;
        self.kernels.stream().synchronize()?;
        let graph = self.kernels.captured(|| (0..launches).try_for_each(launch))?;
        Ok(Captured { graph, launches })
    }

    /// Microseconds of one launch of each, in turns.
    pub(crate) fn in_turns<const N: usize>(
        &self,
        captured: [&Captured; N],
    ) -> Result<[f64; N], Box<dyn Error>> {
        let times = self.kernels.replayed(&captured.map(|it| &it.graph), (WARM_UP, REPLAYS))?;
        Ok(std::array::from_fn(|i| f64::from(times[i]) * 1e3 / captured[i].launches as f64))
    }

    /// Random numbers in device memory: a few MiB of them, again and again.
    pub(crate) fn numbers(&self, len: usize, seed: u64) -> Result<CudaSlice<bf16>, Box<dyn Error>> {
        let piece = Self::piece(len.min(4 << 20), seed, bf16::from_f32);
        let mut values = self.kernels.memory(len)?;
        self.fill(&piece, &mut values)?;
        Ok(values)
    }

    /// An arena full of random numbers, which `stored` makes of numbers from -1 to 1.
    pub(crate) fn arena<KV: DeviceRepr>(
        &self,
        shape: ArenaShape,
        stored: fn(f32) -> KV,
    ) -> Result<Arena<KV>, Box<dyn Error>> {
        let mut arena = Arena::new(&self.kernels, shape)?;
        self.fill(&Self::piece(4 << 20, 3, stored), arena.values_mut())?;
        Ok(arena)
    }

    fn piece<T>(len: usize, seed: u64, made: fn(f32) -> T) -> Vec<T> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..len).map(|_| made(random.f32() * 2.0 - 1.0)).collect()
    }

    /// Repeats a piece over device memory.
    pub(crate) fn fill<T: DeviceRepr>(
        &self,
        piece: &[T],
        values: &mut CudaSlice<T>,
    ) -> Result<(), Box<dyn Error>> {
        let stream = self.kernels.stream();
        let len = values.len();
        let first = piece.len().min(len);
        stream.memcpy_htod(&piece[..first], &mut values.slice_mut(..first))?;
        let mut done = first;
        while done < len {
            let (filled, mut rest) = values.split_at_mut(done);
            let count = done.min(len - done);
            stream.memcpy_dtod(&filled.slice(..count), &mut rest.slice_mut(..count))?;
            done += count;
        }
        Ok(())
    }
}
