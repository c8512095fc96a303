//! The room that downloads share on a disk: how much there is, what was not used for longest, what is in use.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// Room on disk; clones are the same room. The default has no limit but the disk's, and nothing to remove.
#[derive(Debug, Clone, Default)]
pub struct Room(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Each entry of one of these is used and removed as a whole. Its modification time says when it was used last.
    folders: Vec<PathBuf>,
    /// Folders of links to what is kept; a link goes with what it names.
    links: Vec<PathBuf>,
    limit_bytes: Option<u64>,
    in_use: Mutex<Vec<Use>>,
}

/// An entry that is in use, and the bytes that it is going to have.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Use {
    entry: PathBuf,
    bytes: u64,
}

/// Keeps an entry from being removed, and the bytes that it was promised from being given away.
#[derive(Debug)]
pub struct Held {
    room: Room,
    used: Use,
}

struct Entry {
    path: PathBuf,
    used: SystemTime,
    bytes: u64,
}

/// What a download is weighed against, in bytes.
#[derive(Debug, Clone, Copy)]
struct Space {
    limit: Option<u64>,
    disk_free: u64,
    kept: u64,
    /// What downloads that run have not written yet.
    promised: u64,
}

impl Space {
    /// Bytes that must go before `wanted` more fit.
    fn over(self, wanted: u64) -> u64 {
        let coming = self.promised.saturating_add(wanted);
        let over_limit =
            self.limit.map_or(0, |limit| self.kept.saturating_add(coming).saturating_sub(limit));
        over_limit.max(coming.saturating_sub(self.disk_free))
    }
}

impl Room {
    /// For the entries of `folders`, together at most `limit_bytes`, with `links` to them.
    pub fn new(folders: Vec<PathBuf>, links: Vec<PathBuf>, limit_bytes: Option<u64>) -> Self {
        Self(Arc::new(Shared { folders, links, limit_bytes, in_use: Mutex::default() }))
    }

    /// Holds the entry that `path` lies in, and notes that it is used.
    pub fn hold(&self, path: &Path) -> Held {
        self.held(&mut self.in_use(), Use { entry: self.entry(path), bytes: 0 })
    }

    /// Holds the entry that `path` lies in with `wanted` bytes more than it has. What was not used for longest is removed
    /// for them, or nothing where that would not be enough.
    ///
    /// # Errors
    /// With the bytes that would be free without anything that is not in use.
    pub(crate) fn reserve(&self, path: &Path, wanted: u64) -> Result<Held, u64> {
        // Its own first part is not what goes.
        let held = self.hold(path);
        if wanted == 0 {
            return Ok(held);
        }
        // Locked throughout: nobody begins to use what is about to go.
        let mut in_use = self.in_use();
        let entry = held.entry().to_owned();
        let bytes = size(&entry).saturating_add(wanted);
        let entries = self.entries();
        let over = self.space(&entry, &in_use, &entries).over(wanted);
        let over = self.make(over, entries, &in_use);
        if over > 0 {
            return Err(wanted.saturating_sub(over));
        }
        Ok(self.held(&mut in_use, Use { entry, bytes }))
    }

    fn in_use(&self) -> MutexGuard<'_, Vec<Use>> {
        self.0.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, path: &Path) -> PathBuf {
        let inside = self.0.folders.iter().find_map(|folder| {
            let first = path.strip_prefix(folder).ok()?.components().next()?;
            Some(folder.join(first))
        });
        inside.unwrap_or_else(|| path.to_owned())
    }

    fn held(&self, in_use: &mut Vec<Use>, used: Use) -> Held {
        touch(&used.entry);
        in_use.push(used.clone());
        Held { room: self.clone(), used }
    }

    fn space(&self, path: &Path, in_use: &[Use], entries: &[Entry]) -> Space {
        let missing = |used: &Use| match used.bytes {
            0 => 0,
            bytes => bytes.saturating_sub(size(&used.entry)),
        };
        Space {
            limit: self.0.limit_bytes,
            disk_free: disk_free(path),
            kept: sum(entries.iter().map(|entry| entry.bytes)),
            promised: sum(in_use.iter().map(missing)),
        }
    }

    /// Removes what is not in use, oldest first, and says how many of the bytes are still over.
    fn make(&self, mut over: u64, entries: Vec<Entry>, in_use: &[Use]) -> u64 {
        let is_used = |entry: &Entry| in_use.iter().any(|used| used.entry == entry.path);
        let mut unused: Vec<_> = entries.into_iter().filter(|entry| !is_used(entry)).collect();
        let removable = sum(unused.iter().map(|entry| entry.bytes));
        if over == 0 || over > removable {
            return over.saturating_sub(removable);
        }
        unused.sort_by_key(|entry| entry.used);
        for Entry { path, bytes, .. } in unused {
            if over > 0 && remove(&path).is_ok() {
                tracing::info!(entry = %path.display(), bytes, "weights that were not used were removed");
                over = over.saturating_sub(bytes);
            }
        }
        self.remove_loose_links();
        over
    }

    fn entries(&self) -> Vec<Entry> {
        let entries = self.0.folders.iter().flat_map(|folder| inside(folder));
        let entry = |path: PathBuf| {
            let used = std::fs::symlink_metadata(&path).and_then(|found| found.modified());
            let bytes = size(&path);
            Entry { path, used: used.unwrap_or(SystemTime::UNIX_EPOCH), bytes }
        };
        entries.map(entry).collect()
    }

    fn remove_loose_links(&self) {
        for link in self.0.links.iter().flat_map(|folder| inside(folder)) {
            if !link.exists() {
                // One that stays leads nowhere.
                drop(std::fs::remove_file(link));
            }
        }
    }
}

