//! What `kubectl get -o json` gives, asked of the API server itself: what is looked at ten times a second should not start a
//! program each time.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use reqwest::{Certificate, Client, Identity};
use serde_json::Value;

use crate::cluster::PATIENCE;

const SERVER: &str = "https://10.99.0.1:6443";

/// A kind that the tests look at: its names, and where it is.
struct Kind {
    names: [&'static str; 2],
    group: &'static str,
    plural: &'static str,
}

const KINDS: &[Kind] = &[
    Kind { names: ["pod", "pods"], group: "api/v1", plural: "pods" },
    Kind { names: ["node", "nodes"], group: "api/v1", plural: "nodes" },
    Kind { names: ["service", "services"], group: "api/v1", plural: "services" },
    Kind { names: ["event", "events"], group: "api/v1", plural: "events" },
    Kind { names: ["deployment", "deployments"], group: "apis/apps/v1", plural: "deployments" },
    Kind { names: ["lease", "leases"], group: "apis/coordination.k8s.io/v1", plural: "leases" },
    Kind {
        names: ["endpointslice", "endpointslices"],
        group: "apis/discovery.k8s.io/v1",
        plural: "endpointslices",
    },
    Kind {
        names: ["imodel", "inferencemodel"],
        group: "apis/bindery.dev/v1alpha1",
        plural: "inferencemodels",
    },
    Kind {
        names: ["pdb", "poddisruptionbudget"],
        group: "apis/policy/v1",
        plural: "poddisruptionbudgets",
    },
];

/// A client of the API server with the rights of its administrator.
#[derive(Debug, Clone)]
pub(crate) struct Api(Client);

impl Api {
    pub(crate) fn new(pki: &Path) -> Result<Self> {
        let read = |name: &str| std::fs::read(pki.join(name)).with_context(|| name.to_owned());
        let authority = Certificate::from_pem(&read("ca.crt")?)?;
        let identity = [read("admin.crt")?, read("admin.key")?].concat();
        let client = Client::builder()
            .no_proxy()
            .timeout(PATIENCE)
            .tls_certs_only([authority])
            .identity(Identity::from_pem(&identity)?);
        Ok(Self(client.build()?))
    }

    /// Takes the words of `kubectl get` for one kind; `None` for words that it does not know.
    pub(crate) async fn get(&self, words: &[&str]) -> Option<Result<Value>> {
        let url = url(words)?;
        let ask = async {
            let answer = self.0.get(url).send().await?;
            let status = answer.status();
            let value: Value = answer.json().await?;
            ensure!(status.is_success(), "{}", value["message"]);
            Ok(value)
        };
        Some(ask.await)
    }

    /// Gives every state of what `kubectl get --watch` would give with these words, until the server ends it.
    pub(crate) async fn watch(&self, words: &[&str], mut each: impl FnMut(&Value)) -> Result<()> {
        let url = url(words).context("the words of a watch")? + "&watch=1";
        let mut pieces = self.0.get(url).send().await?.error_for_status()?.bytes_stream();
        let mut rest = Vec::new();
        while let Some(piece) = pieces.next().await {
            rest.extend_from_slice(&piece?);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                each(&serde_json::from_slice::<Value>(&line)?["object"]);
            }
        }
        Ok(())
    }
}

/// The address of what `kubectl get` with these words gives.
fn url(words: &[&str]) -> Option<String> {
    let (mut place, mut query, mut rest) = (String::new(), Vec::new(), Vec::new());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match *word {
            "-n" => place = format!("/namespaces/{}", words.next()?),
            "-A" => {}
            "-l" => query.push(format!("labelSelector={}", escaped(words.next()?))),
            word => match word.strip_prefix("--field-selector=") {
                Some(selector) => query.push(format!("fieldSelector={}", escaped(selector))),
                None => rest.push(word),
            },
        }
    }
    let kind = KINDS.iter().find(|kind| rest.first().is_some_and(|it| kind.names.contains(it)))?;
    let name = match rest[1..] {
        [] => String::new(),
        [name] => format!("/{name}"),
        _ => return None,
    };
    Some(format!("{SERVER}/{}{place}/{}{name}?{}", kind.group, kind.plural, query.join("&")))
}

/// Safe within a query.
pub(crate) fn escaped(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02x}")).collect()
}
