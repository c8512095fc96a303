//! The wiring: what is watched, who leads, what ends the process.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::future::join_all;
use futures_util::stream::{BoxStream, select, select_all};
use futures_util::{Stream, StreamExt};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Container, Node, Pod, PodSpec, PodTemplateSpec};
use k8s_openapi::jiff::Timestamp;
use kube::api::Api;
use kube::runtime::controller::{self, Action, Config as ControllerConfig, Controller};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::admin;
use crate::apply::{Applier, ApplyError, MANAGER};
use crate::ask::Asker;
use crate::backoff::Counts;
use crate::config::Config;
use crate::desired::MODEL_LABEL;
use crate::lease::Lease;
use crate::metrics::Metrics;
use crate::moves::Moves;
use crate::observe::{Shared, Stores};
use crate::pods::{Key, Pods, Writer, key_of};
use crate::reconcile::{Context, Teller, Watched, after_error, reconcile};

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
    let asker = Asker::new().context("make a client for replicas")?;
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
        () = work(client, config, metrics, asker) => anyhow::bail!("the watches have ended"),
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

/// Reconciles for as long as it is polled. Each namespace has its watches and its controller: a watch that lists anew
/// replaces what its store has, so that no two may share one.
async fn work(client: Client, config: Config, metrics: Metrics, asker: Asker) {
    let (shared, followed) = shared(&client, &config, asker);
    let namespaces = match config.namespaces.as_slice() {
        [] => vec![None],
        some => some.iter().cloned().map(Some).collect(),
    };
    let controls = namespaces
        .into_iter()
        .map(|namespace| control(&client, &config, &metrics, namespace, shared.clone()));
    tokio::join!(join_all(controls), followed.for_each(|()| std::future::ready(())));
}

async fn control(
    client: &Client,
    config: &Config,
    metrics: &Metrics,
    namespace: Option<String>,
    shared: Shared,
) {
    let scope = Scope { client, namespace };
    let (stores, triggers) = scope.watch_all(shared);
    let reporter = Reporter { controller: MANAGER.into(), instance: Some(config.own_name.clone()) };
    let context = Arc::new(Context {
        applier: Applier::new(client.clone()),
        teller: Teller::new(Recorder::new(client.clone(), reporter)),
        config: config.clone(),
        stores,
        metrics: metrics.clone(),
        failures: Counts::default(),
    });
    let (models, writer) = reflector::store::<Watched>();
    let changed = watcher(scope.api(), watcher::Config::default())
        .default_backoff()
        .modify(|model: &mut Watched| model.managed_fields_mut().clear())
        .reflect(writer)
        .touched_objects()
        .inspect({
            let metrics = metrics.clone();
            move |model| model.iter().for_each(|model| metrics.woke(key_of(model.meta())))
        });
    let triggers = triggers.inspect({
        let metrics = metrics.clone();
        move |model| metrics.woke(key_of_ref(model))
    });
    metrics.watch(models.clone());
    let controller = Controller::for_stream(changed, models)
        .with_config(ControllerConfig::default().concurrency(CONCURRENCY).debounce(DEBOUNCE))
        .reconcile_on(triggers);
    let results = controller.run(reconcile, after_error, Arc::clone(&context));
    let heard = results.for_each(|result| {
        hear(result, |gone| context.forget(gone));
        std::future::ready(())
    });
    heard.await;
}

fn key_of_ref(model: &ObjectRef<Watched>) -> Key {
    (model.namespace.clone().unwrap_or_default(), model.name.clone())
}

type Reconciled =
    Result<(ObjectRef<Watched>, Action), controller::Error<ApplyError, watcher::Error>>;

/// Tells what nobody else has told, and of models that are gone. Nothing reconciles such a one any more: no finalizer keeps
/// it, its last event and those of its children come here.
fn hear(result: Reconciled, forget: impl FnOnce(&Key)) {
    match result {
        // The second is told where it is tried again.
        Ok(_) | Err(controller::Error::ReconcilerFailed(..)) => {}
        Err(controller::Error::ObjectNotFound(gone)) => {
            forget(&(gone.namespace.unwrap_or_default(), gone.name));
        }
        Err(controller::Error::QueueError(error)) => {
            tracing::warn!(%error, "the watch of models broke off");
        }
        Err(controller::Error::RunnerError(error)) => {
            tracing::error!(%error, "no model is reconciled");
        }
    }
}

/// One namespace, or all of them.
struct Scope<'a> {
    client: &'a Client,
    namespace: Option<String>,
}

type Wakes = Vec<BoxStream<'static, ObjectRef<Watched>>>;

