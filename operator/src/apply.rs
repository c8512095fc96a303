//! One request for each change. What is already so is not sent again.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crds::{InferenceModel, InferenceModelStatus};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams};
use kube::core::error_boundary::InvalidObject;
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::observe::{Child, Observed};
use crate::plan::Change;
use crate::pods::{Key, key_of};
use crate::reconcile::Watched;

/// The one owner of our fields.
pub const MANAGER: &str = "bindery-operator";

/// Figures in messages change all the time; they are written this often at most.
const WORDS: Duration = Duration::from_secs(10);

/// A write that was refused.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("{what} {name}: {}", words(source))]
    Refused { what: &'static str, name: String, source: Box<kube::Error> },
    #[error(
        "the {what} {name} is not of this model: delete or rename it, or give the model another name"
    )]
    Taken { what: &'static str, name: String },
    #[error("write {what} as JSON: {source}")]
    Json { what: &'static str, source: serde_json::Error },
}

/// Of an answer of the API server its message alone.
fn words(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

impl ApplyError {
    /// Whether the answer is no until somebody acts.
    pub fn is_refusal(&self) -> bool {
        matches!(self.kind(), "refused" | "forbidden" | "taken")
    }

    /// The metric's label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Refused { source, .. } => match source.as_ref() {
                kube::Error::Api(status) if status.is_conflict() => "conflict",
                kube::Error::Api(status) if status.is_forbidden() => "forbidden",
                kube::Error::Api(_) => "refused",
                _ => "unreachable",
            },
            Self::Taken { .. } => "taken",
            Self::Json { .. } => "json",
        }
    }
}

/// Sends changes, and remembers what was sent.
pub struct Applier {
    client: Client,
    sent: Mutex<HashMap<(Child, Key), Sent>>,
    told: Mutex<HashMap<Key, Instant>>,
    /// Generations of models that cannot be read and what was said of them: their own status cannot be read either.
    unreadable: Mutex<HashMap<Key, (Option<i64>, String)>>,
}

impl Debug for Applier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Applier").finish_non_exhaustive()
    }
}

/// The kinds that are written.
trait Kind:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Serialize
    + DeserializeOwned
    + Clone
    + Debug
{
}

impl<K> Kind for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Serialize
        + DeserializeOwned
        + Clone
        + Debug
{
}

/// A model and the heads of the objects that carry its label and name.
#[derive(Clone, Copy)]
struct Owner<'a> {
    model: &'a InferenceModel,
    heads: &'a BTreeMap<Child, ObjectMeta>,
}

impl Owner<'_> {
    fn owns(self, head: &ObjectMeta) -> bool {
        is_owned(head, self.model)
    }
}

/// Whether a model controls an object. A label is not enough: anybody can write one.
pub fn is_owned(head: &ObjectMeta, model: &InferenceModel) -> bool {
    let mut owners = head.owner_references.iter().flatten();
    owners.any(|owner| owner.controller == Some(true) && Some(&owner.uid) == model.uid().as_ref())
}

/// The head of an object that the watches, which see our label alone, do not show. A POST would say as much, but what is
/// created by one has fields of two managers, of which a later apply removes none.
async fn look<K: Kind>(api: &Api<K>, name: &str) -> kube::Result<Option<ObjectMeta>> {
    let named = ListParams::default().fields(&format!("metadata.name={name}"));
    let found = api.list_metadata(&named).await?;
    Ok(found.items.into_iter().next().map(|found| found.metadata))
}

fn hash(value: &serde_json::Value) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.to_string().hash(&mut hasher);
    hasher.finish()
}

/// What was sent, and how the object then stood.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sent {
    desired: u64,
    stood: Option<String>,
}

/// How an object stands: its generation, which a change of its status leaves, else its version.
fn stand(head: &ObjectMeta) -> Option<String> {
    let version = || head.resource_version.clone();
    head.generation.map(|generation| generation.to_string()).or_else(version)
}

impl Applier {
    pub fn new(client: Client) -> Self {
        Self {
            client,
            sent: Mutex::default(),
            told: Mutex::default(),
            unreadable: Mutex::default(),
        }
    }

    /// Makes one change.
    ///
    /// # Errors
    /// When the API server refuses it or is away, and when the name of a child is taken.
    pub async fn apply(
        &self,
        model: &InferenceModel,
        observed: &Observed,
        change: &Change,
    ) -> Result<(), ApplyError> {
        let owner = Owner { model, heads: &observed.heads };
        match change {
            Change::ApplyDeployment(desired) => {
                self.send(owner, Child::Deployment, &**desired).await
            }
            Change::ApplyService(desired) => self.send(owner, Child::Service, &**desired).await,
            Change::ApplyDisruptionBudget(desired) => {
                self.send(owner, Child::DisruptionBudget, &**desired).await
            }
            Change::ApplyNetworkPolicy(desired) => {
                self.send(owner, Child::NetworkPolicy, &**desired).await
            }
            Change::DeleteNetworkPolicy { name } => {
                self.delete::<NetworkPolicy>(model, "delete NetworkPolicy", name).await
            }
            Change::DeletePod { name, .. } => self.delete::<Pod>(model, "delete Pod", name).await,
        }
    }

