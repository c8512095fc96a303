//! Tells how far a download is: a bar on a terminal, log lines elsewhere, a call for whoever supervises.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How far a download is, all files together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Downloaded {
    pub bytes: u64,
    pub total_bytes: u64,
}

/// Shows [`Downloaded`] as it grows.
pub(super) struct Progress<'a> {
    bar: ProgressBar,
    on_terminal: Terminal,
    logged_tenths: u64,
    now: Downloaded,
    report: &'a (dyn Fn(Downloaded) + Send + Sync),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Terminal {
    Present,
    Absent,
}

impl<'a> Progress<'a> {
    pub(super) fn new(total_bytes: u64, report: &'a (dyn Fn(Downloaded) + Send + Sync)) -> Self {
        let on_terminal =
            if std::io::stderr().is_terminal() { Terminal::Present } else { Terminal::Absent };
        let bar = match on_terminal {
            Terminal::Present => ProgressBar::new(total_bytes),
            Terminal::Absent => ProgressBar::hidden(),
        };
        let style = ProgressStyle::with_template(
            "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self {
            bar,
            on_terminal,
            logged_tenths: 0,
            now: Downloaded { bytes: 0, total_bytes },
            report,
        }
    }

    /// Names the file that comes now.
    pub(super) fn file(&self, path: &str) {
        self.bar.set_message(path.to_owned());
    }

    /// Sets the bytes that are on disk, all files together.
    pub(super) fn set(&mut self, bytes: u64) {
        self.now.bytes = bytes;
        self.bar.set_position(bytes);
        (self.report)(self.now);
        let tenths = bytes.saturating_mul(10).checked_div(self.now.total_bytes).unwrap_or(10);
        if self.on_terminal == Terminal::Absent && tenths > self.logged_tenths {
            self.logged_tenths = tenths;
            tracing::info!(bytes, total_bytes = self.now.total_bytes, "downloading the model");
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
