//! Nodes whose GPUs stand in a file, in place of a driver's: there is no GPU here. How their memory is lent, and what becomes of
//! Pods when a device is lost.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Test;
use crate::cluster::{CPU_GIB, Cluster, GPU_GIB, Namespace, PATIENCE, SYSTEM, idle_pod};
use crate::devices::{GPU_LABEL, held_units, is_running};

pub(crate) const TESTS: &[Test] =
    &[("gpu_memory_is_lent_by_device_and_a_lost_device_is_followed", gpu_memory)];

const NODES: [&str; 2] = ["node1", "node2"];
const INVENTORY: &str = "/var/lib/bindery-models/gpus/gpus.yaml";
const WHOLE: &str = "- {uuid: GPU-whole, memoryGib: 4}\n";
const HALVES: &str = "- {uuid: GPU-a, memoryGib: 2}\n- {uuid: GPU-b, memoryGib: 2}\n";
const LOST: &str = "- {uuid: GPU-a, memoryGib: 2, unhealthy: fell off the bus}
- {uuid: GPU-b, memoryGib: 2, unhealthy: fell off the bus}\n";

fn gpu_memory(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    inventory(cluster, "node1", WHOLE)?;
    inventory(cluster, "node2", HALVES)?;
    for node in NODES {
        cluster.kubectl(&["label", "node", node, &format!("{GPU_LABEL}=true"), "--overwrite"])?;
    }
    let done = with_gpus(cluster);
    for node in NODES {
        cluster.kubectl(&["label", "node", node, &format!("{GPU_LABEL}-")])?;
    }
    cluster.upgrade(&["gpuNodes.enabled=false"])?;
    for node in NODES {
        cluster.wait_until("it lends CPU memory again", || {
            let lends = cluster.lends(node, CPU_GIB)?;
            Ok(lends.as_deref() == Some("4") && cluster.ledger(node).is_ok())
        })?;
    }
    done
}

/// Another file beside, so that none is read half written.
fn inventory(cluster: &Cluster, node: &str, text: &str) -> Result<()> {
    let path = cluster.state.join("vm").join(node).join(INVENTORY.trim_start_matches('/'));
    std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    Ok(std::fs::rename(new, path)?)
}

fn wait_until_lent(cluster: &Cluster, node: &str, gib: &str) -> Result<()> {
    cluster.wait_until(&format!("{node} lends {gib} GiB"), || {
        Ok(cluster.lends(node, GPU_GIB)?.as_deref() == Some(gib))
    })
}

fn with_gpus(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("gpus")?;
    let path = format!("gpuNodes.inventory={INVENTORY}");
    cluster.upgrade(&[
        "gpuNodes.enabled=true",
        "gpuNodes.memory=1Gi",
        "gpuNodes.cpu=100m",
        &path,
    ])?;
    for node in NODES {
        wait_until_lent(cluster, node, "4")?;
        ensure!(n_agents(cluster, node)? == 1, "both agents run on {node}");
    }
    on_one_device(&space)?;
    spread_and_placed_elsewhere(&space)?;
    lost_and_back(&space)?;
    given_what_was_just_lost(&space)
}

fn n_agents(cluster: &Cluster, node: &str) -> Result<usize> {
    let component = "app.kubernetes.io/component in (node-cpu,node-gpu)";
    let agents = cluster.items(&["-n", SYSTEM, "pods", "-l", component])?;
    let stays = |pod: &&Value| {
        pod["spec"]["nodeName"] == node && pod["metadata"]["deletionTimestamp"].is_null()
    };
    Ok(agents.iter().filter(stays).count())
}

/// By best fit, and the engine that is to come says so.
fn on_one_device(space: &Namespace) -> Result<()> {
    space.model("one", &gpu("2Gi", json!({"kubernetes.io/hostname": "node2"})))?;
    let message = space.wait_for_reason("one", "UnsupportedDevice")?;
    ensure!(message.contains("wanted cpu"), "{message}");
    space.kubectl(&["wait", "--for=condition=Stalled", "imodel/one", "--timeout=20s"])?;
    space.kubectl(&["delete", "imodel", "one"]).map(drop)
}

fn gpu(memory: &str, node_selector: Value) -> Value {
    json!({"device": "gpu", "memory": memory, "scheduling": {"nodeSelector": node_selector}})
}

/// One node has 3 GiB, but not on one device; the other has.
fn spread_and_placed_elsewhere(space: &Namespace) -> Result<()> {
    let cluster = space.cluster;
    cluster.kubectl(&["cordon", "node1"])?;
    let told = space
        .model("spread", &gpu("3Gi", json!({})))
        .and_then(|_| space.wait_for_reason("spread", "Fragmented"));
    cluster.kubectl(&["uncordon", "node1"])?;
    let message = told?;
    ensure!(message.contains("GPU-a") && message.contains("GPU-b"), "{message}");
    let is_on = |node: &str| {
        let pods = space.pods("spread")?;
        Ok::<_, anyhow::Error>(pods.iter().all(|pod| pod["spec"]["nodeName"] == node))
    };
    ensure!(is_on("node2")?, "it began elsewhere");
    cluster.wait_until("it is on the other node alone", || is_on("node1"))?;
    // It got as far as the engine: all of it is on one device.
    let message = space.wait_for_reason("spread", "UnsupportedDevice")?;
    ensure!(message.contains("wanted cpu"), "{message}");
    space.kubectl(&["delete", "imodel", "spread"]).map(drop)
}

