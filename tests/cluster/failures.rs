//! Things end at the worst moment: each recovers alone, the ledger returns to its value, no orphan stays.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use crate::Test;
use crate::cluster::{
    AGENT, CPU_GIB, Cluster, ENGINE, Namespace, REPLICA, SYSTEM, on, patient, signal,
};
use crate::load::Load;

pub(crate) const TESTS: &[Test] = &[
    ("an_engine_is_killed", an_engine_is_killed),
    #[cfg(target_arch = "x86_64")]
    ("an_engine_that_eats_memory_is_ended_alone", an_engine_that_eats_memory),
    ("a_replica_is_killed", a_replica_is_killed),
    ("an_agent_is_killed_and_takes_its_engines_along", an_agent_is_killed),
    ("an_agent_restarts_in_order_and_no_stream_breaks", an_agent_restarts_in_order),
    ("the_kubelet_is_killed_and_the_plugin_registers_again", the_kubelet_is_killed),
    ("containerd_is_killed", containerd_is_killed),
    ("the_api_server_is_gone_and_serving_goes_on", the_api_server_is_gone),
];

/// The nodes of the models `one` and `two`, each with one replica.
type Nodes = [&'static str; 2];
const APART: Nodes = ["node1", "node2"];
/// Beside each other on one device.
const TOGETHER: Nodes = ["node1", "node1"];
const MODELS: [&str; 2] = ["one", "two"];

fn serving<'a>(cluster: &'a Cluster, name: &'a str, nodes: Nodes) -> Result<Namespace<'a>> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace(name)?;
    for (model, node) in MODELS.into_iter().zip(nodes) {
        space.model(model, &on(node))?;
    }
    settled(&space, nodes)?;
    Ok(space)
}

/// Both models answer, each has one engine on 1 GiB.
fn settled(space: &Namespace, nodes: Nodes) -> Result<()> {
    let cluster = space.cluster;
    for (model, node) in MODELS.into_iter().zip(nodes) {
        let n_models = nodes.iter().filter(|other| **other == node).count();
        let gib = u64::try_from(n_models)?;
        cluster
            .wait_until("the ledger is at its value", || Ok(cluster.ledger(node)? == (gib, gib)))?;
        space.wait_until_ready(model)?;
        cluster.wait_until("it answers", || Ok(space.chat(model, "Hello").is_ok()))?;
        let engines = cluster.processes(node, ENGINE)?;
        ensure!(engines.len() == n_models, "{node} has engines {engines:?}");
    }
    Ok(())
}

/// Another model's clients see nothing of what is done to the first.
fn beside<T>(space: &Namespace, harm: impl FnOnce() -> Result<T>) -> Result<T> {
    let load = Load::start(space, "two", 4, 4)?;
    std::thread::sleep(Duration::from_secs(1));
    let harmed = harm();
    let tally = load.finish(space.cluster)?;
    let harmed = harmed?;
    tally.ensure_nothing_failed()?;
    Ok(harmed)
}

/// Its neighbour on the same node, on the same device, serves on with the engine that it has.
fn an_engine_is_killed(cluster: &Cluster) -> Result<()> {
    let space = serving(cluster, "killed-engine", TOGETHER)?;
    let reasons = space.watch_reasons("one")?;
    beside(&space, || {
        let neighbour = cluster.process_of("node1", ENGINE, "two")?;
        signal(cluster.process_of("node1", ENGINE, "one")?, Signal::KILL)?;
        let told = last_words(&space, "one")?;
        ensure!(told.contains("EngineCrashed") && told.contains("SIGKILL"), "{told}");
        reasons.wait_for(cluster, "EngineCrashed", "SIGKILL")?;
        settled(&space, TOGETHER)?;
        ensure!(cluster.process_of("node1", ENGINE, "two")? == neighbour, "both engines ended");
        Ok(())
    })
}

/// The termination message of a model's replica.
fn last_words(space: &Namespace, model: &str) -> Result<String> {
    space.cluster.wait("the reason", Duration::from_secs(20), || {
        let pods = space.pods(model)?;
        let last = &pods[0]["status"]["containerStatuses"][0];
        let states = [&last["state"]["terminated"], &last["lastState"]["terminated"]];
        let message = states.iter().find_map(|state| state["message"].as_str());
        Ok(message.map(str::to_owned))
    })
}

#[cfg(target_arch = "x86_64")]
fn an_engine_that_eats_memory(cluster: &Cluster) -> Result<()> {
    let space = serving(cluster, "eaten", TOGETHER)?;
    let reasons = space.watch_reasons("one")?;
    beside(&space, || {
        let neighbour = cluster.process_of("node1", ENGINE, "two")?;
        crate::eater::eat(cluster.process_of("node1", ENGINE, "one")?, 2 << 30)?;
        let told = last_words(&space, "one")?;
        ensure!(
            told.contains("MemoryGrantExceeded") && told.contains("granted were 1073741824"),
            "{told}"
        );
        reasons.wait_for(cluster, "MemoryGrantExceeded", "granted were 1073741824")?;
        settled(&space, TOGETHER)?;
        ensure!(cluster.process_of("node1", ENGINE, "two")? == neighbour, "both engines ended");
        Ok(())
    })
}

