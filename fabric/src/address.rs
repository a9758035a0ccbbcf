//! Where a responder is.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

#[cfg(feature = "verbs")]
use crate::verbs::{DeviceChoice, DeviceChoiceError};

/// The longest Unix socket name that `sockaddr_un` holds, without its terminating or leading zero.
const MAX_SOCKET_NAME: usize = 107;

/// A responder's address: `tcp:HOST:PORT`, `shm:@NAME`, `shm:/PATH` or `rdma:HOST:PORT`, the last one with an optional
/// `?device=NAME&port=N&gid=N` for the requester's own device. Prints as it parses.
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
    /// Over verbs.
    #[cfg(feature = "verbs")]
    Rdma {
        /// Name or number of the control connection; an IPv6 number without its brackets.
        host: String,
        /// Its port, not 0.
        port: u16,
        /// By which of the requester's devices.
        choice: DeviceChoice,
    },
}

/// Which of its own RDMA devices a requester uses: `device=NAME&port=N&gid=N` or a part of it; the best if nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnDevice {
    #[cfg(feature = "verbs")]
    choice: DeviceChoice,
}

impl OwnDevice {
    /// Whether there is one, if one was asked for.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub fn look(&self) -> Result<(), String> {
        #[cfg(feature = "verbs")]
        if self.choice != DeviceChoice::default() {
            crate::verbs::chosen(&self.choice, None)?;
        }
        Ok(())
    }

    /// What it can do at most, in words.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub fn limits(&self) -> Result<String, String> {
        #[cfg(feature = "verbs")]
        return crate::verbs::limits(&self.choice);
        #[cfg(not(feature = "verbs"))]
        Err(AddressError::NoRdma.to_string())
    }
}

impl FromStr for OwnDevice {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        #[cfg(feature = "verbs")]
        return Ok(Self {
            choice: text.parse()?,
        });
        #[cfg(not(feature = "verbs"))]
        Err(AddressError::NoRdma)
    }
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
    #[error(
        "{0:?} names no transport; write tcp:HOST:PORT, rdma:HOST:PORT, shm:@NAME or shm:/PATH"
    )]
    Transport(String),
    /// Not a choice of a device.
    #[cfg(feature = "verbs")]
    #[error(transparent)]
    Device(#[from] DeviceChoiceError),
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

impl FabricAddress {
    /// The same, to be reached by this device of the requester's own if it is reached by RDMA.
    #[must_use]
    pub fn by(self, own: &OwnDevice) -> Self {
        #[cfg(feature = "verbs")]
        if own.choice != DeviceChoice::default()
            && let Self::Rdma { host, port, .. } = self
        {
            let choice = own.choice.clone();
            return Self::Rdma { host, port, choice };
        }
        let _ = own;
        self
    }
}

impl FromStr for FabricAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.split_once(':') {
            Some(("tcp", rest)) => {
                let (host, port) = host_port(rest)?;
                Ok(Self::Tcp { host, port })
            }
            Some(("shm", rest)) => rest.parse().map(Self::Shm),
            #[cfg(feature = "verbs")]
            Some(("rdma", rest)) => {
                let (at, choice) = match rest.split_once('?') {
                    Some((at, choice)) => (at, choice.parse()?),
                    None => (rest, DeviceChoice::default()),
                };
                let (host, port) = host_port(at)?;
                Ok(Self::Rdma { host, port, choice })
            }
            #[cfg(not(feature = "verbs"))]
            Some(("rdma", _)) => Err(AddressError::NoRdma),
            _ => Err(AddressError::Transport(text.to_owned())),
        }
    }
}

fn host_port(text: &str) -> Result<(String, u16), AddressError> {
    parse_host_port(text).ok_or_else(|| AddressError::HostPort(text.to_owned()))
}

fn parse_host_port(text: &str) -> Option<(String, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|host| host.contains(':'))?,
        None if host.contains(':') => return None,
        None => host,
    };
    let port = port.parse().ok().filter(|&port| port != 0)?;
    let plain = |c: char| {
        !c.is_whitespace() && !c.is_control() && !matches!(c, '[' | ']' | '/' | '@' | '?')
    };
    if host.is_empty() || !host.chars().all(plain) {
        return None;
    }
    Some((host.to_owned(), port))
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
            Self::Tcp { host, port } => write_host_port(f, "tcp", host, *port),
            #[cfg(feature = "verbs")]
            Self::Rdma { host, port, choice } => {
                write_host_port(f, "rdma", host, *port)?;
                if *choice == DeviceChoice::default() {
                    Ok(())
                } else {
                    write!(f, "?{choice}")
                }
            }
            Self::Shm(address) => write!(f, "shm:{address}"),
        }
    }
}

fn write_host_port(f: &mut fmt::Formatter<'_>, scheme: &str, host: &str, port: u16) -> fmt::Result {
    if host.contains(':') {
        write!(f, "{scheme}:[{host}]:{port}")
    } else {
        write!(f, "{scheme}:{host}:{port}")
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
            #[cfg(feature = "verbs")]
            "rdma:[fe80::1]:7700",
            #[cfg(feature = "verbs")]
            "rdma:node1:7700?device=mlx5_0&port=2&gid=3",
        ] {
            assert_eq!(text.parse::<FabricAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn errors_say_what_to_write() {
        for (text, hint) in [
            #[cfg(not(feature = "verbs"))]
            ("rdma:node1:7700", "no rdma transport"),
            #[cfg(feature = "verbs")]
            ("rdma:node1:7700?gid=256", "gid=N"),
            #[cfg(feature = "verbs")]
            ("rdma:node1:7700?device=../x", "device=NAME"),
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
        fn whatever_parses_prints_to_something_equal(text in "(tcp|shm|rdma)?:?[\\[\\]@/:a-z0-9 .]{0,20}(:[0-9]{1,5})?([?][a-z0-9=&]{0,12})?") {
            if let Ok(address) = text.parse::<FabricAddress>() {
                prop_assert_eq!(address.to_string().parse::<FabricAddress>().unwrap(), address);
            }
        }
    }
}
