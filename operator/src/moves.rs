//! Which models' replicas move to a new image: after the node agents, a few models at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::jiff::Timestamp;
use kube::runtime::reflector::Store;

use crate::pods::{Key, key_of};

/// Models that move at once.
const MOVES: usize = 4;
/// A model whose replicas make no progress for this long does not keep others from moving.
const STUCK_SECONDS: i64 = 60;

/// The models on their way. One that may go is counted at once: what it writes is in no store when the next one asks.
#[derive(Debug)]
pub struct Moves {
    /// Absent: replicas do not wait for agents.
    agents: Option<Store<DaemonSet>>,
    /// The Deployments of every namespace that is looked at.
    deployments: Mutex<Vec<Store<Deployment>>>,
    /// Models that may go, and since when.
    claims: Mutex<BTreeMap<Key, Timestamp>>,
    begun: Timestamp,
}

impl Moves {
    /// Where agents are named, replicas follow them.
    pub fn new(agents: Option<Store<DaemonSet>>, begun: Timestamp) -> Self {
        Self { agents, deployments: Mutex::default(), claims: Mutex::default(), begun }
    }

    /// Counts these Deployments as well.
    pub fn watch(&self, deployments: Store<Deployment>) {
        self.deployments.lock().unwrap_or_else(PoisonError::into_inner).push(deployments);
    }

    /// Waits until the agents are known.
    pub async fn begin(&self) {
        if let Some(agents) = &self.agents {
            // A writer that is gone means that the process ends.
            let _ = agents.wait_until_ready().await;
        }
    }

    /// Whether a model's replicas may run `image`. Where that is a move, the model has its place until it has arrived, makes
    /// no progress, or gives it up.
    pub fn may_move(
        &self,
        model: &Key,
        own: Option<&Deployment>,
        image: &str,
        now: Timestamp,
    ) -> bool {
        let Some(own) = own.filter(|own| image_of(own).is_some()) else { return true };
        if image_of(own) != Some(image) {
            return self.agents_run(image) && self.claim(model, image, now);
        }
        if !self.is_moving(own, image, now) {
            self.give_up(model);
        }
        true
    }

    /// Takes a model's place from it.
    pub fn give_up(&self, model: &Key) {
        self.claims().remove(model);
    }

    fn claim(&self, model: &Key, image: &str, now: Timestamp) -> bool {
        if self.claims().contains_key(model) {
            return true;
        }
        let moving = self.moving(image, now);
        let mut claims = self.claims();
        let places: BTreeSet<&Key> = moving.iter().chain(claims.keys()).collect();
        let is_free = places.len() < MOVES;
        if is_free {
            claims.insert(model.clone(), now);
        }
        is_free
    }

    /// Models whose Deployments are on their way, also from before this operator began.
    fn moving(&self, image: &str, now: Timestamp) -> Vec<Key> {
        let stores = self.deployments.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let all = stores.iter().flat_map(Store::state);
        let moving = all.filter(|found| self.is_moving(found, image, now));
        moving.map(|found| key_of(&found.metadata)).collect()
    }

    /// A rollout to `image` that is not over and makes progress. At first its time of progress is that of the rollout before,
    /// so that it counts only after the model was allowed to go.
    fn is_moving(&self, deployment: &Deployment, image: &str, now: Timestamp) -> bool {
        let model = key_of(&deployment.metadata);
        let allowed = self.claims().get(&model).copied().unwrap_or(self.begun);
        let is_stuck = progressed(deployment).is_some_and(|progressed| {
            now.as_second() - progressed.max(allowed).as_second() > STUCK_SECONDS
        });
        image_of(deployment) == Some(image) && !has_arrived(deployment) && !is_stuck
    }

    /// None found is not all of them done.
    fn agents_run(&self, image: &str) -> bool {
        let agents = self.agents.as_ref().map(Store::state);
        agents.is_none_or(|all| !all.is_empty() && all.iter().all(|found| is_done(found, image)))
    }

