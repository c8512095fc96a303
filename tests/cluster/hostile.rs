//! What is malformed is refused with words that help; what harms, harms its own grant alone.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Test;
use crate::cluster::{Cluster, ENGINE, Namespace, PATIENCE, SYSTEM, model, on};
use crate::load::Load;

pub(crate) const TESTS: &[Test] = &[
    ("malformed_resources_are_refused_with_words_that_help", malformed_resources_are_refused),
    ("models_that_cannot_work_say_why_and_a_correct_edit_heals_them", models_that_cannot_work),
    ("a_crowd_whose_children_are_refused_holds_up_nobody", a_refused_crowd),
    ("engines_are_confined", engines_are_confined),
    ("hostile_clients_of_a_grant_harm_no_other", hostile_clients_harm_no_other),
    ("a_pod_without_a_grant_reaches_nothing", a_pod_without_a_grant_reaches_nothing),
];

fn malformed_resources_are_refused(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("malformed")?;
    let long = "x".repeat(3000);
    let many: Vec<Value> = (0..100).map(|index| json!({"key": format!("k{index}")})).collect();
    let labels: serde_json::Map<_, _> =
        (0..100).map(|index| (format!("l{index}"), json!("x"))).collect();
    let cases = [
        ("m", json!({"source": {"uri": "pvc://claim/model"}}), "file://"),
        ("m", json!({"source": {"uri": "oci://registry/model"}}), "use hf://"),
        ("m", json!({"source": {"uri": "ftp://host/model"}}), "wanted hf://"),
        ("m", json!({"source": {"uri": "hf://justaname"}}), "wanted hf://"),
        ("m", json!({"source": {"uri": "file://../../etc/passwd"}}), "may not contain .."),
        ("m", json!({"source": {"uri": format!("file://{long}")}}), "2048"),
        ("m", json!({"source": {"uri": ""}}), "uri"),
        ("m", json!({"source": {}}), "uri"),
        ("m", json!({"source": {"uri": "file://m", "sha256": "abc"}}), "64"),
        (
            "m",
            json!({"source": {"uri": "hf://a/b", "sha256": "0".repeat(64)}}),
            "checksums of its own",
        ),
        ("m", json!({"memory": "1500Mi"}), "whole GiB"),
        ("m", json!({"memory": "0"}), "whole GiB"),
        ("m", json!({"memory": "-2Gi"}), "memory"),
        ("m", json!({"memory": "lots"}), "memory"),
        // Quantities of Kubernetes that the operator does not read: one that got in would end its watch.
        ("m", json!({"memory": "+2Gi"}), "memory"),
        ("m", json!({"memory": "2147483648."}), "memory"),
        ("m", json!({"memory": "2147483648e0"}), "memory"),
        ("m", json!({"memory": "2Pi"}), "at most 1Pi"),
        ("m", json!({"device": "tpu"}), "supported values"),
        ("m", json!({"replicas": -1}), "replicas"),
        ("m", json!({"replicas": 1_000_000}), "10000"),
        ("m", json!({"replicas": "two"}), "integer"),
        ("m", json!({"engine": {"blockSize": 0}}), "blockSize"),
        ("m", json!({"engine": {"dtype": "int3"}}), "supported values"),
        ("m", json!({"engine": {"maxModelLen": 1_i64 << 40}}), "maxModelLen"),
        ("m", json!({"rollout": {"maxSurge": 0, "maxUnavailable": 0}}), "cannot both be 0"),
        ("m", json!({"rollout": {"drainSeconds": 1_000_000}}), "86400"),
        ("m", json!({"rollout": {"progressDeadlineSeconds": 1}}), "greater than or equal to 10"),
        ("m", json!({"pod": {"labels": {"bindery.dev/model": "other"}}}), "the operator's"),
        ("m", json!({"pod": {"labels": labels}}), "64"),
        ("m", json!({"scheduling": {"tolerations": many}}), "64"),
        ("m", json!({"servedName": ""}), "servedName"),
        ("m", json!({"servedName": "-rf"}), "begin with a dash"),
        ("m", json!({"servedName": "a,b"}), "hold a comma"),
        ("m", json!({"nosuchfield": 1}), "nosuchfield"),
        ("Upper", json!({}), "ower"),
        ("1st", json!({}), "becomes a Service"),
        ("a".repeat(53).leak(), json!({}), "at most 52"),
    ];
    for (name, spec, word) in cases {
        let refused = space.model(name, &spec).err().map(|error| format!("{error:#}"));
        let words = refused.with_context(|| format!("{name} {spec} was taken"))?;
        ensure!(words.contains(word), "{name} {spec}: wanted {word:?} in {words}");
    }
    space.model("m", &json!({"replicas": 0}))?;
    let changed = space.model("m", &json!({"replicas": 0, "device": "gpu"})).err();
    let words = changed.context("the device was changed")?.to_string();
    ensure!(words.contains("create another model"), "{words}");
    space.wait_for_reason("m", "ScaledToZero").map(drop)
}

