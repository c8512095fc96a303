//! Clients that never stop: streams and short requests, on connections that are kept and on new ones. Every failure counts.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::cluster::{Cluster, Namespace};

/// Tokens of a stream and of a short answer.
const LONG: u32 = 48;
const SHORT: u32 = 2;
/// The longest that one request may take.
const DEADLINE: Duration = Duration::from_secs(120);

/// What the clients saw.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) streams: usize,
    pub(crate) shorts: usize,
    /// A reused connection was closed before the first byte of an answer; the request was sent once more.
    pub(crate) retries: usize,
    pub(crate) failures: Vec<String>,
}

impl Tally {
    pub(crate) fn ensure_nothing_failed(&self) -> Result<()> {
        eprintln!(
            "  {} streams, {} short requests, {} retries on reused connections, {} failures",
            self.streams,
            self.shorts,
            self.retries,
            self.failures.len()
        );
        let some: Vec<_> = self.failures.iter().take(8).collect();
        ensure!(some.is_empty(), "{} requests failed: {some:#?}", self.failures.len());
        ensure!(self.streams > 0 && self.shorts > 0, "nothing was sent");
        Ok(())
    }
}

/// Clients at work.
#[derive(Debug)]
pub(crate) struct Load {
    stop: watch::Sender<bool>,
    clients: Vec<JoinHandle<Tally>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Stream,
    Short,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Connections {
    Kept,
    New,
}

impl Load {
    /// Starts `streams` clients that stream and as many as `shorts` that do not. Half of each keep their connections.
    pub(crate) fn start(
        space: &Namespace,
        model: &str,
        streams: usize,
        shorts: usize,
    ) -> Result<Self> {
        let host: Arc<str> = space.service(model)?.trim_start_matches("http://").into();
        let stop = watch::Sender::new(false);
        let kinds = std::iter::repeat_n(Kind::Stream, streams)
            .chain(std::iter::repeat_n(Kind::Short, shorts));
        let clients = kinds.enumerate().map(|(index, kind)| {
            let connections = if index % 2 == 0 { Connections::Kept } else { Connections::New };
            let client = Client {
                host: Arc::clone(&host),
                model: model.to_owned(),
                kind,
                connections,
                kept: None,
                index,
            };
            space.cluster.spawn(client.run(stop.subscribe()))
        });
        let clients = clients.collect();
        Ok(Self { stop, clients })
    }

    /// Lets every client finish its request, and adds up.
    pub(crate) fn finish(self, cluster: &Cluster) -> Result<Tally> {
        self.stop.send_replace(true);
        cluster.block_on(async {
            let mut all = Tally::default();
            for client in self.clients {
                let one = client.await?;
                all.streams += one.streams;
                all.shorts += one.shorts;
                all.retries += one.retries;
                all.failures.extend(one.failures);
            }
            Ok(all)
        })
    }
}

struct Client {
    host: Arc<str>,
    model: String,
    kind: Kind,
    connections: Connections,
    kept: Option<SendRequest<Full<Bytes>>>,
    index: usize,
}

enum Broken {
    /// May be sent once more.
    Stale,
    Failed(anyhow::Error),
}

impl Client {
    async fn run(mut self, stop: watch::Receiver<bool>) -> Tally {
        let mut tally = Tally::default();
        let mut count = 0;
        while !*stop.borrow() && stop.has_changed().is_ok() {
            count += 1;
            let body = self.body(count);
            let mut done = self.request(&body).await;
            if matches!(done, Err(Broken::Stale)) {
                tally.retries += 1;
                self.kept = None;
                done = self.request(&body).await;
            }
            match (done, self.kind) {
                (Ok(()), Kind::Stream) => tally.streams += 1,
                (Ok(()), Kind::Short) => tally.shorts += 1,
                (Err(Broken::Stale), _) => tally.failures.push("stale on a new connection".into()),
                (Err(Broken::Failed(error)), kind) => {
                    let text = format!("{kind:?} {:?}: {error:#}", self.connections);
                    tally.failures.push(text);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            if self.connections == Connections::New {
                self.kept = None;
            }
        }
        tally
    }

    fn body(&self, count: usize) -> Bytes {
        let tokens = if self.kind == Kind::Stream { LONG } else { SHORT };
        let words = format!("Client {} asks for the {count}. time.", self.index);
        let body = json!({
            "model": self.model, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": true,
            "temperature": 0, "stream": self.kind == Kind::Stream,
            "messages": [{"role": "user", "content": words}],
        });
        Bytes::from(body.to_string())
    }

    async fn request(&mut self, body: &Bytes) -> Result<(), Broken> {
        let done = tokio::time::timeout(DEADLINE, self.exchange(body)).await;
        done.unwrap_or_else(|_| Err(Broken::Failed(anyhow!("no answer within {DEADLINE:?}"))))
    }

    async fn exchange(&mut self, body: &Bytes) -> Result<(), Broken> {
        let failed = |error: anyhow::Error| Broken::Failed(error);
        let kept = self.kept.take().filter(|kept| !kept.is_closed());
        let reused = kept.is_some();
        let mut sender = match kept {
            Some(kept) => kept,
            None => connect(&self.host).await.map_err(failed)?,
        };
        let request = hyper::Request::post("/v1/chat/completions")
            .header("host", &*self.host)
            .header("content-type", "application/json")
            .body(Full::new(body.clone()))
            .map_err(|error| failed(error.into()))?;
        if let Err(error) = sender.ready().await {
            return Err(if reused { Broken::Stale } else { failed(error.into()) });
        }
        let answer = match sender.send_request(request).await {
            Ok(answer) => answer,
            Err(_) if reused => return Err(Broken::Stale),
            Err(error) => return Err(failed(anyhow!("before an answer: {error:?}"))),
        };
        let status = answer.status();
        let text = answer.into_body().collect().await;
        let text = text.map_err(|error| failed(anyhow!("{status}, then {error:?}")))?.to_bytes();
        let text = String::from_utf8_lossy(&text);
        if status != 200 || (self.kind == Kind::Stream && !text.ends_with("data: [DONE]\n\n")) {
            return Err(failed(anyhow!("{status}: {} bytes, {text:.200}", text.len())));
        }
        self.kept = Some(sender);
        Ok(())
    }
}

async fn connect(host: &str) -> Result<SendRequest<Full<Bytes>>> {
    let stream = tokio::net::TcpStream::connect((host, 80)).await?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}
