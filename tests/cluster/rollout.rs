//! Changes under load: no stream is dropped, no request fails.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Test;
use crate::cluster::{Cluster, Namespace, PATIENCE, SYSTEM, on, patient};
use crate::load::Load;

pub(crate) const TESTS: &[Test] = &[
    ("an_engine_flag_is_changed_under_load", an_engine_flag_is_changed_under_load),
    ("an_update_that_cannot_work_leaves_the_old_replicas", an_update_that_cannot_work),
    ("a_rollout_that_does_not_get_on_is_said_to_be_stuck", a_stuck_rollout),
    ("no_memory_for_the_surge_is_said_with_what_to_set", no_memory_for_the_surge),
    ("helm_upgrade_to_a_new_image_and_back_under_load", helm_upgrade_under_load),
];

const CLIENTS: usize = 32;
/// Models that move to a new image at once at most, and how many there are beside the one under load.
const AT_ONCE: usize = 4;
const OTHERS: usize = 4;

/// Two replicas on two nodes, with room for a third.
fn two_replicas(space: &Namespace) -> Result<()> {
    space.cluster.wait_until_empty()?;
    space.model("m", &json!({"replicas": 2, "rollout": patient()}))?;
    space.wait_until_ready("m")?;
    let pods = space.pods("m")?;
    ensure!(
        pods.len() == 2 && pods[0]["spec"]["nodeName"] != pods[1]["spec"]["nodeName"],
        "not spread"
    );
    Ok(())
}

fn patch(space: &Namespace, spec: &Value) -> Result<()> {
    let patch = json!({"spec": spec}).to_string();
    space.kubectl(&["patch", "imodel", "m", "--type=merge", "-p", &patch]).map(drop)
}

fn an_engine_flag_is_changed_under_load(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("rolling")?;
    two_replicas(&space)?;
    let load = Load::start(&space, "m", CLIENTS, CLIENTS)?;
    std::thread::sleep(Duration::from_secs(2));
    patch(&space, &json!({"engine": {"maxNumSeqs": 64}}))?;
    space.wait_for_reason("m", "AllReplicasReady")?;
    // Reverted half-way, then two edits in a row.
    patch(&space, &json!({"engine": {"maxNumSeqs": 48}}))?;
    cluster.wait_until("old and new replicas are there", || Ok(n_templates(&space)? == 2))?;
    patch(&space, &json!({"engine": {"maxNumSeqs": 64}}))?;
    space.wait_for_reason("m", "AllReplicasReady")?;
    patch(&space, &json!({"engine": {"blockSize": 32}}))?;
    patch(&space, &json!({"engine": {"blockSize": 8}}))?;
    space.wait_for_reason("m", "AllReplicasReady")?;
    load.finish(cluster)?.ensure_nothing_failed()?;
    // Some were told to end before they had begun; what they hold, nobody else can have.
    cluster.wait("none of before is left", Duration::from_secs(30), || {
        Ok((space.pods("m")?.len() == 2).then_some(()))
    })?;
    let spec = cluster.get(&["-n", "rolling", "deployment", "m"])?["spec"]["template"].to_string();
    ensure!(spec.contains("\\\"blockSize\\\":8"), "{spec}");
    Ok(())
}

/// Templates that Pods of the model are of.
fn n_templates(space: &Namespace) -> Result<usize> {
    let hash = |pod: &Value| pod["metadata"]["labels"]["pod-template-hash"].to_string();
    let hashes: BTreeSet<String> = space.pods("m")?.iter().map(hash).collect();
    Ok(hashes.len())
}

fn an_update_that_cannot_work(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("broken")?;
    space.model("m", &json!({}))?;
    space.wait_until_ready("m")?;
    let load = Load::start(&space, "m", 4, 4)?;
    for (spec, reason, word) in [
        (json!({"source": {"uri": "file://absent.gguf"}}), "SourceUnreachable", "absent.gguf"),
        (
            json!({"source": {"uri": crate::cluster::SMALL}, "engine": {"maxModelLen": 1_000_000}}),
            "InvalidSpec",
            "max-model-len",
        ),
    ] {
        patch(&space, &spec)?;
        let mut seen = None;
        let told = cluster.wait("the reason", PATIENCE, || {
            seen = space.condition("m", "Ready")?;
            Ok(seen.clone().filter(|found| found.message.contains(word)))
        });
        let told = told.with_context(|| format!("{seen:?}"))?;
        ensure!(told.reason == reason, "{told:?}, wanted {reason}");
        ensure!(told.message.contains("serve on"), "{told:?}");
        space.chat("m", "Hello").context("the old replica serves on")?;
    }
    load.finish(cluster)?.ensure_nothing_failed()?;
    patch(&space, &json!({"engine": {"maxModelLen": 1024}}))?;
    space.wait_until_ready("m")
}

