//! What a model's status says, from facts alone. Pure.

use crds::{ConditionType, InferenceModel, InferenceModelStatus, Reason};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::core::error_boundary::InvalidObject;

use crate::desired::{resource_of, selector};
use crate::observe::{Counted, Observed};
use crate::pods::{PodSeen, key_of};

/// Nodes that a message names at most.
const NAMED_NODES: usize = 8;

/// Replicas as the Deployment counts them.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    wanted: i32,
    present: i32,
    ready: i32,
    updated: i32,
    /// The Deployment has seen what is asked, and everything that is there is of it and answers.
    is_done: bool,
}

/// Why a model is as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Cause {
    reason: Reason,
    message: String,
}

/// Whether a model is ready, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Ready(Cause),
    NotReady(Cause),
}

/// The status to write. Times of conditions that have not changed stay.
pub fn status(model: &InferenceModel, observed: &Observed) -> InferenceModelStatus {
    let counts = counts(model, observed);
    let verdict = if counts.is_done {
        Verdict::Ready(well(model, observed, counts))
    } else {
        Verdict::NotReady(cause(model, observed, counts))
    };
    with_verdict(model, observed, counts, verdict)
}

/// The status where the API server refuses a child, in its words.
pub fn refused(
    model: &InferenceModel,
    observed: &Observed,
    message: String,
) -> InferenceModelStatus {
    let cause = Cause { reason: Reason::ApplyFailed, message };
    with_verdict(model, observed, counts(model, observed), Verdict::NotReady(cause))
}

fn with_verdict(
    model: &InferenceModel,
    observed: &Observed,
    counts: Counts,
    verdict: Verdict,
) -> InferenceModelStatus {
    InferenceModelStatus {
        observed_generation: model.metadata.generation,
        replicas: counts.present,
        ready_replicas: counts.ready,
        updated_replicas: counts.updated,
        summary: Some(format!("{}/{}", counts.ready, counts.wanted)),
        selector: Some(selector(&model.name_any())),
        url: Some(url(&model.namespace().unwrap_or_default(), &model.name_any())),
        conditions: Conditions {
            old: model.status.as_ref().map_or(&[], |status| &status.conditions),
            generation: model.metadata.generation,
            now: observed.now,
        }
        .of(&verdict),
    }
}

/// The status of a model that this operator cannot read; its replicas go on.
pub fn unreadable(
    invalid: &InvalidObject,
    deployment: Option<&Deployment>,
    now: Timestamp,
) -> InferenceModelStatus {
    let head = &invalid.metadata;
    let (namespace, name) = key_of(head);
    let runs = deployment.and_then(|found| found.status.clone()).unwrap_or_default();
    let message = format!("this operator cannot read the resource: {}", invalid.error);
    let cause = Cause { reason: Reason::InvalidSpec, message };
    InferenceModelStatus {
        observed_generation: head.generation,
        replicas: runs.replicas.unwrap_or(0),
        ready_replicas: runs.ready_replicas.unwrap_or(0),
        updated_replicas: runs.updated_replicas.unwrap_or(0),
        summary: None,
        selector: Some(selector(&name)),
        url: Some(url(&namespace, &name)),
        conditions: Conditions { old: &[], generation: head.generation, now }
            .of(&Verdict::NotReady(cause)),
    }
}

/// Whether nothing is on its way.
pub fn is_settled(status: &InferenceModelStatus) -> bool {
    status.conditions.iter().any(|condition| {
        condition.type_ == ConditionType::Ready.to_string() && condition.status == "True"
    })
}

fn url(namespace: &str, name: &str) -> String {
    format!("http://{name}.{namespace}.svc/v1")
}

