//! The hub's client against a local hub that behaves badly.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_RANGE, LOCATION, RANGE};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use sha2::{Digest, Sha256};

use super::*;
use crate::source::Room;
use crate::source::reach::Reach;

fn hub_config() -> HubConfig {
    HubConfig {
        endpoint: String::new(),
        token: None,
        cache: PathBuf::new(),
        offline: false,
        trusts_cache: true,
        reach: Reach::Everywhere,
        room: Room::default(),
    }
}

/// What goes wrong at the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Honest,
    /// The first answers with content end after half of what is left.
    BreaksOff {
        times: usize,
    },
    IgnoresRanges,
    LongerThanSaid,
    LengthHeaderLies,
    OtherContent,
    Unauthorized,
    Forbidden,
    NoSuchModel,
    /// Everybody sees the list of files.
    Gated,
    /// Content lies on another server.
    Redirects,
    Overloaded {
        times: usize,
    },
}

#[derive(Debug)]
struct Hub {
    mood: Mood,
    weights: Vec<u8>,
    seen: Mutex<Vec<Seen>>,
    failed: Mutex<usize>,
    other: Option<String>,
}

/// Path, range and authorization of a request.
type Seen = (String, Option<String>, Option<String>);

const CONFIG: &[u8] = b"{}\n";
/// Of `CONFIG`, by `git hash-object`.
const CONFIG_BLOB: &str = "0967ef424bce6791893e9a57bb952f80fd536e93";

