//! Where a node's data path is reached.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::field::{self, FieldError};
use crate::{limits, v1};

/// Which fabric carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FabricKind {
    /// Shared memory on one host.
    Shm,
    /// TCP.
    Tcp,
    /// Verbs, reliable connections.
    Rdma,
}

impl FabricKind {
    /// The scheme of its addresses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
        }
    }

    /// From the wire; `None` is "any".
    pub fn from_wire(number: i32) -> Result<Option<Self>, FieldError> {
        match v1::Fabric::try_from(number) {
            Ok(v1::Fabric::Unspecified) => Ok(None),
            Ok(v1::Fabric::Shm) => Ok(Some(Self::Shm)),
            Ok(v1::Fabric::Tcp) => Ok(Some(Self::Tcp)),
            Ok(v1::Fabric::Rdma) => Ok(Some(Self::Rdma)),
            Err(_) => Err(FieldError::Malformed {
                field: "fabric",
                expected: "not a fabric of this version",
            }),
        }
    }

    /// To the wire; `None` is "any".
    pub fn to_wire(kind: Option<Self>) -> i32 {
        match kind {
            None => v1::Fabric::Unspecified,
            Some(Self::Shm) => v1::Fabric::Shm,
            Some(Self::Tcp) => v1::Fabric::Tcp,
            Some(Self::Rdma) => v1::Fabric::Rdma,
        }
        .into()
    }
}

impl fmt::Display for FabricKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for FabricKind {
    type Err = FieldError;
    fn from_str(text: &str) -> Result<Self, FieldError> {
        match text {
            "shm" => Ok(Self::Shm),
            "tcp" => Ok(Self::Tcp),
            "rdma" => Ok(Self::Rdma),
            _ => Err(FieldError::Malformed {
                field: "fabric",
                expected: "use one of shm, tcp, rdma",
            }),
        }
    }
}

/// A data path's address: `shm:@NAME` (abstract Unix socket), `shm:/PATH`, `tcp:HOST:PORT`, `rdma:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DataAddress {
    /// A Unix socket over which the pool is handed out; the name starts with `@` (abstract) or `/`.
    Shm(String),
    /// A TCP listener.
    Tcp(HostPort),
    /// An RDMA listener.
    Rdma(HostPort),
}

const FIELD: &str = "data_addresses";
const FORM: FieldError = FieldError::Malformed {
    field: FIELD,
    expected: "use shm:@NAME, shm:/PATH, tcp:HOST:PORT or rdma:HOST:PORT",
};

impl DataAddress {
    /// Which fabric it belongs to.
    pub fn fabric(&self) -> FabricKind {
        match self {
            Self::Shm(_) => FabricKind::Shm,
            Self::Tcp(_) => FabricKind::Tcp,
            Self::Rdma(_) => FabricKind::Rdma,
        }
    }
}

impl FromStr for DataAddress {
    type Err = FieldError;
    fn from_str(text: &str) -> Result<Self, FieldError> {
        field::bounded(FIELD, text.len(), limits::MAX_ADDRESS)?;
        let (scheme, rest) = text.split_once(':').ok_or(FORM)?;
        match scheme {
            "shm" if rest.len() > 1 && (rest.starts_with('@') || rest.starts_with('/')) => {
                field::socket_name(FIELD, rest, MAX_SOCKET_NAME)?;
                Ok(Self::Shm(rest.to_owned()))
            }
            "tcp" => Ok(Self::Tcp(HostPort::parse(FIELD, rest)?.reachable(FIELD)?)),
            "rdma" => Ok(Self::Rdma(HostPort::parse(FIELD, rest)?.reachable(FIELD)?)),
            _ => Err(FORM),
        }
    }
}

impl fmt::Display for DataAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shm(name) => write!(f, "shm:{name}"),
            Self::Tcp(at) => write!(f, "tcp:{at}"),
            Self::Rdma(at) => write!(f, "rdma:{at}"),
        }
    }
}

impl TryFrom<String> for DataAddress {
    type Error = FieldError;
    fn try_from(text: String) -> Result<Self, FieldError> {
        text.parse()
    }
}

impl From<DataAddress> for String {
    fn from(address: DataAddress) -> String {
        address.to_string()
    }
}

/// `sun_path` has 108 bytes: one for the leading or final NUL.
pub(crate) const MAX_SOCKET_NAME: usize = 107;

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    /// A DNS name, an IPv4 address, or an IPv6 address without its brackets.
    pub host: String,
    /// The port; zero asks a listener for any.
    pub port: u16,
}

impl HostPort {
    /// Parses `HOST:PORT`, an IPv6 address in brackets.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, FieldError> {
        const EXPECTED: &str = "use HOST:PORT, an IPv6 address in brackets";
        let malformed = FieldError::Malformed {
            field,
            expected: EXPECTED,
        };
        let (host, port) = text.rsplit_once(':').ok_or(malformed.clone())?;
        // `u16::from_str` would take a sign.
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(malformed);
        }
        let Ok(port) = port.parse::<u16>() else {
            return Err(malformed);
        };
        let host = match host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            Some(inner) if inner.contains(':') => inner,
            Some(_) => return Err(malformed),
            None if host.contains(':') => return Err(malformed),
            None => host,
        };
        if host.contains(['[', ']']) {
            return Err(malformed);
        }
        field::host(field, host)?;
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl HostPort {
    /// Refuses port 0, which only listeners can use.
    pub(crate) fn reachable(self, field: &'static str) -> Result<Self, FieldError> {
        field::within(field, self.port.into(), 1, u16::MAX.into())?;
        Ok(self)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}
