//! Takes rights away from an engine under a node agent: files by Landlock, new sockets by seccomp.
//! What the kernel lacks is told to the caller, who says it loudly; nothing is silently left open.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::model::ModelError;
use crate::model::files::ModelFiles;

/// What the engine may still do with files.
#[derive(Debug, Clone, Default)]
pub struct Files {
    pub read: Vec<PathBuf>,
    pub write: Vec<PathBuf>,
}

/// A protection that this kernel does not give, or not wholly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    #[error(
        "Landlock is not enabled in this kernel: the engine can open every file that its user can"
    )]
    Landlock,
    #[error(
        "Landlock is older than wanted in this kernel: some file operations or signals to others are not refused"
    )]
    LandlockPart,
    #[error("seccomp is not available: the engine can open sockets ({0})")]
    Seccomp(String),
    #[error("cannot raise oom_score_adj: {0}")]
    OomScore(String),
    #[error("cannot ask to be ended with the parent: {0}")]
    ParentDeath(String),
}

/// A rule that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("open {} for its Landlock rule", path.display())]
    Path { path: PathBuf, source: landlock::PathFdError },
    #[error("apply Landlock")]
    Landlock(#[from] landlock::RulesetError),
}

/// Leaves this thread, and every thread and process that it starts, only `files`, and signals among themselves. Takes new
/// privileges away too.
/// Call it before any other thread exists.
///
/// # Errors
/// When a path of `files` cannot be opened or the kernel refuses the rules.
pub fn confine_files(files: &Files) -> Result<Option<Missing>, ConfineError> {
    // Up to signals; what the kernel does not know is reported by the status below.
    let abi = ABI::V6;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = AccessFs::from_all(abi) & !AccessFs::Execute;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?;
    for (paths, access) in [(&files.read, read), (&files.write, write)] {
        for path in paths {
            let fd = PathFd::new(path)
                .map_err(|source| ConfineError::Path { path: path.clone(), source })?;
            // Rights that only folders have are refused for files.
            let access = if path.is_dir() { access } else { access & AccessFs::from_file(abi) };
            ruleset = ruleset.add_rule(PathBeneath::new(fd, access))?;
        }
    }
    Ok(match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => None,
        RulesetStatus::PartiallyEnforced => Some(Missing::LandlockPart),
        RulesetStatus::NotEnforced => Some(Missing::Landlock),
    })
}

/// What loading `model` reads: its folder, or of a GGUF its own files alone, which may lie among those of others; and the
/// files that links among these lead to (the hub's cache is made of links).
///
/// # Errors
/// When the model is not there.
pub fn paths_of(model: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let io = |source| ModelError::Io { path: model.to_owned(), source };
    let model = std::path::absolute(model).map_err(io)?;
    let files = if model.is_dir() {
        let entries = std::fs::read_dir(&model).map_err(io)?;
        entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>().map_err(io)?
    } else {
        match ModelFiles::find(&model)? {
            ModelFiles::Gguf(files) => files,
            ModelFiles::Folder(folder) => vec![folder],
        }
    };
    let linked = files.iter().filter(|path| path.is_symlink());
    let mut paths: BTreeSet<PathBuf> = linked.filter_map(|path| path.canonicalize().ok()).collect();
    if model.is_dir() {
        paths.insert(model);
    } else {
        paths.extend(files.into_iter().filter(|path| path.is_file() && !path.is_symlink()));
    }
    Ok(paths.into_iter().collect())
}

/// Refuses every thread of this process a new socket or connection, with EPERM. Call it once the listener exists;
/// sockets that are there go on working. Also refuses io_uring, which could make sockets past this filter.
pub fn deny_sockets() -> Option<Missing> {
    let applied = socket_filter().and_then(|filter| {
        seccompiler::apply_filter_all_threads(&filter).map_err(|error| error.to_string())
    });
    applied.err().map(Missing::Seccomp)
}

fn socket_filter() -> Result<BpfProgram, String> {
    /// On x86-64 the same calls under the x32 ABI.
    const X32: i64 = 0x4000_0000;
    let calls = [libc::SYS_socket, libc::SYS_connect, libc::SYS_io_uring_setup];
    let rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> =
        calls.iter().flat_map(|call| [(*call, vec![]), (*call | X32, vec![])]).collect();
    let architecture = std::env::consts::ARCH
        .try_into()
        .map_err(|error: seccompiler::BackendError| error.to_string())?;
    let refuse =
        SeccompAction::Errno(u32::try_from(libc::EPERM).map_err(|error| error.to_string())?);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, architecture);
    filter.and_then(TryInto::try_into).map_err(|error: seccompiler::BackendError| error.to_string())
}

/// Makes this process the first to go when memory runs out, before the agent that started it.
pub fn raise_oom_score() -> Option<Missing> {
    /// Above an agent's own, below the most that there is.
    const SCORE: &str = "800";
    let raised = std::fs::write("/proc/self/oom_score_adj", SCORE);
    raised.err().map(|error| Missing::OomScore(error.to_string()))
}

