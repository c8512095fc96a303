//! What the parts of a node agent share: the ledger, the grants on disk, and which of them are claimed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::UnixListener;
use tokio::sync::{Notify, mpsc, watch};

use super::engine::Spawner;
use super::grants::Grants;
use super::ledger::{CannotStart, GrantId, Health, Ledger, Place, Unit};
use super::weights::Weights;

/// A grant without a claim ends once it has been absent from the kubelet's list for this long.
const ABSENCE: Duration = Duration::from_secs(10);
/// A grant that the kubelet never listed is given this long to appear.
const APPEARANCE: Duration = Duration::from_secs(60);
/// An agent that came back is not ready until the grants of before have their engines, but for this long at most.
const RETURN: Duration = Duration::from_secs(60);
/// Who holds a grant is asked of the kubelet for so long.
const WHOSE: Duration = Duration::from_secs(10);
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// The namespace of the Pod that holds each unit, as the kubelet lists them.
pub type Holders = BTreeMap<Unit, String>;

/// How far the agent's own end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Serving,
    /// Engines finish what runs; replicas are told.
    Draining,
}

/// Whether a process of this machine that is no Pod may claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalClients {
    Refused,
    Allowed,
}

/// Shared by the device plugin, the claims and the loops.
#[derive(Debug)]
pub struct Agent {
    pub grants: Grants,
    pub weights: Arc<Weights>,
    pub spawner: Spawner,
    /// The program that engines run.
    pub program: PathBuf,
    pub local_clients: LocalClients,
    /// How long running requests may take when the agent ends.
    pub drain: Duration,
    pub phase: watch::Sender<Phase>,
    /// Told when somebody waits for the kubelet's list.
    pub compare_now: Notify,
    state: Mutex<State>,
    /// Told of every change of the ledger.
    changed: watch::Sender<u64>,
    listening: mpsc::UnboundedSender<(GrantId, UnixListener)>,
}

#[derive(Debug, Default)]
struct State {
    ledger: Ledger,
    known: BTreeMap<GrantId, Known>,
    /// Grants that the disk has not taken yet.
    unopened: Vec<GrantId>,
    /// Grants of an earlier agent whose engines have not answered to this one, and since when that is waited for.
    awaited: Option<(Instant, BTreeSet<GrantId>)>,
}

/// What is known of a grant beside its units.
#[derive(Debug)]
struct Known {
    since: Instant,
    claimed: Claimed,
    listed: Listed,
    /// Of the Pod that holds it; absent until the kubelet has listed it.
    namespace: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claimed {
    No,
    Yes,
}

/// What the kubelet's lists have said.
#[derive(Debug, Clone, Copy)]
enum Listed {
    Never,
    Present,
    AbsentSince(Instant),
}

/// Parts that an agent is made of.
#[derive(Debug)]
pub struct Parts {
    pub ledger: Ledger,
    pub grants: Grants,
    pub weights: Weights,
    pub spawner: Spawner,
    pub program: PathBuf,
    pub local_clients: LocalClients,
    pub drain: Duration,
}

/// The sockets to serve, each once.
pub type Listeners = mpsc::UnboundedReceiver<(GrantId, UnixListener)>;

impl Agent {
    /// Puts the parts together. The grants' sockets arrive on the channel: as many as the kubelet allocates, no more.
    pub fn new(parts: Parts) -> (Arc<Self>, Listeners) {
        let (listening, listeners) = mpsc::unbounded_channel();
        let agent = Self {
            grants: parts.grants,
            weights: Arc::new(parts.weights),
            spawner: parts.spawner,
            program: parts.program,
            local_clients: parts.local_clients,
            drain: parts.drain,
            phase: watch::Sender::new(Phase::Serving),
            compare_now: Notify::new(),
            state: Mutex::new(State { ledger: parts.ledger, ..State::default() }),
            changed: watch::Sender::new(0),
            listening,
        };
        (Arc::new(agent), listeners)
    }