fn a_stuck_rollout(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("stuck")?;
    space.model("m", &json!({"rollout": {"drainSeconds": 10, "progressDeadlineSeconds": 20}}))?;
    space.wait_until_ready("m")?;
    patch(&space, &json!({"source": {"uri": "file://absent.gguf"}}))?;
    space.wait_for_reason("m", "SourceUnreachable")?;
    let begun = Instant::now();
    let message = space.wait_for_reason("m", "RolloutStuck")?;
    ensure!(begun.elapsed() > Duration::from_secs(10), "stuck after {:?}", begun.elapsed());
    ensure!(message.contains("absent.gguf") && message.contains("serve on"), "{message}");
    space.chat("m", "Hello").context("the old replica serves on")?;
    patch(&space, &json!({"source": {"uri": crate::cluster::SMALL}}))?;
    space.wait_until_ready("m")
}

fn no_memory_for_the_surge(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("tight")?;
    let spec = json!({"memory": "4Gi", "scheduling": {"nodeSelector": {"kubernetes.io/hostname": "node2"}}});
    space.model("m", &spec)?;
    space.wait_until_ready("m")?;
    patch(&space, &json!({"engine": {"blockSize": 8}}))?;
    let message = space.wait_for_reason("m", "InsufficientMemory")?;
    ensure!(message.contains("node2 0 of 4 GiB") && message.contains("maxSurge"), "{message}");
    space.chat("m", "Hello")?;
    patch(&space, &json!({"rollout": {"maxSurge": 0, "maxUnavailable": 1}}))?;
    space.wait_until_ready("m")
}

fn helm_upgrade_under_load(cluster: &Cluster) -> Result<()> {
    let space = cluster.namespace("upgraded")?;
    two_replicas(&space)?;
    others(&space)?;
    let load = Load::start(&space, "m", CLIENTS, CLIENTS)?;
    upgrade(cluster, "next")?;
    wait_for_image(&space, "next")?;
    cluster.helm(&["-n", SYSTEM, "rollback", "bindery"])?;
    wait_for_image(&space, "dev")?;
    load.finish(cluster)?.ensure_nothing_failed()
}

/// Models beside the first, so that all are more than may move at once. As many on either node, so that each has room for the
/// surge: two replicas on one node would be unready together while its agent restarts. They take no surge of their own.
fn others(space: &Namespace) -> Result<()> {
    for index in 0..OTHERS {
        let mut spec = on(&format!("node{}", 1 + index % 2));
        spec["rollout"] = json!({"drainSeconds": 10, "maxSurge": 0, "maxUnavailable": 1});
        space.model(&format!("other{index}"), &spec)?;
    }
    (0..OTHERS).try_for_each(|index| space.wait_until_ready(&format!("other{index}")))
}

fn upgrade(cluster: &Cluster, tag: &str) -> Result<()> {
    cluster.upgrade(&[&format!("image.tag={tag}")])
}

/// Agents first, then the replicas of a few models at a time.
fn wait_for_image(space: &Namespace, tag: &str) -> Result<()> {
    let image = format!("localhost/bindery:{tag}");
    wait_for_agents(space, &image)?;
    let mut most = 0;
    space.cluster.wait("replicas run the image", PATIENCE * 2, || {
        let models = models(space)?;
        let on_the_way = |model: &&Value| image_of(model) == image && !has_arrived(model);
        most = most.max(models.iter().filter(on_the_way).count());
        let done = models.iter().all(|model| image_of(model) == image && has_arrived(model));
        Ok(done.then_some(()))
    })?;
    ensure!((1..=AT_ONCE).contains(&most), "{most} models moved to {tag} at once");
    space.wait_until_ready("m")
}

fn wait_for_agents(space: &Namespace, image: &str) -> Result<()> {
    let cluster = space.cluster;
    let agents = ["-n", SYSTEM, "daemonsets", "-l", "app.kubernetes.io/component=node-cpu"];
    let mut early = false;
    cluster.wait("agents run the image", PATIENCE * 2, || {
        let models = models(space)?;
        let agents = cluster.items(&agents)?;
        let done = agents.iter().all(|set| image_of(set) == image && has_arrived(set));
        // Read before the agents were: whoever moved by then moved too early.
        early |= !done && models.iter().any(|model| image_of(model) == image);
        Ok(done.then_some(()))
    })?;
    ensure!(!early, "replicas moved before the agents");
    Ok(())
}

/// The Deployments of the namespace's models.
fn models(space: &Namespace) -> Result<Vec<Value>> {
    space.cluster.items(&["-n", space.name, "deployments"])
}

/// The image of what a Deployment or DaemonSet makes.
fn image_of(maker: &Value) -> &str {
    let image = &maker["spec"]["template"]["spec"]["containers"][0]["image"];
    image.as_str().unwrap_or_default()
}

/// Whether all Pods of a Deployment or DaemonSet are of its template and ready, and no other is left.
fn has_arrived(maker: &Value) -> bool {
    let status = &maker["status"];
    let (wanted, counts) = match maker["spec"]["replicas"].as_i64() {
        Some(wanted) => (wanted, ["replicas", "updatedReplicas", "availableReplicas"]),
        None => (
            status["desiredNumberScheduled"].as_i64().unwrap_or(-1),
            ["currentNumberScheduled", "updatedNumberScheduled", "numberAvailable"],
        ),
    };
    status["observedGeneration"] == maker["metadata"]["generation"]
        && counts.iter().all(|count| status[*count].as_i64() == Some(wanted))
}