    fn claims(&self) -> MutexGuard<'_, BTreeMap<Key, Timestamp>> {
        // Every change is one call.
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The image of a Deployment's replicas.
pub fn image_of(deployment: &Deployment) -> Option<&str> {
    let pod = deployment.spec.as_ref()?.template.spec.as_ref()?;
    pod.containers.first()?.image.as_deref()
}

/// All Pods of the DaemonSet run `image` and are available.
fn is_done(agents: &DaemonSet, image: &str) -> bool {
    let template = agents.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let runs = template.and_then(|pod| pod.containers.first()?.image.as_deref()) == Some(image);
    let Some(status) = agents.status.as_ref().filter(|_| runs) else { return false };
    let wanted = status.desired_number_scheduled;
    status.observed_generation >= agents.metadata.generation
        && status.updated_number_scheduled.unwrap_or(0) >= wanted
        && status.number_available.unwrap_or(0) >= wanted
}

/// Whether all replicas that are there are of the Deployment's template and available.
fn has_arrived(deployment: &Deployment) -> bool {
    let Some(status) = &deployment.status else { return false };
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    status.observed_generation >= deployment.metadata.generation
        && status.updated_replicas.unwrap_or(0) >= wanted
        && status.available_replicas.unwrap_or(0) >= wanted
        && status.replicas.unwrap_or(0) == wanted
}

/// When its controller last saw a Deployment's rollout get on; of which rollout, it does not say.
fn progressed(deployment: &Deployment) -> Option<Timestamp> {
    let conditions = deployment.status.as_ref()?.conditions.as_ref()?;
    let progress = conditions.iter().find(|found| found.type_ == "Progressing")?;
    progress.last_update_time.as_ref().map(|time| time.0)
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector;
    use kube::runtime::watcher::Event;
    use serde_json::{Value, json};

    use super::*;

    const OLD: &str = "localhost/bindery:0";
    const NEW: &str = "localhost/bindery:1";

    fn now() -> Timestamp {
        Timestamp::from_second(1000).unwrap()
    }

    fn status(updated: i32, present: i32, progressed_at: i64) -> Value {
        let time = Timestamp::from_second(progressed_at).unwrap().to_string();
        json!({
            "observedGeneration": 2, "replicas": present, "updatedReplicas": updated, "availableReplicas": present,
            "conditions": [{"type": "Progressing", "status": "True", "lastUpdateTime": time}],
        })
    }

    fn deployment(name: &str, image: &str, status: Value) -> Deployment {
        serde_json::from_value(json!({
            "metadata": {"namespace": "n", "name": name, "generation": 2},
            "spec": {"replicas": 2, "selector": {}, "template": {"spec": {"containers": [{"name": "r", "image": image}]}}},
            "status": status,
        }))
        .unwrap()
    }

    fn agents(image: &str, updated: i32, available: i32) -> DaemonSet {
        serde_json::from_value(json!({
            "metadata": {"namespace": "n", "name": "agents", "generation": 2},
            "spec": {"selector": {}, "template": {"spec": {"containers": [{"name": "node", "image": image}]}}},
            "status": {
                "observedGeneration": 2, "desiredNumberScheduled": 2, "currentNumberScheduled": 2, "numberMisscheduled": 0,
                "numberReady": available, "updatedNumberScheduled": updated, "numberAvailable": available,
            },
        }))
        .unwrap()
    }

    fn store<K>(objects: Vec<K>) -> Store<K>
    where
        K: kube::Resource<DynamicType = ()> + Clone + 'static,
    {
        let (store, mut writer) = reflector::store();
        for object in objects {
            writer.apply_watcher_event(&Event::Apply(object));
        }
        store
    }

    /// Of an operator that began long ago.
    fn moves() -> Moves {
        Moves::new(None, Timestamp::UNIX_EPOCH)
    }

    fn after(agents: Vec<DaemonSet>) -> Moves {
        Moves::new(Some(store(agents)), Timestamp::UNIX_EPOCH)
    }

    fn key(name: &str) -> Key {
        ("n".into(), name.into())
    }

    fn may(moves: &Moves, name: &str) -> bool {
        let own = deployment(name, OLD, status(0, 2, 1000));
        moves.may_move(&key(name), Some(&own), NEW, now())
    }

    #[test]
    fn a_rollout_moves_until_it_is_done_or_stuck() {
        for (case, image, status, wanted) in [
            ("another image", OLD, status(1, 2, 1000), false),
            ("half way", NEW, status(1, 3, 1000), true),
            ("old ones are left", NEW, status(2, 3, 1000), true),
            ("done", NEW, status(2, 2, 1000), false),
            ("without progress", NEW, status(1, 3, 939), false),
            ("not seen by its controller", NEW, json!({"observedGeneration": 1}), true),
            ("without a status", NEW, json!({}), true),
        ] {
            let moves = moves();
            assert_eq!(
                moves.is_moving(&deployment("m", image, status), NEW, now()),
                wanted,
                "{case}"
            );
        }
    }

    #[test]
    fn a_rollout_is_not_stuck_by_the_time_of_the_one_before() {
        let stale = deployment("a", NEW, status(0, 2, 0));
        let moves = moves();
        assert!(!moves.is_moving(&stale, NEW, now()), "nobody allowed it");
        assert!(may(&moves, "a"));
        assert!(moves.may_move(&key("a"), Some(&stale), NEW, now()));
        for name in ["b", "c", "d"] {
            assert!(may(&moves, name));
        }
        assert!(!may(&moves, "e"), "a's place is its own");
        let later = Timestamp::from_second(1061).unwrap();
        assert!(moves.may_move(&key("a"), Some(&stale), NEW, later));
        assert!(may(&moves, "e"), "a has made no progress");
        let began = Moves::new(None, now());
        assert!(began.is_moving(&stale, NEW, now()), "a new leader waits as long");
    }

    #[test]
    fn agents_are_done_when_all_run_the_image_and_are_available() {
        for (agents, wanted) in [
            (agents(NEW, 2, 2), true),
            (agents(NEW, 1, 2), false),
            (agents(NEW, 2, 1), false),
            (agents(OLD, 2, 2), false),
        ] {
            assert_eq!(is_done(&agents, NEW), wanted, "{agents:?}");
        }
        let mut unseen = agents(NEW, 2, 2);
        unseen.metadata.generation = Some(3);
        assert!(!is_done(&unseen, NEW));
    }

    #[test]
    fn replicas_follow_their_agents() {
        assert!(may(&moves(), "m"));
        assert!(!may(&after(Vec::new()), "m"), "no agents found is not all of them done");
        assert!(!may(&after(vec![agents(OLD, 2, 2)]), "m"));
        assert!(may(&after(vec![agents(NEW, 2, 2)]), "m"));
        let waits = after(vec![agents(OLD, 2, 2)]);
        assert!(waits.may_move(&key("new"), None, NEW, now()), "a new model waits for nobody");
    }

    #[test]
    fn as_many_as_may_move_do_though_all_ask_at_once() {
        let moves = moves();
        let moves = &moves;
        let may = std::thread::scope(|scope| {
            let asking: Vec<_> =
                (0..16).map(|n| scope.spawn(move || may(moves, &format!("m{n}")))).collect();
            asking.into_iter().filter_map(|it| it.join().ok()).filter(|may| *may).count()
        });
        assert_eq!(may, MOVES);
    }

    #[test]
    fn models_of_every_namespace_and_from_before_count() {
        let moves = moves();
        let moving = |name: &str| deployment(name, NEW, status(1, 3, 1000));
        moves.watch(store(vec![moving("a"), moving("b")]));
        moves.watch(store(vec![moving("c"), deployment("d", NEW, status(2, 2, 1000))]));
        assert!(may(&moves, "e") && may(&moves, "e"), "a place that it has stays");
        assert!(!may(&moves, "f"));
    }

    #[test]
    fn a_place_is_free_again_when_its_model_has_arrived_or_gives_up() {
        let moves = moves();
        for name in ["a", "b", "c", "d"] {
            assert!(may(&moves, name));
        }
        assert!(!may(&moves, "e"));
        let arrived = deployment("a", NEW, status(2, 2, 1000));
        assert!(moves.may_move(&key("a"), Some(&arrived), NEW, now()));
        assert!(may(&moves, "e") && !may(&moves, "f"));
        moves.give_up(&key("b"));
        assert!(may(&moves, "f"));
    }
}
