//! A read-only file mapping, safe to hold.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use memmap2::{Mmap, UncheckedAdvice};

const PAGE: usize = 4096;

/// The bytes of a file, mapped read-only.
///
/// A file that another process cuts short while it is mapped ends this process with SIGBUS when the lost pages are
/// read: model files are replaced by renaming, never rewritten.
#[derive(Debug)]
pub struct Mapping {
    map: Mmap,
}

impl Mapping {
    /// Maps a regular file.
    ///
    /// # Errors
    /// When the file cannot be opened or mapped, or is no regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        // SAFETY: the mapping is private and read-only; what remains, a file cut short by others, is documented above.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self { map })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The file's length in bytes.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Gives the whole pages inside `range` back: they are read from the file again when they are needed again.
    pub fn release(&self, range: Range<usize>) {
        let first = range.start.next_multiple_of(PAGE);
        let end = range.end.min(self.map.len()) / PAGE * PAGE;
        if first < end {
            // SAFETY: the pages of a private read-only file mapping hold nothing but the file's bytes, which the
            // kernel reads again on the next access; no reference sees a change.
            let advised = unsafe {
                self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, first, end - first)
            };
            // Memory that stays is a cost, not a failure.
            drop(advised);
        }
    }
}
