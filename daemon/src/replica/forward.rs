//! Bytes between clients and the engine's socket. Knows nothing of HTTP but the one answer when there is no engine.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{Phase, Shared, splice};

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 4096;
/// After an error of `accept`, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);
/// What a client hears while no engine is attached.
const UNAVAILABLE: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\n\
    connection: close\r\ncontent-length: 99\r\n\r\n\
    {\"error\":{\"message\":\"the replica is not ready\",\"type\":\"not_ready\",\"param\":null,\"code\":\"not_ready\"}}";

/// What is known of the connections.
#[derive(Debug, Clone, Default)]
pub(super) struct Connections {
    open: Arc<AtomicUsize>,
    newest: Arc<Mutex<Option<Instant>>>,
}

impl Connections {
    pub(super) fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// When the newest arrived.
    pub(super) fn newest(&self) -> Option<Instant> {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn arrived(&self) -> Open {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.open.fetch_add(1, Ordering::Relaxed);
        Open(self.clone())
    }
}

/// Counts one connection for as long as it lives.
struct Open(Connections);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Accepts until the replica closes.
pub(super) async fn serve(listener: TcpListener, status: Shared, connections: Connections) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut watched = status.subscribe();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = watched.wait_for(|status| status.phase == Phase::Closing) => return,
        };
        match accepted {
            Ok((client, _)) => {
                let open = connections.arrived();
                let engine = status.borrow().engine.clone();
                tokio::spawn(async move {
                    forward(client, engine.as_deref()).await;
                    drop((open, place));
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Either side may go at any time; that is no error.
async fn forward(mut client: TcpStream, engine: Option<&std::path::Path>) {
    // Small pieces of a stream must not wait for more.
    drop(client.set_nodelay(true));
    let engine = match engine {
        Some(path) => UnixStream::connect(path).await.ok(),
        None => None,
    };
    match engine {
        Some(engine) => drop(splice::pass(&client, &engine).await),
        None => drop(client.write_all(UNAVAILABLE).await),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_without_an_engine_is_whole() {
        let text = std::str::from_utf8(UNAVAILABLE).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{}", body.len());
        assert!(serde_json::from_str::<serde_json::Value>(body).is_ok());
    }
}