fn counts(model: &InferenceModel, observed: &Observed) -> Counts {
    let wanted = model.spec.replicas.unwrap_or(1);
    let Some(deployment) = &observed.deployment else {
        return Counts { wanted, ..Counts::default() };
    };
    let status = deployment.status.clone().unwrap_or_default();
    let updated = status.updated_replicas.unwrap_or(0);
    let ready = status.ready_replicas.unwrap_or(0);
    let present = status.replicas.unwrap_or(0);
    let has_seen = status.observed_generation >= deployment.metadata.generation
        && deployment.spec.as_ref().and_then(|spec| spec.replicas) == Some(wanted);
    let all_answer = observed.pods.iter().all(|pod| pod.ready || pod.deleting);
    let is_done =
        has_seen && all_answer && updated >= wanted && ready >= wanted && present == wanted;
    Counts { wanted, present, ready, updated, is_done }
}

/// Why a model is ready, and what is not well all the same.
fn well(model: &InferenceModel, observed: &Observed, counts: Counts) -> Cause {
    let reason = if counts.wanted == 0 { Reason::ScaledToZero } else { Reason::AllReplicasReady };
    let drains = model.spec.rollout.drain_seconds;
    let cut = observed.agents_drain_seconds.filter(|seconds| *seconds < drains);
    let warning = cut.map(|seconds| {
        format!(
            "; rollout.drainSeconds is {drains}, but an update of the node agent cuts requests off after {seconds} s (node.drainSeconds of the chart)"
        )
    });
    let answer = format!("{} of {} replicas answer", counts.ready, counts.wanted);
    Cause { reason, message: answer + &warning.unwrap_or_default() }
}

/// The one thing that a person should know first.
fn cause(model: &InferenceModel, observed: &Observed, counts: Counts) -> Cause {
    // A failure is told even when another replica merely waits.
    let causes: Vec<Cause> = observed
        .pods
        .iter()
        .filter(|pod| !pod.ready && !pod.deleting && !pod.failed)
        .filter_map(|pod| cause_of(model, observed, pod))
        .collect();
    let first = causes
        .iter()
        .find(|cause| cause.reason.is_terminal())
        .or_else(|| causes.iter().find(|cause| cause.reason == Reason::InsufficientMemory))
        .or_else(|| causes.first())
        .cloned();
    let cause = first.or_else(|| not_created(observed)).unwrap_or_else(|| Cause {
        reason: Reason::Progressing,
        message: format!(
            "{} of {} replicas are up to date, {} answer",
            counts.updated, counts.wanted, counts.ready
        ),
    });
    let newest = observed.pods.first().map(|pod| pod.template.as_str());
    let older = observed
        .pods
        .iter()
        .filter(|pod| pod.ready && Some(pod.template.as_str()) != newest)
        .count();
    if older == 0 {
        return cause;
    }
    let reason =
        if is_stuck(model, observed, cause.reason) { Reason::RolloutStuck } else { cause.reason };
    Cause { reason, message: format!("{}; {older} replicas of before serve on", cause.message) }
}

/// What the API server said when it refused the Pods: a quota, or a class that does not exist.
fn not_created(observed: &Observed) -> Option<Cause> {
    let status = observed.deployment.as_ref()?.status.as_ref()?;
    let refused = status
        .conditions
        .iter()
        .flatten()
        .find(|found| found.type_ == "ReplicaFailure" && found.status == "True")?;
    Some(Cause { reason: Reason::ApplyFailed, message: refused.message.clone()? })
}

/// Whether the newest replica has waited for too long, for something that is not merely long such as a download.
fn is_stuck(model: &InferenceModel, observed: &Observed, reason: Reason) -> bool {
    let passes = matches!(
        reason,
        Reason::Progressing | Reason::Waiting | Reason::Fragmented | Reason::SourceUnreachable
    );
    let newest = observed.pods.iter().find(|pod| !pod.ready && !pod.deleting);
    let age = newest
        .and_then(|pod| pod.created)
        .map_or(0, |created| observed.now.as_second() - created.as_second());
    passes && age >= i64::from(model.spec.rollout.progress_deadline_seconds)
}

