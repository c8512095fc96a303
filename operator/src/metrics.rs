//! What Prometheus sees of the operator.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crds::{ConditionType, InferenceModel};
use kube::runtime::reflector::Store;
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::pods::Key;
use crate::reconcile::Watched;

/// Every metric, cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    durations: HistogramVec,
    errors: IntCounterVec,
    models: IntGaugeVec,
    leader: IntGauge,
    pending: IntGauge,
    /// Models that something has woken and that were not reconciled since; the controller does not tell.
    woken: Arc<Mutex<HashSet<Key>>>,
    stores: Arc<Mutex<Vec<Store<Watched>>>>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// # Errors
    /// When two metrics have one name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let buckets = vec![0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0];
        let durations = HistogramVec::new(
            HistogramOpts::new(
                "bindery_operator_reconcile_duration_seconds",
                "Time from the begin of a reconciliation to its last write, by result.",
            )
            .buckets(buckets),
            &["result"],
        )?;
        let errors = IntCounterVec::new(
            Opts::new(
                "bindery_operator_reconcile_errors_total",
                "Reconciliations that ended with an error, by its kind.",
            ),
            &["error"],
        )?;
        let models = IntGaugeVec::new(
            Opts::new(
                "bindery_operator_models",
                "Models whose condition is true, those that were changed and not looked at yet, those that cannot be read, and all of them.",
            ),
            &["condition"],
        )?;
        let leader = IntGauge::new("bindery_operator_leader", "1 while this operator leads.")?;
        let pending = IntGauge::new(
            "bindery_operator_pending_reconciles",
            "Models that something has woken and whose reconciliation has not begun since.",
        )?;
        registry.register(Box::new(pending.clone()))?;
        registry.register(Box::new(durations.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        registry.register(Box::new(models.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        let (woken, stores) = (Arc::default(), Arc::default());
        Ok(Self { registry, durations, errors, models, leader, pending, woken, stores })
    }

    /// Something has woken a model.
    pub(crate) fn woke(&self, model: Key) {
        self.woken().insert(model);
    }

    /// The reconciliation of a model begins, or it is gone.
    pub(crate) fn begun(&self, model: &Key) {
        self.woken().remove(model);
    }

    fn woken(&self) -> MutexGuard<'_, HashSet<Key>> {
        // Every change is one call.
        self.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn reconciled(&self, result: &str, duration: Duration) {
        self.durations.with_label_values(&[result]).observe(duration.as_secs_f64());
    }

    pub(crate) fn failed(&self, error: &str) {
        self.errors.with_label_values(&[error]).inc();
    }

    pub(crate) fn leads(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// Counts the models of this store, beside others', when somebody asks.
    pub(crate) fn watch(&self, store: Store<Watched>) {
        self.stores.lock().unwrap_or_else(PoisonError::into_inner).push(store);
    }

    /// The text that Prometheus reads.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn exposition(&self) -> prometheus::Result<String> {
        let stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let watched: Vec<_> = stores.iter().flat_map(Store::state).collect();
        let models: Vec<_> = watched.iter().filter_map(|model| model.0.as_ref().ok()).collect();
        let count = |label: &str, n: usize| {
            self.models.with_label_values(&[label]).set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        self.pending.set(i64::try_from(self.woken().len()).unwrap_or(i64::MAX));
        count("any", watched.len());
        count("unreadable", watched.len() - models.len());
        let is_outdated = |model: &&&InferenceModel| {
            let observed = model.status.as_ref().and_then(|status| status.observed_generation);
            observed < model.metadata.generation
        };
        count("outdated", models.iter().filter(is_outdated).count());
        for type_ in [ConditionType::Ready, ConditionType::Reconciling, ConditionType::Stalled] {
            let word = type_.to_string();
            let is_true = |model: &&&InferenceModel| {
                let conditions = model.status.iter().flat_map(|status| &status.conditions);
                conditions.into_iter().any(|it| it.type_ == word && it.status == "True")
            };
            count(&word, models.iter().filter(is_true).count());
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_pending_from_what_wakes_it_to_its_reconciliation() {
        let metrics = Metrics::new().unwrap();
        let pending = || {
            let text = metrics.exposition().unwrap();
            let line =
                text.lines().find(|it| it.starts_with("bindery_operator_pending_reconciles "));
            line.unwrap().rsplit_once(' ').unwrap().1.to_owned()
        };
        let key = |name: &str| ("n".to_owned(), name.to_owned());
        for name in ["a", "a", "b"] {
            metrics.woke(key(name));
        }
        assert_eq!(pending(), "2", "one that is woken twice is reconciled once");
        metrics.begun(&key("a"));
        assert_eq!(pending(), "1");
    }
}
