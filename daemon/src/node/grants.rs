//! Grants on disk: one record and one folder with the grant's sockets each, so that they outlive the agent and the node.
//! Only the folder is mounted into the replica's container.

use std::collections::BTreeSet;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ledger::{GrantId, Unit};

/// The socket on which a grant is claimed.
pub const CLAIM_SOCKET: &str = "claim.sock";
/// The one folder that an engine may write.
pub const ENGINE_FOLDER: &str = "engine";
/// The socket on which an engine serves HTTP, below [`ENGINE_FOLDER`].
pub const ENGINE_SOCKET: &str = "http.sock";

/// The longest from the making of a folder by the runtime to its mount, on a machine that is overloaded.
const MOUNTED: Duration = Duration::from_secs(20);

/// The agent's folder.
#[derive(Debug, Clone)]
pub struct Grants {
    root: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    units: BTreeSet<Unit>,
}

impl Grants {
    /// Uses `root`, which outlives the agent.
    ///
    /// # Errors
    /// When its folders cannot be made.
    pub fn open(root: &Path) -> std::io::Result<Self> {
        let grants = Self { root: root.to_owned() };
        for folder in [grants.records(), grants.root.join("sockets")] {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
        }
        Ok(grants)
    }

    /// The folder that is mounted into the replica.
    pub fn folder(&self, id: &GrantId) -> PathBuf {
        self.root.join("sockets").join(&id.0)
    }

    /// Where the grant's engine listens.
    pub fn engine_socket(&self, id: &GrantId) -> PathBuf {
        self.folder(id).join(ENGINE_FOLDER).join(ENGINE_SOCKET)
    }