    /// Nothing that holds this lock can leave it half changed, so a poisoned one is good.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        let changed = with(&mut self.lock());
        self.changed.send_modify(|count| *count += 1);
        changed
    }

    /// Sees every change of the ledger.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Reads the ledger.
    pub fn read<T>(&self, with: impl FnOnce(&Ledger) -> T) -> T {
        with(&self.lock().ledger)
    }

    /// Changes the ledger.
    pub fn write<T>(&self, with: impl FnOnce(&mut Ledger) -> T) -> T {
        self.change(|state| with(&mut state.ledger))
    }

    /// Sets the health that `health` has for a device; nobody is told when nothing changed.
    pub fn follow(&self, health: impl Fn(&str) -> Option<Health>) {
        let changed = self.lock().ledger.follow(health);
        if changed {
            self.changed.send_modify(|count| *count += 1);
        }
    }

    /// Takes up the grants that an earlier agent wrote down.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn restore(&self) -> std::io::Result<()> {
        let found = self.grants.load()?;
        let ids = found.iter().map(|(id, _)| id.clone()).collect();
        self.change(|state| state.awaited = Some((Instant::now(), ids)));
        for (id, units) in found {
            self.enter(&id, units);
            let opened = self.grants.listen(&id).and_then(|listener| self.serve(&id, listener));
            self.or_later(&id, opened);
        }
        Ok(())
    }

    /// Makes a grant of what the kubelet allocates and gives the folder to mount. A disk that does not take it now is tried
    /// again: the kubelet starts the container again as well, where an error here would make its Pod Failed for ever.
    ///
    /// # Errors
    /// When the system has no randomness for a name.
    pub fn allocate(&self, units: BTreeSet<Unit>) -> std::io::Result<PathBuf> {
        let id = Grants::new_id(&units)?;
        self.enter(&id, units.clone());
        let opened = self.open(&id, &units);
        self.or_later(&id, opened);
        tracing::info!(%id, "granted");
        Ok(self.grants.folder(&id))
    }

    /// Opens what the disk did not take before.
    pub fn open_late(&self) {
        // Looked at every few seconds: nobody is told of a change that is none.
        let unopened = std::mem::take(&mut self.lock().unopened);
        for id in unopened {
            let units = self.read(|ledger| {
                ledger.grants().find(|(other, _)| **other == id).map(|(_, units)| units.clone())
            });
            if let Some(units) = units {
                let opened = self.open(&id, &units);
                self.or_later(&id, opened);
            }
        }
    }

    fn open(&self, id: &GrantId, units: &BTreeSet<Unit>) -> std::io::Result<()> {
        self.serve(id, self.grants.create(id, units)?)
    }

    fn serve(
        &self,
        id: &GrantId,
        listener: std::os::unix::net::UnixListener,
    ) -> std::io::Result<()> {
        // The receiver lives as long as the agent.
        drop(self.listening.send((id.clone(), UnixListener::from_std(listener)?)));
        Ok(())
    }

    fn or_later(&self, id: &GrantId, opened: std::io::Result<()>) {
        if let Err(error) = opened {
            tracing::error!(%id, %error, "a grant cannot be opened yet");
            self.change(|state| state.unopened.push(id.clone()));
        }
    }

    fn enter(&self, id: &GrantId, units: BTreeSet<Unit>) {
        let known = Known {
            since: Instant::now(),
            claimed: Claimed::No,
            listed: Listed::Never,
            namespace: None,
        };
        let ended = self.change(|state| {
            let ended = state.ledger.grant(id.clone(), units);
            state.known.insert(id.clone(), known);
            ended
        });
        for id in ended {
            self.forget(&id, "its memory was granted again");
        }
    }

    /// Opens the one claim that a grant can have; `None` when it has one or has ended.
    pub fn claim(self: &Arc<Self>, id: &GrantId) -> Option<Claiming> {
        let claimed = self.change(|state| {
            let known = state.known.get_mut(id)?;
            (known.claimed == Claimed::No).then(|| known.claimed = Claimed::Yes)
        });
        claimed.map(|()| Claiming { agent: Arc::clone(self), id: id.clone() })
    }

    /// The namespace of the Pod that holds a grant, of which the kubelet is asked if it was not yet; absent when it does not say.
    /// Without a kubelet there is one.
    pub async fn namespace(&self, id: &GrantId) -> Option<String> {
        if self.local_clients == LocalClients::Allowed {
            return Some(String::new());
        }
        let mut changed = self.watch();
        let told = async {
            loop {
                let known = self.lock().known.get(id)?.namespace.clone();
                if known.is_some() {
                    return known;
                }
                self.compare_now.notify_one();
                changed.changed().await.ok()?;
                tokio::time::sleep(ASK_AGAIN).await;
            }
        };
        tokio::time::timeout(WHOSE, told).await.ok().flatten()
    }

    /// Whether a grant has not ended.
    pub fn holds(&self, id: &GrantId) -> bool {
        self.lock().known.contains_key(id)
    }

    /// Says that a grant's engine answers, or that its claim has failed: nobody waits for it any more.
    pub fn settled(&self, id: &GrantId) {
        self.change(|state| state.awaited.as_mut().map(|(_, ids)| ids.remove(id)));
    }

    /// Whether the engines that an earlier agent's end took away are back.
    pub fn has_returned(&self) -> bool {
        match &self.lock().awaited {
            Some((since, ids)) => ids.is_empty() || since.elapsed() >= RETURN,
            None => true,
        }
    }

    /// Takes the memory for an engine; it is given back when the answer is dropped.
    ///
    /// # Errors
    /// When the engine may not start, or not yet.
    pub fn start_engine(self: &Arc<Self>, id: &GrantId) -> Result<Running, CannotStart> {
        let place = self.write(|ledger| ledger.start_engine(id))?;
        Ok(Running { agent: Arc::clone(self), id: id.clone(), place })
    }

    /// Ends the grants that the kubelet does not list any more. Nobody waits for the engine of one that no Pod holds.
    pub fn compare(&self, listed: &Holders, now: Instant) {
        let over = self.change(|state| {
            let mut over = Vec::new();
            for (id, units) in state.ledger.grants() {
                let Some(known) = state.known.get_mut(id) else { continue };
                let holder = units.iter().find_map(|unit| listed.get(unit));
                let is_held = holder.is_some();
                known.see(is_held, now);
                known.namespace = holder.cloned().or(known.namespace.take());
                if !is_held && let Some((_, ids)) = &mut state.awaited {
                    ids.remove(id);
                }
                if known.is_over(now) {
                    over.push(id.clone());
                }
            }
            for id in &over {
                state.ledger.release(id);
            }
            over
        });
        for id in over {
            self.forget(&id, "the kubelet does not list it any more");
        }
        if let Err(error) = self.grants.sweep(|id| self.holds(id)) {
            tracing::warn!(%error, "cannot look for folders of grants that have ended");
        }
    }

    fn forget(&self, id: &GrantId, why: &str) {
        self.change(|state| state.known.remove(id));
        self.settled(id);
        if let Err(error) = self.grants.remove(id) {
            tracing::error!(%id, %error, "cannot remove a grant's folder");
        }
        tracing::info!(%id, why, "the grant has ended");
    }
}

