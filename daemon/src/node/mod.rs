//! The node agent: lends the node's memory through the kubelet, runs an engine for each claim.

pub mod admin;
pub mod agent;
pub mod claims;
pub mod engine;
pub mod gpus;
pub mod grants;
pub mod kubelet;
pub mod ledger;
pub mod weights;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

pub use agent::LocalClients;

use agent::{Agent, Parts, Phase};
use engine::Spawner;
use gpus::Gpus;
use grants::Grants;
use kubelet::Plugin;
use ledger::{Device, Health, Ledger};
use weights::{Weights, WeightsConfig};

use crate::config::LogConfig;
use crate::source::Retry;
use crate::source::reach::Reach;

/// What the agent advertises: the resource, and how its devices' names begin.
const RESOURCES: [(&str, &str); 2] =
    [("bindery.dev/cpu-memory-gib", "cpu"), ("bindery.dev/gpu-memory-gib", gpus::PREFIX)];
/// From the end of the last engine to the end of the agent, so that the claims' last words are read.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Everything `bindery node` needs to know, checked.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Memory to lend as `bindery.dev/cpu-memory-gib`.
    pub cpu_memory_gib: Option<u32>,
    /// A file that says which GPUs there are, in place of the driver.
    pub gpu_inventory: Option<PathBuf>,
    pub model_dir: PathBuf,
    pub state_dir: PathBuf,
    pub kubelet_dir: PathBuf,
    pub hub_endpoint: String,
    /// Which addresses downloads may reach.
    pub reach: Reach,
    /// Bytes of all downloads together.
    pub cache_limit_bytes: Option<u64>,
    pub admin: std::net::SocketAddr,
    pub drain: Duration,
    pub local_clients: LocalClients,
    pub log: LogConfig,
}

/// How often the inventory is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Runs the agent until a signal.
///
/// # Errors
/// When it cannot start.
pub fn run(config: &NodeConfig) -> Result<()> {
    crate::serve::start_log(&config.log)?;
    let runtime = tokio::runtime::Runtime::new().context("start the agent's threads")?;
    let done = runtime.block_on(live(config));
    runtime.shutdown_background();
    done
}

async fn live(config: &NodeConfig) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let gpus = Gpus::find(config.gpu_inventory.as_deref())?;
    let devices = inventory(config, &gpus)?;
    let resources = RESOURCES
        .into_iter()
        .filter(|(_, prefix)| devices.iter().any(|device| device.name.starts_with(prefix)));
    let resources: Vec<_> = resources.collect();
    let (agent, listeners) = Agent::new(parts(config, devices)?);
    agent.restore().context("take up the grants of before")?;
    let mut tasks = JoinSet::new();
    tasks.spawn(claims::serve(Arc::clone(&agent), listeners));
    for (resource, prefix) in resources {
        let plugin = Plugin { agent: Arc::clone(&agent), resource, prefix };
        tasks.spawn(plugin.run(config.kubelet_dir.join("device-plugins")));
    }
    tasks.spawn(kubelet::compare(
        Arc::clone(&agent),
        config.kubelet_dir.join("pod-resources/kubelet.sock"),
    ));
    if !matches!(gpus, Gpus::None) {
        tasks.spawn(follow(Arc::clone(&agent), gpus));
    }
    let listener = tokio::net::TcpListener::bind(config.admin).await;
    let listener = listener.with_context(|| format!("listen on {}", config.admin))?;
    tasks.spawn(admin::serve(listener, Arc::clone(&agent)));
    tracing::info!(admin = %config.admin, "the node agent runs");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    drain(&agent).await;
    Ok(())
}

fn parts(config: &NodeConfig, devices: Vec<Device>) -> Result<Parts> {
    let root = &config.state_dir;
    Ok(Parts {
        ledger: Ledger::new(devices),
        grants: Grants::open(root).with_context(|| format!("open {}", root.display()))?,
        weights: Weights::new(WeightsConfig {
            model_folder: config.model_dir.clone(),
            root: root.clone(),
            hub_endpoint: config.hub_endpoint.clone(),
            reach: config.reach,
            limit_bytes: config.cache_limit_bytes,
            retry: Retry::USUAL,
        }),
        spawner: Spawner::start().context("start the spawning thread")?,
        program: std::env::current_exe().context("find this program")?,
        local_clients: config.local_clients,
        drain: config.drain,
    })
}

/// What there is to lend.
fn inventory(config: &NodeConfig, gpus: &Gpus) -> Result<Vec<Device>> {
    let cpu = config.cpu_memory_gib.map(|gib| Device {
        name: "cpu0".into(),
        gib,
        health: Health::Healthy,
    });
    let mut devices: Vec<_> = cpu.into_iter().collect();
    devices.extend(gpus.list()?);
    anyhow::ensure!(
        !devices.is_empty(),
        "there is nothing to lend: no NVIDIA driver shows a GPU here, and --cpu-memory, such as 16Gi, is not stated"
    );
    Ok(devices)
}

/// Follows the health of the GPUs. One that has gone stays, unhealthy: its grants must be able to see it.
async fn follow(agent: Arc<Agent>, gpus: Gpus) {
    let lost = Health::Unhealthy { reason: "the device is gone".into() };
    loop {
        tokio::time::sleep(LOOK).await;
        let asked = gpus.clone();
        // A driver in trouble may take its time.
        let found = tokio::task::spawn_blocking(move || asked.list()).await;
        let found = found.unwrap_or_else(|error| Err(error.into())).unwrap_or_else(|error| {
            tracing::warn!(error = %format!("{error:#}"), "no GPU can be seen");
            Vec::new()
        });
        agent.follow(|device| {
            let same = found.iter().find(|found| found.name == device);
            device
                .starts_with(gpus::PREFIX)
                .then(|| same.map_or(&lost, |found| &found.health).clone())
        });
    }
}

/// Lets running requests finish, then lets the engines end with their claims.
async fn drain(agent: &Agent) {
    tracing::info!("draining");
    agent.phase.send_replace(Phase::Draining);
    let mut changed = agent.watch();
    let empty = async {
        while agent.read(|ledger| ledger.usage().iter().any(|device| device.used_gib > 0)) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    };
    if tokio::time::timeout(agent.drain, empty).await.is_err() {
        tracing::warn!("requests still run and are broken off");
    }
    tokio::time::sleep(LAST_WORDS).await;
}