impl Scope<'_> {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    /// Watches everything that a plan looks at. A child or Pod that changes wakes its model.
    fn watch_all(
        &self,
        shared: Shared,
    ) -> (Stores, impl Stream<Item = ObjectRef<Watched>> + Send + use<>) {
        let mut wakes = Vec::new();
        let (begun, pods_begun) = watch::channel(false);
        self.pods(Writer::new(shared.pods.clone(), begun), &mut wakes);
        let deployments = self.children(&mut wakes, trim);
        shared.moves.watch(deployments.clone());
        let stores = Stores {
            deployments,
            services: self.children(&mut wakes, |_| {}),
            disruption_budgets: self.children(&mut wakes, |_| {}),
            network_policies: self.children(&mut wakes, |_| {}),
            pods_begun,
            shared,
            begun: Arc::default(),
        };
        (stores, select_all(wakes))
    }

    fn children<K>(&self, wakes: &mut Wakes, trim: fn(&mut K)) -> Store<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + Debug
            + DeserializeOwned
            + Send
            + Sync
            + 'static,
    {
        let (store, writer) = reflector::store();
        let touched = watcher(self.api::<K>(), ours())
            .default_backoff()
            .modify(move |child| {
                child.managed_fields_mut().clear();
                trim(child);
            })
            .reflect(writer)
            .touched_objects();
        wakes.push(touched.filter_map(|child| std::future::ready(woken(child))).boxed());
        store
    }

    fn pods(&self, mut writer: Writer, wakes: &mut Wakes) {
        let events = watcher(self.api::<Pod>(), ours()).default_backoff();
        let taken = events.inspect(move |event| {
            if let Ok(event) = event {
                writer.take(event);
            }
        });
        let touched = taken.touched_objects();
        wakes.push(touched.filter_map(|pod| std::future::ready(woken(pod))).boxed());
    }
}

fn ours() -> watcher::Config {
    watcher::Config::default().labels(MODEL_LABEL)
}

/// Of a Deployment's template nobody reads more than the image.
fn trim(deployment: &mut Deployment) {
    let Some(spec) = &mut deployment.spec else { return };
    let containers = spec.template.spec.take().map(|pod| pod.containers).unwrap_or_default();
    let containers = containers
        .into_iter()
        .map(|container| Container { image: container.image, ..Default::default() });
    let pod = PodSpec { containers: containers.collect(), ..Default::default() };
    spec.template = PodTemplateSpec { metadata: None, spec: Some(pod) };
}

/// The model of a child or Pod. A watch that breaks off is begun again by itself.
fn woken<K: Resource>(child: Result<K, watcher::Error>) -> Option<ObjectRef<Watched>> {
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

/// Watches nodes and agents. They wake nobody: a model that waits for them looks again by itself.
fn shared(
    client: &Client,
    config: &Config,
    asker: Asker,
) -> (Shared, impl Stream<Item = ()> + Send + use<>) {
    let (nodes, node_events) = nodes(client);
    let (agents, agent_events) = config.node_agents.as_deref().map_or_else(
        || (None, futures_util::stream::pending().boxed()),
        |labels| {
            let (store, events) = agents(client, config, labels);
            (Some(store), events)
        },
    );
    let moves = Arc::new(Moves::new(agents, Timestamp::now()));
    let shared = Shared {
        pods: Pods::default(),
        nodes,
        moves,
        asker: Arc::new(asker),
        fragmented: Arc::default(),
        begun: Arc::default(),
    };
    (shared, select(node_events, agent_events))
}

fn agents(
    client: &Client,
    config: &Config,
    labels: &str,
) -> (Store<DaemonSet>, BoxStream<'static, ()>) {
    let (store, writer) = reflector::store();
    let api = Api::<DaemonSet>::namespaced(client.clone(), &config.own_namespace);
    let events =
        watcher(api, watcher::Config::default().labels(labels)).default_backoff().reflect(writer);
    (store, told("node agents", events))
}

fn nodes(client: &Client) -> (Store<Node>, BoxStream<'static, ()>) {
    let (store, writer) = reflector::store();
    let events = watcher(Api::<Node>::all(client.clone()), watcher::Config::default())
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
        .reflect(writer);
    (store, told("nodes", events))
}

/// A watch of which nothing is wanted but its store.
fn told<K: 'static>(
    what: &'static str,
    events: impl Stream<Item = Result<watcher::Event<K>, watcher::Error>> + Send + 'static,
) -> BoxStream<'static, ()> {
    let told = events.map(move |event| {
        if let Err(error) = event {
            tracing::warn!(%error, what, "a watch broke off");
        }
    });
    told.boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_is_gone_is_forgotten() {
        let gone = ObjectRef::<Watched>::new("m").within("n").erase();
        let mut forgotten = None;
        hear(Err(controller::Error::ObjectNotFound(Box::new(gone))), |key| {
            forgotten = Some(key.clone());
        });
        assert_eq!(forgotten, Some(("n".to_owned(), "m".to_owned())));
    }
}
