//! Replica Pods by their model, in what plans read of them: a thousand models' Pods are the most of what an operator keeps.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crds::ReplicaState;
use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::watcher::Event;
use tokio::sync::watch;

use crate::desired::MODEL_LABEL;

/// How the names of resources of ours begin.
const RESOURCES: &str = "bindery.dev/";

/// A replica Pod.
#[derive(Debug, Clone, PartialEq)]
pub struct PodSeen {
    pub name: String,
    /// Which template it was made of.
    pub template: String,
    pub created: Option<Timestamp>,
    pub ready: bool,
    pub deleting: bool,
    /// Ended for good, by the node and not by itself.
    pub failed: bool,
    /// What the scheduler says while it finds no node.
    pub unscheduled: Option<String>,
    /// Why its container does not run, as the kubelet says it.
    pub waiting: Option<String>,
    /// Its own words: of now, else the last before it ended.
    pub state: Option<ReplicaState>,
    pub ip: Option<String>,
}

/// The Pods of every namespace that is looked at.
#[derive(Debug, Clone, Default)]
pub struct Pods(Arc<RwLock<Index>>);

#[derive(Debug, Default)]
struct Index {
    /// By namespace and name.
    pods: HashMap<Key, Kept>,
    /// Names by namespace and model.
    of_models: HashMap<Key, BTreeSet<String>>,
    /// GiB by resource and node.
    granted: HashMap<String, HashMap<String, i64>>,
}

/// A namespace and a name in it.
pub type Key = (String, String);

#[derive(Debug)]
struct Kept {
    /// Absent: a Pod of somebody else, which counts on its node alone.
    model: Option<String>,
    seen: PodSeen,
    grant: Option<Grant>,
}

/// What a Pod holds of a node, as the scheduler counts it.
#[derive(Debug)]
struct Grant {
    node: String,
    resource: String,
    gib: i64,
}

impl Pods {
    /// The Pods of a model, newest first.
    pub fn of(&self, model: &Key) -> Vec<PodSeen> {
        let index = self.read();
        let pods = index.of_models.get(model).into_iter().flatten();
        let seen = pods.filter_map(|name| index.pods.get(&(model.0.clone(), name.clone())));
        let mut seen: Vec<_> = seen.map(|kept| kept.seen.clone()).collect();
        seen.sort_by(|one, other| (&other.created, &one.name).cmp(&(&one.created, &other.name)));
        seen
    }

    /// GiB of `resource` that Pods hold on a node.
    pub fn granted_gib(&self, resource: &str, node: &str) -> i64 {
        let index = self.read();
        index.granted.get(resource).and_then(|nodes| nodes.get(node)).copied().unwrap_or(0)
    }

    fn read(&self) -> RwLockReadGuard<'_, Index> {
        // Every change is whole when the lock is let go.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Index> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes one watch's events into the Pods.
#[derive(Debug)]
pub struct Writer {
    pods: Pods,
    /// What this watch knows. Other watches, of other namespaces, know others.
    known: BTreeSet<Key>,
    /// What a list that has begun has not named yet.
    unnamed: BTreeSet<Key>,
    begun: watch::Sender<bool>,
}

impl Writer {
    /// `begun` is set once the first list has ended.
    pub fn new(pods: Pods, begun: watch::Sender<bool>) -> Self {
        Self { pods, known: BTreeSet::new(), unnamed: BTreeSet::new(), begun }
    }

    /// Takes one event. What a new list does not name is gone when the list ends.
    pub fn take(&mut self, event: &Event<Pod>) {
        match event {
            Event::Init => self.unnamed = self.known.clone(),
            Event::InitApply(pod) | Event::Apply(pod) => {
                let key = key_of(&pod.metadata);
                self.unnamed.remove(&key);
                self.known.insert(key.clone());
                self.pods.write().insert(key, kept(pod));
            }
            Event::InitDone => {
                for key in std::mem::take(&mut self.unnamed) {
                    self.forget(&key);
                }
                self.begun.send_replace(true);
            }
            Event::Delete(pod) => self.forget(&key_of(&pod.metadata)),
        }
    }

    fn forget(&mut self, key: &Key) {
        self.known.remove(key);
        self.pods.write().remove(key);
    }
}

impl Index {
    fn insert(&mut self, key: Key, kept: Kept) {
        self.remove(&key);
        let (namespace, name) = key.clone();
        if let Some(model) = kept.model.clone() {
            self.of_models.entry((namespace, model)).or_default().insert(name);
        }
        if let Some(grant) = &kept.grant {
            *self.held(grant) += grant.gib;
        }
        self.pods.insert(key, kept);
    }

