//! The client's end.

use std::io;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use super::Connection;
use super::url::EndpointUrl;
use crate::limits;

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The URL is not one that HTTP can carry.
    #[error(
        "cannot reach {url}: the address is not valid in a URL; use an ASCII host name or an address"
    )]
    Url {
        /// Where to.
        url: EndpointUrl,
    },
    /// Refused, unreachable, or not speaking HTTP/2.
    #[error("cannot reach {url}: {cause}; check that it runs and that the address is right")]
    Refused {
        /// Where to.
        url: EndpointUrl,
        /// What kind of failure the system reported; `Other` when it was not the system's.
        kind: io::ErrorKind,
        /// What it said.
        cause: String,
    },
    /// Nothing was heard in time.
    #[error("cannot reach {url}: no answer within {} ms; check the address, the network and its load", deadline.as_millis())]
    Deadline {
        /// Where to.
        url: EndpointUrl,
        /// How long was waited.
        deadline: Duration,
    },
}

/// Connects. `deadline` bounds connecting, and each later reconnect; after a break the channel connects anew with the
/// next request. Each request is bounded by [`limits::REQUEST_TIMEOUT`] unless it carries a shorter deadline.
pub async fn connect(url: &EndpointUrl, deadline: Duration) -> Result<Channel, ConnectError> {
    let endpoint = endpoint(url, deadline)?;
    let target = url.clone();
    let connecting =
        endpoint.connect_with_connector(service_fn(move |_: Uri| open(target.clone())));
    match tokio::time::timeout(deadline, connecting).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => {
            let (kind, cause) = root_cause(&error);
            Err(ConnectError::Refused {
                url: url.clone(),
                kind,
                cause,
            })
        }
        Err(_) => Err(ConnectError::Deadline {
            url: url.clone(),
            deadline,
        }),
    }
}

/// A channel that connects with its first request, which then fails when it cannot.
pub fn connect_lazy(url: &EndpointUrl, deadline: Duration) -> Result<Channel, ConnectError> {
    let target = url.clone();
    Ok(endpoint(url, deadline)?
        .connect_with_connector_lazy(service_fn(move |_: Uri| open(target.clone()))))
}

fn endpoint(url: &EndpointUrl, deadline: Duration) -> Result<Endpoint, ConnectError> {
    // Over a Unix socket the URL only fills the `:authority` header.
    let text = if url.is_unix() {
        "http://localhost".to_owned()
    } else {
        url.to_string()
    };
    let endpoint =
        Endpoint::from_shared(text).map_err(|_| ConnectError::Url { url: url.clone() })?;
    Ok(endpoint
        .connect_timeout(deadline)
        .timeout(limits::REQUEST_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(limits::KEEPALIVE_INTERVAL)
        .keep_alive_timeout(limits::KEEPALIVE_TIMEOUT))
}

async fn open(url: EndpointUrl) -> io::Result<TokioIo<Connection>> {
    let connection = match &url {
        EndpointUrl::Tcp(at) => {
            let stream = TcpStream::connect((at.host.as_str(), at.port)).await?;
            stream.set_nodelay(true)?;
            Connection::tcp(stream)?
        }
        EndpointUrl::UnixPath(path) => Connection::unix(UnixStream::connect(path).await?)?,
        // A leading NUL is how an abstract name is written.
        EndpointUrl::UnixAbstract(name) => {
            Connection::unix(UnixStream::connect(format!("\0{name}")).await?)?
        }
    };
    Ok(TokioIo::new(connection))
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> (io::ErrorKind, String) {
    let mut cause = error;
    let mut kind = io::ErrorKind::Other;
    loop {
        if let Some(system) = cause.downcast_ref::<io::Error>() {
            kind = system.kind();
        }
        match cause.source() {
            Some(next) => cause = next,
            None => return (kind, cause.to_string()),
        }
    }
}
