//! Downloads, from a hub of the test's own that behaves as each repository's name says.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::Test;
use crate::cluster::{Cluster, Namespace, SYSTEM};

pub(crate) const TESTS: &[Test] =
    &[("weights_come_from_a_hub_that_misbehaves", weights_come_from_a_hub)];

const ADDRESS: &str = "10.99.0.1:18400";

#[derive(Default)]
struct Hub {
    content: Bytes,
    sha256: String,
    /// Whether it answers 503 alone.
    away: AtomicBool,
    /// Answers with content of the repositories `breaks` and `shared`.
    broken: AtomicUsize,
    shared: AtomicUsize,
}

fn weights_come_from_a_hub(cluster: &Cluster) -> Result<()> {
    cluster.wait_until_empty()?;
    let content = Bytes::from(std::fs::read(cluster.state.join("models/small.gguf"))?);
    let sha256 = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    let hub = Arc::new(Hub { content, sha256, ..Hub::default() });
    let router = Router::new()
        .route("/api/models/org/{name}/revision/{revision}", get(listing))
        .route("/org/{name}/resolve/{commit}/{file}", get(file))
        .with_state(Arc::clone(&hub));
    let listener = cluster.block_on(tokio::net::TcpListener::bind(ADDRESS))?;
    let server = cluster.spawn(async move { axum::serve(listener, router).await });
    let endpoint = format!("node.hubEndpoint=http://{ADDRESS}");
    // Two models of 36 MB fit.
    upgrade(cluster, &[&endpoint, "node.allowPrivateSources=true", "node.cacheSize=80Mi"])?;
    let done = downloads(cluster, &hub);
    server.abort();
    upgrade(
        cluster,
        &[
            "node.hubEndpoint=https://huggingface.co",
            "node.allowPrivateSources=false",
            "node.cacheSize=",
        ],
    )?;
    done
}

fn upgrade(cluster: &Cluster, values: &[&str]) -> Result<()> {
    cluster.upgrade(values)?;
    let set = "daemonset/bindery-node-cpu";
    cluster.kubectl(&["-n", SYSTEM, "rollout", "status", set, "--timeout=120s"]).map(drop)
}