/// A device that the file does not name any more.
fn lost_and_back(space: &Namespace) -> Result<()> {
    /// The agent looks twice a second, the kubelet tells once a second; the rest is for a busy machine.
    const FOLLOWED: Duration = Duration::from_secs(5);
    let cluster = space.cluster;
    cluster.wait_until("node2 has no grant", || Ok(held_units(cluster, "node2")?.is_empty()))?;
    cluster.apply(space.name, &idle_pod("holder", "node2", &json!({GPU_GIB: "1"})))?;
    cluster.wait_until("it runs", || is_running(space, "holder"))?;
    let held = held_units(cluster, "node2")?;
    let (lost, left) = HALVES.split_at(HALVES.len() / 2);
    ensure!(held.len() == 1 && lost.contains(&held[0][..5]), "{held:?} is not of {lost}");

    let start = Instant::now();
    inventory(cluster, "node2", left)?;
    wait_until_lent(cluster, "node2", "2")?;
    ensure!(start.elapsed() < FOLLOWED, "it took {:?}", start.elapsed());
    let node = cluster.get(&["node", "node2"])?;
    ensure!(node["status"]["capacity"][GPU_GIB] == "4", "its units are gone: {}", node["status"]);
    cluster.wait_until("the Pod is told", || Ok(health(space, "holder")? == "Unhealthy"))?;

    // The 2 GiB of the other device are free, but 1 of the 2 that are lent counts as the first Pod's.
    cluster.apply(space.name, &idle_pod("second", "node2", &json!({GPU_GIB: "2"})))?;
    let refused = format!("Insufficient {GPU_GIB}");
    cluster.wait_until("the other Pod waits", || {
        let pod = cluster.get(&["-n", space.name, "pod", "second"])?;
        Ok(pod["status"]["conditions"].to_string().contains(&refused))
    })?;
    inventory(cluster, "node2", HALVES)?;
    wait_until_lent(cluster, "node2", "4")?;
    cluster.wait_until("it runs by itself", || is_running(space, "second"))?;
    cluster.wait_until("the Pod is told", || Ok(health(space, "holder")? == "Healthy"))?;
    let status = cluster.get(&["-n", space.name, "pod", "holder"])?["status"].take();
    let restarts = &status["containerStatuses"][0]["restartCount"];
    ensure!(status["phase"] == "Running" && *restarts == 0, "{status}");
    space.kubectl(&["delete", "pod", "holder", "second"]).map(drop)
}

/// What the kubelet says of the only unit of a Pod.
fn health(space: &Namespace, pod: &str) -> Result<Value> {
    let pod = space.cluster.get(&["-n", space.name, "pod", pod])?;
    let of_resources = &pod["status"]["containerStatuses"][0]["allocatedResourcesStatus"];
    Ok(of_resources[0]["resources"][0]["health"].clone())
}

/// The scheduler does not know yet that a device is lost.
fn given_what_was_just_lost(space: &Namespace) -> Result<()> {
    let cluster = space.cluster;
    let n_lost = || -> Result<usize> {
        let mut count = 0;
        for log in ["kubelet.log", "again.log"] {
            let text = std::fs::read_to_string(cluster.state.join("vm/node2/log").join(log));
            let text = text.unwrap_or_default();
            let lines = text.lines().filter(|line| line.contains("Processed device updates"));
            count += lines.filter(|line| line.contains("healthyCount=0")).count();
        }
        Ok(count)
    };
    let before = n_lost()?;
    let cut = Cut::from("10.99.0.12")?;
    inventory(cluster, "node2", LOST)?;
    cluster.wait_until("the kubelet knows", || Ok(n_lost()? > before))?;
    space.model("late", &gpu("2Gi", json!({"kubernetes.io/hostname": "node2"})))?;
    let bound = cluster.wait("a Pod is bound", PATIENCE, || {
        let pods = space.pods("late")?;
        let bound = pods.into_iter().find(|pod| pod["spec"]["nodeName"] == "node2");
        Ok(bound.map(|pod| pod["metadata"]["name"].clone()))
    })?;
    drop(cut);
    cluster.wait_until("it has Failed", || {
        let refused = ["events", "--field-selector=reason=UnexpectedAdmissionError"];
        let events = cluster.items(&[&["-n", space.name], &refused[..]].concat())?;
        Ok(events.iter().any(|event| event["involvedObject"]["name"] == bound))
    })?;
    cluster.wait_until("none that has Failed is left, another waits", || {
        let pods = space.pods("late")?;
        Ok(pods.len() == 1 && pods[0]["status"]["phase"] == "Pending")
    })?;
    space.wait_for_reason("late", "InsufficientMemory")?;
    inventory(cluster, "node2", HALVES)?;
    space.wait_for_reason("late", "UnsupportedDevice").map(drop)
}

/// A node whose kubelet cannot reach the API server for a while.
struct Cut(&'static str);

impl Cut {
    fn from(address: &'static str) -> Result<Self> {
        let cut = Self(address);
        cut.rule("--insert")?;
        Ok(cut)
    }

    fn rule(&self, action: &str) -> Result<()> {
        // The tests run in the network of the control plane.
        let status = Command::new("iptables")
            .args([action, "INPUT", "--source", self.0, "--protocol", "tcp"])
            .args(["--dport", "6443", "--jump", "DROP"])
            .status()
            .context("run iptables")?;
        ensure!(status.success(), "iptables {action}: {status}");
        Ok(())
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        drop(self.rule("--delete"));
    }
}