impl Known {
    fn see(&mut self, present: bool, now: Instant) {
        self.listed = match (present, self.listed) {
            (true, _) => Listed::Present,
            (false, Listed::Present) => Listed::AbsentSince(now),
            (false, Listed::Never | Listed::AbsentSince(_)) => self.listed,
        };
    }

    fn is_over(&self, now: Instant) -> bool {
        let absent = match self.listed {
            Listed::Never => now.duration_since(self.since) >= APPEARANCE,
            Listed::Present => false,
            Listed::AbsentSince(since) => now.duration_since(since) >= ABSENCE,
        };
        self.claimed == Claimed::No && absent
    }
}

/// An open claim.
#[derive(Debug)]
pub struct Claiming {
    agent: Arc<Agent>,
    id: GrantId,
}

impl Drop for Claiming {
    fn drop(&mut self) {
        self.agent.change(|state| {
            if let Some(known) = state.known.get_mut(&self.id) {
                known.claimed = Claimed::No;
            }
        });
    }
}

/// The memory of an engine.
#[derive(Debug)]
pub struct Running {
    agent: Arc<Agent>,
    id: GrantId,
    pub place: Place,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.agent.write(|ledger| ledger.engine_ended(&self.id));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::node::ledger::Device;
    use crate::node::weights::WeightsConfig;
    use crate::source::Retry;
    use crate::source::reach::Reach;

