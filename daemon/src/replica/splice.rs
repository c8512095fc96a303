//! Bytes from one socket to another without a copy into this process: splice(2) by way of a pipe.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::Shutdown;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// The kernel's own size of a pipe.
const PIPE_BYTES: usize = 64 << 10;

/// A socket of the runtime.
pub(super) trait Socket: AsFd {
    async fn readable(&self) -> io::Result<()>;
    async fn writable(&self) -> io::Result<()>;
    fn try_io<T>(&self, interest: Interest, with: impl FnOnce() -> io::Result<T>) -> io::Result<T>;
}

macro_rules! socket {
    ($($kind:ty),*) => {$(
        impl Socket for $kind {
            async fn readable(&self) -> io::Result<()> {
                <$kind>::readable(self).await
            }

            async fn writable(&self) -> io::Result<()> {
                <$kind>::writable(self).await
            }

            fn try_io<T>(&self, interest: Interest, with: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
                <$kind>::try_io(self, interest, with)
            }
        }
    )*};
}
socket!(TcpStream, UnixStream);

/// Passes bytes on in both directions until both have ended, or one has failed.
///
/// # Errors
/// When a socket fails, or there is no pipe to be had.
pub(super) async fn pass(one: &impl Socket, other: &impl Socket) -> io::Result<()> {
    let (there, back) = (Pipe::new()?, Pipe::new()?);
    tokio::try_join!(there.pass(one, other), back.pass(other, one)).map(drop)
}

struct Pipe {
    end: OwnedFd,
    begin: OwnedFd,
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (end, begin) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { end, begin })
    }

    /// In one direction. The end of what comes is the end of what goes.
    async fn pass(&self, from: &impl Socket, to: &impl Socket) -> io::Result<()> {
        loop {
            let mut n_bytes = self.fill(from).await?;
            if n_bytes == 0 {
                // Who has gone needs no word of it.
                let _ = rustix::net::shutdown(to.as_fd(), Shutdown::Write);
                return Ok(());
            }
            while n_bytes > 0 {
                n_bytes -= self.empty(to, n_bytes).await?;
            }
        }
    }

    async fn fill(&self, from: &impl Socket) -> io::Result<usize> {
        loop {
            let moved = from.try_io(Interest::READABLE, || moved(from, &self.begin, PIPE_BYTES));
            match moved {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => from.readable().await?,
                moved => return moved,
            }
        }
    }

    async fn empty(&self, to: &impl Socket, n_bytes: usize) -> io::Result<usize> {
        loop {
            let moved = to.try_io(Interest::WRITABLE, || moved(&self.end, to, n_bytes));
            match moved {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                moved => return moved,
            }
        }
    }
}

fn moved(from: impl AsFd, to: impl AsFd, n_bytes: usize) -> io::Result<usize> {
    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
    Ok(splice(from, None, to, None, n_bytes, flags)?)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn all_bytes_pass_in_both_directions_and_each_end_is_passed_on() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let (inner, engine) = UnixStream::pair().unwrap();
        let passing = tokio::spawn(async move { pass(&accepted, &inner).await });
        // Far more than sockets and pipes hold.
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|index| (index % 251) as u8).collect();
        let (mut client_read, mut client_write) = client.into_split();
        let (mut engine_read, mut engine_write) = engine.into_split();
        let sent = bytes.clone();
        let up = tokio::spawn(async move {
            client_write.write_all(&sent).await.unwrap();
            // Dropped: the engine sees the end, and can still answer.
        });
        let mut got = Vec::new();
        engine_read.read_to_end(&mut got).await.unwrap();
        assert!(got == bytes);
        up.await.unwrap();
        engine_write.write_all(&bytes[..1_000_000]).await.unwrap();
        drop(engine_write);
        let mut got = Vec::new();
        client_read.read_to_end(&mut got).await.unwrap();
        assert!(got == bytes[..1_000_000]);
        passing.await.unwrap().unwrap();
    }
}
