//! Against local servers: one of plain files and one that checks what S3 checks.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, LAST_MODIFIED, LOCATION, RANGE};
use axum::response::{IntoResponse, Response};

use super::*;
use crate::source::Token;

/// Of the content below, by sha256sum.
const SHA: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
const CONTENT: &[u8] = b"abc";

#[derive(Debug, Default)]
struct Server {
    status: Option<StatusCode>,
    /// So many answers with content end after one byte.
    breaks: Mutex<usize>,
    /// What the Authorization header must begin with.
    authorization: Option<&'static str>,
    redirect: Option<String>,
    /// Content waits for a permit.
    gate: Option<tokio::sync::Semaphore>,
    /// Method, path and range of each request.
    seen: Mutex<Vec<String>>,
    /// The Authorization headers.
    shown: Mutex<Vec<String>>,
}

async fn serve(State(server): State<std::sync::Arc<Server>>, request: HttpRequest) -> Response {
    let range = request.headers().get(RANGE).map(|range| range.to_str().unwrap().to_owned());
    let line =
        format!("{} {} {}", request.method(), request.uri().path(), range.as_deref().unwrap_or(""));
    server.seen.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    let shown =
        request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
    server.shown.lock().unwrap().extend(shown.clone());
    if let Some(wanted) = server.authorization
        && !shown.unwrap_or_default().starts_with(wanted)
    {
        return StatusCode::FORBIDDEN.into_response();
    }
    if let Some(to) = &server.redirect {
        return (StatusCode::FOUND, [(LOCATION, to.clone())]).into_response();
    }
    if let Some(status) = server.status {
        return status.into_response();
    }
    let from = range
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
        .unwrap_or(0);
    let is_head = request.method() == "HEAD";
    if let Some(gate) = server.gate.as_ref().filter(|_| !is_head) {
        gate.acquire().await.unwrap().forget();
    }
    content(&server, from, is_head)
}

fn content(server: &Server, from: usize, is_head: bool) -> Response {
    let rest = &CONTENT[from..];
    let answer = Response::builder()
        .status(if from > 0 { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK })
        .header(ETAG, "\"one\"")
        .header(LAST_MODIFIED, "Mon, 01 Jan 2024 00:00:00 GMT")
        .header(CONTENT_LENGTH, rest.len());
    let answer = match from {
        0 => answer,
        _ => answer
            .header(CONTENT_RANGE, format!("bytes {from}-{}/{}", CONTENT.len() - 1, CONTENT.len())),
    };
    let mut breaks = server.breaks.lock().unwrap_or_else(PoisonError::into_inner);
    let body = if is_head {
        Body::empty()
    } else if *breaks > 0 && rest.len() > 1 {
        *breaks -= 1;
        let broken = std::io::Error::other("the line broke");
        Body::from_stream(
            futures_util::stream::iter([Ok(rest[..1].to_vec()), Err(broken)]).then(later),
        )
    } else {
        Body::from(rest.to_vec())
    };
    answer.body(body).unwrap()
}

/// Lets what was sent before leave the server.
async fn later<T>(piece: T) -> T {
    tokio::time::sleep(Duration::from_millis(20)).await;
    piece
}

struct Bench {
    server: std::sync::Arc<Server>,
    url: String,
    folder: tempfile::TempDir,
    objects: Objects,
}

impl Bench {
    async fn new(server: Server) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = std::sync::Arc::new(server);
        let router = Router::new().fallback(serve).with_state(std::sync::Arc::clone(&server));
        tokio::spawn(async move { axum::serve(listener, router).await });
        let folder = tempfile::tempdir().unwrap();
        let objects = Objects {
            folder: folder.path().to_owned(),
            reach: Reach::Everywhere,
            retry: Retry { attempts: 2, first_pause: Duration::from_millis(1) },
            room: Room::default(),
        };
        Self { server, url, folder, objects }
    }

    async fn fetch(
        &self,
        credential: &Credential,
        sha256: Option<&str>,
    ) -> Result<PathBuf, ObjectError> {
        let uri = format!("{}/a/m.gguf", self.url);
        let held = self.objects.fetch(&Request { uri: &uri, credential, sha256 }, &|_| {}).await?;
        Ok(held.entry().to_owned())
    }

    async fn fetch_s3(&self, credential: &Credential) -> Result<PathBuf, ObjectError> {
        let credential =
            Credential { aws_endpoint_url: Some(self.url.clone()), ..credential.clone() };
        let request =
            Request { uri: "s3://bucket/a/m.gguf", credential: &credential, sha256: None };
        Ok(self.objects.fetch(&request, &|_| {}).await?.entry().to_owned())
    }

    /// Fetches `/{name}.gguf`.
    async fn fetch_named(&self, name: &str) -> Result<Held, ObjectError> {
        let (uri, credential) = (format!("{}/{name}.gguf", self.url), Credential::default());
        let request = Request { uri: &uri, credential: &credential, sha256: None };
        let fetched = self.objects.fetch(&request, &|_| {});
        tokio::time::timeout(Duration::from_secs(10), fetched).await.expect("an answer in time")
    }

    /// Gives all files together so many bytes.
    fn limit(&mut self, bytes: u64) {
        let folders = ["partial", "sha256"].map(|name| self.objects.folder.join(name)).to_vec();
        let links = vec![self.objects.folder.join("versions")];
        self.objects.room = Room::new(folders, links, Some(bytes));
    }

    fn seen(&self) -> Vec<String> {
        self.server.seen.lock().unwrap().clone()
    }
}

