//! What is: children, Pods and nodes from the watches, and what replicas that are not ready say of themselves.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crds::{InferenceModel, ReplicaState};
use futures_util::StreamExt;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Resource, ResourceExt};
use tokio::sync::{OnceCell, watch};

use crate::desired::{HEALTH_PORT, resource_of};
use crate::pods::{Key, PodSeen, Pods, key_of};

/// The longest that a replica may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(1);
/// Replicas that are asked at once.
const AT_ONCE: usize = 8;
/// Models whose replicas move to a new image at once.
const MOVES: usize = 4;
/// A model whose replicas make no progress for this long does not keep others from moving.
const STUCK_SECONDS: i64 = 60;
/// The largest answer of a replica.
const LARGEST_STATE: u64 = 16 << 10;

/// What the watches keep, of one namespace or of all.
#[derive(Clone, Debug)]
pub struct Stores {
    pub deployments: Store<Deployment>,
    pub services: Store<PartialObjectMeta<Service>>,
    pub disruption_budgets: Store<PartialObjectMeta<PodDisruptionBudget>>,
    pub network_policies: Store<PartialObjectMeta<NetworkPolicy>>,
    pub pods_begun: watch::Receiver<bool>,
    pub shared: Shared,
    /// Set once every watch has begun.
    pub begun: Arc<OnceCell<()>>,
}

/// What is the same for every namespace.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The Pods of all namespaces that are looked at: they share the nodes.
    pub pods: Pods,
    pub nodes: Store<Node>,
    /// The node agents, where replicas' images follow theirs.
    pub agents: Option<Store<DaemonSet>>,
    /// Set once these watches have begun.
    pub begun: Arc<OnceCell<()>>,
}

impl Shared {
    async fn begin(&self) {
        // A writer that is gone means that the process ends.
        let _ = self.nodes.wait_until_ready().await;
        if let Some(agents) = &self.agents {
            let _ = agents.wait_until_ready().await;
        }
    }
}

impl Stores {
    /// Waits until every watch has begun: before that, what is not there may only not be known yet.
    pub async fn wait(&self) {
        // One waits for all: a store wakes only the last of several that wait for it (kube 5.0, `DelayedInit`).
        self.begun.get_or_init(|| self.begin()).await;
    }

    /// The Deployment of a model.
    pub fn deployment(&self, (namespace, name): &Key) -> Option<Arc<Deployment>> {
        self.deployments.get(&ObjectRef::new(name).within(namespace))
    }

    async fn begin(&self) {
        let mut pods_begun = self.pods_begun.clone();
        // A writer that is gone means that the process ends.
        let _ = tokio::join!(
            self.deployments.wait_until_ready(),
            self.services.wait_until_ready(),
            self.disruption_budgets.wait_until_ready(),
            self.network_policies.wait_until_ready(),
            async { drop(pods_begun.wait_for(|begun| *begun).await) },
            self.shared.begun.get_or_init(|| self.shared.begin()),
        );
    }
}

/// What is known of a model's surroundings.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub deployment: Option<Arc<Deployment>>,
    /// Kinds and heads of the children that exist.
    pub heads: BTreeMap<Child, ObjectMeta>,
    /// Newest first.
    pub pods: Vec<PodSeen>,
    pub nodes: Vec<NodeSeen>,
    /// Whether replicas may move to the operator's image now.
    pub may_move: bool,
    pub now: Timestamp,
}

/// The kinds of children.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Child {
    Deployment,
    Service,
    DisruptionBudget,
    NetworkPolicy,
}

/// A node that could lend memory of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSeen {
    pub name: String,
    pub lends_gib: i64,
    /// Of Pods that have not ended.
    pub granted_gib: i64,
}

impl NodeSeen {
    /// What is left.
    pub fn free_gib(&self) -> i64 {
        self.lends_gib.saturating_sub(self.granted_gib).max(0)
    }
}

/// Looks at a model's surroundings. Replicas that are not ready are asked how they are.
pub async fn observe(
    model: &InferenceModel,
    stores: &Stores,
    http: &reqwest::Client,
    image: &str,
) -> Observed {
    let name = model.name_any();
    let namespace = model.namespace().unwrap_or_default();
    let deployment = stores.deployment(&key_of(&model.metadata));
    let mut heads = BTreeMap::new();
    let mut head = |child, metadata: Option<ObjectMeta>| {
        heads.extend(metadata.map(|metadata| (child, metadata)));
    };
    head(Child::Deployment, deployment.as_ref().map(|found| found.metadata.clone()));
    head(Child::Service, meta(&stores.services, &name, &namespace));
    head(Child::DisruptionBudget, meta(&stores.disruption_budgets, &name, &namespace));
    head(Child::NetworkPolicy, meta(&stores.network_policies, &name, &namespace));
    let mut pods = stores.shared.pods.of(&namespace, &name);
    ask(&mut pods, http).await;
    let nodes = nodes(model, stores);
    let now = Timestamp::now();
    let may_move = may_move(deployment.as_deref(), stores, image, now);
    Observed { deployment, heads, pods, nodes, may_move, now }
}

