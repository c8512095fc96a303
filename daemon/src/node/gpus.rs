//! Which GPUs a node has and how they are: from the driver (NVML), or from a file in its place.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use serde::Deserialize;

use super::ledger::{Device, Health};

/// How the driver's UUIDs begin.
pub const PREFIX: &str = "GPU-";
/// The library that a driver brings; container runtimes mount it under this name alone.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// How long one wait for the driver's next error event lasts.
const EVENT_WAIT_MS: u32 = 1000;
/// After a wait that failed.
const PAUSE: Duration = Duration::from_secs(5);
/// Errors that a program causes and that end with it (NVIDIA, "XID Errors"): the device goes on.
const OF_PROGRAMS: [u64; 7] = [13, 31, 43, 45, 68, 94, 109];

/// Where the list of GPUs comes from.
#[derive(Debug, Clone)]
pub enum Gpus {
    /// A file that lists them.
    Listed(PathBuf),
    Driver(Driver),
    /// There is no driver.
    None,
}

/// NVIDIA's driver.
#[derive(Debug, Clone)]
pub struct Driver {
    nvml: Arc<Nvml>,
    /// What the driver last said against a device, by UUID. Only a reset heals it, and with that the agent starts anew.
    errors: Arc<Mutex<BTreeMap<String, String>>>,
}

/// One GPU of a file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Gpu {
    /// The driver's UUID, which begins with `GPU-`.
    uuid: String,
    memory_gib: u32,
    /// Why it cannot be granted from; absent: it can.
    #[serde(default)]
    unhealthy: Option<String>,
}

impl Gpus {
    /// The file if one is named, else the driver if there is one.
    ///
    /// # Errors
    /// When there is a driver that does not work.
    pub fn find(file: Option<&Path>) -> Result<Self> {
        if let Some(path) = file {
            return Ok(Self::Listed(path.to_owned()));
        }
        match Nvml::builder().lib_path(OsStr::new(LIBRARY)).init() {
            Ok(nvml) => Driver::watch(nvml).map(Self::Driver),
            Err(error @ (NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound)) => {
                tracing::info!(%error, "no NVIDIA driver");
                Ok(Self::None)
            }
            Err(error) => Err(error).context("start NVIDIA's management library"),
        }
    }

    /// Every GPU that can be seen now.
    ///
    /// # Errors
    /// When the list cannot be had.
    pub fn list(&self) -> Result<Vec<Device>> {
        match self {
            Self::Listed(path) => listed(path),
            Self::Driver(driver) => driver.list(),
            Self::None => Ok(Vec::new()),
        }
    }
}

fn listed(path: &Path) -> Result<Vec<Device>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("read {shown}"))?;
    let gpus: Vec<Gpu> = serde_yaml::from_str(&text)
        .with_context(|| format!("read {shown}: wanted a list of uuid and memoryGib"))?;
    let device = |gpu: Gpu| {
        ensure!(
            gpu.uuid.starts_with(PREFIX),
            "{shown}: wanted a uuid such as GPU-0a1b, got {:?}",
            gpu.uuid
        );
        Ok(Device { name: gpu.uuid, gib: gpu.memory_gib, health: health(gpu.unhealthy) })
    };
    gpus.into_iter().map(device).collect()
}

fn health(unhealthy: Option<String>) -> Health {
    unhealthy.map_or(Health::Healthy, |reason| Health::Unhealthy { reason })
}

impl Driver {
    /// Listens to what the driver reports of its devices, for as long as the process lives.
    fn watch(nvml: Nvml) -> Result<Self> {
        let driver = Self { nvml: Arc::new(nvml), errors: Arc::default() };
        let listener = driver.clone();
        std::thread::Builder::new()
            .name("gpu-events".into())
            .spawn(move || {
                if let Err(error) = listener.listen() {
                    tracing::warn!(%error, "the driver reports no errors of devices");
                }
            })
            .context("start the thread that listens to the driver")?;
        Ok(driver)
    }