fn cause_of(model: &InferenceModel, observed: &Observed, pod: &PodSeen) -> Option<Cause> {
    if let Some(message) = &pod.unscheduled {
        return Some(unscheduled(model, observed, message));
    }
    if let Some(state) = &pod.state
        && state.reason != Reason::AllReplicasReady
    {
        return Some(Cause { reason: state.reason, message: state.message.clone() });
    }
    let waiting = pod.waiting.as_ref()?;
    let spec = &model.spec;
    let secrets: Vec<_> = [&spec.api_key_secret_ref, &spec.source.secret_ref]
        .into_iter()
        .flatten()
        .map(|secret| secret.name.as_str())
        .collect();
    // The kubelet tells of a Secret that is not there by an Event alone, and the operator may not look.
    let mounts = if waiting == "ContainerCreating" && !secrets.is_empty() {
        format!("; it mounts the Secrets {}: are they there?", secrets.join(", "))
    } else {
        String::new()
    };
    let message = format!("Pod {}: {waiting}{mounts}", pod.name);
    Some(Cause { reason: Reason::Progressing, message })
}

/// The scheduler's words, with the figures where memory is what lacks.
fn unscheduled(model: &InferenceModel, observed: &Observed, message: &str) -> Cause {
    let resource = resource_of(model.spec.device);
    if !message.contains(&format!("Insufficient {resource}")) {
        let lacking = if observed.nodes.is_empty() {
            format!("no matching node lends {resource}: ")
        } else {
            String::new()
        };
        return Cause { reason: Reason::Progressing, message: format!("{lacking}{message}") };
    }
    if observed.nodes.is_empty() {
        let message = format!("asked {}, no matching node lends {resource}", model.spec.memory);
        return Cause { reason: Reason::InsufficientMemory, message };
    }
    let mut free: Vec<_> = observed
        .nodes
        .iter()
        .take(NAMED_NODES)
        .map(|node| format!("{} {} of {} GiB", node.name, node.free_gib(), node.lends_gib))
        .collect();
    if observed.nodes.len() > NAMED_NODES {
        free.push(format!("{} more", observed.nodes.len() - NAMED_NODES));
    }
    let surge = if observed.pods.iter().any(|pod| pod.ready) {
        "; to replace replicas without free memory set rollout.maxSurge to 0 and rollout.maxUnavailable to 1"
    } else {
        ""
    };
    let others = match observed.counted {
        Counted::All => "",
        Counted::Listed => " (less what Pods of other namespaces hold)",
    };
    let message = format!(
        "asked {} of one node, free: {}{others}{surge}",
        model.spec.memory,
        free.join(", ")
    );
    Cause { reason: Reason::InsufficientMemory, message }
}

/// The conditions that a model has, and when its next ones are made.
struct Conditions<'a> {
    old: &'a [Condition],
    generation: Option<i64>,
    now: Timestamp,
}

impl Conditions<'_> {
    fn of(&self, verdict: &Verdict) -> Vec<Condition> {
        let cause = match verdict {
            Verdict::Ready(cause) => return vec![self.one(ConditionType::Ready, "True", cause)],
            Verdict::NotReady(cause) => cause,
        };
        let other = if cause.reason.is_terminal() {
            ConditionType::Stalled
        } else {
            ConditionType::Reconciling
        };
        vec![self.one(ConditionType::Ready, "False", cause), self.one(other, "True", cause)]
    }

    fn one(&self, type_: ConditionType, status: &str, cause: &Cause) -> Condition {
        let type_ = type_.to_string();
        let same = self.old.iter().find(|old| old.type_ == type_ && old.status == status);
        Condition {
            type_,
            status: status.to_owned(),
            reason: cause.reason.to_string(),
            message: cause.message.clone(),
            observed_generation: self.generation,
            last_transition_time: same
                .map_or(Time(self.now), |old| old.last_transition_time.clone()),
        }
    }
}
