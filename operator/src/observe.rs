//! What is: children, Pods and nodes from the watches, and what replicas that are not ready say of themselves.

use std::collections::BTreeMap;
use std::sync::Arc;

use crds::InferenceModel;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::core::PartialObjectMeta;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Resource, ResourceExt};
use tokio::sync::{OnceCell, watch};

use crate::apply::is_owned;
use crate::ask::Asker;
use crate::backoff::Counts;
use crate::config::Config;
use crate::desired::resource_of;
use crate::moves::Moves;
use crate::nodes::takes;
use crate::pods::{Key, PodSeen, Pods, key_of};

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
    /// Which models' replicas move to a new image.
    pub moves: Arc<Moves>,
    pub asker: Arc<Asker>,
    /// Fragmented replicas that were replaced in a row, by model.
    pub fragmented: Arc<Counts>,
    /// Set once these watches have begun.
    pub begun: Arc<OnceCell<()>>,
}

impl Shared {
    async fn begin(&self) {
        // A writer that is gone means that the process ends.
        let _ = self.nodes.wait_until_ready().await;
        self.moves.begin().await;
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
    /// Whose Pods are counted there.
    pub counted: Counted,
    /// Whether replicas may move to the operator's image now.
    pub may_move: bool,
    /// What a node agent that ends leaves to running requests, where it is known.
    pub agents_drain_seconds: Option<u32>,
    /// Fragmented replicas that were replaced in a row.
    pub n_fragmented: u32,
    pub now: Timestamp,
}

/// Whose Pods an operator sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Counted {
    #[default]
    All,
    /// Those of its list of namespaces.
    Listed,
}

/// The kinds of children.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Child {
    Deployment,
    Service,
    DisruptionBudget,
    NetworkPolicy,
}

impl Child {
    /// Every kind.
    pub const ALL: [Self; 4] =
        [Self::Deployment, Self::Service, Self::DisruptionBudget, Self::NetworkPolicy];
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
pub async fn observe(model: &InferenceModel, stores: &Stores, config: &Config) -> Observed {
    let key = key_of(&model.metadata);
    let heads = heads(&key, stores);
    let deployment = stores.deployment(&key).filter(|found| is_owned(&found.metadata, model));
    let mut pods = stores.shared.pods.of(&key);
    let now = Timestamp::now();
    stores.shared.asker.ask(&key.0, &mut pods, now).await;
    let moves = &stores.shared.moves;
    Observed {
        may_move: moves.may_move(&key, deployment.as_deref(), &config.replica_image, now),
        deployment,
        heads,
        pods,
        nodes: nodes(model, stores),
        counted: if config.namespaces.is_empty() { Counted::All } else { Counted::Listed },
        agents_drain_seconds: config.node_drain_seconds,
        n_fragmented: stores.shared.fragmented.of(&key),
        now,
    }
}

/// The heads of what has the model's label and name, whosever it is.
fn heads(key: &Key, stores: &Stores) -> BTreeMap<Child, ObjectMeta> {
    let deployment = stores.deployment(key).map(|found| found.metadata.clone());
    let heads = [
        (Child::Deployment, deployment),
        (Child::Service, head(&stores.services, key)),
        (Child::DisruptionBudget, head(&stores.disruption_budgets, key)),
        (Child::NetworkPolicy, head(&stores.network_policies, key)),
    ];
    heads.into_iter().filter_map(|(child, head)| Some((child, head?))).collect()
}

fn head<K>(store: &Store<K>, (namespace, name): &Key) -> Option<ObjectMeta>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace)).map(|found| found.meta().clone())
}

/// Nodes that take the model's replicas and lend its kind of memory.
fn nodes(model: &InferenceModel, stores: &Stores) -> Vec<NodeSeen> {
    let resource = resource_of(model.spec.device);
    let fits = |node: &Node| takes(node, &model.spec.scheduling);
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