    fn listen(&self) -> Result<(), NvmlError> {
        let mut events = self.nvml.create_event_set()?;
        for index in 0..self.nvml.device_count()? {
            let device = self.nvml.device_by_index(index)?;
            events = device
                .register_events(EventTypes::CRITICAL_XID_ERROR, events)
                .map_err(|failed| failed.error)?;
        }
        loop {
            match events.wait(EVENT_WAIT_MS) {
                Ok(event) => {
                    self.note(&event.device.uuid().unwrap_or_default(), event.event_data);
                }
                Err(NvmlError::Timeout) => {}
                // A device is lost; the others go on.
                Err(error) => {
                    tracing::warn!(%error, "cannot wait for the driver's next event");
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    fn note(&self, uuid: &str, error: Option<XidError>) {
        let said = match error {
            Some(XidError::Value(number)) if !OF_PROGRAMS.contains(&number) => number.to_string(),
            Some(XidError::Unknown) => "of an unknown kind".into(),
            Some(XidError::Value(_)) | None => return,
        };
        tracing::error!(uuid, xid = said, "the driver reports an error of the device");
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.insert(uuid.to_owned(), format!("the driver reports XID {said}"));
    }

    fn list(&self) -> Result<Vec<Device>> {
        let count = self.nvml.device_count().context("count the GPUs")?;
        let answers = (0..count).filter_map(|index| {
            let device = self.device(index);
            // It is missed in the list, and looked at again soon.
            device.inspect_err(|error| tracing::debug!(index, %error, "a GPU does not answer")).ok()
        });
        Ok(answers.collect())
    }

    fn device(&self, index: u32) -> Result<Device> {
        let asked = || format!("ask the driver for GPU {index}");
        let device = self.nvml.device_by_index(index).with_context(asked)?;
        let name = device.uuid().with_context(asked)?;
        let memory = device.memory_info().with_context(asked)?;
        // Not every device knows MIG.
        let is_split = device.mig_mode().is_ok_and(|mode| mode.current == 1);
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let reported = errors.get(&name).cloned();
        let reason = reported.or_else(|| is_split.then(|| "MIG is on: its memory is split".into()));
        let gib = u32::try_from(memory.total.saturating_sub(memory.reserved) >> 30)?;
        Ok(Device { name, gib, health: health(reason) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_takes_the_drivers_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text =
            "- {uuid: GPU-a, memoryGib: 2}\n- {uuid: GPU-b, memoryGib: 3, unhealthy: XID 79}\n";
        std::fs::write(file.path(), text).unwrap();
        let gpus = Gpus::find(Some(file.path())).unwrap();
        let unhealthy = Health::Unhealthy { reason: "XID 79".into() };
        let wanted = [
            Device { name: "GPU-a".into(), gib: 2, health: Health::Healthy },
            Device { name: "GPU-b".into(), gib: 3, health: unhealthy },
        ];
        assert_eq!(gpus.list().unwrap(), wanted);
        std::fs::write(file.path(), "- {uuid: a, memoryGib: 2}").unwrap();
        assert!(format!("{:#}", gpus.list().unwrap_err()).contains("such as GPU-0a1b"));
        std::fs::remove_file(file.path()).unwrap();
        assert!(gpus.list().is_err());
    }

    #[test]
    fn the_driver_lists_its_gpus_and_what_it_reports_of_them() {
        let Gpus::Driver(driver) = Gpus::find(None).unwrap() else {
            eprintln!("NOT RUN: the driver's list of GPUs. There is no NVIDIA driver here");
            return;
        };
        let found = driver.list().unwrap();
        assert!(!found.is_empty());
        for device in &found {
            eprintln!("{}: {} GiB, {:?}", device.name, device.gib, device.health);
            assert!(device.name.starts_with(PREFIX) && device.gib > 0);
        }
        driver.note(&found[0].name, Some(XidError::Value(31)));
        assert_eq!(driver.list().unwrap(), found, "a program's error is not the device's");
        driver.note(&found[0].name, Some(XidError::Value(79)));
        let reason = "the driver reports XID 79".into();
        assert_eq!(driver.list().unwrap()[0].health, Health::Unhealthy { reason });
    }
}