impl Held {
    /// What is held.
    pub fn entry(&self) -> &Path {
        &self.used.entry
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut in_use = self.room.in_use();
        touch(&self.used.entry);
        if let Some(at) = in_use.iter().position(|used| *used == self.used) {
            in_use.swap_remove(at);
        }
    }
}

fn sum(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

fn inside(folder: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Bytes of a file, or of all files below a folder. Links are not followed: they name what is counted elsewhere.
fn size(path: &Path) -> u64 {
    let Ok(found) = std::fs::symlink_metadata(path) else { return 0 };
    if !found.is_dir() {
        return if found.is_file() { found.len() } else { 0 };
    }
    sum(inside(path).map(|path| size(&path)))
}

/// Bytes that the file system of a path still takes; one that cannot say is tried.
fn disk_free(path: &Path) -> u64 {
    let space = path.ancestors().find_map(|path| rustix::fs::statvfs(path).ok());
    space.map_or(u64::MAX, |space| space.f_bavail.saturating_mul(space.f_frsize))
}

/// What is not there yet is noted when it is left.
fn touch(entry: &Path) {
    let touched = std::fs::File::open(entry).and_then(|file| file.set_modified(SystemTime::now()));
    match touched {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(entry = %entry.display(), %error, "cannot note the use of weights");
        }
        Ok(()) | Err(_) => {}
    }
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
    use super::*;

    /// Three entries of 100 bytes and a link to one, in a room for 350.
    struct Bench {
        root: tempfile::TempDir,
        room: Room,
    }

    impl Bench {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let path = |name: &str| root.path().join(name);
            let folders = ["hub", "partial", "objects"].map(path).to_vec();
            let room = Room::new(folders, vec![path("links")], Some(350));
            let bench = Self { root, room };
            for name in ["hub/a/blobs/x", "partial/b", "objects/c"] {
                bench.write(name, 100);
            }
            std::fs::create_dir(bench.path("links")).unwrap();
            std::os::unix::fs::symlink("../objects/c", bench.path("links/c")).unwrap();
            bench
        }

        fn path(&self, name: &str) -> PathBuf {
            self.root.path().join(name)
        }

        fn write(&self, name: &str, n_bytes: usize) {
            std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
            std::fs::write(self.path(name), vec![0; n_bytes]).unwrap();
        }

        fn used(&self, name: &str) {
            drop(self.room.hold(&self.path(name)));
        }

        fn reserve(&self, name: &str, wanted: u64) -> Result<Held, u64> {
            self.room.reserve(&self.path(name), wanted)
        }

        fn there(&self) -> Vec<&'static str> {
            let all = ["hub/a", "partial/b", "objects/c", "links/c"];
            all.into_iter().filter(|name| self.path(name).symlink_metadata().is_ok()).collect()
        }
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let bench = Bench::new();
        for name in ["partial/b", "objects/c", "hub/a/snapshots/1/m.gguf"] {
            bench.used(name);
        }
        drop(bench.reserve("partial/new", 50).unwrap());
        assert_eq!(bench.there().len(), 4, "it fits as it is");
        drop(bench.reserve("partial/new", 51).unwrap());
        assert_eq!(bench.there(), ["hub/a", "objects/c", "links/c"], "nobody went on with it");
        drop(bench.reserve("partial/new", 200).unwrap());
        assert_eq!(bench.there(), ["hub/a"], "a link goes with what it names");
    }

    #[test]
    fn what_is_in_use_stays_and_nothing_goes_in_vain() {
        let bench = Bench::new();
        let (first, second) = (bench.room.hold(&bench.path("objects/c")), bench.path("objects/c"));
        drop(bench.room.hold(&second));
        let download = bench.reserve("partial/b", 20).unwrap();
        assert_eq!(bench.reserve("partial/new", 300).unwrap_err(), 130);
        assert_eq!(bench.there().len(), 4);
        drop(download);
        drop(bench.reserve("partial/new", 250).unwrap());
        assert_eq!(bench.there(), ["objects/c", "links/c"]);
        drop(first);
        drop(bench.reserve("partial/new", 350).unwrap());
        assert!(bench.there().is_empty());
    }

    #[test]
    fn downloads_that_fit_only_one_by_one_do_not_run_together() {
        let bench = Bench::new();
        for name in ["hub/a", "partial/b", "objects/c"] {
            remove(&bench.path(name)).unwrap();
        }
        let first = bench.reserve("partial/first", 200).unwrap();
        assert_eq!(bench.reserve("partial/second", 200).unwrap_err(), 150);
        // What has arrived is not counted twice.
        bench.write("partial/first", 180);
        assert_eq!(bench.reserve("partial/second", 200).unwrap_err(), 150);
        drop(bench.reserve("partial/second", 150).unwrap());
        drop(first);
        drop(bench.reserve("partial/second", 170).unwrap());
        drop(bench.reserve("partial/second", 350).unwrap());
        assert!(!bench.path("partial/first").exists(), "it was given up");
    }

    #[test]
    fn a_disk_is_promised_once() {
        let space = Space { limit: None, disk_free: 100, kept: 1000, promised: 60 };
        assert_eq!(space.over(40), 0);
        assert_eq!(space.over(41), 1);
        // A limit that was lowered.
        assert_eq!(Space { limit: Some(900), ..space }.over(10), 170);
        let bench = Bench::new();
        let room = Room::new(Vec::new(), Vec::new(), None);
        let most = disk_free(bench.root.path());
        let held = room.reserve(&bench.path("partial/one"), most / 4 * 3).unwrap();
        assert!(room.reserve(&bench.path("partial/two"), most / 4 * 3).is_err());
        drop(held);
        assert!(room.reserve(&bench.path("partial/two"), most / 4 * 3).is_ok());
    }
}