/// A model of a repository, on one node so that the cache is one.
fn ask(space: &Namespace, name: &str, more: &Value) -> Result<()> {
    let mut spec = json!({
        "source": {"uri": format!("hf://org/{name}")},
        "scheduling": {"nodeSelector": {"kubernetes.io/hostname": "node1"}},
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    space.model(name, &spec).map(drop)
}

fn told(space: &Namespace, name: &str, reason: &str, word: &str) -> Result<()> {
    let message = space.wait_for_reason(name, reason)?;
    ensure!(message.contains(word), "{name}: wanted {word:?} in {message:?}");
    Ok(())
}

fn downloads(cluster: &Cluster, hub: &Hub) -> Result<()> {
    let space = cluster.namespace("hub")?;
    // Bytes of total flow into the condition.
    ask(&space, "slow", &json!({}))?;
    told(&space, "slow", "Downloading", "of 34 MiB")?;
    space.wait_until_ready("slow")?;
    space.chat("slow", "Hello")?;
    ask(&space, "breaks", &json!({}))?;
    space.wait_until_ready("breaks")?;
    ensure!(hub.broken.load(Ordering::SeqCst) > 1, "it did not break off");
    // Both are in use: a third has no room, and gets it when one goes.
    ask(&space, "shared", &json!({"replicas": 2, "memory": "1Gi"}))?;
    told(&space, "shared", "DiskFull", "free bytes")?;
    space.kubectl(&["delete", "imodel", "slow"])?;
    space.wait_until_ready("shared")?;
    ensure!(
        hub.shared.load(Ordering::SeqCst) == 1,
        "two replicas, {} downloads",
        hub.shared.load(Ordering::SeqCst)
    );
    space.kubectl(&["delete", "imodel", "shared", "breaks"])?;

    ask(&space, "absent", &json!({}))?;
    told(&space, "absent", "SourceUnreachable", "no such model")?;
    ask(&space, "corrupt", &json!({}))?;
    told(&space, "corrupt", "ChecksumMismatch", "wrong checksum")?;
    space.kubectl(&["delete", "imodel", "absent", "corrupt"])?;
    ask(&space, "private", &json!({}))?;
    told(&space, "private", "Unauthorized", "401")?;
    let with_token = |space: &Namespace| {
        ask(
            space,
            "private",
            &json!({"source": {"uri": "hf://org/private", "secretRef": {"name": "token"}}}),
        )
    };
    let secret = ["create", "secret", "generic", "token", "--from-literal=token=hf_good"];
    space.kubectl(&secret)?;
    with_token(&space)?;
    space.wait_until_ready("private")?;
    // While the hub is away, what a credential brought is its namespace's alone.
    hub.away.store(true, Ordering::SeqCst);
    delete_private(&space)?;
    with_token(&space)?;
    space.wait_until_ready("private")?;
    let other = cluster.namespace("hub-other")?;
    other.kubectl(&secret)?;
    with_token(&other)?;
    told(&other, "private", "SourceUnreachable", "503")?;
    hub.away.store(false, Ordering::SeqCst);
    other.wait_until_ready("private")?;
    // What one credential brought is not another's.
    delete_private(&space)?;
    ask(&space, "private", &json!({}))?;
    told(&space, "private", "Unauthorized", "401")?;
    let logs = cluster.kubectl(&[
        "-n",
        SYSTEM,
        "logs",
        "-l",
        "app.kubernetes.io/component=node-cpu",
        "--tail=-1",
    ])?;
    ensure!(!logs.contains("hf_good"), "a token is in the log");
    Ok(())
}

fn delete_private(space: &Namespace) -> Result<()> {
    space.kubectl(&["delete", "imodel", "private"])?;
    space.cluster.wait_until("it is gone", || Ok(space.pods("private")?.is_empty()))
}

fn may_read(name: &str, headers: &HeaderMap) -> bool {
    let shown = headers.get("authorization").and_then(|value| value.to_str().ok());
    name != "private" || shown == Some("Bearer hf_good")
}

async fn listing(
    State(hub): State<Arc<Hub>>,
    Path((name, _revision)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if hub.away.load(Ordering::SeqCst) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if name == "absent" {
        return StatusCode::NOT_FOUND.into_response();
    }
    if !may_read(&name, &headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    // Blobs are kept by repository, so that each counts for itself.
    let lfs = json!({"sha256": hub.sha256, "size": hub.content.len()});
    let file = json!({"rfilename": "m.gguf", "size": hub.content.len(), "blobId": "0", "lfs": lfs});
    axum::Json(json!({"sha": "c0ffee", "siblings": [file]})).into_response()
}

async fn file(
    State(hub): State<Arc<Hub>>,
    Path((name, _commit, _file)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    if !may_read(&name, &headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let range = headers.get("range").and_then(|value| value.to_str().ok());
    let from =
        range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let from: usize = from.unwrap_or(0).min(hub.content.len());
    let mut rest = hub.content.slice(from..);
    if name == "corrupt" {
        rest = Bytes::from(vec![0; rest.len()]);
    }
    if name == "shared" {
        hub.shared.fetch_add(1, Ordering::SeqCst);
    }
    let total = hub.content.len();
    let answer = Response::builder().header("content-length", rest.len());
    let answer = if from > 0 {
        answer.status(206).header("content-range", format!("bytes {from}-{}/{total}", total - 1))
    } else {
        answer
    };
    let breaks = name == "breaks" && hub.broken.fetch_add(1, Ordering::SeqCst) < 3;
    let pause = if name == "slow" { Duration::from_millis(400) } else { Duration::ZERO };
    answer
        .body(pieces(rest, pause, breaks))
        .unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

/// In pieces of 2 MB; a line that breaks does so after three.
fn pieces(rest: Bytes, pause: Duration, breaks: bool) -> Body {
    let pieces = futures_util::stream::unfold((rest, 0), move |(mut rest, count)| async move {
        if rest.is_empty() {
            return None;
        }
        tokio::time::sleep(pause).await;
        if breaks && count == 3 {
            return Some((Err(std::io::Error::other("the line broke")), (Bytes::new(), count)));
        }
        let piece = rest.split_to(rest.len().min(2 << 20));
        Some((Ok(piece), (rest, count + 1)))
    });
    Body::from_stream(pieces)
}
