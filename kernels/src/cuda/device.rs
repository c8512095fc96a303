//! A device with its kernels loaded.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, PinnedHostSlice,
    result, sys,
};
use cudarc::nvrtc::Ptx;

use super::DeviceError;
use super::beside::Begins;

/// The driver's version that kernels were built for.
const CUDA: (i32, i32) = (13, 0);
/// The oldest device.
const CAPABILITY: (i32, i32) = (8, 0);

/// The kernels' files and what they hold.
const MODULES: &[Module] = &[
    super::copy_blocks::MODULE,
    super::few_row::MODULE,
    super::gate::MODULE,
    super::gather::MODULE,
    super::paged_decode::MODULE,
    super::paged_prefill::HOPPER_MODULE,
    super::paged_prefill::MODULE,
    super::rms_norm::MODULE,
    super::rope_store::MODULE,
    super::sample::MODULE,
    super::sampling_rows::MODULE,
    super::shared_prefix::MODULE,
    super::split_k::MODULE,
];

/// Kernels of one `.cu`.
pub(super) struct Module {
    pub(super) image: &'static [u8],
    pub(super) functions: &'static [&'static str],
    /// Bytes of shared memory that a block may ask for.
    pub(super) most_shared: u32,
}

/// A device, the one stream that everything is queued on, and every kernel.
#[derive(Debug)]
pub struct Kernels {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    functions: HashMap<&'static str, CudaFunction>,
    multiprocessors: u32,
    most_shared: u32,
    /// Of every launch: all modules are built for the same devices.
    begins: Begins,
}

impl Kernels {
    /// Opens a device and loads the kernels.
    ///
    /// # Errors
    /// Says what is there and what is needed: no driver, an old one, no such device, an old one.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        check_driver(ordinal)?;
        let context = CudaContext::new(ordinal).map_err(driver("open the device"))?;
        check_capability(&context)?;
        // SAFETY: there is one stream, so that nothing has to wait for another; this type makes no second one.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(driver("make a stream"))?;
        let ask = |what| context.attribute(what).map_err(driver("ask for the device's sizes"));
        let count = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let most = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let mut functions = HashMap::new();
        for module in MODULES {
            load(&context, (module, most), &mut functions).map_err(driver("load a kernel"))?;
        }
        let begins = Begins::of(&functions[MODULES[0].functions[0]]);
        let begins = begins.map_err(driver("ask what a kernel was built for"))?;
        let (multiprocessors, most_shared) = (count.unsigned_abs(), most.unsigned_abs());
        Ok(Self { context, stream, functions, multiprocessors, most_shared, begins })
    }

    /// The stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The device's name, such as `NVIDIA H200`.
    pub fn name(&self) -> String {
        self.context.name().unwrap_or_default()
    }

    /// Multiprocessors of the device.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Bytes of shared memory that a block may have.
    pub(super) fn most_shared(&self) -> u32 {
        self.most_shared
    }

    /// Whether the kernels with Hopper's own instructions are there: the device is one, and this was built for it.
    pub(super) fn is_hopper(&self) -> bool {
        self.begins == Begins::Beside
    }

    pub(super) fn begins(&self) -> Begins {
        self.begins
    }

    /// Takes device memory; its contents are undefined.
    ///
    /// # Errors
    /// When the device has not as much.
    pub fn memory<T: DeviceRepr>(&self, len: usize) -> Result<CudaSlice<T>, DeviceError> {
        // SAFETY: every bit pattern is a value of a `DeviceRepr`, and no kernel reads what was not written.
        let taken = unsafe { self.stream.alloc(len) };
        taken.map_err(|_| DeviceError::OutOfMemory {
            bytes: len.saturating_mul(size_of::<T>()),
            free: self.context.mem_get_info().map_or(0, |(free, _)| free),
        })
    }

    /// Takes memory of the host that copies reach without help. It does not wait for them, neither where it is read nor where it is
    /// dropped: whoever queues a copy does.
    ///
    /// # Errors
    /// When the host has not as much.
    pub fn pinned<T: DeviceRepr>(&self, len: usize) -> Result<PinnedHostSlice<T>, DeviceError> {
        // SAFETY: every bit pattern is a value of a `DeviceRepr`.
        unsafe { self.context.alloc_pinned(len) }.map_err(driver("take pinned memory"))
    }

    /// A kernel; absent: it was not built for such a shape.
    pub(super) fn function(&self, name: &str) -> Option<&CudaFunction> {
        self.functions.get(name)
    }
}

/// An error of the driver, with what was tried.
pub(super) fn driver(what: &'static str) -> impl Fn(DriverError) -> DeviceError {
    move |source| DeviceError::Driver { what, source }
}

fn check_driver(ordinal: usize) -> Result<(), DeviceError> {
    // SAFETY: opens a library and closes it again.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver);
    }
    result::init().map_err(driver("initialize the driver"))?;
    let mut version = 0;
    // SAFETY: writes one number.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    asked.result().map_err(driver("ask for the driver's version"))?;
    let (major, minor) = (version / 1000, version % 1000 / 10);
    if (major, minor) < CUDA {
        return Err(DeviceError::OldDriver { major, minor });
    }
    let count = CudaContext::device_count().map_err(driver("count devices"))?;
    let count = usize::try_from(count).unwrap_or(0);
    if ordinal >= count {
        return Err(DeviceError::NoDevice { ordinal, count });
    }
    Ok(())
}

fn check_capability(context: &CudaContext) -> Result<(), DeviceError> {
    let (major, minor) =
        context.compute_capability().map_err(driver("ask for the compute capability"))?;
    if (major, minor) >= CAPABILITY {
        return Ok(());
    }
    let name = context.name().unwrap_or_default();
    Err(DeviceError::OldDevice { ordinal: context.ordinal(), name, major, minor })
}

fn load(
    context: &Arc<CudaContext>,
    (module, most_shared): (&Module, i32),
    functions: &mut HashMap<&'static str, CudaFunction>,
) -> Result<(), DriverError> {
    use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST_SHARED;
    let loaded = context.load_module(Ptx::from_binary(module.image.to_vec()))?;
    for name in module.functions {
        let function = loaded.load_function(name)?;
        if module.most_shared > 0 {
            // A launch that needs more than the device has is refused by the driver.
            let most = i32::try_from(module.most_shared).unwrap_or(i32::MAX);
            function.set_attribute(MOST_SHARED, most.min(most_shared))?;
        }
        functions.insert(name, function);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_said_with_what_is_needed() {
        // On a machine with a driver no device has this number.
        let error = Kernels::open(usize::MAX).unwrap_err();
        let words = error.to_string();
        match error {
            DeviceError::NoDriver | DeviceError::OldDriver { .. } => {
                assert!(words.contains("driver 580"), "{words}");
            }
            DeviceError::NoDevice { .. } => assert!(words.contains("is not there"), "{words}"),
            other => panic!("{other}"),
        }
    }
}