/// Puts a file into the model folder of both nodes.
fn put(cluster: &Cluster, name: &str, content: &[u8]) -> Result<()> {
    for node in ["node1", "node2"] {
        let path = cluster.state.join("vm").join(node).join("var/lib/bindery-models").join(name);
        // Another name beside: what is mapped must not change under an engine.
        let new = path.with_extension("new");
        std::fs::write(&new, content)?;
        std::fs::rename(new, path)?;
    }
    Ok(())
}

/// Name, specification, and what is said of it.
const WRONG: &[(&str, &str, &str, &str)] = &[
    (
        "truncated",
        r#"{"source": {"uri": "file://truncated.gguf"}}"#,
        "UnsupportedModel",
        "truncated.gguf",
    ),
    (
        "garbage",
        r#"{"source": {"uri": "file://garbage.gguf"}}"#,
        "UnsupportedModel",
        "garbage.gguf",
    ),
    (
        "checksum",
        r#"{"source": {"uri": "file://small.gguf", "sha256": "0000000000000000000000000000000000000000000000000000000000000000"}}"#,
        "ChecksumMismatch",
        "got",
    ),
    ("absent", r#"{"source": {"uri": "file://absent.gguf"}}"#, "SourceUnreachable", "No such file"),
    ("outside", r#"{"source": {"uri": "file://outside"}}"#, "InvalidSpec", "not below"),
    ("hub", r#"{"source": {"uri": "hf://org/name"}}"#, "SourceUnreachable", "huggingface.co"),
    (
        "token",
        r#"{"source": {"uri": "hf://org/name", "secretRef": {"name": "bad"}}}"#,
        "Unauthorized",
        "token",
    ),
    (
        "secretless",
        r#"{"source": {"uri": "hf://org/name", "secretRef": {"name": "absent"}}}"#,
        "Progressing",
        "absent",
    ),
    (
        "small",
        r#"{"engine": {"maxModelLen": 8192, "maxNumBatchedTokens": 1048576}}"#,
        "MemoryGrantTooSmall",
        "missing",
    ),
    ("long", r#"{"engine": {"maxModelLen": 16000000}}"#, "InvalidSpec", "max-model-len"),
    (
        "nowhere",
        r#"{"scheduling": {"nodeSelector": {"no": "such"}}}"#,
        "Progressing",
        "no matching node",
    ),
    (
        "gpu",
        r#"{"device": "gpu"}"#,
        "InsufficientMemory",
        "no matching node lends bindery.dev/gpu-memory-gib",
    ),
    ("class", r#"{"scheduling": {"priorityClassName": "absent"}}"#, "ApplyFailed", "absent"),
];

fn models_that_cannot_work(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("wrong")?;
    let good = std::fs::read(cluster.state.join("models/small.gguf"))?;
    put(cluster, "truncated.gguf", &good[..good.len() / 2])?;
    put(cluster, "garbage.gguf", &vec![0xa5; 1 << 20])?;
    for node in ["node1", "node2"] {
        let link = cluster.state.join("vm").join(node).join("var/lib/bindery-models/outside");
        // It may be there from a run before.
        drop(std::os::unix::fs::symlink("/etc", link));
    }
    space.kubectl(&["create", "secret", "generic", "bad", "--from-literal=token=bad token"])?;
    // One that works sees nothing of it.
    space.model("well", &json!({}))?;
    space.wait_until_ready("well")?;
    // As many at once as the nodes have room for.
    for some in WRONG.chunks(5) {
        for (name, spec, ..) in some {
            space.model(name, &serde_json::from_str(spec)?)?;
        }
        for (name, _, reason, word) in some {
            said(&space, name, reason, word)?;
            stalled(&space, name, reason)?;
        }
        space.chat("well", "Hello")?;
        // Healed by a correct edit, where the model itself can be.
        let healed = some.iter().filter(|(name, ..)| HEALED.contains(name));
        for (name, ..) in healed.clone() {
            space.model(name, &json!({}))?;
        }
        for (name, ..) in healed {
            space.wait_until_ready(name)?;
        }
        let names = some.iter().map(|(name, ..)| *name);
        space.kubectl(&["delete", "imodel"].into_iter().chain(names).collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Each of them is tried again and again, and fails each time.
fn a_refused_crowd(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("refused")?;
    let refused = json!({"pod": {"labels": {"team": "two words"}}});
    let name = |index: u32| format!("m{index}");
    let items: Vec<Value> = (0..60).map(|index| model(&name(index), &refused)).collect();
    cluster.apply(space.name, &json!({"apiVersion": "v1", "kind": "List", "items": items}))?;
    for index in [0, 30, 59] {
        said(&space, &name(index), "ApplyFailed", "two words")?;
    }
    space.model("well", &json!({}))?;
    space.wait_until_ready("well")?;
    let wanted = |name: &str, replicas: u32| {
        let found = cluster.get(&["-n", space.name, "deployment", name])?;
        Ok(found["spec"]["replicas"].as_u64() == Some(replicas.into()))
    };
    space.kubectl(&["scale", "imodel/well", "--replicas=0"])?;
    cluster.wait_until("the change arrives", || wanted("well", 0))?;
    // Also one that waits for its next turn by now.
    space.model(&name(0), &json!({"replicas": 0}))?;
    cluster.wait_until("a correct edit is not waited for", || wanted(&name(0), 0))
}

/// What does not pass by itself is also a condition of its own.
fn stalled(space: &Namespace, name: &str, reason: &str) -> Result<()> {
    let passes =
        ["SourceUnreachable", "Progressing", "InsufficientMemory", "ApplyFailed"].contains(&reason);
    let found = space.condition(name, "Stalled")?;
    let is_stalled = found.as_ref().is_some_and(|found| found.status == "True");
    ensure!(passes || is_stalled, "{name} is {reason} and not Stalled: {found:?}");
    Ok(())
}

/// Of [`WRONG`], those that are edited to what works.
const HEALED: &[&str] = &["garbage", "long", "absent", "small", "checksum"];

fn said(space: &Namespace, name: &str, reason: &str, word: &str) -> Result<()> {
    let mut seen = None;
    let told = space.cluster.wait("the reason", PATIENCE, || {
        seen = space.condition(name, "Ready")?;
        Ok(seen.clone().filter(|found| found.reason == reason && found.message.contains(word)))
    });
    told.map(drop).with_context(|| format!("{name}: wanted {reason} with {word:?}, last {seen:?}"))
}

/// The figures of the process's own status.
fn engines_are_confined(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace("confined")?;
    space.model("m", &on("node1"))?;
    space.wait_until_ready("m")?;
    let engine = cluster.processes("node1", ENGINE)?[0];
    let status = std::fs::read_to_string(format!("/proc/{engine}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(|line| line.trim_start_matches(':').trim().to_owned()).unwrap_or_default()
    };
    ensure!(field("NoNewPrivs") == "1" && field("Seccomp") == "2", "{status}");
    ensure!(field("CapEff") == "0000000000000000", "{status}");
    let score: i32 =
        std::fs::read_to_string(format!("/proc/{engine}/oom_score_adj"))?.trim().parse()?;
    let agents = cluster.processes("node1", crate::cluster::AGENT)?;
    let own: i32 =
        std::fs::read_to_string(format!("/proc/{}/oom_score_adj", agents[0]))?.trim().parse()?;
    ensure!(score > own, "the engine's {score} is not above the agent's {own}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", agents[0]))?;
    ensure!(status.contains("CapEff:\t0000000000000000"), "its agent: {status}");
    let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", agents[0]))?;
    let root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/"));
    let options = root.and_then(|line| line.split(' ').nth(5)).unwrap_or_default();
    ensure!(options.split(',').any(|option| option == "ro"), "its agent's root: {root:?}");
    let command = std::fs::read_to_string(format!("/proc/{engine}/environ"))?;
    ensure!(command.trim_matches('\0').is_empty(), "an engine needs no environment: {command:?}");
    let log = space.kubectl(&["logs", "-l", "bindery.dev/model=m", "--tail=-1"])?;
    ensure!(!log.contains("a protection is missing"), "{log}");
    sockets_stay(cluster)?;
    #[cfg(target_arch = "x86_64")]
    from_inside(cluster, &space, engine)?;
    space.chat("m", "Hello").map(drop)
}

/// From among the mounts of a replica not even root can put another socket in the place of its own.
fn sockets_stay(cluster: &Cluster) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;

    let replica = cluster.process_of("node1", crate::cluster::REPLICA, "m")?;
    let folder = std::path::PathBuf::from(format!("/proc/{replica}/root/run/bindery"));
    let (socket, other) = (folder.join("claim.sock"), folder.join("other.sock"));
    let tried = [
        ("write", std::fs::write(folder.join("engine/x"), "")),
        ("listen beside", std::os::unix::net::UnixListener::bind(&other).map(drop)),
        ("restrict", std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o600))),
        ("rename", std::fs::rename(&socket, &other)),
        ("unlink", std::fs::remove_file(&socket)),
    ];
    for (what, done) in tried {
        let kind = done.err().map(|error| error.kind());
        ensure!(kind == Some(std::io::ErrorKind::ReadOnlyFilesystem), "{what}: {kind:?}");
    }
    ensure!(socket.exists(), "{} is gone", socket.display());
    #[cfg(target_arch = "x86_64")]
    for path in ["/run/bindery/claim.sock", "/run/bindery/engine/http.sock"] {
        let unlink = |address| crate::eater::Call {
            number: nix::libc::SYS_unlink,
            arguments: [address, 0, 0, 0, 0, 0],
        };
        let result = crate::eater::call(replica, path, unlink)?;
        ensure!(result == Some(i64::from(-nix::libc::EROFS)), "unlink {path}: {result:?}");
    }
    Ok(())
}

/// Reaches for what is another's, as an engine that was taken over would.
#[cfg(target_arch = "x86_64")]
fn from_inside(cluster: &Cluster, space: &Namespace, engine: i32) -> Result<()> {
    use crate::eater::{Call, call};
    use nix::libc::{AF_INET, AF_UNIX, EACCES, EPERM, SOCK_DGRAM, SOCK_STREAM};
    use nix::libc::{SYS_connect, SYS_kill, SYS_openat, SYS_socket};

    space.model("other", &on("node1"))?;
    space.wait_until_ready("other")?;
    let sockets = cluster.state.join("vm/node1/var/lib/bindery/sockets");
    let grants = std::fs::read_dir(sockets)?.flatten().map(|entry| entry.file_name());
    let words = std::fs::read_to_string(format!("/proc/{engine}/cmdline"))?;
    let other =
        grants.filter_map(|name| name.into_string().ok()).find(|name| !words.contains(name));
    let other = format!("/var/lib/bindery/sockets/{}", other.context("one grant alone")?);
    let files = [
        (other.clone(), 0),
        (format!("{other}/claim.sock"), 0),
        (format!("{other}/engine/new"), nix::libc::O_CREAT | nix::libc::O_WRONLY),
        ("/var/lib/bindery/grants".to_owned(), 0),
        ("/var/lib/kubelet/device-plugins".to_owned(), 0),
        ("/var/lib/bindery-models/SmolLM2-135M-Instruct.Q4_1.gguf".to_owned(), 0),
        ("/usr/bin/bindery".to_owned(), 0),
    ];
    for (path, flags) in files {
        let open = |address| Call {
            number: SYS_openat,
            arguments: [nix::libc::AT_FDCWD as u64, address, flags as u64, 0o600, 0, 0],
        };
        let result = call(engine, &path, open)?;
        ensure!(result == Some(i64::from(-EACCES)), "open {path}: {result:?}");
    }
    let socket = |family, kind| {
        move |_| Call { number: SYS_socket, arguments: [family as u64, kind as u64, 0, 0, 0, 0] }
    };
    for (family, kind) in [(AF_INET, SOCK_STREAM), (AF_INET, SOCK_DGRAM), (AF_UNIX, SOCK_STREAM)] {
        let result = call(engine, "", socket(family, kind))?;
        ensure!(result == Some(i64::from(-EPERM)), "socket {family} {kind}: {result:?}");
    }
    let connect = |_| Call { number: SYS_connect, arguments: [0; 6] };
    ensure!(call(engine, "", connect)? == Some(i64::from(-EPERM)), "an engine may connect");
    // Its agent is process 1 of its container. Signal 0 asks whether one may.
    let signal = |_| Call { number: SYS_kill, arguments: [1, 0, 0, 0, 0, 0] };
    ensure!(call(engine, "", signal)? == Some(i64::from(-EPERM)), "an engine may signal its agent");
    space.kubectl(&["delete", "imodel", "other"]).map(drop)
}

/// The folder of the only grant of a node, by a way that is short enough for a socket's name.
fn grant(cluster: &Cluster, node: &str) -> Result<tempfile::TempDir> {
    let folder = cluster.state.join("vm").join(node).join("var/lib/bindery/sockets");
    let grants: Vec<_> = std::fs::read_dir(folder)?.flatten().collect();
    ensure!(grants.len() == 1, "{} grants", grants.len());
    let short = tempfile::tempdir()?;
    std::os::unix::fs::symlink(grants[0].path(), short.path().join("grant"))?;
    Ok(short)
}

fn hostile_clients_harm_no_other(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace("hostile")?;
    for (name, node) in [("victim", "node1"), ("other", "node2")] {
        space.model(name, &on(node))?;
        space.wait_until_ready(name)?;
    }
    // A second model on the node of the attacked grant.
    let grant = grant(cluster, "node1")?;
    space.model("beside", &on("node1"))?;
    space.wait_until_ready("beside")?;
    let load = Load::start(&space, "beside", 2, 4)?;
    let socket = grant.path().join("grant/claim.sock");
    let attacked = attack(&socket).and_then(|()| asked_from_the_agents_side(cluster, &socket));
    let tally = load.finish(cluster)?;
    attacked?;
    tally.ensure_nothing_failed()?;
    // The grant that was attacked serves on as well: its claim was open.
    space.chat("victim", "Hello")?;
    ensure!(cluster.ledger("node1")? == (2, 2), "{:?}", cluster.ledger("node1")?);
    let agents =
        cluster.items(&["-n", SYSTEM, "pods", "-l", "app.kubernetes.io/component=node-cpu"])?;
    let restarts =
        agents.iter().filter(|pod| pod["status"]["containerStatuses"][0]["restartCount"] != 0);
    ensure!(restarts.count() == 0, "an agent was restarted");
    Ok(())
}

/// A process of the agent's own is no replica: an engine could be one.
fn asked_from_the_agents_side(cluster: &Cluster, socket: &std::path::Path) -> Result<()> {
    let said = |enter: &[&str]| -> Result<String> {
        let mut words = enter.to_vec();
        words.extend(["curl", "--silent", "--http0.9", "--max-time", "5", "--unix-socket"]);
        let mut command = std::process::Command::new(words[0]);
        let output = command.args(&words[1..]).arg(socket).arg("http://grant/").output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let agents = cluster.processes("node1", crate::cluster::AGENT)?;
    let pid = agents.first().context("no agent")?.to_string();
    let of_a_pod = said(&["env"])?;
    ensure!(of_a_pod.contains("wanted a claim"), "a Pod is told nothing: {of_a_pod:?}");
    let of_the_agent = said(&["nsenter", "-t", &pid, "--pid", "--"])?;
    ensure!(of_the_agent.is_empty(), "a process of the agent's is told {of_the_agent:?}");
    Ok(())
}

/// Garbage, far too much, slowness, a second claim, and more connections than a socket has places.
fn attack(path: &std::path::Path) -> Result<()> {
    let connect = || UnixStream::connect(path).with_context(|| path.display().to_string());
    for garbage in [
        b"\n\n\n".to_vec(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        b"{}\n".to_vec(),
        b"{\"drain\":{}}\n".to_vec(),
        b"{\"claim\":{\"version\":99}}\n".to_vec(),
        format!("{}\n", "[".repeat(100_000)).into_bytes(),
    ] {
        let mut client = connect()?;
        drop(client.write_all(&garbage));
        client.set_read_timeout(Some(Duration::from_secs(15)))?;
        let mut said = Vec::new();
        drop(client.read_to_end(&mut said));
    }
    let mut huge = connect()?;
    let piece = vec![b'x'; 1 << 20];
    let took = (0..1000).take_while(|_| huge.write_all(&piece).is_ok()).count();
    ensure!(took < 100, "{took} MiB of one line were taken");
    let mut many = Vec::new();
    for _ in 0..2000 {
        let client = rustix_nonblocking(path);
        many.extend(client);
    }
    for client in &mut many {
        drop(client.write_all(b"{"));
    }
    std::thread::sleep(Duration::from_secs(3));
    Ok(())
}

/// A connection, if the queue has a place for it.
fn rustix_nonblocking(path: &std::path::Path) -> Option<UnixStream> {
    let path = path.to_owned();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(UnixStream::connect(path)));
    receiver.recv_timeout(Duration::from_millis(2)).ok()?.ok()
}

fn a_pod_without_a_grant_reaches_nothing(cluster: &Cluster) -> Result<()> {
    let _space = cluster.namespace("poor")?;
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "poor"},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "replica", "image": "localhost/bindery:dev",
                "args": ["replica", "file://small.gguf", "--served-model-name", "m", "--device", "cpu"],
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            }],
        },
    });
    cluster.apply("poor", &pod)?;
    let state = cluster.wait("it says that it waits", PATIENCE, || {
        let pod = cluster.get(&["-n", "poor", "pod", "poor"])?;
        let ip = pod["status"]["podIP"].as_str().context("no address")?.to_owned();
        let (_, text) = cluster.http_get(&format!("http://{ip}:8001/state"))?;
        Ok(text.contains("waiting for the node agent").then_some(text))
    })?;
    ensure!(state.contains("Waiting"), "{state}");
    // Nor may it be given the folder: its namespace is restricted.
    let mut with_path = pod.clone();
    with_path["metadata"]["name"] = json!("rich");
    with_path["spec"]["volumes"] = json!([{"name": "s", "hostPath": {"path": "/var/lib/bindery"}}]);
    let refused = cluster.apply("poor", &with_path).err().context("a hostPath was taken")?;
    ensure!(refused.to_string().contains("hostPath"), "{refused}");
    Ok(())
}
