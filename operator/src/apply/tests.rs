use std::convert::Infallible;
use std::sync::Arc;

use http::{Request, Response};
use kube::client::Body;
use serde_json::{Value, json};

use super::*;
use crate::desired::Children;
use crate::desired::tests::{config, model};

/// A request as the API server gets it.
#[derive(Debug, Clone, PartialEq)]
struct Asked {
    verb: String,
    uri: String,
    body: Value,
}

type Log = Arc<Mutex<Vec<Asked>>>;

/// An API server that has one Service, or none, and remembers what it was asked.
fn server(service: Option<Value>) -> (Applier, Log) {
    let log = Log::default();
    let asked = Arc::clone(&log);
    let answer = move |request: Request<Body>| {
        let (asked, service) = (Arc::clone(&asked), service.clone());
        async move {
            let (head, body) = request.into_parts();
            let (verb, uri) = (head.method.to_string(), head.uri.to_string());
            let body = body.collect_bytes().await.unwrap();
            let body = serde_json::from_slice(&body).unwrap_or_default();
            let answer = if verb == "GET" {
                json!({"metadata": {}, "items": service.into_iter().collect::<Vec<_>>()})
            } else {
                json!({"metadata": {"name": "tiny", "resourceVersion": "8"}})
            };
            asked.lock().unwrap().push(Asked { verb, uri, body });
            Ok::<_, Infallible>(Response::new(Body::from(answer.to_string().into_bytes())))
        }
    };
    let client = Client::new(tower::service_fn(answer), "default");
    (Applier::new(client), log)
}

fn service(owner: Option<&str>) -> Value {
    let owner = owner.map(|uid| {
        json!({"apiVersion": "v1", "kind": "K", "name": "tiny", "uid": uid, "controller": true})
    });
    let owners: Vec<_> = owner.into_iter().collect();
    json!({"metadata": {"name": "tiny", "uid": "s1", "ownerReferences": owners}})
}

fn head(service: &Value) -> ObjectMeta {
    serde_json::from_value(service["metadata"].clone()).unwrap()
}

/// What happens to a Service that is there, `seen` by the watch or not.
async fn apply(there: Option<Value>, seen: bool) -> (Result<(), ApplyError>, Vec<Asked>) {
    let model = model(json!({}));
    let desired = Children::of(&model, &config(), "localhost/bindery:1").service;
    let mut observed = Observed::default();
    if let Some(there) = there.as_ref().filter(|_| seen) {
        observed.heads.insert(Child::Service, head(there));
    }
    let (applier, log) = server(there);
    let change = Change::ApplyService(Box::new(desired));
    let result = applier.apply(&model, &observed, &change).await;
    let log = log.lock().unwrap().clone();
    (result, log)
}

fn n_writes(log: &[Asked]) -> usize {
    log.iter().filter(|asked| asked.verb != "GET").count()
}

#[tokio::test]
async fn an_object_of_somebody_else_is_left_alone_and_named() {
    for (owner, seen) in [(None, false), (None, true), (Some("of-another"), true)] {
        let (result, log) = apply(Some(service(owner)), seen).await;
        let error = result.unwrap_err();
        assert!(error.is_refusal() && error.to_string().contains("Service tiny"), "{error}");
        assert_eq!(n_writes(&log), 0, "{log:?}");
    }
}

#[tokio::test]
async fn a_child_that_is_not_there_is_made_without_force() {
    let (result, log) = apply(None, false).await;
    result.unwrap();
    let write = log.last().unwrap();
    assert!(write.verb == "PATCH" && !write.uri.contains("force=true"), "{write:?}");
    assert!(write.body["metadata"]["uid"].is_null(), "{write:?}");
}

#[tokio::test]
async fn a_child_is_changed_by_force_and_no_other_in_its_place() {
    for seen in [false, true] {
        let (result, log) = apply(Some(service(Some("1234"))), seen).await;
        result.unwrap();
        let write = log.last().unwrap();
        assert!(write.verb == "PATCH" && write.uri.contains("force=true"), "{write:?}");
        assert_eq!(write.body["metadata"]["uid"], "s1");
    }
}

#[tokio::test]
async fn what_was_sent_is_not_sent_again_and_forgotten_with_its_model() {
    let model = model(json!({}));
    let desired = Children::of(&model, &config(), "localhost/bindery:1").service;
    let there = service(Some("1234"));
    let (applier, log) = server(Some(there.clone()));
    let change = Change::ApplyService(Box::new(desired));
    let mut seen = head(&there);
    seen.resource_version = Some("8".into());
    let observed = Observed { heads: [(Child::Service, seen)].into(), ..Observed::default() };
    for _ in 0..3 {
        applier.apply(&model, &observed, &change).await.unwrap();
    }
    assert_eq!(n_writes(&log.lock().unwrap()), 1);
    assert!(applier.may_tell("default", "tiny"));
    applier.forget(&("default".into(), "other".into()));
    assert_eq!(applier.sent().len(), 1);
    applier.forget(&("default".into(), "tiny".into()));
    assert!(applier.sent().is_empty() && applier.told.lock().unwrap().is_empty());
}