/// The image of a Deployment's replicas.
pub fn image_of(deployment: &Deployment) -> Option<&str> {
    let pod = deployment.spec.as_ref()?.template.spec.as_ref()?;
    pod.containers.first()?.image.as_deref()
}

/// The agents run the image, and few other models are on their way to it.
fn may_move(own: Option<&Deployment>, stores: &Stores, image: &str, now: Timestamp) -> bool {
    let moved = own.and_then(image_of).is_none_or(|own| own == image);
    let agents = stores.shared.agents.as_ref().map(Store::state);
    // Where agents are named, none found is not all of them done.
    let follow = agents
        .is_none_or(|found| !found.is_empty() && found.iter().all(|agents| is_done(agents, image)));
    let moving = |found: &&Arc<Deployment>| is_moving(found, image, now);
    moved || (follow && stores.deployments.state().iter().filter(moving).count() < MOVES)
}

/// All Pods of the DaemonSet run `image` and are available.
fn is_done(agents: &DaemonSet, image: &str) -> bool {
    let template = agents.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let runs = template.and_then(|pod| pod.containers.first()?.image.as_deref()) == Some(image);
    let status = agents.status.clone().unwrap_or_default();
    let wanted = status.desired_number_scheduled;
    runs && status.observed_generation >= agents.metadata.generation
        && status.updated_number_scheduled.unwrap_or(0) >= wanted
        && status.number_available.unwrap_or(0) >= wanted
}

/// A rollout to `image` that is not over and makes progress.
fn is_moving(deployment: &Deployment, image: &str, now: Timestamp) -> bool {
    let status = deployment.status.clone().unwrap_or_default();
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let seen = status.observed_generation >= deployment.metadata.generation;
    let done = status.updated_replicas.unwrap_or(0) >= wanted
        && status.available_replicas.unwrap_or(0) >= wanted
        && status.replicas.unwrap_or(0) == wanted;
    let progress = status.conditions.iter().flatten().find(|found| found.type_ == "Progressing");
    let stuck = progress
        .and_then(|found| found.last_update_time.as_ref())
        .is_some_and(|time| now.as_second() - time.0.as_second() > STUCK_SECONDS);
    image_of(deployment) == Some(image) && !(seen && (done || stuck))
}

fn meta<K>(store: &Store<K>, name: &str, namespace: &str) -> Option<ObjectMeta>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace)).map(|found| found.meta().clone())
}

/// Asks the replicas that run and are not ready.
async fn ask(pods: &mut [PodSeen], http: &reqwest::Client) {
    let unready = pods.iter_mut().filter(|pod| !pod.ready && !pod.deleting && !pod.failed);
    futures_util::stream::iter(unready)
        .for_each_concurrent(AT_ONCE, |pod| async move {
            let Some(ip) = &pod.ip else { return };
            let asked = tokio::time::timeout(PATIENCE, state_of(ip, http)).await;
            if let Ok(Some(state)) = asked {
                pod.state = Some(state);
            }
        })
        .await;
}

async fn state_of(ip: &str, http: &reqwest::Client) -> Option<ReplicaState> {
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
    let answer = http.get(format!("http://{host}:{HEALTH_PORT}/state")).send().await.ok()?;
    if answer.content_length().is_none_or(|length| length > LARGEST_STATE) {
        return None;
    }
    answer.json().await.ok()
}

/// Nodes that the model's selector takes and that lend its kind of memory.
fn nodes(model: &InferenceModel, stores: &Stores) -> Vec<NodeSeen> {
    let resource = resource_of(model.spec.device);
    let selector = &model.spec.scheduling.node_selector;
    let fits =
        |node: &Node| selector.iter().all(|(key, value)| node.labels().get(key) == Some(value));
    let mut nodes: Vec<_> = stores
        .shared
        .nodes
        .state_filter(fits)
        .iter()
        .filter_map(|node| {
            let allocatable = node.status.as_ref()?.allocatable.as_ref()?.get(&resource)?;
            let name = node.name_any();
            Some(NodeSeen {
                granted_gib: stores.shared.pods.granted_gib(&resource, &name),
                // One whose agent is gone lends nothing, but is still listed with 0.
                lends_gib: allocatable.0.parse().ok().filter(|gib| *gib > 0)?,
                name,
            })
        })
        .collect();
    nodes.sort_by(|one, other| one.name.cmp(&other.name));
    nodes
}
