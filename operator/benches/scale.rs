//! A thousand models and five thousand replica Pods on a real API server: `make bench-operator`.
//! No kubelet runs the Pods: nothing matches their node selector, and their status is set from here.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "it prints a table")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use crds::InferenceModel;
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;

const MODELS: usize = 1000;
const REPLICAS: usize = 5;
/// Changes a second, and for how long each: together about a thousand, as one in some seconds of an hour.
const RATES: [u32; 3] = [2, 5, 10];
const CHURN: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "bench";
const PATIENCE: Duration = Duration::from_secs(600);
/// Requests from here at once.
const AT_ONCE: usize = 16;
/// Of so many changes one is a new model, which is deleted so many new ones later.
const NEW_OF: usize = 10;
const STAY: usize = 5;
/// Resources of children and verbs of writes, as the API server's metrics call them.
const CHILDREN: [&str; 4] = ["deployments", "services", "poddisruptionbudgets", "networkpolicies"];
const WRITES: [&str; 5] = ["APPLY", "PATCH", "PUT", "POST", "DELETE"];

struct Operator(Child);

impl Drop for Operator {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl Operator {
    fn start() -> Result<Self> {
        let exe = std::env::current_exe()?;
        let folder = exe.parent().and_then(|deps| deps.parent()).context("no target folder")?;
        let program: PathBuf = folder.join("bindery-operator");
        let child = Command::new(&program)
            .args([
                "--replica-image=localhost/bindery:dev",
                "--namespaces",
                NAMESPACE,
                "--lease=bench",
                "--port=18300",
            ])
            .env("POD_NAMESPACE", NAMESPACE)
            .env("POD_NAME", "bench")
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.join("bench-operator.log"))?)
            .spawn()
            .with_context(|| program.display().to_string())?;
        Ok(Self(child))
    }

    /// Processor time since its start, in seconds; a tick is a hundredth (`proc(5)`).
    fn seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let after_name = stat.rsplit_once(") ").context("no name")?.1;
        let ticks = after_name.split(' ').skip(11).take(2).map(str::parse::<f64>);
        Ok(ticks.sum::<Result<f64, _>>()? / 100.0)
    }

    /// Resident now and at most, in MiB.
    fn memory(&self) -> Result<(u64, u64)> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let figure = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
        };
        let now = figure("VmRSS").context("no VmRSS")?;
        Ok((now >> 10, figure("VmHWM").context("no VmHWM")? >> 10))
    }
}

fn main() -> Result<()> {
    if std::env::var_os("BINDERY_BENCH_OPERATOR").is_none() {
        eprintln!("NOT RUN: `make bench-operator` starts a cluster and runs this against it");
        return Ok(());
    }
    tokio::runtime::Runtime::new()?.block_on(bench())
}

async fn bench() -> Result<()> {
    let client = Client::try_default().await?;
    let models: Api<InferenceModel> = Api::namespaced(client.clone(), NAMESPACE);
    let start = Instant::now();
    let mut operator = Operator::start()?;
    stream::iter(0..MODELS)
        .map(|index| create(&models, format!("m{index}")))
        .buffer_unordered(AT_ONCE)
        .try_collect::<Vec<_>>()
        .await?;
    wait_for_pods(&client).await?;
    settle(&client, &models).await?;
    println!(
        "{MODELS} models with {} Pods Ready after {:.0} s",
        MODELS * REPLICAS,
        start.elapsed().as_secs_f64()
    );
    let (settled, _) = operator.memory()?;
    println!("resident {settled} MiB");

    for rate in RATES {
        change(&client, &models, &operator, rate).await?;
        settle(&client, &models).await?;
    }
    let (after, most) = operator.memory()?;
    println!(
        "resident {settled} MiB, after the changes {after} MiB, at most {most} MiB (goal 100)"
    );

    tokio::time::sleep(Duration::from_secs(20)).await;
    let before = versions(&client).await?;
    let written = writes(&client).await?;
    tokio::time::sleep(Duration::from_secs(30)).await;
    println!("writes in 30 quiet seconds: {}", since(&written, &writes(&client).await?));
    println!(
        "objects that changed meanwhile: {} of {}",
        changed(&before, &versions(&client).await?),
        before.len()
    );
    operator.0.kill()?;
    operator.0.wait()?;
    let written = writes(&client).await?;
    operator = Operator::start()?;
    tokio::time::sleep(Duration::from_secs(40)).await;
    println!("writes after a restart: {}", since(&written, &writes(&client).await?));
    println!("objects that it changed: {}", changed(&before, &versions(&client).await?));
    println!("resident after the restart {} MiB", operator.memory()?.0);
    Ok(())
}