fn sha(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn listing(hub: &Hub) -> Response {
    let lfs = serde_json::json!({"sha256": sha(&hub.weights), "size": hub.weights.len()});
    axum::Json(serde_json::json!({
        "sha": "c0ffee", "unknown": 1, "gated": if hub.mood == Mood::Gated { "manual".into() } else { serde_json::Value::from(false) },
        "siblings": [
            {"rfilename": "config.json", "size": CONFIG.len(), "blobId": CONFIG_BLOB},
            {"rfilename": "model.safetensors", "size": hub.weights.len(), "blobId": "0", "lfs": lfs},
            {"rfilename": "../../escape", "size": 1, "blobId": CONFIG_BLOB},
        ]
    }))
    .into_response()
}

/// Lets what was sent before leave the server.
async fn sent_alone<T>(piece: T) -> T {
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    piece
}

fn content(hub: &Hub, request: &Request) -> Response {
    let all: &[u8] =
        if request.uri().path().ends_with("config.json") { CONFIG } else { &hub.weights };
    let range = request.headers().get(RANGE).and_then(|range| range.to_str().ok());
    let start = range
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let start = start.filter(|_| hub.mood != Mood::IgnoresRanges).unwrap_or(0);
    let status = if start > 0 { 206 } else { 200 };
    let part = &all[start..];
    let fail = |times: usize| {
        let mut failed = hub.failed.lock().unwrap();
        *failed += 1;
        *failed <= times
    };
    let headers = |builder: axum::http::response::Builder| {
        builder.header(CONTENT_RANGE, format!("bytes {start}-{}/{}", all.len() - 1, all.len()))
    };
    let small = all.len() == CONFIG.len();
    match hub.mood {
        Mood::Overloaded { times } if fail(times) => {
            Response::builder().status(503).body(Body::empty()).unwrap()
        }
        Mood::BreaksOff { times } if !small && fail(times) => {
            let sent = Bytes::copy_from_slice(&part[..part.len() / 2]);
            let pieces = [Ok(sent), Err(std::io::Error::other("broken"))];
            let builder =
                headers(Response::builder().status(status).header("content-length", part.len()));
            builder
                .body(Body::from_stream(futures_util::stream::iter(pieces).then(sent_alone)))
                .unwrap()
        }
        // Without a declared length nothing but the count can notice.
        Mood::LongerThanSaid if !small => {
            let pieces = [
                Ok::<_, std::io::Error>(Bytes::copy_from_slice(part)),
                Ok(Bytes::from_static(b"more")),
            ];
            Response::new(Body::from_stream(futures_util::stream::iter(pieces)))
        }
        Mood::LengthHeaderLies if !small => {
            Response::new(Body::from(part[..part.len() / 2].to_vec()))
        }
        Mood::OtherContent if !small => Response::new(Body::from(vec![0; part.len()])),
        _ => headers(Response::builder().status(status)).body(Body::from(part.to_vec())).unwrap(),
    }
}

async fn answer(State(hub): State<Arc<Hub>>, request: Request) -> Response {
    let header = |name| {
        request.headers().get(name).and_then(|value: &axum::http::HeaderValue| value.to_str().ok())
    };
    let path = request.uri().path().to_owned();
    hub.seen.lock().unwrap().push((
        path.clone(),
        header(RANGE).map(str::to_owned),
        header(AUTHORIZATION).map(str::to_owned),
    ));
    let status = |code| Response::builder().status(code).body(Body::empty()).unwrap();
    match (hub.mood, &hub.other) {
        (Mood::Unauthorized, _) => status(401),
        (Mood::Forbidden, _) => status(403),
        (Mood::NoSuchModel, _) => status(404),
        _ if path.starts_with("/api/models/org/name/revision/") => listing(&hub),
        (Mood::Redirects, Some(other)) => Response::builder()
            .status(302)
            .header(LOCATION, format!("{other}{path}"))
            .body(Body::empty())
            .unwrap(),
        (Mood::Gated, _) if header(AUTHORIZATION) != Some("Bearer hf_x") => status(403),
        _ => content(&hub, &request),
    }
}

async fn start(mood: Mood, other: Option<String>) -> (Arc<Hub>, String) {
    let weights = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    let hub =
        Arc::new(Hub { mood, weights, seen: Mutex::default(), failed: Mutex::default(), other });
    let app = Router::new().fallback(answer).with_state(Arc::clone(&hub));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    (hub, url)
}

struct Setup {
    hub: Arc<Hub>,
    config: HubConfig,
    _cache: tempfile::TempDir,
}

async fn setup(mood: Mood) -> Setup {
    let (hub, endpoint) = start(mood, None).await;
    let cache = tempfile::tempdir().unwrap();
    let config =
        HubConfig { endpoint, token: None, cache: cache.path().to_owned(), ..hub_config() };
    Setup { hub, config, _cache: cache }
}

impl Setup {
    async fn fetch(&self) -> Result<PathBuf, HubError> {
        let model = HubModel { org: "org".into(), name: "name".into(), revision: None, file: None };
        fetch(&model, &self.config, Retry { attempts: 3, first_pause: Duration::ZERO }, &|_| {})
            .await
    }

    fn ranges(&self) -> Vec<String> {
        self.hub.seen.lock().unwrap().iter().filter_map(|(_, range, _)| range.clone()).collect()
    }

    async fn assert_whole(&self) {
        let folder = self.fetch().await.unwrap();
        assert_eq!(std::fs::read(folder.join("config.json")).unwrap(), CONFIG);
        assert!(std::fs::read(folder.join("model.safetensors")).unwrap() == self.hub.weights);
    }
}

#[tokio::test]
async fn a_model_comes_once_and_then_from_the_cache() {
    let setup = setup(Mood::Honest).await;
    setup.assert_whole().await;
    let requests = setup.hub.seen.lock().unwrap().len();
    setup.assert_whole().await;
    assert_eq!(setup.hub.seen.lock().unwrap().len(), requests + 1, "only the list is asked again");
}

#[tokio::test]
async fn a_broken_download_is_resumed_where_it_broke() {
    let setup = setup(Mood::BreaksOff { times: 4 }).await;
    setup.assert_whole().await;
    let ranges = setup.ranges();
    assert_eq!(ranges.len(), 4, "{ranges:?}");
    assert!(ranges.iter().all(|range| range != "bytes=0-"));
}

#[tokio::test]
async fn a_part_of_an_earlier_run_is_used_and_a_wrong_one_is_not_believed() {
    for (part, kept) in
        [(vec![0u8, 0, 0, 0, 1, 0], true), (vec![9u8; 6], false), (vec![9u8; 1_000_000], false)]
    {
        let setup = setup(Mood::Honest).await;
        let blobs = setup.config.cache.join("models--org--name/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(sha(&setup.hub.weights)).with_extension("incomplete"), &part)
            .unwrap();
        setup.assert_whole().await;
        let whole = |path: &str| path.ends_with("model.safetensors");
        let fetched =
            setup.hub.seen.lock().unwrap().iter().filter(|(path, ..)| whole(path)).count();
        assert!(kept == (setup.ranges() == ["bytes=6-"] && fetched == 1), "{} bytes", part.len());
    }
}

#[tokio::test]
async fn a_server_without_ranges_sends_all_again() {
    let setup = setup(Mood::IgnoresRanges).await;
    let blobs = setup.config.cache.join("models--org--name/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join(sha(&setup.hub.weights)).with_extension("incomplete"), [0, 0])
        .unwrap();
    setup.assert_whole().await;
}

#[tokio::test]
async fn lengths_and_contents_that_differ_are_refused_and_leave_no_file() {
    for mood in [Mood::LongerThanSaid, Mood::LengthHeaderLies, Mood::OtherContent] {
        let setup = setup(mood).await;
        let error = setup.fetch().await.unwrap_err();
        let expected = match mood {
            Mood::OtherContent => matches!(error, HubError::WrongChecksum { .. }),
            _ => matches!(error, HubError::WrongLength { .. }),
        };
        assert!(expected, "{mood:?}: {error}");
        assert!(
            !setup
                .config
                .cache
                .join("models--org--name/blobs")
                .join(sha(&setup.hub.weights))
                .exists()
        );
    }
}

#[tokio::test]
async fn refusals_name_the_token_or_the_model() {
    for (mood, word) in [
        (Mood::Unauthorized, "HF_TOKEN"),
        (Mood::Forbidden, "secretRef"),
        (Mood::NoSuchModel, "no such"),
    ] {
        let mut setup = setup(mood).await;
        let error = setup.fetch().await.unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("org/name"), "{error}");
        setup.config.token = crate::source::Token::new("hf_x".into());
        let error = setup.fetch().await.unwrap_err().to_string();
        // Where the token came from is not known here.
        assert!(!error.contains("HF_TOKEN") && error.contains("org/name"), "{error}");
    }
}

#[tokio::test]
async fn a_token_is_shown_to_the_hub_and_not_to_whom_it_redirects_to() {
    let (other, other_url) = start(Mood::Honest, None).await;
    let (hub, endpoint) = start(Mood::Redirects, Some(other_url)).await;
    let cache = tempfile::tempdir().unwrap();
    let token = crate::source::Token::new("hf_x".into());
    let config = HubConfig { endpoint, token, cache: cache.path().to_owned(), ..hub_config() };
    Setup { hub: Arc::clone(&hub), config, _cache: cache }.assert_whole().await;
    let shown =
        |hub: &Hub| hub.seen.lock().unwrap().iter().filter(|(.., token)| token.is_some()).count();
    assert_eq!(shown(&hub), hub.seen.lock().unwrap().len());
    assert_eq!(shown(&other), 0);
    assert!(!other.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_gated_model_is_not_served_from_the_cache_to_who_may_not_read_it() {
    let mut setup = setup(Mood::Gated).await;
    setup.config.token = crate::source::Token::new("hf_x".into());
    setup.assert_whole().await;
    setup.assert_whole().await;
    for other in [crate::source::Token::new("hf_y".into()), None] {
        setup.config.token = other;
        let error = setup.fetch().await.unwrap_err().to_string();
        assert!(error.contains("403") && error.contains("org/name"), "{error}");
    }
}

#[tokio::test]
async fn redirects_come_to_an_end() {
    let (hub, endpoint) = start(Mood::Redirects, Some(String::new())).await;
    let cache = tempfile::tempdir().unwrap();
    let config = HubConfig { endpoint, cache: cache.path().to_owned(), ..hub_config() };
    let setup = Setup { hub, config, _cache: cache };
    let error = setup.fetch().await.unwrap_err().to_string();
    assert!(error.contains("more than 5 redirects"), "{error}");
    assert_eq!(setup.hub.seen.lock().unwrap().len(), 1 + 6, "the list, and the file six times");
}

#[tokio::test]
async fn an_overloaded_hub_is_asked_again_but_not_for_ever() {
    setup(Mood::Overloaded { times: 2 }).await.assert_whole().await;
    let error = setup(Mood::Overloaded { times: 1000 }).await.fetch().await.unwrap_err();
    assert!(matches!(error, HubError::Status { .. }), "{error}");
}

#[tokio::test]
async fn without_the_hub_a_whole_model_is_used_and_an_absent_one_is_an_error() {
    let mut setup = setup(Mood::Honest).await;
    let first = setup.fetch().await.unwrap();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    setup.config.endpoint = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    assert_eq!(setup.fetch().await.unwrap(), first);
    let empty = tempfile::tempdir().unwrap();
    setup.config.cache = empty.path().to_owned();
    assert!(matches!(setup.fetch().await.unwrap_err(), HubError::Unreachable { .. }));
    setup.config.offline = true;
    assert!(matches!(setup.fetch().await.unwrap_err(), HubError::Offline { .. }));
}