    /// Applies a child, unless the same was sent before and it stands as it did then.
    async fn send<K: Kind>(
        &self,
        owner: Owner<'_>,
        child: Child,
        desired: &K,
    ) -> Result<(), ApplyError> {
        let key = (child, key_of(desired.meta()));
        let json = serde_json::to_value(desired);
        let body = json.map_err(|source| ApplyError::Json { what: kind(child), source })?;
        let head = owner.heads.get(&child);
        let now = Sent { desired: hash(&body), stood: head.and_then(stand) };
        if head.is_some_and(|head| owner.owns(head)) && self.sent().get(&key) == Some(&now) {
            return Ok(());
        }
        let applied = self.write::<K>(owner, &key, body).await?;
        self.sent().insert(key, Sent { stood: stand(&applied), ..now });
        Ok(())
    }

    /// Changes a child of the model, or makes it.
    async fn write<K: Kind>(
        &self,
        owner: Owner<'_>,
        (child, (namespace, name)): &(Child, Key),
        mut body: serde_json::Value,
    ) -> Result<ObjectMeta, ApplyError> {
        let what = kind(*child);
        let failed = |source| refused(what, name, source);
        let api = Api::<K>::namespaced(self.client.clone(), namespace);
        let found = match owner.heads.get(child) {
            Some(head) => Some(head.clone()),
            None => look(&api, name).await.map_err(failed)?,
        };
        let params = match found {
            Some(head) if !owner.owns(&head) => {
                return Err(ApplyError::Taken { what, name: name.clone() });
            }
            Some(head) => {
                // Another that took its place since is refused by the API server.
                body["metadata"]["uid"] = head.uid.into();
                params()
            }
            // Not by force: what appeared since is somebody's.
            None => PatchParams { force: false, ..params() },
        };
        let applied = api.patch(name, &params, &Patch::Apply(body)).await.map_err(failed)?;
        Ok(applied.meta().clone())
    }

    /// Deletes what may be gone already.
    async fn delete<K: Kind>(
        &self,
        model: &InferenceModel,
        what: &'static str,
        name: &str,
    ) -> Result<(), ApplyError> {
        let namespace = model.namespace().unwrap_or_default();
        let api = Api::<K>::namespaced(self.client.clone(), &namespace);
        match api.delete(name, &DeleteParams::default()).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(source) => Err(refused(what, name, source)),
        }
    }

    /// Writes the status when it is another than the model has.
    ///
    /// # Errors
    /// When the API server refuses it or is away.
    pub async fn write_status(
        &self,
        model: &InferenceModel,
        status: &InferenceModelStatus,
    ) -> Result<(), ApplyError> {
        if model.status.as_ref() == Some(status) {
            return Ok(());
        }
        let (namespace, name) = key_of(&model.metadata);
        let is_milestone =
            model.status.as_ref().is_none_or(|old| without_words(old) != without_words(status));
        if !is_milestone && !self.may_tell(&namespace, &name) {
            return Ok(());
        }
        self.patch_status(&namespace, &name, status).await
    }

    /// Writes the status of a model that cannot be read, once for each generation.
    ///
    /// # Errors
    /// When the API server refuses it or is away.
    pub async fn write_unreadable(
        &self,
        invalid: &InvalidObject,
        status: &InferenceModelStatus,
    ) -> Result<(), ApplyError> {
        let key = key_of(&invalid.metadata);
        let said = (invalid.metadata.generation, invalid.error.clone());
        if self.unreadable().get(&key) == Some(&said) {
            return Ok(());
        }
        self.patch_status(&key.0, &key.1, status).await?;
        self.unreadable().insert(key, said);
        Ok(())
    }

    async fn patch_status(
        &self,
        namespace: &str,
        name: &str,
        status: &InferenceModelStatus,
    ) -> Result<(), ApplyError> {
        let api = Api::<Watched>::namespaced(self.client.clone(), namespace);
        let patch = serde_json::json!({
            "apiVersion": InferenceModel::api_version(&()),
            "kind": InferenceModel::kind(&()),
            "status": status,
        });
        let written = api.patch_status(name, &params(), &Patch::Apply(patch)).await;
        written.map(drop).map_err(|source| refused("status", name, source))
    }

    fn unreadable(&self) -> std::sync::MutexGuard<'_, HashMap<Key, (Option<i64>, String)>> {
        self.unreadable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a change of words alone may be written: every [`WORDS`] at most.
    fn may_tell(&self, namespace: &str, name: &str) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (namespace.to_owned(), name.to_owned());
        let may = told.get(&key).is_none_or(|last| last.elapsed() >= WORDS);
        if may {
            told.insert(key, Instant::now());
        }
        may
    }

    /// Forgets a model that is gone.
    pub fn forget(&self, model: &Key) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).remove(model);
        self.unreadable().remove(model);
        for child in Child::ALL {
            self.sent().remove(&(child, model.clone()));
        }
    }

    fn sent(&self) -> std::sync::MutexGuard<'_, HashMap<(Child, Key), Sent>> {
        // A map of what was sent is right at any moment.
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A status without the texts of its conditions.
fn without_words(status: &InferenceModelStatus) -> InferenceModelStatus {
    let mut status = status.clone();
    for condition in &mut status.conditions {
        condition.message.clear();
    }
    status
}

fn params() -> PatchParams {
    PatchParams::apply(MANAGER).force()
}

fn refused(what: &'static str, name: &str, source: kube::Error) -> ApplyError {
    ApplyError::Refused { what, name: name.to_owned(), source: Box::new(source) }
}

fn kind(child: Child) -> &'static str {
    match child {
        Child::Deployment => "Deployment",
        Child::Service => "Service",
        Child::DisruptionBudget => "PodDisruptionBudget",
        Child::NetworkPolicy => "NetworkPolicy",
    }
}

#[cfg(test)]
mod tests;
