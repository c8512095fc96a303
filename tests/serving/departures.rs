//! Clients that go away, servers that end too soon or have not begun, and other doors.

use std::future::Future;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use harness::Server;
use serde_json::{Value, json};

use crate::{completion, model};

const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting";

fn endless() -> Value {
    let mut body = completion("Once upon a time", 400);
    body["ignore_eos"] = true.into();
    body
}

/// Sends a request whose answer nobody may live to read.
fn send(server: &Server, body: &Value) -> impl Future<Output = Result<Value>> + Send + use<> {
    let request = reqwest::Client::new().post(format!("{}/v1/completions", server.url)).json(body);
    async move { Ok(request.send().await?.json().await?) }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_leave_free_what_they_hold_or_their_place_in_the_queue() -> Result<()> {
    let test = "clients_that_leave_free_what_they_hold_or_their_place_in_the_queue";
    let Some(model) = model(test) else { return Ok(()) };
    let server = Server::start(&model, &["--max-model-len", "512", "--max-num-seqs", "1"]).await?;
    let running = tokio::spawn(send(&server, &endless()));
    server.wait_metric(RUNNING, "", 1.0).await?;
    let queued = tokio::spawn(send(&server, &endless()));
    server.wait_metric(WAITING, "", 1.0).await?;
    queued.abort();
    server.wait_metric(WAITING, "", 0.0).await?;
    assert_eq!(server.metric(RUNNING, "").await?, 1.0, "the other goes on");
    running.abort();
    server.wait_metric("bindery_blocks", "used", 0.0).await?;
    server.wait_metric("vllm:request_success_total", "abort", 2.0).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_more_urgent_of_two_that_wait_is_answered_first() -> Result<()> {
    let Some(model) = model("the_more_urgent_of_two_that_wait_is_answered_first") else {
        return Ok(());
    };
    let server = Server::start(&model, &["--max-model-len", "512", "--max-num-seqs", "1"]).await?;
    let running = tokio::spawn(send(&server, &endless()));
    server.wait_metric(RUNNING, "", 1.0).await?;
    let mut body = completion("Hello", 8);
    body["ignore_eos"] = true.into();
    body["priority"] = 5.into();
    let late = tokio::spawn(send(&server, &body));
    server.wait_metric(WAITING, "", 1.0).await?;
    body["priority"] = (-5).into();
    let urgent = tokio::spawn(send(&server, &body));
    server.wait_metric(WAITING, "", 2.0).await?;
    running.abort();
    let first = tokio::select! {
        answer = late => { answer??; "late" }
        answer = urgent => { answer??; "urgent" }
    };
    assert_eq!(first, "urgent");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_longer_than_the_shutdown_timeout_is_cut_off() -> Result<()> {
    let test = "a_stream_longer_than_the_shutdown_timeout_is_cut_off";
    let Some(model) = model(test) else { return Ok(()) };
    let flags = ["--max-model-len", "8192", "--shutdown-timeout", "1"];
    let mut server = Server::start(&model, &flags).await?;
    let mut body = endless();
    (body["stream"], body["max_tokens"]) = (true.into(), 8000.into());
    let url = format!("{}/v1/completions", server.url);
    let answer = reqwest::Client::new().post(url).json(&body).send().await?;
    let mut bytes = answer.bytes_stream();
    bytes.next().await.context("a first chunk")??;
    server.terminate()?;
    ensure!(server.wait().await?.success(), "{}", server.log());
    let log = server.log();
    ensure!(log.contains("running requests are dropped") && log.contains("requests=1"), "{log}");
    let mut text = String::new();
    while let Some(Ok(chunk)) = bytes.next().await {
        text.push_str(&String::from_utf8_lossy(&chunk));
    }
    ensure!(!text.contains("[DONE]"), "the stream was cut off");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_come_while_the_model_loads_are_told_when_to_return() -> Result<()> {
    // A hub that takes connections and never answers.
    let hub = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", hub.local_addr()?);
    let cache = tempfile::tempdir()?;
    let port = free_port().await?;
    let variables =
        [("HF_ENDPOINT", endpoint.as_str()), ("HF_HUB_CACHE", &cache.path().to_string_lossy())];
    let mut server = Server::spawn("hf://org/tiny".as_ref(), &["--port", &port], &variables)?;
    server.url = format!("http://127.0.0.1:{port}");
    // Connected: the load has begun, and so the server listens.
    let _connection = tokio::time::timeout(harness::PATIENCE, hub.accept()).await??;
    let url = format!("{}/v1/completions", server.url);
    let answer = reqwest::Client::new().post(url).json(&completion("Hi", 2)).send().await?;
    assert_eq!(answer.status(), 503);
    ensure!(answer.headers().contains_key("retry-after"), "{:?}", answer.headers());
    let answer: Value = answer.json().await?;
    assert_eq!(answer["error"]["code"], "model_loading");
    let status = |path| reqwest::get(format!("{}{path}", server.url));
    assert_eq!(status("/readyz").await?.status(), 503);
    assert_eq!(status("/healthz").await?.status(), 200);
    Ok(())
}

async fn free_port() -> Result<String> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    Ok(listener.local_addr()?.port().to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_answers_and_goes_with_its_server() -> Result<()> {
    let Some(model) = model("a_unix_socket_answers_and_goes_with_its_server") else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("bindery.sock");
    let path = socket.to_string_lossy();
    let mut server = Server::spawn(&model, &["--max-model-len", "64", "--uds", &path], &[])?;
    server.wait_log("at=\"unix:").await?;
    let client = reqwest::Client::builder().unix_socket(socket.clone()).build()?;
    let body = completion("The capital of France is", 4);
    let answer = client.post("http://bindery/v1/completions").json(&body).send().await?;
    let answer: Value = answer.json().await?;
    let text = answer["choices"][0]["text"].as_str().unwrap_or_default();
    ensure!(text.contains("Paris"), "{answer}");
    server.terminate()?;
    ensure!(server.wait().await?.success(), "{}", server.log());
    ensure!(UnixStream::connect(&socket).is_err() && !socket.exists(), "the socket is left behind");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_of_the_client_is_echoed_and_another_is_made_up() -> Result<()> {
    let Some(model) = model("an_id_of_the_client_is_echoed_and_another_is_made_up") else {
        return Ok(());
    };
    let server = Server::start(&model, &["--max-model-len", "64"]).await?;
    let url = format!("{}/v1/models/tiny", server.url);
    let client = reqwest::Client::new();
    let id = |answer: &reqwest::Response| answer.headers().get("x-request-id").cloned();
    let answer = client.get(&url).header("X-Request-Id", "mine-7").send().await?;
    assert_eq!(id(&answer).context("an id")?, "mine-7");
    let card: Value = answer.json().await?;
    assert_eq!((&card["id"], &card["max_model_len"]), (&json!("tiny"), &json!(64)));
    let (one, two) = (client.get(&url).send().await?, client.get(&url).send().await?);
    ensure!(id(&one).is_some() && id(&one) != id(&two), "{one:?} {two:?}");
    let none = client.get(format!("{}/v1/models/none", server.url)).send().await?;
    assert_eq!(none.status(), 404);
    Ok(())
}