/// Changes models for a while and prints how soon each was answered.
async fn change(
    client: &Client,
    models: &Api<InferenceModel>,
    operator: &Operator,
    rate: u32,
) -> Result<()> {
    let used = operator.seconds()?;
    let delays = churn(client, models, rate).await?;
    let used = operator.seconds()? - used;
    let at = |percent: usize| delays[(delays.len() - 1) * percent / 100].as_secs_f64() * 1e3;
    println!(
        "{} changes at {rate} a second, to the model's last write: p50 {:.0} ms, p99 {:.0} ms (goal 1000); the operator's own processor time for each {:.0} ms",
        delays.len(),
        at(50),
        at(99),
        used * 1e3 / delays.len() as f64
    );
    Ok(())
}

/// Writes of models and their children that the API server has answered, by resource: a patch that changes nothing leaves
/// every version as it is. What Kubernetes' controllers write of a child's status is left out.
async fn writes(client: &Client) -> Result<BTreeMap<String, f64>> {
    let asked = http::Request::get("/metrics").body(Vec::new())?;
    let metrics = client.request_text(asked).await?;
    let mut writes = BTreeMap::new();
    for line in metrics.lines() {
        let Some(labels) = line.strip_prefix("apiserver_request_total{") else { continue };
        let label = |name: &str| {
            let (_, rest) = labels.split_once(&format!("{name}=\""))?;
            Some(rest.split_once('"')?.0.to_owned())
        };
        let (resource, verb) = (label(",resource").unwrap_or_default(), label("verb"));
        let is_childs = CHILDREN.contains(&resource.as_str());
        let is_ours = resource == "inferencemodels"
            || (is_childs && label("subresource").as_deref() == Some(""));
        if is_ours && verb.is_some_and(|verb| WRITES.contains(&verb.as_str())) {
            let figure = line.rsplit_once(' ').context("no figure")?.1.parse::<f64>()?;
            *writes.entry(resource).or_default() += figure;
        }
    }
    ensure!(!writes.is_empty(), "the API server's metrics have other names");
    Ok(writes)
}

/// What was written since, by resource.
fn since(before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>) -> String {
    let figure = |(resource, after): (&String, &f64)| {
        format!("{resource} {}", after - before.get(resource).unwrap_or(&0.0))
    };
    after.iter().map(figure).collect::<Vec<_>>().join(", ")
}

async fn create(models: &Api<InferenceModel>, name: String) -> Result<()> {
    let model = serde_json::from_value(json!({
        "apiVersion": "bindery.dev/v1alpha1", "kind": "InferenceModel",
        "metadata": {"name": name},
        "spec": {
            "source": {"uri": "file://m.gguf"}, "device": "cpu", "memory": "1Gi", "replicas": REPLICAS,
            "rollout": {"maxSurge": 0, "maxUnavailable": REPLICAS},
            "scheduling": {"nodeSelector": {"bench": "none"}},
        },
    }))?;
    models.create(&PostParams::default(), &model).await?;
    Ok(())
}

async fn wait_for_pods(client: &Client) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let start = Instant::now();
    loop {
        let found = pods.list_metadata(&ListParams::default()).await?.items.len();
        if found >= MODELS * REPLICAS {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{found} Pods");
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// Sets the status that a kubelet would set.
async fn make_ready(client: &Client) -> Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let ready = json!({"status": {"phase": "Running", "conditions": [
        {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
    ]}});
    let is_ready = |pod: &Pod| {
        let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|found| found.type_ == "Ready" && found.status == "True")
    };
    let waiting: Vec<String> = pods
        .list(&ListParams::default())
        .await?
        .iter()
        .filter(|pod| !is_ready(pod))
        .map(|pod| pod.name_any())
        .collect();
    stream::iter(waiting)
        .for_each_concurrent(AT_ONCE, |name| {
            let (pods, ready) = (&pods, &ready);
            async move {
                // It may have been replaced since.
                drop(pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(ready)).await);
            }
        })
        .await;
    Ok(())
}

