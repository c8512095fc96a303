//! Which of several operators writes: the one whose name stands in the lease and who renews it.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::coordination::v1::{Lease as Object, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt};
use tokio::time::Instant;

use crate::config::Config;

/// Who does not renew for this long does not lead any more.
const TERM: Duration = Duration::from_secs(15);
/// Who has not renewed for this long stops writing, before another may begin.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often it is renewed, or looked at.
const RENEW: Duration = Duration::from_secs(2);

/// One operator's view of the lease.
#[derive(Debug)]
pub struct Lease {
    api: Api<Object>,
    name: String,
    holder: String,
    /// What was last seen and since when: clocks of other machines are not compared.
    seen: Option<(Option<String>, Instant)>,
}

/// The lease was not renewed in time.
#[derive(Debug, thiserror::Error)]
#[error("the lease {name} was not renewed for {DEADLINE:?}: {reason}")]
pub struct Lost {
    name: String,
    reason: String,
}

impl Lease {
    pub fn new(client: Client, config: &Config) -> Self {
        Self {
            api: Api::namespaced(client, &config.own_namespace),
            name: config.lease.clone(),
            holder: config.own_name.clone(),
            seen: None,
        }
    }

    /// Waits until this operator leads.
    pub async fn acquire(&mut self) {
        loop {
            match self.take().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "cannot read the lease"),
            }
            tokio::time::sleep(RENEW).await;
        }
    }

    /// Renews until that fails for too long, which is the answer.
    pub async fn hold(&mut self) -> Lost {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(RENEW).await;
            let reason = match tokio::time::timeout(RENEW, self.take()).await {
                Ok(Ok(true)) => {
                    renewed = Instant::now();
                    continue;
                }
                Ok(Ok(false)) => {
                    return Lost { name: self.name.clone(), reason: "another took it".into() };
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            if renewed.elapsed() >= DEADLINE {
                return Lost { name: self.name.clone(), reason };
            }
        }
    }

    /// Gives the lease back, so that another need not wait for its term.
    pub async fn release(&self) {
        let given_back = async {
            let mut lease = self.api.get(&self.name).await?;
            if let Some(spec) = &mut lease.spec
                && spec.holder_identity.as_deref() == Some(&self.holder)
            {
                spec.holder_identity = None;
                self.api.replace(&self.name, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match tokio::time::timeout(RENEW, given_back).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot give the lease back"),
            Err(_) => tracing::warn!("cannot give the lease back: no answer"),
        }
    }

    /// Takes or renews the lease when it is free or ours. A write between the read and ours makes ours fail: two never lead.
    async fn take(&mut self) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api.get_opt(&self.name).await? else {
            let lease = Object {
                metadata: ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() },
                spec: Some(self.spec(0)),
            };
            return won(self.api.create(&PostParams::default(), &lease).await);
        };
        let version = lease.resource_version();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != version) {
            self.seen = Some((version, Instant::now()));
        }
        let spec = lease.spec.clone().unwrap_or_default();
        let is_ours = spec.holder_identity.as_deref() == Some(&self.holder);
        let is_free = spec.holder_identity.as_deref().is_none_or(str::is_empty)
            || self.seen.as_ref().is_some_and(|(_, since)| since.elapsed() >= TERM);
        if !is_ours && !is_free {
            return Ok(false);
        }
        let transitions = spec.lease_transitions.unwrap_or(0);
        let mut new = self.spec(if is_ours { transitions } else { transitions.saturating_add(1) });
        if is_ours {
            new.acquire_time = spec.acquire_time;
        }
        lease.spec = Some(new);
        won(self.api.replace(&self.name, &PostParams::default(), &lease).await)
    }

    fn spec(&self, transitions: i32) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            holder_identity: Some(self.holder.clone()),
            lease_duration_seconds: i32::try_from(TERM.as_secs()).ok(),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }
}

/// A conflict is no error: another was faster.
fn won(written: Result<Object, kube::Error>) -> Result<bool, kube::Error> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}
