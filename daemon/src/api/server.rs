//! The accept loop: connections within limits, cut off when they stall, ended gracefully.

use std::io;
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};

use crate::metrics::Metrics;

/// Where clients come in.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// What a connection may take.
#[derive(Debug, Clone, Copy)]
pub struct ServerOptions {
    /// A client that accepts no byte for this long while there is one to send is cut off.
    pub write_timeout: Duration,
    /// A request's head must come within this time.
    pub header_timeout: Duration,
    /// While the server drains, a connection that has been idle for this long is closed.
    pub drain_idle: Duration,
    /// Connections beyond this wait to be accepted.
    pub max_connections: usize,
    pub keepalive: Keepalive,
}

/// How long a connection is kept for further requests. Where a balancer spreads connections rather than requests, ending
/// them now and then is what brings load to new replicas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// The answer to this many requests ends it.
    pub requests: Option<NonZeroUsize>,
    /// The first answer after this time ends it.
    pub time: Option<Duration>,
}

/// Where the server is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Serving,
    /// Connections are still accepted, and told to close after their answer.
    Draining,
    /// Nothing is accepted; connections end with the answer that they are sending.
    Closing,
}

/// Either kind of connection.
trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Serves until the phase is [`Phase::Closing`] and every connection has ended.
pub async fn serve(
    listener: Listener,
    app: Router,
    options: ServerOptions,
    mut phase: watch::Receiver<Phase>,
    metrics: Arc<Metrics>,
) {
    let places = Arc::new(Semaphore::new(options.max_connections));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = closing(&mut phase) => break,
            accepted = accept(&listener, &places) => accepted,
        };
        match accepted {
            Ok((stream, place)) => {
                metrics.connection_accepted();
                let stream = Stalling::new(stream, options.write_timeout, Arc::clone(&metrics));
                let connection = converse(stream, app.clone(), options, phase.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) if is_of_client(&error) => {
                tracing::debug!(%error, "a client went away before it was accepted");
            }
            Err(error) => {
                // Such as too many open files: others must end before the next can come.
                tracing::warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Whether one client's connection failed, which says nothing about the next.
fn is_of_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Waits until a connection should end with the answer that it is sending, or at once where it sends none.
async fn time_to_end(phase: &mut watch::Receiver<Phase>, drain_idle: Duration) {
    let ends = phase.wait_for(|phase| *phase != Phase::Serving).await.map(|phase| *phase);
    if ends.is_ok_and(|phase| phase == Phase::Draining) {
        // Every answer of a draining server ends its connection; this is for those that ask nothing.
        drop(tokio::time::timeout(drain_idle, closing(phase)).await);
    }
}

/// Waits until the server closes, or nobody can say so any more.
async fn closing(phase: &mut watch::Receiver<Phase>) {
    drop(phase.wait_for(|phase| *phase == Phase::Closing).await);
}

type Place = tokio::sync::OwnedSemaphorePermit;

async fn accept(
    listener: &Listener,
    places: &Arc<Semaphore>,
) -> io::Result<(Box<dyn Connection>, Place)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let stream: Box<dyn Connection> = match listener {
        Listener::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            // Tokens are small and should leave at once. It fails only where the client has gone.
            drop(stream.set_nodelay(true));
            Box::new(stream)
        }
        Listener::Unix(listener) => Box::new(listener.accept().await?.0),
    };
    Ok((stream, place))
}

/// Speaks HTTP on one connection until it ends.
async fn converse(
    stream: Stalling,
    app: Router,
    options: ServerOptions,
    mut phase: watch::Receiver<Phase>,
) {
    let life = Arc::new(Life {
        phase: phase.clone(),
        began: Instant::now(),
        answers: AtomicUsize::new(0),
        keepalive: options.keepalive,
    });
    let app = app.layer(axum::middleware::from_fn_with_state(life, close_in_the_end));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_timeout)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = time_to_end(&mut phase, options.drain_idle) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// One connection, as far as its end depends on it.
struct Life {
    phase: watch::Receiver<Phase>,
    began: Instant,
    answers: AtomicUsize,
    keepalive: Keepalive,
}

impl Life {
    fn is_over(&self) -> bool {
        let answers = self.answers.fetch_add(1, Ordering::Relaxed) + 1;
        *self.phase.borrow() != Phase::Serving
            || self.keepalive.requests.is_some_and(|most| answers >= most.get())
            || self.keepalive.time.is_some_and(|most| self.began.elapsed() >= most)
    }
}

async fn close_in_the_end(
    axum::extract::State(life): axum::extract::State<Arc<Life>>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> axum::response::Response {
    let mut response = next.run(request).await;
    if life.is_over() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// A connection whose writes fail when the other side accepts no byte for too long.
struct Stalling {
    stream: Box<dyn Connection>,
    limit: Duration,
    /// Runs while a write waits.
    deadline: Option<Pin<Box<Sleep>>>,
    metrics: Arc<Metrics>,
}

impl Stalling {
    fn new(stream: Box<dyn Connection>, limit: Duration, metrics: Arc<Metrics>) -> Self {
        Self { stream, limit, deadline: None, metrics }
    }

    /// A write that waits goes on waiting until the deadline; one that is done ends it.
    fn bounded<T>(
        &mut self,
        context: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.deadline = None;
            return result;
        }
        let limit = self.limit;
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit)));
        match deadline.as_mut().poll(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(()) => {
                self.metrics.client_stalled();
                tracing::info!(
                    seconds = limit.as_secs(),
                    "a client accepted no byte and is cut off"
                );
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl AsyncRead for Stalling {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stalling {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.bounded(context, result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(context);
        self.bounded(context, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(context);
        self.bounded(context, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.bounded(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::body::Body;
    use axum::routing::get;
    use futures_util::stream;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::sync::{Notify, mpsc};

    use super::*;

    struct Server {
        address: SocketAddr,
        phase: watch::Sender<Phase>,
        metrics: Arc<Metrics>,
        task: tokio::task::JoinHandle<()>,
        /// Told when a flood's body is dropped.
        dropped: mpsc::UnboundedReceiver<()>,
        /// Told when a gated request has begun.
        entered: mpsc::UnboundedReceiver<()>,
        /// Lets a gated request end.
        gate: Arc<Notify>,
    }

    struct Tells(mpsc::UnboundedSender<()>);

    impl Drop for Tells {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }

    async fn start(options: ServerOptions) -> Server {
        let (tell, dropped) = mpsc::unbounded_channel();
        let flood = move || {
            let tells = Tells(tell.clone());
            let chunks = stream::unfold(tells, |tells| async {
                Some((Ok::<_, io::Error>(vec![b'x'; 1 << 16]), tells))
            });
            async { Body::from_stream(chunks) }
        };
        let (enter, entered) = mpsc::unbounded_channel();
        let gate = Arc::new(Notify::new());
        let waits = Arc::clone(&gate);
        let gated = move || {
            enter.send(()).unwrap();
            let waits = Arc::clone(&waits);
            async move {
                waits.notified().await;
                "done"
            }
        };
        let app = Router::new()
            .route("/hello", get(|| async { "hello" }))
            .route("/flood", get(flood))
            .route("/gated", get(gated));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (phase, watched) = watch::channel(Phase::Serving);
        let metrics = Arc::new(Metrics::new("tiny").unwrap());
        let task = tokio::spawn(serve(
            Listener::Tcp(listener),
            app,
            options,
            watched,
            Arc::clone(&metrics),
        ));
        Server { address, phase, metrics, task, dropped, entered, gate }
    }

    fn options() -> ServerOptions {
        let (write_timeout, header_timeout) =
            (Duration::from_millis(200), Duration::from_millis(200));
        let drain_idle = Duration::from_millis(200);
        let keepalive = Keepalive::default();
        ServerOptions { write_timeout, header_timeout, drain_idle, max_connections: 100, keepalive }
    }

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_client_that_reads_nothing_is_cut_off_and_holds_up_nobody() {
        let mut server = start(options()).await;
        let mut silent = TcpStream::connect(server.address).await.unwrap();
        silent.write_all(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        assert!(ask(server.address, "/hello").await.ends_with("hello"));
        tokio::time::timeout(Duration::from_secs(20), server.dropped.recv()).await.unwrap();
        assert!(server.metrics.render().contains("bindery_stalled_clients_total 1"));
    }

    #[tokio::test]
    async fn a_head_that_does_not_come_ends_the_connection() {
        let server = start(options()).await;
        let mut slow = TcpStream::connect(server.address).await.unwrap();
        slow.write_all(b"GET /hello HT").await.unwrap();
        let mut rest = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(20), slow.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "the server closes the connection");
    }

    #[tokio::test]
    async fn draining_tells_connections_to_close_and_closing_ends_the_server() {
        let server = start(options()).await;
        server.phase.send(Phase::Draining).unwrap();
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains("connection: close"), "{answer}");
        server.phase.send(Phase::Closing).unwrap();
        tokio::time::timeout(Duration::from_secs(20), server.task).await.unwrap().unwrap();
        assert!(TcpStream::connect(server.address).await.is_err());
    }

    #[tokio::test]
    async fn a_connection_ends_after_its_requests_or_its_time() {
        let ends_after = async |keepalive: Keepalive| {
            let server = start(ServerOptions { keepalive, ..options() }).await;
            let mut stream = TcpStream::connect(server.address).await.unwrap();
            for n_answers in 1..100 {
                stream.write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
                let mut answer = vec![0; 1024];
                let n_bytes = stream.read(&mut answer).await.unwrap();
                let answer = String::from_utf8_lossy(&answer[..n_bytes]).into_owned();
                if answer.contains("connection: close") {
                    return n_answers;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            100
        };
        let requests = NonZeroUsize::new(3);
        assert_eq!(ends_after(Keepalive { requests, time: None }).await, 3);
        let time = Some(Duration::from_millis(50));
        assert!((2..90).contains(&ends_after(Keepalive { requests: None, time }).await));
        assert_eq!(ends_after(Keepalive::default()).await, 100);
    }

    #[tokio::test]
    async fn a_draining_server_closes_idle_connections_and_answers_new_ones() {
        let patient = ServerOptions { header_timeout: Duration::from_secs(60), ..options() };
        let server = start(patient).await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        idle.write_all(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        idle.read_exact(&mut answer).await.unwrap();
        server.phase.send(Phase::Draining).unwrap();
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(20), idle.read_to_end(&mut rest));
        assert!(ended.await.is_ok(), "the idle connection is closed");
        assert!(ask(server.address, "/hello").await.ends_with("hello"));
    }

    #[tokio::test]
    async fn an_answer_that_runs_when_the_server_closes_is_finished() {
        let mut server = start(options()).await;
        let asked = tokio::spawn(ask(server.address, "/gated"));
        tokio::time::timeout(Duration::from_secs(20), server.entered.recv()).await.unwrap();
        server.phase.send(Phase::Closing).unwrap();
        let refused = async {
            while TcpStream::connect(server.address).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), refused).await.unwrap();
        server.gate.notify_one();
        let answer = tokio::time::timeout(Duration::from_secs(20), asked).await.unwrap().unwrap();
        assert!(answer.ends_with("done"), "{answer}");
        tokio::time::timeout(Duration::from_secs(20), server.task).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn connections_over_the_limit_wait_for_a_place() {
        let server = start(ServerOptions {
            max_connections: 1,
            header_timeout: Duration::from_secs(60),
            ..options()
        })
        .await;
        let first = TcpStream::connect(server.address).await.unwrap();
        let mut second = tokio::spawn(ask(server.address, "/hello"));
        let early = tokio::time::timeout(Duration::from_millis(200), &mut second).await;
        assert!(early.is_err(), "answered while the only place was taken");
        drop(first);
        let answer = tokio::time::timeout(Duration::from_secs(20), second).await.unwrap().unwrap();
        assert!(answer.ends_with("hello"));
    }
}
