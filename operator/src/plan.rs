//! From what is asked and what is seen to what is written. Pure: the same facts give the same plan.

use std::time::Duration;

use crds::{InferenceModel, InferenceModelStatus, Reason};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt;

use crate::apply::is_owned;
use crate::config::Config;
use crate::desired::{Children, GENERATION};
use crate::moves::image_of;
use crate::observe::{Child, Observed};
use crate::pods::PodSeen;
use crate::status;

/// A replica whose grant is spread over devices is replaced after this long: while it holds its units the node's total is
/// smaller, so that its successor tends elsewhere.
const FRAGMENTED_SECONDS: i64 = 30;
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
    DeletePod { name: String },
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
    let spent = observed.pods.iter().filter(|pod| is_spent(pod, observed));
    changes.extend(spent.map(|pod| Change::DeletePod { name: pod.name.clone() }));
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
fn is_spent(pod: &PodSeen, observed: &Observed) -> bool {
    let age = pod.created.map_or(0, |created| observed.now.as_second() - created.as_second());
    let fragmented =
        pod.state.as_ref().is_some_and(|state| state.reason == Reason::Fragmented) && !pod.ready;
    !pod.deleting && (pod.failed || (fragmented && age >= FRAGMENTED_SECONDS))
}

#[cfg(test)]
pub(crate) mod tests;