    fn remove(&mut self, key: &Key) {
        let Some(kept) = self.pods.remove(key) else { return };
        if let Some(model) = kept.model {
            self.take_from((key.0.clone(), model), &key.1);
        }
        if let Some(grant) = &kept.grant {
            *self.held(grant) -= grant.gib;
        }
    }

    fn take_from(&mut self, model: Key, name: &str) {
        let Some(names) = self.of_models.get_mut(&model) else { return };
        names.remove(name);
        if names.is_empty() {
            self.of_models.remove(&model);
        }
    }

    fn held(&mut self, grant: &Grant) -> &mut i64 {
        let nodes = self.granted.entry(grant.resource.clone()).or_default();
        nodes.entry(grant.node.clone()).or_default()
    }
}

/// Where an object is.
pub fn key_of(head: &ObjectMeta) -> Key {
    (head.namespace.clone().unwrap_or_default(), head.name.clone().unwrap_or_default())
}

fn kept(pod: &Pod) -> Kept {
    Kept { model: model_of(pod).cloned(), seen: seen(pod), grant: grant(pod) }
}

/// The model whose Deployment's ReplicaSet controls a Pod. Anybody can write the label; an owner that is not there ends the
/// Pod, and the Deployment of the model's name is the model's.
fn model_of(pod: &Pod) -> Option<&String> {
    let model = pod.labels().get(MODEL_LABEL)?;
    let hash = pod.labels().get("pod-template-hash")?;
    let owners = pod.metadata.owner_references.iter().flatten();
    let owner = owners.into_iter().find(|owner| owner.controller == Some(true))?;
    let name = owner.name.strip_prefix(model.as_str())?.strip_prefix('-')?;
    (owner.kind == "ReplicaSet" && owner.api_version.starts_with("apps/") && name == hash)
        .then_some(model)
}

/// What a Pod holds; nothing before it has a node and after it has ended.
fn grant(pod: &Pod) -> Option<Grant> {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let spec = pod.spec.as_ref()?;
    let node = spec.node_name.clone()?;
    if matches!(phase, Some("Failed" | "Succeeded")) {
        return None;
    }
    let of_container = |container: &Container| {
        let limits = container.resources.as_ref()?.limits.as_ref()?;
        let (resource, gib) = limits.iter().find(|(name, _)| name.starts_with(RESOURCES))?;
        Some((resource.clone(), gib.0.parse::<i64>().ok()?))
    };
    let (resource, gib) = spec
        .containers
        .iter()
        .filter_map(of_container)
        .reduce(|(resource, sum), (_, gib)| (resource, sum + gib))?;
    Some(Grant { node, resource, gib })
}

fn seen(pod: &Pod) -> PodSeen {
    let status = pod.status.clone().unwrap_or_default();
    let condition =
        |type_: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == type_);
    let container = status.container_statuses.iter().flatten().next();
    let last = container.and_then(|container| {
        let states = [container.state.as_ref(), container.last_state.as_ref()];
        let message = states.into_iter().flatten().find_map(|state| state.terminated.as_ref())?;
        serde_json::from_str(message.message.as_deref()?).ok()
    });
    let waiting =
        container.and_then(|container| container.state.as_ref()?.waiting.as_ref()).map(|waiting| {
            let words = [waiting.reason.clone(), waiting.message.clone()];
            words.into_iter().flatten().collect::<Vec<_>>().join(": ")
        });
    PodSeen {
        name: pod.name_any(),
        template: pod.labels().get("pod-template-hash").cloned().unwrap_or_default(),
        created: pod.metadata.creation_timestamp.as_ref().map(|time| time.0),
        ready: condition("Ready").is_some_and(|ready| ready.status == "True"),
        deleting: pod.metadata.deletion_timestamp.is_some(),
        failed: status.phase.as_deref() == Some("Failed"),
        unscheduled: condition("PodScheduled")
            .filter(|scheduled| scheduled.status == "False")
            .map(|scheduled| scheduled.message.clone().unwrap_or_default()),
        waiting,
        state: last,
        ip: status.pod_ip,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const GIB: &str = "bindery.dev/cpu-memory-gib";

    fn pod(namespace: &str, name: &str, model: &str, node: &str, gib: i64, phase: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {
                "namespace": namespace, "name": name, "labels": {MODEL_LABEL: model, "pod-template-hash": "5d"},
                "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{model}-5d"), "uid": "1", "controller": true,
                }],
            },
            "spec": {"nodeName": node, "containers": [{"name": "replica", "resources": {"limits": {GIB: gib.to_string()}}}]},
            "status": {"phase": phase},
        }))
        .unwrap()
    }

    fn names(pods: &Pods, namespace: &str, model: &str) -> Vec<String> {
        let model = (namespace.to_owned(), model.to_owned());
        pods.of(&model).into_iter().map(|pod| pod.name).collect()
    }

    #[test]
    fn a_new_list_of_one_namespace_leaves_the_others_alone() {
        let pods = Pods::default();
        let (begun, told) = watch::channel(false);
        let [mut left, mut right] = ["left", "right"].map(|namespace| {
            let mut writer = Writer::new(pods.clone(), begun.clone());
            let own = pod(namespace, "a", "m", "node1", 2, "Running");
            for event in [Event::Init, Event::InitApply(own), Event::InitDone] {
                writer.take(&event);
            }
            writer
        });
        assert!(*told.borrow());
        assert_eq!(pods.granted_gib(GIB, "node1"), 4);
        left.take(&Event::Init);
        assert_eq!(names(&pods, "left", "m"), ["a"], "what is known stays while a list runs");
        left.take(&Event::InitApply(pod("left", "b", "m", "node2", 1, "Running")));
        left.take(&Event::InitDone);
        assert_eq!(names(&pods, "left", "m"), ["b"]);
        assert_eq!(names(&pods, "right", "m"), ["a"]);
        assert_eq!((pods.granted_gib(GIB, "node1"), pods.granted_gib(GIB, "node2")), (2, 1));
        right.take(&Event::Delete(pod("right", "a", "m", "node1", 2, "Running")));
        assert!(names(&pods, "right", "m").is_empty());
    }

    #[test]
    fn a_label_alone_makes_no_pod_the_models() {
        let (pods, mut writer) = {
            let pods = Pods::default();
            (pods.clone(), Writer::new(pods, watch::channel(false).0))
        };
        let with = |name: &str, change: fn(&mut OwnerReference)| {
            let mut one = pod("n", name, "m", "node1", 1, "Running");
            one.metadata.owner_references.iter_mut().flatten().for_each(change);
            Event::Apply(one)
        };
        let mut bare = pod("n", "bare", "m", "node1", 1, "Running");
        bare.metadata.owner_references = None;
        writer.take(&Event::Apply(bare));
        writer.take(&with("job", |owner| owner.kind = "Job".into()));
        writer.take(&with("other", |owner| owner.name = "other-5d".into()));
        writer.take(&with("follower", |owner| owner.controller = None));
        writer.take(&with("own", |_| {}));
        assert_eq!(names(&pods, "n", "m"), ["own"]);
        assert_eq!(pods.granted_gib(GIB, "node1"), 5, "they hold their nodes' memory all the same");
    }

    #[test]
    fn a_pod_holds_memory_from_its_node_to_its_end() {
        let mut one = pod("n", "a", "m", "node1", 3, "Pending");
        one.spec.as_mut().unwrap().node_name = None;
        assert!(grant(&one).is_none());
        assert_eq!(grant(&pod("n", "a", "m", "node1", 3, "Pending")).unwrap().gib, 3);
        assert!(grant(&pod("n", "a", "m", "node1", 3, "Failed")).is_none());
    }

    proptest! {
        /// Whatever happens, the index says what a look at every Pod would say.
        #[test]
        fn the_index_is_what_the_pods_are(
            steps in prop::collection::vec((0..4usize, 0..3usize, 0..3usize, 1..4i64, 0..4usize), 1..60)
        ) {
            let pods = Pods::default();
            let mut writer = Writer::new(pods.clone(), watch::channel(false).0);
            let mut all = HashMap::new();
            for (name, model, node, gib, kind) in steps {
                let phase = ["Running", "Pending", "Failed"].get(kind).copied();
                let (name, model, node) = (format!("p{name}"), format!("m{model}"), format!("n{node}"));
                let one = pod("n", &name, &model, &node, gib, phase.unwrap_or("Running"));
                if phase.is_some() {
                    writer.take(&Event::Apply(one));
                    all.insert(name, (model, node, gib, phase));
                } else {
                    writer.take(&Event::Delete(one));
                    all.remove(&name);
                }
                for index in 0..3 {
                    let (model, node) = (format!("m{index}"), format!("n{index}"));
                    let mut wanted: Vec<_> = all
                        .iter()
                        .filter(|(_, (its, ..))| *its == model)
                        .map(|(name, _)| name.clone())
                        .collect();
                    wanted.sort();
                    prop_assert_eq!(names(&pods, "n", &model), wanted);
                    let held = all.values().filter(|(_, its, _, phase)| *its == node && *phase != Some("Failed"));
                    prop_assert_eq!(pods.granted_gib(GIB, &node), held.map(|(_, _, gib, _)| gib).sum::<i64>());
                }
            }
        }
    }
}