    /// An agent with one device of 4 GiB, in `root`.
    pub(in crate::node) fn agent(root: &std::path::Path, program: &str) -> (Arc<Agent>, Listeners) {
        Agent::new(parts(root, program))
    }

    fn parts(root: &std::path::Path, program: &str) -> Parts {
        std::fs::create_dir_all(root.join("models")).unwrap();
        let device = Device { name: "cpu0".into(), gib: 4, health: Health::Healthy };
        Parts {
            ledger: Ledger::new(vec![device]),
            grants: Grants::open(root).unwrap(),
            weights: Weights::new(WeightsConfig {
                model_folder: root.join("models"),
                root: root.to_owned(),
                hub_endpoint: "http://127.0.0.1:1".into(),
                reach: Reach::Public,
                limit_bytes: None,
                retry: Retry { attempts: 1, first_pause: Duration::ZERO },
            }),
            spawner: Spawner::start().unwrap(),
            program: program.into(),
            local_clients: LocalClients::Allowed,
            drain: Duration::from_secs(5),
        }
    }

    fn units(indices: std::ops::Range<u32>) -> BTreeSet<Unit> {
        indices.map(|index| Unit { device: "cpu0".into(), index }).collect()
    }

    #[tokio::test]
    async fn a_grant_that_the_disk_did_not_take_is_held_and_opened_later() {
        let root = tempfile::tempdir().unwrap();
        let (agent, mut listeners) = agent(root.path(), "true");
        let (records, away) = (root.path().join("grants"), root.path().join("away"));
        std::fs::rename(&records, &away).unwrap();
        let folder = agent.allocate(units(0..2)).unwrap();
        assert!(!folder.exists() && listeners.try_recv().is_err());
        assert_eq!(agent.read(|ledger| ledger.usage()[0].granted_gib), 2);
        agent.open_late();
        assert!(listeners.try_recv().is_err(), "the disk still refuses");
        // The runtime makes what it mounts; long after, the Pod has it still.
        std::fs::create_dir(&folder).unwrap();
        let an_hour = Duration::from_secs(3600);
        let made = std::fs::File::open(&folder).unwrap();
        made.set_modified(std::time::SystemTime::now() - an_hour).unwrap();
        agent.compare(&held(units(0..2)), Instant::now());
        assert!(folder.exists(), "swept away beneath its Pod");
        std::fs::rename(&away, &records).unwrap();
        agent.open_late();
        assert!(folder.exists());
        assert_eq!(listeners.try_recv().unwrap().0, only(&agent));
    }

    fn held(units: BTreeSet<Unit>) -> Holders {
        units.into_iter().map(|unit| (unit, "tenant".to_owned())).collect()
    }