fn a_replica_is_killed(cluster: &Cluster) -> Result<()> {
    let space = serving(cluster, "killed-replica", TOGETHER)?;
    beside(&space, || {
        let of_two = || -> Result<[i32; 2]> {
            let of = |program| cluster.process_of("node1", program, "two");
            Ok([of(REPLICA)?, of(ENGINE)?])
        };
        let neighbours = of_two()?;
        signal(cluster.process_of("node1", REPLICA, "one")?, Signal::KILL)?;
        cluster.wait_until("its container starts again", || {
            let pods = space.pods("one")?;
            Ok(pods[0]["status"]["containerStatuses"][0]["restartCount"] == 1)
        })?;
        settled(&space, TOGETHER)?;
        ensure!(of_two()? == neighbours, "the replica or the engine beside it ended");
        Ok(())
    })
}

fn an_agent_is_killed(cluster: &Cluster) -> Result<()> {
    let space = serving(cluster, "killed-agent", APART)?;
    beside(&space, || {
        let engine = cluster.process_of("node1", ENGINE, "one")?;
        ensure!(cluster.kill("node1", AGENT)? == 1);
        // A busy machine takes its time to end what was killed.
        cluster.wait("the engine ends with its agent", Duration::from_secs(5), || {
            Ok((!cluster.processes("node1", ENGINE)?.contains(&engine)).then_some(()))
        })?;
        settled(&space, APART)
    })?;
    let restarts = space.pods("one")?[0]["status"]["containerStatuses"][0]["restartCount"].clone();
    ensure!(restarts == 0, "the replica stays for what passes, but it restarted {restarts} times");
    Ok(())
}

fn an_agent_restarts_in_order(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let space = cluster.namespace("ordered")?;
    space.model("m", &json!({"replicas": 2, "rollout": patient()}))?;
    space.wait_until_ready("m")?;
    let load = Load::start(&space, "m", 16, 16)?;
    std::thread::sleep(Duration::from_secs(1));
    let set = "daemonset/bindery-node-cpu";
    cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", set])?;
    cluster.kubectl(&["-n", SYSTEM, "rollout", "status", set, "--timeout=180s"])?;
    space.wait_until_ready("m")?;
    load.finish(cluster)?.ensure_nothing_failed()
}

fn the_kubelet_is_killed(cluster: &Cluster) -> Result<()> {
    let space = serving(cluster, "killed-kubelet", APART)?;
    let program = cluster.program("kubelet")?;
    beside(&space, || {
        let words = cluster.end("node1", &program)?;
        std::thread::sleep(Duration::from_secs(2));
        cluster.begin("node1", &words)?;
        // It has emptied the folder of the plugins.
        let folder = cluster.state.join("vm/node1/var/lib/kubelet/device-plugins");
        cluster.wait_until("the plugin's socket is back", || {
            let names = std::fs::read_dir(&folder)?.flatten().map(|entry| entry.file_name());
            Ok(names.filter(|name| name.to_string_lossy().starts_with("bindery")).count() == 1)
        })?;
        cluster.wait_until("the node lends again", || {
            Ok(cluster.lends("node1", CPU_GIB)?.as_deref() == Some("4"))
        })?;
        settled(&space, APART)
    })?;
    // What the kubelet lends now is what it lent before.
    space.model("three", &json!({"memory": "3Gi", "scheduling": {"nodeSelector": {"kubernetes.io/hostname": "node1"}}}))?;
    space.wait_until_ready("three")?;
    ensure!(cluster.ledger("node1")? == (4, 4), "{:?}", cluster.ledger("node1")?);
    Ok(())
}

fn containerd_is_killed(cluster: &Cluster) -> Result<()> {
    let space = serving(cluster, "killed-containerd", APART)?;
    beside(&space, || {
        let words = cluster.end("node1", "containerd -c ")?;
        std::thread::sleep(Duration::from_secs(2));
        space.chat("one", "Hello").context("it serves without containerd")?;
        cluster.begin("node1", &words)?;
        space.kubectl(&["delete", "pods", "-l", "bindery.dev/model=one", "--timeout=60s"])?;
        settled(&space, APART)
    })
}

fn the_api_server_is_gone(cluster: &Cluster) -> Result<()> {
    let space = serving(cluster, "alone", APART)?;
    let (one, two) = (Load::start(&space, "one", 4, 4)?, Load::start(&space, "two", 4, 4)?);
    let api = cluster.end("cp", &cluster.program("kube-apiserver")?)?;
    std::thread::sleep(Duration::from_secs(20));
    // A kubelet that comes up alone must not take away what serves.
    let kubelet = cluster.end("node1", &cluster.program("kubelet")?)?;
    cluster.begin("node1", &kubelet)?;
    std::thread::sleep(Duration::from_secs(40));
    cluster.begin("cp", &api)?;
    cluster.wait_until("the API server is back", || {
        Ok(cluster.kubectl(&["get", "--raw", "/readyz"]).is_ok())
    })?;
    cluster.wait_until("both nodes are Ready", || {
        Ok(cluster
            .kubectl(&["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=1s"])
            .is_ok())
    })?;
    settled(&space, APART)?;
    one.finish(cluster)?.ensure_nothing_failed()?;
    two.finish(cluster)?.ensure_nothing_failed()?;
    space.model("three", &json!({}))?;
    space.wait_until_ready("three")
}
