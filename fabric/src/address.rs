//! Where a responder is.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The longest Unix socket name that `sockaddr_un` holds, without its terminating or leading zero.
const MAX_SOCKET_NAME: usize = 107;

/// A responder's address: `tcp:HOST:PORT`, `shm:@NAME` or `shm:/PATH`. Prints as it parses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum FabricAddress {
    /// Over TCP.
    Tcp {
        /// Name or number; an IPv6 number without its brackets.
        host: String,
        /// Port, not 0.
        port: u16,
    },
    /// Over memory shared on one host.
    Shm(ShmAddress),
}

/// The Unix socket on which shared memory is handed over.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ShmAddress {
    /// A name in the abstract namespace, without the `@`. Visible in its network namespace only.
    Abstract(String),
    /// An absolute path.
    Path(PathBuf),
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// No transport that there is.
    #[error("{0:?} names no transport; write tcp:HOST:PORT, shm:@NAME or shm:/PATH")]
    Transport(String),
    /// Verbs are not built in.
    #[error("this build has no rdma transport; use tcp:HOST:PORT, or shm: on one host")]
    NoRdma,
    /// Not HOST:PORT.
    #[error("{0:?} is not HOST:PORT; write, say, tcp:node1:7700 or tcp:[fe80::1]:7700")]
    HostPort(String),
    /// Not a socket name.
    #[error("{0:?} is no socket; write shm:@NAME or shm:/PATH, at most {MAX_SOCKET_NAME} bytes")]
    Socket(String),
}

impl FromStr for FabricAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.split_once(':') {
            Some(("tcp", rest)) => {
                parse_tcp(rest).ok_or_else(|| AddressError::HostPort(rest.to_owned()))
            }
            Some(("shm", rest)) => rest.parse().map(Self::Shm),
            Some(("rdma", _)) => Err(AddressError::NoRdma),
            _ => Err(AddressError::Transport(text.to_owned())),
        }
    }
}

fn parse_tcp(text: &str) -> Option<FabricAddress> {
    let (host, port) = text.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|host| host.contains(':'))?,
        None if host.contains(':') => return None,
        None => host,
    };
    let port = port.parse().ok().filter(|&port| port != 0)?;
    let plain =
        |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '[' | ']' | '/' | '@');
    if host.is_empty() || !host.chars().all(plain) {
        return None;
    }
    Some(FabricAddress::Tcp {
        host: host.to_owned(),
        port,
    })
}

impl FromStr for ShmAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refuse = || AddressError::Socket(text.to_owned());
        if text.contains('\0') {
            return Err(refuse());
        }
        match text.strip_prefix('@') {
            Some(name) if (1..=MAX_SOCKET_NAME).contains(&name.len()) => {
                Ok(Self::Abstract(name.to_owned()))
            }
            None if text.starts_with('/') && (2..=MAX_SOCKET_NAME).contains(&text.len()) => {
                Ok(Self::Path(text.into()))
            }
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for FabricAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Shm(address) => write!(f, "shm:{address}"),
        }
    }
}

impl fmt::Display for ShmAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Abstract(name) => write!(f, "@{name}"),
            Self::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_print_as_they_parse() {
        for text in [
            "tcp:node1:7700",
            "tcp:10.0.0.1:1",
            "tcp:[fe80::1]:65535",
            "shm:@farpage",
            "shm:/run/farpage/x",
        ] {
            assert_eq!(text.parse::<FabricAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn errors_say_what_to_write() {
        for (text, hint) in [
            ("rdma:node1:7700", "no rdma transport"),
            ("udp:x:1", "tcp:HOST:PORT"),
            ("", "tcp:HOST:PORT"),
            ("tcp:node1", "HOST:PORT"),
            ("tcp:node1:0", "HOST:PORT"),
            ("tcp:node1:65536", "HOST:PORT"),
            ("tcp::7700", "HOST:PORT"),
            ("tcp:fe80::1:7700", "[fe80::1]"),
            ("shm:relative", "shm:/PATH"),
            ("shm:@", "shm:@NAME"),
            ("shm:/", "shm:/PATH"),
        ] {
            let error = text.parse::<FabricAddress>().unwrap_err().to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_parses_prints_to_something_equal(text in "(tcp|shm|rdma)?:?[\\[\\]@/:a-z0-9 .]{0,20}(:[0-9]{1,5})?") {
            if let Ok(address) = text.parse::<FabricAddress>() {
                prop_assert_eq!(address.to_string().parse::<FabricAddress>().unwrap(), address);
            }
        }
    }
}
