//! The device plugin: what the kubelet does with its units.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Test;
use crate::cluster::{AGENT, CPU_GIB, Cluster, Namespace, idle_pod, on};

pub(crate) const TESTS: &[Test] = &[
    ("units_that_a_pod_is_given_twice_are_one_grant", units_given_twice),
    ("many_pods_at_once_share_no_unit_and_keep_theirs_until_they_end", many_pods_at_once),
    ("pods_wait_while_the_plugin_is_away_and_those_that_run_go_on", the_plugin_is_away),
    ("a_disk_that_takes_no_grant_holds_up_its_pod_alone", a_disk_that_takes_no_grant),
];

/// The kubelet gives the units of an init container to the container after it, both before either starts.
fn units_given_twice(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace("twice")?;
    let container = |name: &str, args: &[&str]| {
        json!({
            "name": name, "image": "localhost/bindery:dev", "args": args,
            "resources": {"limits": {"bindery.dev/cpu-memory-gib": "1"}},
            "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
        })
    };
    let replica = ["replica", "file://small.gguf", "--served-model-name", "m", "--device", "cpu"];
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "twice"},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": false, "terminationGracePeriodSeconds": 5,
            "nodeSelector": {"kubernetes.io/hostname": "node1"},
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "initContainers": [container("first", &["--version"])],
            "containers": [container("replica", &replica)],
        },
    });
    cluster.apply("twice", &pod)?;
    let mut last = String::new();
    let ready = cluster.wait_until("its replica serves", || {
        let pod = cluster.get(&["-n", "twice", "pod", "twice"])?;
        last = pod["status"].to_string();
        let ip = pod["status"]["podIP"].as_str().context("no address")?.to_owned();
        Ok(cluster.http_get(&format!("http://{ip}:8001/readyz"))?.0 == 200)
    });
    ready.with_context(|| last.clone())?;
    ensure!(cluster.ledger("node1")? == (1, 1), "{:?}", cluster.ledger("node1")?);
    drop(space);
    cluster.wait_until_empty()
}

/// As many Pods as both nodes have units for, made and ended at once.
fn many_pods_at_once(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace("many")?;
    space.model("m", &json!({"replicas": 8}))?;
    space.wait_until_ready("m")?;
    for node in ["node1", "node2"] {
        ensure!(cluster.ledger(node)? == (4, 4), "{node}: {:?}", cluster.ledger(node)?);
        let held = held_units(cluster, node)?;
        let distinct: BTreeSet<&String> = held.iter().collect();
        ensure!((held.len(), distinct.len()) == (4, 4), "{node}: {held:?}");
    }
    // One more waits, and starts with the units of the first that has ended, not of one that is still ending.
    space.model("n", &json!({}))?;
    space.wait_for_reason("n", "InsufficientMemory")?;
    space.kubectl(&["scale", "imodel", "m", "--replicas=7"])?;
    space.wait_until_ready("n")?;
    for node in ["node1", "node2"] {
        ensure!(held_units(cluster, node)?.len() == 4, "{:?}", held_units(cluster, node)?);
    }
    drop(space);
    cluster.wait_until_empty()
}

/// The units that the records of a node's grants hold.
pub(crate) fn held_units(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let folder = cluster.state.join("vm").join(node).join("var/lib/bindery/grants");
    let mut held = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let record: Value = serde_json::from_slice(&std::fs::read(entry?.path())?)?;
        let units = record["units"].as_array().cloned().unwrap_or_default();
        held.extend(units.iter().filter_map(Value::as_str).map(str::to_owned));
    }
    Ok(held)
}

/// The label of GPU nodes, which the agents of other nodes leave.
pub(crate) const GPU_LABEL: &str = "nvidia.com/gpu.present";

/// The kubelet, too, begins anew in that time.
fn the_plugin_is_away(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace("away")?;
    space.model("held", &on("node2"))?;
    space.wait_until_ready("held")?;
    let before = running(&space, "held")?;
    cluster.kubectl(&["label", "node", "node2", &format!("{GPU_LABEL}=true"), "--overwrite"])?;
    let done = while_away(&space, &before);
    cluster.kubectl(&["label", "node", "node2", &format!("{GPU_LABEL}-")])?;
    done?;
    cluster
        .wait_until("node2 lends again", || Ok(cluster.lends("node2", CPU_GIB)? == lent("4")))?;
    space.wait_until_ready("new")?;
    space.wait_until_ready("held")?;
    space.chat("held", "Hello")?;
    ensure!(running(&space, "held")? == before, "{before:?} became {:?}", running(&space, "held")?);
    Ok(())
}

