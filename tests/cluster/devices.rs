//! The device plugin: what the kubelet does with its units. GPU nodes have a fake inventory given by file: there is no GPU here.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Test;
use crate::cluster::{Cluster, PATIENCE, SYSTEM};

pub(crate) const TESTS: &[Test] = &[
    ("units_that_a_pod_is_given_twice_are_one_grant", units_given_twice),
    ("many_pods_at_once_share_no_unit_and_keep_theirs_until_they_end", many_pods_at_once),
    (
        "gpu_memory_of_a_fake_inventory_is_lent_fragmented_and_followed",
        gpu_memory_of_a_fake_inventory,
    ),
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
fn held_units(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let folder = cluster.state.join("vm").join(node).join("var/lib/bindery/grants");
    let mut held = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let record: Value = serde_json::from_slice(&std::fs::read(entry?.path())?)?;
        let units = record["units"].as_array().cloned().unwrap_or_default();
        held.extend(units.iter().map(Value::to_string));
    }
    Ok(held)
}

const INVENTORY: &str = "/var/lib/bindery-models/gpus/gpus.yaml";
const GIB: &str = "bindery.dev/gpu-memory-gib";

fn gpu_memory_of_a_fake_inventory(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    inventory(cluster, "- {uuid: GPU-a, memoryGib: 2}\n- {uuid: GPU-b, memoryGib: 2}\n")?;
    cluster.kubectl(&["label", "node", "node2", "nvidia.com/gpu.present=true", "--overwrite"])?;
    let done = with_gpus(cluster);
    cluster.kubectl(&["label", "node", "node2", "nvidia.com/gpu.present-"])?;
    upgrade(cluster, &["gpuNodes.enabled=false"])?;
    cluster.wait_until("node2 lends CPU memory again", || {
        let node = cluster.get(&["node", "node2"])?;
        Ok(node["status"]["allocatable"]["bindery.dev/cpu-memory-gib"] == "4"
            && cluster.ledger("node2").is_ok())
    })?;
    done
}

fn inventory(cluster: &Cluster, text: &str) -> Result<()> {
    let path = cluster.state.join("vm/node2").join(INVENTORY.trim_start_matches('/'));
    std::fs::create_dir_all(path.parent().unwrap_or(&path))?;
    std::fs::write(&path, text)?;
    Ok(())
}

fn upgrade(cluster: &Cluster, values: &[&str]) -> Result<()> {
    let chart = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/bindery");
    let mut words = vec!["-n", SYSTEM, "upgrade", "bindery", chart, "--reuse-values"];
    words.extend(values.iter().flat_map(|value| ["--set", value]));
    cluster.helm(&words).map(drop)
}

fn lent(cluster: &Cluster) -> Result<String> {
    let node = cluster.get(&["node", "node2"])?;
    Ok(node["status"]["allocatable"][GIB].as_str().unwrap_or_default().to_owned())
}

fn with_gpus(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("gpus")?;
    let path = format!("gpuNodes.inventory={INVENTORY}");
    upgrade(
        cluster,
        &["gpuNodes.enabled=true", "gpuNodes.memory=1Gi", "gpuNodes.cpu=100m", &path],
    )?;
    cluster.wait_until("4 GiB are lent", || Ok(lent(cluster)? == "4"))?;
    // Never both agents on a node.
    let agents = cluster.items(&[
        "-n",
        SYSTEM,
        "pods",
        "-l",
        "app.kubernetes.io/component in (node-cpu,node-gpu)",
    ])?;
    let on_node2 = agents.iter().filter(|pod| {
        pod["spec"]["nodeName"] == "node2" && pod["metadata"]["deletionTimestamp"].is_null()
    });
    ensure!(on_node2.count() == 1, "both agents run on node2");

    // On one device: best fit, and the engine that is to come says so.
    space.model("one", &json!({"device": "gpu", "memory": "2Gi"}))?;
    let message = space.wait_for_reason("one", "UnsupportedDevice")?;
    ensure!(message.contains("wanted cpu"), "{message}");
    space.kubectl(&["wait", "--for=condition=Stalled", "imodel/one", "--timeout=20s"])?;
    space.kubectl(&["delete", "imodel", "one"])?;
    // The node has 3 GiB, but not on one device.
    space.model("spread", &json!({"device": "gpu", "memory": "3Gi"}))?;
    let message = space.wait_for_reason("spread", "Fragmented")?;
    ensure!(message.contains("GPU-a") && message.contains("GPU-b"), "{message}");
    let first = space.pods("spread")?[0]["metadata"]["name"].clone();
    cluster.wait("it is tried elsewhere", PATIENCE, || {
        let pods = space.pods("spread")?;
        Ok(pods.iter().any(|pod| pod["metadata"]["name"] != first).then_some(()))
    })?;
    space.kubectl(&["delete", "imodel", "spread"])?;

    // A device that is lost is followed within a second; one that is back, too.
    inventory(
        cluster,
        "- {uuid: GPU-a, memoryGib: 2, unhealthy: fell off the bus}\n- {uuid: GPU-b, memoryGib: 2}\n",
    )?;
    cluster.wait_until("2 GiB are left", || Ok(lent(cluster)? == "2"))?;
    inventory(cluster, "- {uuid: GPU-a, memoryGib: 2}\n- {uuid: GPU-b, memoryGib: 2}\n")?;
    cluster.wait_until("4 GiB are lent again", || Ok(lent(cluster)? == "4"))
}