/// Makes Pods ready, and those that replace them, until every rollout is over.
async fn settle(client: &Client, models: &Api<InferenceModel>) -> Result<()> {
    let start = Instant::now();
    loop {
        make_ready(client).await?;
        let found = models.list(&ListParams::default()).await?;
        let count =
            found.iter().filter(|model| is(model, "Ready") && !is(model, "Reconciling")).count();
        if count == MODELS {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{count} models have settled");
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

fn is(model: &InferenceModel, condition: &str) -> bool {
    let conditions = model.status.iter().flat_map(|status| &status.conditions);
    conditions.into_iter().any(|found| found.type_ == condition && found.status == "True")
}

/// When a model was changed to which generation.
type Waiting = Arc<Mutex<BTreeMap<String, (i64, Instant)>>>;

/// Changes the drain time of one model after the other: every child's template follows, no Pod need be made ready for the
/// status to say that it was seen. Others come and go. Sorted times from the change to the status of its generation.
async fn churn(client: &Client, models: &Api<InferenceModel>, rate: u32) -> Result<Vec<Duration>> {
    let waiting = Waiting::default();
    let delays = Arc::new(Mutex::new(Vec::new()));
    let watched = tokio::spawn(watch(client.clone(), Arc::clone(&waiting), Arc::clone(&delays)));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let start = Instant::now();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
    let mut index = 0;
    while start.elapsed() < CHURN {
        ticks.tick().await;
        let sent = Instant::now();
        let (name, generation) = if index % NEW_OF == 0 {
            come_and_go(models, index).await?
        } else {
            edit(models, index, rate).await?
        };
        waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(name, (generation, sent));
        index += 1;
    }
    tokio::time::sleep(Duration::from_secs(10)).await;
    watched.abort();
    for gone in index.saturating_sub(NEW_OF * (STAY + 1))..index {
        delete(models, &format!("new{gone}")).await?;
    }
    let lost = waiting.lock().unwrap_or_else(PoisonError::into_inner).len();
    ensure!(lost == 0, "{lost} changes were not answered within 10 s");
    let mut delays = delays.lock().unwrap_or_else(PoisonError::into_inner).clone();
    delays.sort();
    Ok(delays)
}

/// Another drain time than the model has, also after the changes of another rate.
async fn edit(models: &Api<InferenceModel>, index: usize, rate: u32) -> Result<(String, i64)> {
    let name = format!("m{}", index * 7 % MODELS);
    let patch = json!({"spec": {"rollout": {"drainSeconds": 100 * rate as usize + index % 50}}});
    let answer = models.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    Ok((name, answer.metadata.generation.unwrap_or(0)))
}

async fn come_and_go(models: &Api<InferenceModel>, index: usize) -> Result<(String, i64)> {
    let name = format!("new{index}");
    create(models, name.clone()).await?;
    if let Some(gone) = index.checked_sub(NEW_OF * STAY) {
        delete(models, &format!("new{gone}")).await?;
    }
    Ok((name, 1))
}

/// Deletes what may not be there.
async fn delete(models: &Api<InferenceModel>, name: &str) -> Result<()> {
    match models.delete(name, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        deleted => deleted.map(drop).map_err(Into::into),
    }
}

async fn watch(client: Client, waiting: Waiting, delays: Arc<Mutex<Vec<Duration>>>) {
    let models: Api<InferenceModel> = Api::namespaced(client, NAMESPACE);
    let mut seen =
        watcher(models, watcher::Config::default()).default_backoff().touched_objects().boxed();
    while let Some(Ok(model)) = seen.next().await {
        let observed = model.status.as_ref().and_then(|status| status.observed_generation);
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let done = waiting
            .get(&model.name_any())
            .filter(|(wanted, _)| observed >= Some(*wanted))
            .map(|(_, sent)| sent.elapsed());
        if let Some(delay) = done {
            waiting.remove(&model.name_any());
            delays.lock().unwrap_or_else(PoisonError::into_inner).push(delay);
        }
    }
}

/// Versions of all models and children by kind and name. Deployments count by generation: their status is not ours.
async fn versions(client: &Client) -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    all.extend(of::<InferenceModel>(client).await?);
    all.extend(of::<Deployment>(client).await?);
    all.extend(of::<Service>(client).await?);
    all.extend(of::<PodDisruptionBudget>(client).await?);
    all.extend(of::<NetworkPolicy>(client).await?);
    Ok(all)
}

async fn of<K>(client: &Client) -> Result<BTreeMap<String, String>>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), NAMESPACE);
    let found = api.list_metadata(&ListParams::default()).await?;
    let version = |item: kube::api::PartialObjectMeta<K>| {
        let generation = item.metadata.generation.map(|generation| generation.to_string());
        let version = item.metadata.resource_version.clone().unwrap_or_default();
        let by_generation = ["Deployment", "PodDisruptionBudget"].contains(&&*K::kind(&()));
        let version = if by_generation { generation.unwrap_or(version) } else { version };
        (format!("{}/{}", K::kind(&()), item.metadata.name.unwrap_or_default()), version)
    };
    Ok(found.items.into_iter().map(version).collect())
}

fn changed(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> usize {
    before.iter().filter(|(name, version)| after.get(*name) != Some(version)).count()
}
