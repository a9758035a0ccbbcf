//! Identifiers and counts that must not be mixed up.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::field::{self, FieldError};
use crate::limits;

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $field:literal, $check:path) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Checks length and characters.
            pub fn new(text: impl Into<String>) -> Result<Self, FieldError> {
                let text = text.into();
                $check($field, &text)?;
                Ok(Self(text))
            }

            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $type {
            type Error = FieldError;
            fn try_from(text: String) -> Result<Self, FieldError> {
                Self::new(text)
            }
        }

        impl FromStr for $type {
            type Err = FieldError;
            fn from_str(text: &str) -> Result<Self, FieldError> {
                Self::new(text)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }
    };
}

name_type!(
    /// A memory node's name: 1 to 63 of `A-Z a-z 0-9 . _ -`.
    NodeId, "node_id", field::name
);
name_type!(
    /// An agent's name: 1 to 63 of `A-Z a-z 0-9 . _ -`.
    AgentId, "agent_id", field::name
);
name_type!(
    /// The host that an agent runs on: a DNS name or address.
    HostName, "host", field::host
);

/// Who pays: a name, or empty for the default tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tenant(String);

impl Tenant {
    /// Checks length and characters. Empty is the default tenant.
    pub fn new(text: impl Into<String>) -> Result<Self, FieldError> {
        let text = text.into();
        if !text.is_empty() {
            field::name("tenant", &text)?;
        }
        Ok(Self(text))
    }

    /// As text; empty for the default tenant.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Tenant {
    type Error = FieldError;
    fn try_from(text: String) -> Result<Self, FieldError> {
        Self::new(text)
    }
}

impl From<Tenant> for String {
    fn from(tenant: Tenant) -> String {
        tenant.0
    }
}

macro_rules! nonzero_type {
    ($(#[$doc:meta])* $type:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "u64", into = "u64")]
        pub struct $type(u64);

        impl $type {
            /// Refuses zero, which is what an absent field reads as.
            pub fn new(value: u64) -> Result<Self, FieldError> {
                if value == 0 { Err(FieldError::Missing { field: $field }) } else { Ok(Self(value)) }
            }

            /// From random bits; the one zero becomes a one.
            pub fn from_random(bits: u64) -> Self {
                Self(bits.max(1))
            }

            /// As a number, never zero.
            pub fn get(self) -> u64 {
                self.0
            }
        }

        impl TryFrom<u64> for $type {
            type Error = FieldError;
            fn try_from(value: u64) -> Result<Self, FieldError> {
                Self::new(value)
            }
        }

        impl From<$type> for u64 {
            fn from(value: $type) -> u64 {
                value.0
            }
        }
    };
}

nonzero_type!(
    /// A lease, cluster-wide. Random, never reused.
    LeaseId, "lease_id"
);
nonzero_type!(
    /// One life of a node's process: random at start, so that a node that comes back empty is told apart.
    Incarnation, "incarnation"
);
nonzero_type!(
    /// The secret that opens an extent (an `rkey`, in verbs' terms). Not shown by `Debug`.
    AccessKey, "key"
);
nonzero_type!(
    /// What makes a repeated request known as such.
    RequestId, "request_id"
);
nonzero_type!(
    /// Orders all grants of a cluster: every grant has a greater one than those before it.
    Epoch, "epoch"
);

macro_rules! display_hex {
    ($($type:ident),*) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($type))
            }
        }
    )*};
}
display_hex!(LeaseId, Incarnation, RequestId);

impl fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessKey(..)")
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Epoch({})", self.0)
    }
}

/// An extent, cluster-wide: a node's first id plus the position in its pool. A node that comes back empty gets new
/// ids, so that an id never names other memory while somebody may still know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExtentId(pub u32);

impl fmt::Display for ExtentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A number of bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct ByteCount(pub u64);

impl ByteCount {
    /// Checks an extent's size: a power of two within [`limits::MIN_EXTENT_BYTES`] and [`limits::MAX_EXTENT_BYTES`].
    pub fn extent(bytes: u64) -> Result<Self, FieldError> {
        field::within(
            "extent_bytes",
            bytes,
            limits::MIN_EXTENT_BYTES,
            limits::MAX_EXTENT_BYTES,
        )?;
        if !bytes.is_power_of_two() {
            return Err(FieldError::Malformed {
                field: "extent_bytes",
                expected: "must be a power of two",
            });
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, unit) = match self.0 {
            n if n != 0 && n.is_multiple_of(1 << 30) => (n >> 30, "GiB"),
            n if n != 0 && n.is_multiple_of(1 << 20) => (n >> 20, "MiB"),
            n if n != 0 && n.is_multiple_of(1 << 10) => (n >> 10, "KiB"),
            n => (n, "B"),
        };
        write!(f, "{value} {unit}")
    }
}