/// Asks the kernel to send SIGTERM when the parent's thread that started this process ends.
/// A parent that ended before is noticed by the end of stdin.
pub fn end_with_parent() -> Option<Missing> {
    let set = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM));
    set.err().map(|error| Missing::ParentDeath(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Tells the child of a test that it is one.
    const CHILD: &str = "CONFINE_TEST_FOLDER";

    /// Runs one test of this file alone in a process of its own, since rights do not come back.
    fn run_in_child(test: &str, folder: &Path) {
        let done = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("confine::tests::{test}"), "--nocapture"])
            .env(CHILD, folder)
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
    }

    fn child_folder() -> Option<PathBuf> {
        std::env::var_os(CHILD).map(PathBuf::from)
    }

    #[test]
    fn a_confined_process_reads_its_model_and_writes_its_folder_alone() {
        let Some(folder) = child_folder() else {
            let folder = tempfile::tempdir().unwrap();
            for name in ["model", "grant", "other"] {
                std::fs::create_dir(folder.path().join(name)).unwrap();
                std::fs::write(folder.path().join(name).join("file"), "x").unwrap();
            }
            return run_in_child(
                "a_confined_process_reads_its_model_and_writes_its_folder_alone",
                folder.path(),
            );
        };
        let (model, grant, other) =
            (folder.join("model"), folder.join("grant"), folder.join("other"));
        let files = Files { read: vec![model.clone()], write: vec![grant.clone()] };
        let missing = confine_files(&files).unwrap();
        assert!(std::fs::read(model.join("file")).is_ok());
        assert!(std::os::unix::net::UnixListener::bind(grant.join("socket")).is_ok());
        if missing == Some(Missing::Landlock) {
            eprintln!("NOT TESTED: {}", Missing::Landlock);
            return;
        }
        assert!(std::fs::read(other.join("file")).is_err());
        assert!(std::fs::write(model.join("file"), "y").is_err());
        assert!(std::fs::write(other.join("new"), "y").is_err());
        let parent = rustix::process::getppid().unwrap();
        let asked = rustix::process::test_kill_process(parent);
        if missing.is_none() {
            assert!(asked.is_err(), "a process outside can be signalled");
        }
        assert!(
            std::thread::spawn(move || std::fs::read(other.join("file"))).join().unwrap().is_err()
        );
    }

    #[test]
    fn a_process_without_sockets_still_serves_the_one_it_has() {
        let Some(folder) = child_folder() else {
            let folder = tempfile::tempdir().unwrap();
            return run_in_child(
                "a_process_without_sockets_still_serves_the_one_it_has",
                folder.path(),
            );
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        if let Some(missing) = deny_sockets() {
            eprintln!("NOT TESTED: {missing}");
            return;
        }
        assert!(listener.accept().is_ok());
        drop(client);
        let refused = |error: std::io::Error| assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        refused(std::net::TcpStream::connect("127.0.0.1:1").unwrap_err());
        refused(std::net::UdpSocket::bind("127.0.0.1:0").unwrap_err());
        refused(std::os::unix::net::UnixStream::connect(folder.join("x")).unwrap_err());
        let elsewhere = std::thread::spawn(|| std::net::UdpSocket::bind("127.0.0.1:0").is_err());
        assert!(elsewhere.join().unwrap());
    }

    #[test]
    fn the_score_rises_and_the_parent_is_followed() {
        let Some(folder) = child_folder() else {
            let folder = tempfile::tempdir().unwrap();
            return run_in_child("the_score_rises_and_the_parent_is_followed", folder.path());
        };
        drop(folder);
        assert_eq!(raise_oom_score(), None);
        assert_eq!(std::fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim(), "800");
        assert_eq!(end_with_parent(), None);
        let signal = rustix::process::parent_process_death_signal().unwrap();
        assert_eq!(signal, Some(rustix::process::Signal::TERM));
    }

    #[test]
    fn links_out_of_a_model_are_followed() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        for name in ["blobs", "snapshot"] {
            std::fs::create_dir(root.join(name)).unwrap();
        }
        std::fs::write(root.join("blobs/b"), "x").unwrap();
        std::os::unix::fs::symlink("../blobs/b", root.join("snapshot/m.gguf")).unwrap();
        let wanted = [root.join("blobs/b"), root.join("snapshot")];
        assert_eq!(paths_of(&root.join("snapshot")).unwrap(), wanted);
        assert_eq!(paths_of(&root.join("snapshot/m.gguf")).unwrap(), [root.join("blobs/b")]);
    }

    #[test]
    fn a_gguf_among_others_is_read_with_its_parts_alone() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let [first, second] =
            ["00001", "00002"].map(|part| root.join(format!("m-{part}-of-00002.gguf")));
        for path in [&first, &second, &root.join("other.gguf")] {
            std::fs::write(path, "x").unwrap();
        }
        assert_eq!(paths_of(&first).unwrap(), [first, second]);
    }
}