fn token(text: &str) -> Option<Token> {
    Token::new(text.into())
}

#[tokio::test]
async fn a_file_comes_once_and_the_source_is_asked_again() {
    let bench = Bench::new(Server::default()).await;
    let none = Credential::default();
    let path = bench.fetch(&none, None).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), CONTENT);
    assert!(path.ends_with(format!("sha256/{SHA}.gguf")), "{}", path.display());
    assert_eq!(bench.fetch(&none, Some(SHA)).await.unwrap(), path);
    assert_eq!(bench.seen(), ["HEAD /a/m.gguf ", "GET /a/m.gguf ", "HEAD /a/m.gguf "]);
}

#[tokio::test]
async fn what_broke_off_is_taken_up_where_it_ended() {
    let bench = Bench::new(Server { breaks: Mutex::new(2), ..Server::default() }).await;
    let path = bench.fetch(&Credential::default(), None).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), CONTENT);
    let seen = bench.seen();
    assert_eq!(seen.last().unwrap(), "GET /a/m.gguf bytes=2-", "{seen:?}");
}

#[tokio::test]
async fn a_wrong_checksum_leaves_nothing() {
    let bench = Bench::new(Server::default()).await;
    let error = bench.fetch(&Credential::default(), Some(&"0".repeat(64))).await.unwrap_err();
    assert!(matches!(&error, ObjectError::WrongChecksum { got, .. } if got == SHA), "{error}");
    for folder in ["partial", "sha256"] {
        assert_eq!(std::fs::read_dir(bench.folder.path().join(folder)).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn refusals_are_told_apart() {
    for (status, is_expected) in [
        (
            StatusCode::UNAUTHORIZED,
            (|error| matches!(error, ObjectError::Refused { .. })) as fn(&ObjectError) -> bool,
        ),
        (StatusCode::FORBIDDEN, |error| matches!(error, ObjectError::Refused { .. })),
        (StatusCode::NOT_FOUND, |error| matches!(error, ObjectError::NotFound { .. })),
        (StatusCode::INTERNAL_SERVER_ERROR, ObjectError::is_away),
        (StatusCode::SERVICE_UNAVAILABLE, ObjectError::is_away),
        (StatusCode::TOO_MANY_REQUESTS, ObjectError::is_away),
        (StatusCode::BAD_REQUEST, |error| matches!(error, ObjectError::BadAnswer { .. })),
        (StatusCode::GONE, |error| matches!(error, ObjectError::BadAnswer { .. })),
    ] {
        let bench = Bench::new(Server { status: Some(status), ..Server::default() }).await;
        let error = bench.fetch(&Credential::default(), None).await.unwrap_err();
        assert!(is_expected(&error), "{status}: {error:?}");
    }
}

#[tokio::test]
async fn what_one_credential_brought_is_not_served_to_another() {
    let server = Server { authorization: Some("Bearer good"), ..Server::default() };
    let bench = Bench::new(server).await;
    let good = Credential { token: token("good"), ..Credential::default() };
    bench.fetch(&good, None).await.unwrap();
    for other in
        [Credential::default(), Credential { token: token("bad"), ..Credential::default() }]
    {
        let error = bench.fetch(&other, Some(SHA)).await.unwrap_err();
        assert!(matches!(error, ObjectError::Refused { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn s3_requests_are_signed_where_there_are_keys() {
    let server =
        Server { authorization: Some("AWS4-HMAC-SHA256 Credential=id/"), ..Server::default() };
    let bench = Bench::new(server).await;
    let keys = Credential {
        aws_access_key_id: token("id"),
        aws_secret_access_key: token("key"),
        aws_region: Some("eu-central-1".into()),
        ..Credential::default()
    };
    let path = bench.fetch_s3(&keys).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), CONTENT);
    assert_eq!(bench.seen()[0], "HEAD /bucket/a/m.gguf ");
    let error = bench.fetch_s3(&Credential::default()).await.unwrap_err();
    assert!(matches!(error, ObjectError::Refused { .. }), "{error:?}");
    let half = Credential { aws_access_key_id: token("id"), ..Credential::default() };
    let error = bench.fetch_s3(&half).await.unwrap_err();
    assert!(error.to_string().contains("wanted both"), "{error}");
}

#[tokio::test]
async fn private_addresses_are_refused_before_anything_is_sent() {
    let mut bench = Bench::new(Server::default()).await;
    bench.objects.reach = Reach::Public;
    let request = Request {
        uri: "https://127.0.0.1/m.gguf",
        credential: &Credential::default(),
        sha256: None,
    };
    let error = bench.objects.fetch(&request, &|_| {}).await.unwrap_err();
    assert!(error.to_string().contains("not a public address"), "{error}");
    let error = bench.fetch_s3(&Credential::default()).await.unwrap_err();
    assert!(error.to_string().contains("not a public address"), "{error}");
    assert!(bench.seen().is_empty());
}

#[tokio::test]
async fn a_redirect_takes_no_token_and_no_signature_to_another_host() {
    let other = Bench::new(Server::default()).await;
    // Another port is another host to HTTP clients.
    let redirect = Some(format!("{}/elsewhere.gguf", other.url));
    let bench = Bench::new(Server { redirect, ..Server::default() }).await;
    let token = Credential { token: token("good"), ..Credential::default() };
    let keys = Credential {
        aws_access_key_id: self::token("id"),
        aws_secret_access_key: self::token("key"),
        ..Credential::default()
    };
    let brought = [bench.fetch(&token, None).await, bench.fetch_s3(&keys).await];
    assert!(brought.iter().all(|path| std::fs::read(path.as_ref().unwrap()).unwrap() == CONTENT));
    let shown = bench.server.shown.lock().unwrap().join(" ");
    assert!(shown.contains("Bearer good") && shown.contains("Credential=id/"), "{shown}");
    let asked = ["HEAD /elsewhere.gguf ", "GET /elsewhere.gguf "];
    assert_eq!(other.seen(), [asked, asked].concat());
    assert!(other.server.shown.lock().unwrap().is_empty());
}

#[tokio::test]
async fn redirects_come_to_an_end() {
    let redirect = Some("/again.gguf".into());
    let bench = Bench::new(Server { redirect, ..Server::default() }).await;
    let error = bench.fetch(&Credential::default(), None).await.unwrap_err();
    assert!(matches!(&error, ObjectError::BadAnswer { .. }), "{error:?}");
    assert!(error.to_string().contains("more than 5 redirects"), "{error}");
    assert_eq!(bench.seen().len(), 6);
}

#[tokio::test]
async fn what_one_server_gave_is_not_served_as_anothers() {
    let first = Bench::new(Server::default()).await;
    first.fetch_s3(&Credential::default()).await.unwrap();
    let mut second = Bench::new(Server::default()).await;
    second.objects.folder = first.objects.folder.clone();
    second.fetch_s3(&Credential::default()).await.unwrap();
    assert_eq!(second.seen().len(), 2, "its own was fetched: {:?}", second.seen());
}

#[tokio::test]
async fn a_full_cache_is_said_before_the_download_begins() {
    let mut bench = Bench::new(Server::default()).await;
    bench.limit(2);
    let error = bench.fetch(&Credential::default(), None).await.unwrap_err();
    assert!(matches!(error, ObjectError::DiskFull { wanted: 3, free: 2, .. }), "{error:?}");
    assert_eq!(bench.seen(), ["HEAD /a/m.gguf "]);
}

#[tokio::test]
async fn what_was_brought_is_held_until_it_is_let_go() {
    let mut bench = Bench::new(Server::default()).await;
    bench.limit(5);
    for _ in ["fetched", "known"] {
        let held = bench.fetch_named("a").await.unwrap();
        let error = bench.fetch_named("b").await.unwrap_err();
        assert!(matches!(error, ObjectError::DiskFull { free: 2, .. }), "{error:?}");
        assert!(held.entry().exists());
    }
    let _second = bench.fetch_named("b").await.unwrap();
    let links = std::fs::read_dir(bench.objects.folder.join("versions")).unwrap();
    assert_eq!(links.count(), 1, "the first went with its content");
}

#[tokio::test]
async fn a_download_that_runs_keeps_its_bytes_from_the_next() {
    let gate = Some(tokio::sync::Semaphore::new(0));
    let mut bench = Bench::new(Server { gate, ..Server::default() }).await;
    bench.limit(5);
    let (first, second) = tokio::join!(bench.fetch_named("a"), async {
        while !bench.seen().iter().any(|line| line.starts_with("GET")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let second = bench.fetch_named("b").await;
        bench.server.gate.as_ref().unwrap().add_permits(1);
        second
    });
    assert!(first.unwrap().entry().exists());
    let error = second.unwrap_err();
    assert!(matches!(error, ObjectError::DiskFull { wanted: 3, free: 2, .. }), "{error:?}");
}
