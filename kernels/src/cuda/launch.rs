//! What every launch needs: checks of lengths, the kernel by its name.

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaFunction, CudaGraph, DriverError};

use super::{Kernels, LaunchError};
use crate::cpu::KernelError;

/// The names of kernels that there are for each pair of activations and of what K and V are stored as.
macro_rules! each_kv_dtype {
    ($name:literal: $($shape:literal)* $(; $($more:literal)*)?) => {
        &[
            $(
                concat!($name, "_bf16_", $shape),
                concat!($name, "_bf16_e4m3_", $shape),
                concat!($name, "_f16_", $shape),
                concat!($name, "_f16_e4m3_", $shape),
            )*
            $($($more),*)?
        ]
    };
}
pub(super) use each_kv_dtype;

/// Threads of a block where nothing speaks for another number.
pub(super) const THREADS: u32 = 256;
/// Numbers that a thread takes at once.
pub(super) const EIGHT: u32 = 8;

/// The length of an array.
pub(super) fn len(factors: &[u32]) -> usize {
    factors.iter().map(|factor| *factor as usize).fold(1, usize::saturating_mul)
}

pub(super) fn same(what: &'static str, got: usize, wanted: usize) -> Result<(), KernelError> {
    if got == wanted { Ok(()) } else { Err(KernelError::Length { what, wanted, got }) }
}

pub(super) fn at_least(what: &'static str, got: usize, wanted: usize) -> Result<(), KernelError> {
    if got >= wanted { Ok(()) } else { Err(KernelError::Length { what, wanted, got }) }
}

pub(super) fn below(what: &'static str, got: u32, limit: u32) -> Result<(), KernelError> {
    let (got, limit) = (got as usize, limit as usize);
    if got < limit { Ok(()) } else { Err(KernelError::OutOfRange { what, limit, got }) }
}

/// Rows are moved 16 bytes at a time.
pub(super) fn whole_eights(what: &'static str, width: u32) -> Result<(), LaunchError> {
    if width.is_multiple_of(EIGHT) && width > 0 {
        return Ok(());
    }
    Err(LaunchError::Unsupported(format!("{what} {width}: a multiple of {EIGHT} is wanted")))
}

/// Not a number where there are none.
fn median(mut values: Vec<f32>) -> f32 {
    values.sort_by(f32::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f32::NAN)
}

/// What the driver said of a launch.
pub(super) fn launched<T>(
    what: &'static str,
    result: Result<T, DriverError>,
) -> Result<(), LaunchError> {
    result.map(drop).map_err(|source| LaunchError::Driver { what, source })
}

impl Kernels {
    /// Records what `queue` queues as a graph, in place of running it. Launched again and again, it has the same arguments: what they
    /// point to must live as long.
    ///
    /// # Errors
    /// When `queue` fails or queues nothing, or the driver refuses.
    pub fn captured<E: From<LaunchError>>(
        &self,
        queue: impl FnOnce() -> Result<(), E>,
    ) -> Result<CudaGraph, E> {
        let refused = |source| LaunchError::Driver { what: "to capture a graph", source };
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream().begin_capture(mode).map_err(refused)?;
        let queued = queue();
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream().end_capture(flags);
        queued?;
        let nothing = || LaunchError::Unsupported("a graph of nothing".to_owned());
        Ok(graph.map_err(refused)?.ok_or_else(nothing)?)
    }

    /// Milliseconds that each graph takes, the median of replays of which the first `warm_up` do not count. They are replayed in turns:
    /// a device slows down at its limit of power, which would speak for what comes first. Waits for the device.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn replayed(
        &self,
        graphs: &[&CudaGraph],
        (warm_up, replays): (usize, usize),
    ) -> Result<Vec<f32>, DriverError> {
        let mut times = vec![Vec::new(); graphs.len()];
        for replay in 0..warm_up + replays {
            for (graph, times) in graphs.iter().zip(&mut times) {
                let time = self.timed(|| graph.launch())?;
                if replay >= warm_up {
                    times.push(time);
                }
            }
        }
        Ok(times.into_iter().map(median).collect())
    }

    /// Milliseconds that the device takes for what `queue` queues. Waits for it.
    ///
    /// # Errors
    /// When `queue` fails or the driver refuses.
    pub fn timed(
        &self,
        queue: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<f32, DriverError> {
        let event = || self.stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let begin = event()?;
        queue()?;
        begin.elapsed_ms(&event()?)
    }

    /// A kernel, or that none was built.
    pub(super) fn kernel(&self, name: &str) -> Result<&CudaFunction, LaunchError> {
        self.function(name).ok_or_else(|| LaunchError::Unsupported(name.to_owned()))
    }
}