fn while_away(space: &Namespace, before: &Running) -> Result<()> {
    let cluster = space.cluster;
    cluster
        .wait_until("the agent is gone", || Ok(cluster.processes("node2", AGENT)?.is_empty()))?;
    cluster
        .wait_until("node2 lends nothing", || Ok(cluster.lends("node2", CPU_GIB)? == lent("0")))?;
    space.model("new", &on("node2"))?;
    let message = space.wait_for_reason("new", "InsufficientMemory")?;
    ensure!(message.contains("no matching node lends"), "{message}");
    let words = cluster.end("node2", &cluster.program("kubelet")?)?;
    let renewed = || {
        let lease = cluster.get(&["-n", "kube-node-lease", "lease", "node2"])?;
        Ok::<_, anyhow::Error>(lease["spec"]["renewTime"].clone())
    };
    let last = renewed()?;
    cluster.begin("node2", &words)?;
    cluster.wait_until("the kubelet is back", || Ok(renewed()? != last))?;
    // What it did with a Pod that it found, it has told by the time that it answers for another.
    cluster.apply(space.name, &idle_pod("plain", "node2", &json!({})))?;
    cluster.wait_until("another Pod runs", || is_running(space, "plain"))?;
    let now = running(space, "held")?;
    ensure!(now == *before, "{before:?} became {now:?}");
    let pods = space.pods("new")?;
    ensure!(pods.len() == 1 && pods[0]["status"]["phase"] == "Pending", "{pods:?}");
    Ok(())
}

fn lent(gib: &str) -> Option<String> {
    Some(gib.to_owned())
}

/// Which Pod a model has, and how often its container was started.
#[derive(Debug, PartialEq)]
struct Running {
    uid: Value,
    phase: Value,
    restarts: Value,
}

fn running(space: &Namespace, model: &str) -> Result<Running> {
    let pods = space.pods(model)?;
    ensure!(pods.len() == 1, "{} Pods of {model}", pods.len());
    let status = &pods[0]["status"];
    Ok(Running {
        uid: pods[0]["metadata"]["uid"].clone(),
        phase: status["phase"].clone(),
        restarts: status["containerStatuses"][0]["restartCount"].clone(),
    })
}

pub(crate) fn is_running(space: &Namespace, pod: &str) -> Result<bool> {
    let pod = space.cluster.get(&["-n", space.name, "pod", pod])?;
    Ok(pod["status"]["phase"] == "Running")
}

/// The folder of the records is away, as on a disk that is full.
fn a_disk_that_takes_no_grant(cluster: &Cluster) -> Result<()> {
    /// What a busy machine may add to the start of a Pod.
    const JITTER: Duration = Duration::from_secs(3);
    cluster.wait_until_empty()?;
    let space = cluster.namespace("full")?;
    let none = json!({});
    let usual = time_to_run(&space, &[idle_pod("usual", "node1", &none)])?;
    let records = cluster.state.join("vm/node1/var/lib/bindery/grants");
    let away = records.with_extension("away");
    std::fs::rename(&records, &away)?;
    let done = (|| -> Result<Duration> {
        let granted = idle_pod("granted", "node1", &json!({CPU_GIB: "1"}));
        let took = time_to_run(&space, &[granted, idle_pod("beside", "node1", &none)])?;
        space.model("m", &on("node1"))?;
        let message = space.wait_for_reason("m", "Waiting")?;
        ensure!(message.contains("claim.sock"), "{message}");
        Ok(took)
    })();
    std::fs::rename(&away, &records)?;
    let took = done?;
    ensure!(took < usual + JITTER, "a Pod beside took {took:?}, {usual:?} is usual");
    space.wait_until_ready("m")?;
    space.chat("m", "Hello")?;
    ensure!(held_units(cluster, "node1")?.len() == 2, "{:?}", held_units(cluster, "node1")?);
    Ok(())
}

/// Makes Pods at once; how long the last of them takes.
fn time_to_run(space: &Namespace, pods: &[Value]) -> Result<Duration> {
    let start = Instant::now();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": pods});
    space.cluster.apply(space.name, &list)?;
    for pod in pods {
        let name = pod["metadata"]["name"].as_str().context("a Pod has a name")?;
        space.cluster.wait_until("it runs", || is_running(space, name))?;
    }
    Ok(start.elapsed())
}
