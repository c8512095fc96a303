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
    /// Method, path and range of each request.
    seen: Mutex<Vec<String>>,
}

async fn serve(State(server): State<std::sync::Arc<Server>>, request: HttpRequest) -> Response {
    let range = request.headers().get(RANGE).map(|range| range.to_str().unwrap().to_owned());
    let line =
        format!("{} {} {}", request.method(), request.uri().path(), range.as_deref().unwrap_or(""));
    server.seen.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    let shown =
        request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
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
    content(&server, from, request.method() == "HEAD")
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
        self.objects.fetch(&Request { uri: &uri, credential, sha256 }, &|_| {}).await
    }

    async fn fetch_s3(&self, credential: &Credential) -> Result<PathBuf, ObjectError> {
        let credential =
            Credential { aws_endpoint_url: Some(self.url.clone()), ..credential.clone() };
        let request =
            Request { uri: "s3://bucket/a/m.gguf", credential: &credential, sha256: None };
        self.objects.fetch(&request, &|_| {}).await
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
        (StatusCode::INTERNAL_SERVER_ERROR, |error| {
            matches!(error, ObjectError::Unreachable { .. })
        }),
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
async fn a_redirect_takes_no_token_to_another_host() {
    let other = Bench::new(Server { authorization: Some(""), ..Server::default() }).await;
    // Another port is another host to HTTP clients.
    let redirect = Some(format!("{}/elsewhere.gguf", other.url));
    let bench =
        Bench::new(Server { authorization: Some("Bearer good"), redirect, ..Server::default() })
            .await;
    let good = Credential { token: token("good"), ..Credential::default() };
    drop(bench.fetch(&good, None).await);
    assert!(other.seen().iter().all(|line| line.contains("/elsewhere.gguf")));
}

#[tokio::test]
async fn a_full_cache_is_said_before_the_download_begins() {
    let mut bench = Bench::new(Server::default()).await;
    bench.objects.room = Room::new(|wanted| if wanted > 2 { Err(2) } else { Ok(()) });
    let error = bench.fetch(&Credential::default(), None).await.unwrap_err();
    assert!(matches!(error, ObjectError::DiskFull { wanted: 3, free: 2, .. }), "{error:?}");
    assert_eq!(bench.seen(), ["HEAD /a/m.gguf "]);
}
