//! The server's end.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as unix;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::time::Sleep;
use tokio_stream::Stream;
use tonic::transport::Server;

use super::connection::{Connection, Peer};
use super::url::EndpointUrl;
use crate::address::HostPort;
use crate::limits;

/// How long to pause when the system has no more file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody has it already.
    #[error("cannot listen on {url}: the address is in use; stop its holder or choose another")]
    InUse {
        /// Where.
        url: EndpointUrl,
    },
    /// Anything else that the system says.
    #[error(
        "cannot listen on {url}: {source}; choose an address of this host that this user may use"
    )]
    System {
        /// Where.
        url: EndpointUrl,
        /// What it said.
        source: io::Error,
    },
}

/// A bound socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    url: EndpointUrl,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Binds. Port 0 takes any free port; [`Listener::url`] tells which. A Unix path must not exist, except as the socket of
/// a server that is gone (nobody answers there), which is replaced.
pub async fn listen(url: &EndpointUrl) -> Result<Listener, ListenError> {
    bind(url).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { url: url.clone() },
        _ => ListenError::System {
            url: url.clone(),
            source,
        },
    })
}

async fn bind(url: &EndpointUrl) -> io::Result<Listener> {
    match url {
        EndpointUrl::Tcp(at) => {
            let listener = TcpListener::bind((at.host.as_str(), at.port)).await?;
            let port = listener.local_addr()?.port();
            let url = EndpointUrl::Tcp(HostPort {
                host: at.host.clone(),
                port,
            });
            Ok(Listener {
                socket: Socket::Tcp(listener),
                url,
            })
        }
        EndpointUrl::UnixPath(path) => {
            if unix::UnixStream::connect(path)
                .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
            {
                std::fs::remove_file(path)?;
            }
            from_std(unix::UnixListener::bind(path)?, url)
        }
        EndpointUrl::UnixAbstract(name) => from_std(
            unix::UnixListener::bind_addr(&unix::SocketAddr::from_abstract_name(name)?)?,
            url,
        ),
    }
}

fn from_std(listener: unix::UnixListener, url: &EndpointUrl) -> io::Result<Listener> {
    listener.set_nonblocking(true)?;
    Ok(Listener {
        socket: Socket::Unix(UnixListener::from_std(listener)?),
        url: url.clone(),
    })
}

impl Listener {
    /// Where it listens, with the port that it got.
    pub fn url(&self) -> &EndpointUrl {
        &self.url
    }

    /// The connections, as tonic's `serve_with_incoming` takes them. At most [`limits::MAX_CONNECTIONS`] at a time,
    /// further ones are closed at once. Over a Unix socket only root and our own user are let in.
    pub fn incoming(self) -> Incoming {
        Incoming {
            socket: self.socket,
            places: Arc::new(Semaphore::new(limits::MAX_CONNECTIONS)),
            pause: None,
        }
    }
}

/// The stream of a listener's connections. It never ends and never fails.
#[derive(Debug)]
pub struct Incoming {
    socket: Socket,
    places: Arc<Semaphore>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Connection>> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, _) = ready!(listener.poll_accept(cx))?;
                // Only latency suffers when this fails.
                let _ = stream.set_nodelay(true);
                Poll::Ready(Connection::tcp(stream))
            }
            Socket::Unix(listener) => {
                let (stream, _) = ready!(listener.poll_accept(cx))?;
                Poll::Ready(Connection::unix(stream))
            }
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(Future::poll(pause.as_mut(), cx));
                self.pause = None;
            }
            let connection = match ready!(self.poll_accept(cx)) {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    if is_shortage(&error) {
                        self.pause = Some(Box::pin(tokio::time::sleep(ACCEPT_BACKOFF)));
                    }
                    continue;
                }
            };
            if let Peer::Unix { uid } = connection.peer()
                && !is_trusted(uid)
            {
                tracing::warn!(uid, "refused a connection from another user");
                continue;
            }
            match Arc::clone(&self.places).try_acquire_owned() {
                Ok(permit) => return Poll::Ready(Some(Ok(connection.accepted(permit)))),
                Err(_) => {
                    tracing::warn!(
                        max = limits::MAX_CONNECTIONS,
                        "refused a connection, there are too many"
                    );
                }
            }
        }
    }
}

fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    error
        .raw_os_error()
        .is_some_and(|code| shortages.iter().any(|errno| errno.raw_os_error() == code))
}

/// tonic's server with this project's bounds: streams, keep-alive, time per request.
pub fn server_builder() -> Server {
    Server::builder()
        .timeout(limits::REQUEST_TIMEOUT)
        .concurrency_limit_per_connection(limits::MAX_STREAMS_PER_CONNECTION as usize)
        .max_concurrent_streams(limits::MAX_STREAMS_PER_CONNECTION)
        .http2_keepalive_interval(Some(limits::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(limits::KEEPALIVE_TIMEOUT))
}