    /// Names a grant that never was. The name says what was granted, for people.
    pub fn new_id(units: &BTreeSet<Unit>) -> std::io::Result<GrantId> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(std::io::Error::other)?;
        let device = units.first().map_or("none", |unit| unit.device.as_str());
        let device: String = device.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
        let random = u64::from_le_bytes(random);
        Ok(GrantId(format!("{device}-{}gib-{random:016x}", units.len())))
    }

    /// Writes a grant down and opens its socket, on which any user may connect.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn create(&self, id: &GrantId, units: &BTreeSet<Unit>) -> std::io::Result<UnixListener> {
        let record = serde_json::to_vec(&Record { units: units.clone() })?;
        let path = self.record(id);
        let written = path.with_extension("new");
        std::fs::write(&written, record)?;
        std::fs::rename(written, path)?;
        self.listen(id)
    }

    /// Opens a grant's socket in its folder, which is made only when it is not there: a Pod may have it mounted.
    ///
    /// # Errors
    /// When the folder or the socket cannot be made.
    pub fn listen(&self, id: &GrantId) -> std::io::Result<UnixListener> {
        let folder = self.folder(id);
        for folder in [folder.clone(), folder.join(ENGINE_FOLDER)] {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&folder)?;
            std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755))?;
        }
        let path = folder.join(CLAIM_SOCKET);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&path)?;
        // Connecting needs the right to write.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Every grant that is written down, the oldest first: of two that share units the newer one holds them, since the
    /// older one was still to be forgotten. A record that cannot be read is logged and passed over.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn load(&self) -> std::io::Result<Vec<(GrantId, BTreeSet<Unit>)>> {
        let mut found = Vec::new();
        for path in self.oldest_first()? {
            let name = path.file_stem().and_then(|name| name.to_str()).map(str::to_owned);
            let (Some(name), Some("json")) = (name, path.extension().and_then(|e| e.to_str()))
            else {
                continue;
            };
            let read = std::fs::read(&path)
                .and_then(|bytes| Ok(serde_json::from_slice::<Record>(&bytes)?));
            match read {
                Ok(record) => found.push((GrantId(name), record.units)),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "a grant's record is lost");
                }
            }
        }
        Ok(found)
    }

    /// Forgets a grant and removes its folder.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn remove(&self, id: &GrantId) -> std::io::Result<()> {
        for removed in
            [std::fs::remove_file(self.record(id)), std::fs::remove_dir_all(self.folder(id))]
        {
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    /// Removes empty folders of grants that have ended: where a container starts with the folder of such a grant, as an init
    /// container does whose units went on, the runtime makes the folder anew. One that it has just made, it may be about to mount.
    ///
    /// # Errors
    /// When the folders cannot be listed.
    pub fn sweep(&self, is_held: impl Fn(&GrantId) -> bool) -> std::io::Result<()> {
        for entry in std::fs::read_dir(self.root.join("sockets"))? {
            let entry = entry?;
            let id = GrantId(entry.file_name().to_string_lossy().into_owned());
            let age =
                entry.metadata().and_then(|found| found.modified()).map(|made| made.elapsed());
            let is_new = matches!(age, Ok(Ok(age)) if age < MOUNTED);
            // A folder that is not empty is no such one, and is not removed.
            if !is_held(&id) && !is_new && std::fs::remove_dir(entry.path()).is_ok() {
                tracing::info!(%id, "the empty folder of a grant that has ended was removed");
            }
        }
        Ok(())
    }

    fn oldest_first(&self) -> std::io::Result<Vec<PathBuf>> {
        let written = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry?;
            Ok((entry.metadata()?.modified()?, entry.path()))
        };
        let found = std::fs::read_dir(self.records())?.map(written);
        let mut found: Vec<_> = found.collect::<std::io::Result<_>>()?;
        found.sort();
        Ok(found.into_iter().map(|(_, path)| path).collect())
    }

    fn records(&self) -> PathBuf {
        self.root.join("grants")
    }

    fn record(&self, id: &GrantId) -> PathBuf {
        self.records().join(format!("{}.json", id.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units() -> BTreeSet<Unit> {
        (0..3).map(|index| Unit { device: "cpu0".into(), index }).collect()
    }

    #[test]
    fn a_grant_is_found_again_until_it_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let grants = Grants::open(root.path()).unwrap();
        let id = Grants::new_id(&units()).unwrap();
        assert!(id.0.starts_with("cpu0-3gib-"), "{id}");
        drop(grants.create(&id, &units()).unwrap());
        let again = Grants::open(root.path()).unwrap();
        assert_eq!(again.load().unwrap(), [(id.clone(), units())]);
        again.remove(&id).unwrap();
        again.remove(&id).unwrap();
        assert_eq!(again.load().unwrap(), []);
        assert!(!again.folder(&id).exists());
    }

    #[test]
    fn a_socket_is_opened_again_in_the_same_folder() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().unwrap();
        let grants = Grants::open(root.path()).unwrap();
        let id = Grants::new_id(&units()).unwrap();
        drop(grants.create(&id, &units()).unwrap());
        let inode = std::fs::metadata(grants.folder(&id)).unwrap().ino();
        let _listener = grants.listen(&id).unwrap();
        assert_eq!(std::fs::metadata(grants.folder(&id)).unwrap().ino(), inode);
        let socket = grants.folder(&id).join(CLAIM_SOCKET);
        assert_eq!(std::fs::metadata(&socket).unwrap().mode() & 0o777, 0o666);
        assert!(std::os::unix::net::UnixStream::connect(socket).is_ok());
    }

    #[test]
    fn only_empty_folders_of_grants_that_have_ended_are_swept_away() {
        let root = tempfile::tempdir().unwrap();
        let grants = Grants::open(root.path()).unwrap();
        let all = ["held", "full", "new", "empty"].map(|name| GrantId(name.to_owned()));
        let [held, full, _, empty] = &all;
        for id in &all {
            std::fs::create_dir(grants.folder(id)).unwrap();
        }
        std::fs::create_dir(grants.folder(full).join("x")).unwrap();
        for id in [held, full, empty] {
            let folder = std::fs::File::open(grants.folder(id)).unwrap();
            folder.set_modified(std::time::SystemTime::now() - MOUNTED).unwrap();
        }
        grants.sweep(|id| id == held).unwrap();
        let left = all.each_ref().map(|id| grants.folder(id).exists());
        assert_eq!(left, [true, true, true, false]);
    }

    #[test]
    fn the_newest_grant_comes_last() {
        let root = tempfile::tempdir().unwrap();
        let grants = Grants::open(root.path()).unwrap();
        let ids: Vec<GrantId> = (0..9).map(|_| Grants::new_id(&units()).unwrap()).collect();
        for (seconds, id) in (1..).zip(&ids) {
            drop(grants.create(id, &units()).unwrap());
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            std::fs::File::open(grants.record(id)).unwrap().set_modified(time).unwrap();
        }
        let found: Vec<GrantId> = grants.load().unwrap().into_iter().map(|(id, _)| id).collect();
        assert_eq!(found, ids);
    }

    #[test]
    fn a_record_that_is_cut_short_does_not_hide_the_others() {
        let root = tempfile::tempdir().unwrap();
        let grants = Grants::open(root.path()).unwrap();
        let id = Grants::new_id(&units()).unwrap();
        drop(grants.create(&id, &units()).unwrap());
        std::fs::write(root.path().join("grants/broken.json"), "{\"units\":[").unwrap();
        assert_eq!(grants.load().unwrap(), [(id, units())]);
    }
}
