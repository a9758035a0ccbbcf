//! An endpoint's URL.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::address::{HostPort, MAX_SOCKET_NAME};
use crate::field::{self, FieldError};
use crate::limits;

/// Where a gRPC service is: `http://HOST:PORT` or `HOST:PORT`, `unix:/PATH`, `unix:@NAME` (abstract).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EndpointUrl {
    /// TCP.
    Tcp(HostPort),
    /// A Unix socket in the file system, by absolute path.
    UnixPath(String),
    /// A Unix socket in the abstract name space of the network namespace; without the `@`.
    UnixAbstract(String),
}

impl EndpointUrl {
    /// Parses a URL that came in the named field.
    pub fn parse_field(field: &'static str, text: &str) -> Result<Self, FieldError> {
        field::bounded(field, text.len(), limits::MAX_ADDRESS)?;
        if text.is_empty() {
            return Err(FieldError::Missing { field });
        }
        if let Some(name) = text.strip_prefix("unix:") {
            field::socket_name(field, name, MAX_SOCKET_NAME)?;
            return match name.strip_prefix('@') {
                Some("") => Err(FieldError::Malformed {
                    field,
                    expected: "a name must follow the @",
                }),
                Some(name) => Ok(Self::UnixAbstract(name.to_owned())),
                None if name.starts_with('/') => Ok(Self::UnixPath(name.to_owned())),
                None => Err(FieldError::Malformed {
                    field,
                    expected: "use unix:/ABSOLUTE/PATH or unix:@NAME",
                }),
            };
        }
        if text.starts_with("https:") {
            return Err(FieldError::Malformed {
                field,
                expected: "TLS is not supported yet, use http://HOST:PORT",
            });
        }
        let rest = text.strip_prefix("http://").unwrap_or(text);
        Ok(Self::Tcp(HostPort::parse(
            field,
            rest.strip_suffix('/').unwrap_or(rest),
        )?))
    }

    /// Whether both ends are on this host for sure.
    pub fn is_unix(&self) -> bool {
        !matches!(self, Self::Tcp(_))
    }
}

impl FromStr for EndpointUrl {
    type Err = FieldError;
    fn from_str(text: &str) -> Result<Self, FieldError> {
        Self::parse_field("url", text)
    }
}

impl fmt::Display for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(at) => write!(f, "http://{at}"),
            Self::UnixPath(path) => write!(f, "unix:{path}"),
            Self::UnixAbstract(name) => write!(f, "unix:@{name}"),
        }
    }
}

impl TryFrom<String> for EndpointUrl {
    type Error = FieldError;
    fn try_from(text: String) -> Result<Self, FieldError> {
        text.parse()
    }
}

impl From<EndpointUrl> for String {
    fn from(url: EndpointUrl) -> String {
        url.to_string()
    }
}
