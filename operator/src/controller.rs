//! The wiring: what is watched, who leads, what ends the process.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use crds::InferenceModel;
use futures_util::stream::{BoxStream, select_all};
use futures_util::{Stream, StreamExt};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::Api;
use kube::runtime::controller::{Config as ControllerConfig, Controller};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin;
use crate::apply::{Applier, MANAGER};
use crate::config::Config;
use crate::desired::MODEL_LABEL;
use crate::lease::Lease;
use crate::metrics::Metrics;
use crate::observe::Stores;
use crate::reconcile::{Context, Failures, Teller, after_error, reconcile};

/// Models that are reconciled at once.
const CONCURRENCY: u16 = 16;
/// A burst of events about one model is one reconciliation.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// Runs the operator until a signal, or until its lease is lost.
///
/// # Errors
/// When it cannot start, or has lost its lease.
pub fn run(config: Config) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log_level);
    let filter = filter.context("read --log-level")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the operator's threads")?;
    runtime.block_on(live(config))
}

async fn live(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let metrics = Metrics::new().context("register the metrics")?;
    let listener = TcpListener::bind(("0.0.0.0", config.port)).await;
    let listener = listener.with_context(|| format!("listen on port {}", config.port))?;
    tokio::spawn(admin::serve(listener, metrics.clone()));
    let client = Client::try_default().await.context("find the API server")?;
    let mut lease = Lease::new(client.clone(), &config);
    let stopped = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::pin!(stopped);
    tokio::select! {
        () = lease.acquire() => {}
        () = &mut stopped => return Ok(()),
    }
    tracing::info!("this operator leads");
    metrics.leads(true);
    let led = tokio::select! {
        () = work(client, config, metrics) => anyhow::bail!("the watches have ended"),
        lost = lease.hold() => Err(lost),
        () = &mut stopped => Ok(()),
    };
    match led {
        Ok(()) => {
            lease.release().await;
            Ok(())
        }
        Err(lost) => Err(lost).context("another operator may lead now"),
    }
}

/// Reconciles for as long as it is polled.
async fn work(client: Client, config: Config, metrics: Metrics) {
    let (stores, triggers) = watch_all(&client, &config);
    let http = reqwest::Client::builder().no_proxy().build().unwrap_or_default();
    let reporter = Reporter { controller: MANAGER.into(), instance: Some(config.own_name.clone()) };
    let context = Arc::new(Context {
        applier: Applier::new(client.clone()),
        teller: Teller::new(Recorder::new(client.clone(), reporter)),
        config: config.clone(),
        stores,
        http,
        metrics: metrics.clone(),
        failures: Failures::default(),
    });
    let (models, writer) = reflector::store::<InferenceModel>();
    let watched = of_namespaces::<InferenceModel>(&client, &config)
        .into_iter()
        .map(|api| watcher(api, watcher::Config::default()).default_backoff().boxed());
    let changed = select_all(watched).reflect(writer).touched_objects();
    metrics.watch(models.clone());
    let controller = Controller::for_stream(changed, models)
        .with_config(ControllerConfig::default().concurrency(CONCURRENCY).debounce(DEBOUNCE))
        .reconcile_on(triggers);
    controller.run(reconcile, after_error, context).for_each(|_| std::future::ready(())).await;
}

/// One interface for each namespace that is looked at.
fn of_namespaces<K>(client: &Client, config: &Config) -> Vec<Api<K>>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
{
    if config.namespaces.is_empty() {
        return vec![Api::all(client.clone())];
    }
    config.namespaces.iter().map(|name| Api::namespaced(client.clone(), name)).collect()
}

/// Watches everything that a plan looks at. A child or Pod that changes wakes its model.
fn watch_all(
    client: &Client,
    config: &Config,
) -> (Stores, impl Stream<Item = ObjectRef<InferenceModel>> + Send + use<>) {
    let mut wakes = Vec::new();
    let stores = Stores {
        deployments: children(client, config, &mut wakes),
        services: children(client, config, &mut wakes),
        disruption_budgets: children(client, config, &mut wakes),
        network_policies: children(client, config, &mut wakes),
        pods: pods(client, config, &mut wakes),
        nodes: nodes(client, &mut wakes),
        agents: config
            .node_agents
            .as_deref()
            .map(|labels| agents(client, config, labels, &mut wakes)),
        begun: Arc::default(),
    };
    (stores, select_all(wakes))
}

type Wakes = Vec<BoxStream<'static, ObjectRef<InferenceModel>>>;

fn children<K>(client: &Client, config: &Config, wakes: &mut Wakes) -> Store<K>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    watch_ours(client, config, wakes, |child: &mut K| child.managed_fields_mut().clear())
}

/// Pods without what no plan reads: they are the most of what is kept.
fn pods(client: &Client, config: &Config, wakes: &mut Wakes) -> Store<Pod> {
    watch_ours(client, config, wakes, |pod: &mut Pod| {
        pod.managed_fields_mut().clear();
        pod.annotations_mut().clear();
        if let Some(spec) = &mut pod.spec {
            let containers =
                spec.containers.iter().map(|container| k8s_openapi::api::core::v1::Container {
                    resources: container.resources.clone(),
                    ..Default::default()
                });
            *spec = k8s_openapi::api::core::v1::PodSpec {
                node_name: spec.node_name.take(),
                containers: containers.collect(),
                ..Default::default()
            };
        }
    })
}

fn watch_ours<K>(client: &Client, config: &Config, wakes: &mut Wakes, trim: fn(&mut K)) -> Store<K>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    let (store, writer) = reflector::store();
    let ours = watcher::Config::default().labels(MODEL_LABEL);
    let watched = of_namespaces::<K>(client, config)
        .into_iter()
        .map(|api| watcher(api, ours.clone()).default_backoff().boxed());
    let touched = select_all(watched).modify(trim).reflect(writer).touched_objects();
    wakes.push(touched.filter_map(|child| std::future::ready(woken(child))).boxed());
    store
}

/// The model of a child or Pod. A watch that breaks off is begun again by itself.
fn woken<K: Resource>(child: Result<K, watcher::Error>) -> Option<ObjectRef<InferenceModel>> {
    match child {
        Ok(child) => {
            let name = child.labels().get(MODEL_LABEL)?;
            Some(ObjectRef::new(name).within(&child.namespace()?))
        }
        Err(error) => {
            tracing::warn!(%error, "a watch broke off");
            None
        }
    }
}

/// The node agents' DaemonSets wake nobody: a model that waits for them looks again by itself.
fn agents(client: &Client, config: &Config, labels: &str, wakes: &mut Wakes) -> Store<DaemonSet> {
    let (store, writer) = reflector::store();
    let api = Api::<DaemonSet>::namespaced(client.clone(), &config.own_namespace);
    let touched = watcher(api, watcher::Config::default().labels(labels))
        .default_backoff()
        .reflect(writer)
        .touched_objects();
    wakes.push(touched.filter_map(|_| std::future::ready(None)).boxed());
    store
}

/// Nodes wake nobody: a model that waits for memory looks again by itself.
fn nodes(client: &Client, wakes: &mut Wakes) -> Store<Node> {
    let (store, writer) = reflector::store();
    let touched = watcher(Api::<Node>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .modify(|node| {
            node.managed_fields_mut().clear();
            node.annotations_mut().clear();
            if let Some(status) = &mut node.status {
                status.images = None;
                status.volumes_attached = None;
                status.volumes_in_use = None;
            }
        })
        .reflect(writer)
        .touched_objects();
    wakes.push(touched.filter_map(|_| std::future::ready(None)).boxed());
    store
}
