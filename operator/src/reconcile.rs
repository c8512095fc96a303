//! One model: observe, plan, apply. Also when to come back, and what is told to people.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crds::{ConditionType, InferenceModel, InferenceModelStatus, Reason};
use futures_util::future::join_all;
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use kube::core::DeserializeGuard;
use kube::core::error_boundary::InvalidObject;
use kube::runtime::controller::Action;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::runtime::reflector::ObjectRef;

use crate::apply::{Applier, ApplyError};
use crate::backoff::{Backoff, Counts};
use crate::config::Config;
use crate::metrics::Metrics;
use crate::observe::{Observed, Stores, observe};
use crate::plan::{Change, Plan, Spent, plan};
use crate::pods::{Key, key_of};
use crate::status;

/// From an error to the next try of the same model.
const RETRY: Backoff =
    Backoff { first: Duration::from_millis(500), longest: Duration::from_secs(60) };
/// When a model is looked at again of which nothing can be done.
const LATER: Duration = Duration::from_secs(300);

/// A model as its watch gives it: one that this operator cannot read must not end the watch for all.
pub type Watched = DeserializeGuard<InferenceModel>;

/// What every reconciliation uses.
#[derive(Debug)]
pub struct Context {
    pub config: Config,
    pub stores: Stores,
    pub applier: Applier,
    pub teller: Teller,
    pub metrics: Metrics,
    /// Errors in a row.
    pub failures: Counts,
}

impl Context {
    /// Forgets a model that is gone.
    pub fn forget(&self, model: &Key) {
        self.metrics.begun(model);
        self.applier.forget(model);
        self.failures.clear(model);
        self.stores.shared.fragmented.clear(model);
        self.stores.shared.moves.give_up(model);
    }
}

/// Brings one model nearer to what is asked.
///
/// # Errors
/// When a write is refused; the same is tried again later.
pub async fn reconcile(model: Arc<Watched>, context: Arc<Context>) -> Result<Action, ApplyError> {
    let start = Instant::now();
    context.metrics.begun(&key_of(model.meta()));
    let done = match &model.0 {
        Ok(model) => write(model, &context).await,
        Err(invalid) => refuse(invalid, &context).await,
    };
    let result = if done.is_ok() { "ok" } else { "error" };
    context.metrics.reconciled(result, start.elapsed());
    if done.is_err() {
        // What could not be written is not on its way.
        context.stores.shared.moves.give_up(&key_of(model.meta()));
    }
    let look_again = done?;
    context.failures.clear(&key_of(model.meta()));
    Ok(Action::requeue(look_again))
}

async fn write(model: &InferenceModel, context: &Context) -> Result<Duration, ApplyError> {
    if model.metadata.deletion_timestamp.is_some() {
        // The garbage collector takes the children.
        return Ok(LATER);
    }
    context.stores.wait().await;
    let observed = observe(model, &context.stores, &context.config).await;
    let plan = plan(model, &observed, &context.config);
    if let Err(error) = apply_all(model, &observed, &plan, context).await {
        if error.is_refusal() {
            let status = status::refused(model, &observed, error.to_string());
            context.applier.write_status(model, &status).await?;
            context.teller.tell(model, &status).await;
        }
        return Err(error);
    }
    if status::is_settled(&plan.status) {
        context.stores.shared.fragmented.clear(&key_of(&model.metadata));
    }
    context.applier.write_status(model, &plan.status).await?;
    context.teller.tell(model, &plan.status).await;
    Ok(plan.look_again)
}

/// Makes a plan's changes: what Pods are to find at once, then the Deployment that makes them, then deletions.
async fn apply_all(
    model: &InferenceModel,
    observed: &Observed,
    plan: &Plan,
    context: &Context,
) -> Result<(), ApplyError> {
    let apply = |change| context.applier.apply(model, observed, change);
    let (found, others): (Vec<_>, Vec<_>) = plan.changes.iter().partition(|it| it.is_for_pods());
    // All of them to their ends: a request that is dropped may have been heard.
    join_all(found.into_iter().map(apply)).await.into_iter().collect::<Result<(), _>>()?;
    for change in others {
        apply(change).await?;
        if matches!(change, Change::DeletePod { spent: Spent::Fragmented, .. }) {
            context.stores.shared.fragmented.add(&key_of(&model.metadata));
        }
    }
    Ok(())
}

/// Says of a model that cannot be read what is wrong with it. Its children stay as they are.
async fn refuse(invalid: &InvalidObject, context: &Context) -> Result<Duration, ApplyError> {
    context.stores.wait().await;
    let deployment = context.stores.deployment(&key_of(&invalid.metadata));
    let status = status::unreadable(invalid, deployment.as_deref(), Timestamp::now());
    context.applier.write_unreadable(invalid, &status).await?;
    Ok(LATER)
}

/// Later and later, and not all at once.
pub fn after_error(model: Arc<Watched>, error: &ApplyError, context: Arc<Context>) -> Action {
    context.metrics.failed(error.kind());
    let name = ObjectRef::from_obj(&*model);
    let n_failures = context.failures.add(&key_of(model.meta()));
    let retry = RETRY.wait(n_failures, &name.to_string());
    tracing::warn!(%name, %error, ?retry, "cannot reconcile");
    Action::requeue(retry)
}

/// Tells people of what changes: one Event for each new reason of `Ready`.
pub struct Teller(Recorder);

impl std::fmt::Debug for Teller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Teller").finish_non_exhaustive()
    }
}

impl Teller {
    pub fn new(recorder: Recorder) -> Self {
        Self(recorder)
    }

    async fn tell(&self, model: &InferenceModel, status: &InferenceModelStatus) {
        let ready = |status: &InferenceModelStatus| {
            let type_ = ConditionType::Ready.to_string();
            status.conditions.iter().find(|condition| condition.type_ == type_).cloned()
        };
        let Some(now) = ready(status) else { return };
        let before = model.status.as_ref().and_then(ready);
        if before.is_some_and(|before| before.reason == now.reason) {
            return;
        }
        let is_bad = status
            .conditions
            .iter()
            .any(|condition| condition.type_ == ConditionType::Stalled.to_string())
            || now.reason == Reason::InsufficientMemory.to_string();
        let event = Event {
            type_: if is_bad { EventType::Warning } else { EventType::Normal },
            reason: now.reason,
            note: Some(now.message.chars().take(1000).collect()),
            action: "Reconcile".into(),
            secondary: None,
        };
        if let Err(error) = self.0.publish(&event, &model.object_ref(&())).await {
            tracing::warn!(%error, "cannot publish an event");
        }
    }
}