    #[tokio::test]
    async fn a_grants_namespace_is_known_once_the_kubelet_lists_it() {
        let root = tempfile::tempdir().unwrap();
        let parts = Parts { local_clients: LocalClients::Refused, ..parts(root.path(), "true") };
        let (agent, _listeners) = Agent::new(parts);
        agent.allocate(units(0..2)).unwrap();
        let id = only(&agent);
        let asked = async {
            agent.compare_now.notified().await;
            agent.compare(&held(units(2..4)), Instant::now());
            agent.compare_now.notified().await;
            agent.compare(&held(units(1..3)), Instant::now());
        };
        let (namespace, ()) = tokio::join!(agent.namespace(&id), asked);
        assert_eq!(namespace.as_deref(), Some("tenant"));
        agent.compare(&Holders::new(), Instant::now());
        assert_eq!(agent.namespace(&id).await.as_deref(), Some("tenant"), "it stays the Pod's");
        assert_eq!(agent.namespace(&GrantId("other".into())).await, None);
    }

    fn only(agent: &Agent) -> GrantId {
        agent.read(|ledger| ledger.grants().next().unwrap().0.clone())
    }

    #[tokio::test]
    async fn a_grant_ends_when_the_kubelet_has_listed_it_and_does_not_any_more() {
        let root = tempfile::tempdir().unwrap();
        let (agent, _listeners) = agent(root.path(), "true");
        let folder = agent.allocate(units(0..2)).unwrap();
        let (start, none) = (Instant::now(), Holders::new());
        let at = |seconds| start + Duration::from_secs(seconds);
        agent.compare(&none, at(30));
        assert!(folder.exists(), "it may not be listed yet");
        agent.compare(&held(units(0..2)), at(31));
        agent.compare(&none, at(32));
        agent.compare(&none, at(41));
        assert!(folder.exists(), "the list is empty for a while after a restart of the kubelet");
        agent.compare(&none, at(42));
        assert!(!folder.exists());
        assert_eq!(agent.read(|ledger| ledger.usage()[0].free_gib), 4);
    }

    #[tokio::test]
    async fn a_grant_that_never_appears_ends_after_a_minute_and_a_claimed_one_never() {
        let root = tempfile::tempdir().unwrap();
        let (agent, _listeners) = agent(root.path(), "true");
        agent.allocate(units(0..2)).unwrap();
        let (none, id) = (Holders::new(), only(&agent));
        let later = Instant::now() + Duration::from_secs(100);
        let claim = agent.claim(&id).unwrap();
        assert!(agent.claim(&id).is_none(), "one claim at a time");
        agent.compare(&none, later);
        assert!(agent.holds(&id));
        drop(claim);
        agent.compare(&none, later);
        assert!(!agent.holds(&id));
    }

    #[tokio::test]
    async fn grants_outlive_the_agent() {
        let root = tempfile::tempdir().unwrap();
        let id = {
            let (agent, _listeners) = agent(root.path(), "true");
            agent.allocate(units(1..4)).unwrap();
            only(&agent)
        };
        let (agent, mut listeners) = agent(root.path(), "true");
        agent.restore().unwrap();
        assert!(!agent.has_returned());
        assert_eq!(listeners.recv().await.unwrap().0, id);
        agent.settled(&id);
        assert!(agent.has_returned());
        assert_eq!(agent.read(|ledger| ledger.usage()[0].granted_gib), 3);
    }

    #[tokio::test]
    async fn an_agent_that_came_back_waits_only_for_grants_that_a_pod_holds() {
        let root = tempfile::tempdir().unwrap();
        {
            let (agent, _listeners) = agent(root.path(), "true");
            agent.allocate(units(0..2)).unwrap();
            agent.allocate(units(2..4)).unwrap();
        }
        let (agent, _listeners) = agent(root.path(), "true");
        agent.restore().unwrap();
        let (id, units) = agent.read(|ledger| {
            let (id, units) = ledger.grants().next().unwrap();
            (id.clone(), units.clone())
        });
        agent.compare(&held(units), Instant::now());
        assert!(!agent.has_returned());
        agent.settled(&id);
        assert!(agent.has_returned(), "the other one's Pod went while no agent was there");
        assert_eq!(agent.read(|ledger| ledger.usage()[0].granted_gib), 4, "but its memory waits");
    }
}
