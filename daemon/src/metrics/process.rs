//! The process's own figures under their standard names, read from /proc when they are asked for.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Error, Gauge};

/// CPU time, memory and file descriptors of this process.
#[derive(Debug)]
pub(super) struct ProcessFigures {
    cpu: Counter,
    resident: Gauge,
    virtual_memory: Gauge,
    open_files: Gauge,
    started: Gauge,
}

impl ProcessFigures {
    pub(super) fn new() -> Result<Self, Error> {
        let figures = Self {
            cpu: Counter::new("process_cpu_seconds_total", "CPU time used, user and system.")?,
            resident: Gauge::new("process_resident_memory_bytes", "Resident memory.")?,
            virtual_memory: Gauge::new("process_virtual_memory_bytes", "Mapped memory.")?,
            open_files: Gauge::new("process_open_fds", "Open file descriptors.")?,
            started: Gauge::new(
                "process_start_time_seconds",
                "When the process started, since 1970.",
            )?,
        };
        figures.started.set(start_time().unwrap_or(0.0));
        Ok(figures)
    }

    /// Reads what can be read; a figure that cannot be keeps its last value.
    fn read(&self) {
        let page = rustix::param::page_size() as f64;
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let mut pages = statm.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
        if let (Some(mapped), Some(resident)) = (pages.next(), pages.next()) {
            self.virtual_memory.set(mapped * page);
            self.resident.set(resident * page);
        }
        if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
            self.open_files.set(files.count() as f64);
        }
        if let Some((_, user, system)) = stat() {
            let seconds = (user + system) / rustix::param::clock_ticks_per_second() as f64;
            self.cpu.inc_by((seconds - self.cpu.get()).max(0.0));
        }
    }
}

/// Start, user and system time in clock ticks.
fn stat() -> Option<(f64, f64, f64)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name of the process may hold anything, a closing bracket too: fields are counted from the last one.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |index: usize| fields.get(index)?.parse::<f64>().ok();
    Some((field(19)?, field(11)?, field(12)?))
}

fn start_time() -> Option<f64> {
    let system = std::fs::read_to_string("/proc/stat").ok()?;
    let booted: f64 =
        system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(booted + stat()?.0 / rustix::param::clock_ticks_per_second() as f64)
}

impl Collector for ProcessFigures {
    fn desc(&self) -> Vec<&Desc> {
        let gauges = [&self.resident, &self.virtual_memory, &self.open_files, &self.started];
        self.cpu.desc().into_iter().chain(gauges.into_iter().flat_map(Collector::desc)).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        let gauges = [&self.resident, &self.virtual_memory, &self.open_files, &self.started];
        self.cpu
            .collect()
            .into_iter()
            .chain(gauges.into_iter().flat_map(Collector::collect))
            .collect()
    }
}
