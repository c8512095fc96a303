//! From what is asked and what is seen to what is written. Pure: the same facts give the same plan.

use std::time::Duration;

use crds::{InferenceModel, InferenceModelStatus, Reason};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;

use crate::apply::is_owned;
use crate::backoff::Backoff;
use crate::config::Config;
use crate::desired::{Children, GENERATION};
use crate::moves::image_of;
use crate::observe::{Child, Observed};
use crate::pods::PodSeen;
use crate::status;

/// The age at which a replica whose grant is spread over devices is replaced: while it holds its units the node's total is
/// smaller, so that its successor tends elsewhere. Each one in a row may grow older.
const FRAGMENTED: Backoff =
    Backoff { first: Duration::from_secs(30), longest: Duration::from_secs(15 * 60) };
/// How often a model that changes is looked at, for the words of its replicas.
const SOON: Duration = Duration::from_secs(2);
/// How often one that does not change is.
const LATER: Duration = Duration::from_secs(300);

/// One write that moves towards what is wanted. These are all that the operator makes, beside status, events and its lease.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    ApplyDeployment(Box<Deployment>),
    ApplyService(Box<Service>),
    ApplyDisruptionBudget(Box<PodDisruptionBudget>),
    ApplyNetworkPolicy(Box<NetworkPolicy>),
    DeleteNetworkPolicy { name: String },
    DeletePod { name: String, spent: Spent },
}

impl Change {
    /// Whether it is of what Pods find: to be there before they are.
    pub fn is_for_pods(&self) -> bool {
        matches!(
            self,
            Self::ApplyService(_)
                | Self::ApplyDisruptionBudget(_)
                | Self::ApplyNetworkPolicy(_)
                | Self::DeleteNetworkPolicy { .. }
        )
    }
}

/// Why a Pod will not come to anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spent {
    /// Its node ended it.
    Failed,
    /// Its grant is spread over devices.
    Fragmented,
}

/// What to do now, what to say, and when to look again.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub changes: Vec<Change>,
    pub status: InferenceModelStatus,
    pub look_again: Duration,
}

/// What the cluster should be told.
pub fn plan(model: &InferenceModel, observed: &Observed, config: &Config) -> Plan {
    let image = image(model, observed, config);
    let children = Children::of(model, config, image.unwrap_or(&config.replica_image));
    let mut changes = vec![
        Change::ApplyService(Box::new(children.service)),
        Change::ApplyDisruptionBudget(Box::new(children.disruption_budget)),
    ];
    match children.network_policy {
        Some(policy) => changes.push(Change::ApplyNetworkPolicy(Box::new(policy))),
        None => changes.extend(stray_policy(model, observed)),
    }
    if image.is_some() {
        changes.push(Change::ApplyDeployment(Box::new(children.deployment)));
    }
    let name = model.name_any();
    changes.extend(observed.pods.iter().filter_map(|pod| {
        let spent = spent(pod, observed, &name)?;
        Some(Change::DeletePod { name: pod.name.clone(), spent })
    }));
    let status = status::status(model, observed);
    let is_done = status::is_settled(&status) && image == Some(config.replica_image.as_str());
    let look_again = if is_done { LATER } else { SOON };
    Plan { changes, status, look_again }
}

/// The image that replicas should run; absent: their Deployment stays as it is. A new one comes after the node agents run
/// it, to a few models at a time. Until then the old one keeps its whole template, since a newer operator's may have
/// arguments that it does not know; only what a user edits is not held.
fn image<'a>(
    model: &InferenceModel,
    observed: &'a Observed,
    config: &'a Config,
) -> Option<&'a str> {
    let wanted = Some(config.replica_image.as_str());
    let Some(deployment) = observed.deployment.as_deref().filter(|_| !observed.may_move) else {
        return wanted;
    };
    let Some(runs) = image_of(deployment) else { return wanted };
    is_edited(model, deployment).then_some(runs)
}

/// Whether a Deployment was made of another generation of its model.
fn is_edited(model: &InferenceModel, deployment: &Deployment) -> bool {
    let made_of = deployment.annotations().get(GENERATION).and_then(|it| it.parse::<i64>().ok());
    made_of.is_some_and(|generation| model.metadata.generation != Some(generation))
}

/// A policy of ours that is no longer wanted.
fn stray_policy(model: &InferenceModel, observed: &Observed) -> Option<Change> {
    let head = observed.heads.get(&Child::NetworkPolicy)?;
    let name = head.name.clone()?;
    is_owned(head, model).then_some(Change::DeleteNetworkPolicy { name })
}

/// A Pod that will not come back: its ReplicaSet makes another.
fn spent(pod: &PodSeen, observed: &Observed, model: &str) -> Option<Spent> {
    if pod.failed || pod.ready || pod.deleting {
        return (pod.failed && !pod.deleting).then_some(Spent::Failed);
    }
    let is_fragmented = pod.state.as_ref().is_some_and(|state| state.reason == Reason::Fragmented);
    let wait = FRAGMENTED.wait(observed.n_fragmented.saturating_add(1), model);
    let is_old = pod.created.is_some_and(|created| created + wait <= observed.now);
    (is_fragmented && is_old).then_some(Spent::Fragmented)
}

#[cfg(test)]
pub(crate) mod tests;
