//! The weights on a node's disk: how large they may be together, which were used last, which are in use.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// What is kept: each entry of one of these folders is used and removed as a whole.
#[derive(Debug)]
pub struct Cache {
    folders: Vec<PathBuf>,
    /// An empty file for each entry that was used; its time says when.
    used: PathBuf,
    limit_bytes: Option<u64>,
    in_use: Mutex<BTreeMap<PathBuf, usize>>,
}

/// Keeps an entry from being removed.
#[derive(Debug)]
pub struct Held {
    cache: Arc<Cache>,
    entry: PathBuf,
}

impl Cache {
    /// Of the entries of `folders`, together at most `limit_bytes`.
    pub fn new(root: &Path, folders: Vec<PathBuf>, limit_bytes: Option<u64>) -> Arc<Self> {
        let used = root.join("used");
        Arc::new(Self { folders, used, limit_bytes, in_use: Mutex::default() })
    }

    /// Holds the entry that `path` lies in, and notes that it is used; `None` for a path that is not kept here.
    pub fn hold(self: &Arc<Self>, path: &Path) -> Option<Held> {
        let entry = self.folders.iter().find_map(|folder| {
            let first = path.strip_prefix(folder).ok()?.components().next()?;
            Some(folder.join(first))
        })?;
        *self.in_use().entry(entry.clone()).or_default() += 1;
        if let Err(error) = self.touch(&entry) {
            tracing::warn!(entry = %entry.display(), %error, "cannot note the use of weights");
        }
        Some(Held { cache: Arc::clone(self), entry })
    }

    fn in_use(&self) -> std::sync::MutexGuard<'_, BTreeMap<PathBuf, usize>> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self, entry: &Path) -> PathBuf {
        self.used.join(entry.file_name().unwrap_or_default())
    }

    fn touch(&self, entry: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.used)?;
        std::fs::File::create(self.mark(entry))?.set_modified(SystemTime::now())
    }

    /// Removes what was not used for the longest time until `wanted` more bytes fit.
    ///
    /// # Errors
    /// With the bytes that are free when everything left is in use.
    pub fn make_room(&self, wanted: u64) -> Result<(), u64> {
        let Some(limit) = self.limit_bytes else { return Ok(()) };
        // Held throughout: nobody begins to use what is about to go.
        let in_use = self.in_use();
        let mut entries = self.entries();
        entries.sort_by_key(|entry| entry.1);
        let mut total = entries.iter().map(|entry| entry.2).fold(0, u64::saturating_add);
        for (entry, _, bytes) in &entries {
            if total.saturating_add(wanted) <= limit {
                break;
            }
            if in_use.contains_key(entry) || remove(entry).is_err() {
                continue;
            }
            // Without it the entry would merely count as never used.
            drop(std::fs::remove_file(self.mark(entry)));
            tracing::info!(entry = %entry.display(), bytes, "weights that were not used were removed");
            total -= bytes;
        }
        if total.saturating_add(wanted) <= limit {
            return Ok(());
        }
        Err(limit.saturating_sub(total))
    }

    /// Path, last use and bytes of each.
    fn entries(&self) -> Vec<(PathBuf, SystemTime, u64)> {
        let entries = self.folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok());
        let entry = |entry: std::fs::DirEntry| {
            let path = entry.path();
            let used = std::fs::metadata(self.mark(&path)).and_then(|mark| mark.modified());
            let bytes = size(&path);
            (path, used.unwrap_or(SystemTime::UNIX_EPOCH), bytes)
        };
        entries.flatten().flatten().map(entry).collect()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut in_use = self.cache.in_use();
        if let Some(count) = in_use.get_mut(&self.entry) {
            *count -= 1;
            if *count == 0 {
                in_use.remove(&self.entry);
            }
        }
    }
}

/// Bytes of a file, or of all files below a folder. Links are not followed: they name what is counted elsewhere.
fn size(path: &Path) -> u64 {
    let Ok(found) = std::fs::symlink_metadata(path) else { return 0 };
    if !found.is_dir() {
        return if found.is_file() { found.len() } else { 0 };
    }
    let inner = std::fs::read_dir(path).into_iter().flatten().flatten();
    inner.map(|entry| size(&entry.path())).fold(0, u64::saturating_add)
}

fn remove(entry: &Path) -> std::io::Result<()> {
    let removed =
        if entry.is_dir() { std::fs::remove_dir_all(entry) } else { std::fs::remove_file(entry) };
    if let Err(error) = &removed {
        tracing::warn!(entry = %entry.display(), %error, "cannot remove weights");
    }
    removed
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn cache(root: &Path) -> Arc<Cache> {
        let folders = vec![root.join("hub"), root.join("objects")];
        for name in ["hub/a/blobs/x", "hub/b/blobs/x", "objects/c"] {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, vec![0; 100]).unwrap();
        }
        Cache::new(root, folders, Some(350))
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_what_is_in_use_never() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path());
        assert!(cache.hold(Path::new("/elsewhere")).is_none());
        let used = |name: &str| {
            drop(cache.hold(&root.path().join(name)).unwrap());
            std::thread::sleep(Duration::from_millis(20));
        };
        used("objects/c");
        used("hub/a/snapshots/1/m.gguf");
        used("hub/b/snapshots/1/m.gguf");
        let held = cache.hold(&root.path().join("objects/c")).unwrap();
        drop(cache.hold(&root.path().join("objects/c")).unwrap());
        let there = |name: &str| root.path().join(name).exists();
        assert_eq!(cache.make_room(50), Ok(()));
        assert!(there("hub/a") && there("hub/b") && there("objects/c"), "it fits as it is");
        assert_eq!(cache.make_room(51), Ok(()));
        assert!(!there("hub/a") && there("hub/b") && there("objects/c"));
        assert_eq!(cache.make_room(300), Err(250));
        assert!(!there("hub/b") && there("objects/c"), "it is in use");
        drop(held);
        assert_eq!(cache.make_room(300), Ok(()));
        assert!(!there("objects/c"));
    }
}
