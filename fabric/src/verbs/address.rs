//! The part of an address that chooses a device.

use std::fmt;
use std::str::FromStr;

/// The longest device name that the kernel gives.
const MAX_NAME: usize = 63;

/// Which of this host's devices, ports and addresses to use; what is not given is chosen. Written as
/// `device=NAME&port=N&gid=N`, in any selection and order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct DeviceChoice {
    /// As in `/sys/class/infiniband`.
    pub device: Option<String>,
    /// From 1 on.
    pub port: Option<u8>,
    /// Index in the port's table of addresses.
    pub gid: Option<u8>,
}

/// Why a text chooses no device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} chooses no RDMA device; write device=NAME, port=N (from 1) or gid=N, joined by &")]
pub struct DeviceChoiceError(pub String);

impl FromStr for DeviceChoice {
    type Err = DeviceChoiceError;

    fn from_str(text: &str) -> Result<Self, DeviceChoiceError> {
        let refuse = || DeviceChoiceError(text.to_owned());
        let mut choice = Self::default();
        for part in text.split('&') {
            match part.split_once('=') {
                Some(("device", name)) if choice.device.is_none() && is_name(name) => {
                    choice.device = Some(name.to_owned());
                }
                Some(("port", number)) if choice.port.is_none() => {
                    let number = number.parse().ok().filter(|&port| port > 0);
                    choice.port = Some(number.ok_or_else(refuse)?);
                }
                Some(("gid", number)) if choice.gid.is_none() => {
                    choice.gid = Some(number.parse().map_err(|_| refuse())?);
                }
                _ => return Err(refuse()),
            }
        }
        Ok(choice)
    }
}

/// Names are parts of paths below `/sys`.
fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    (1..=MAX_NAME).contains(&name.len()) && name.chars().all(plain) && !name.starts_with('.')
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            self.device.as_ref().map(|name| format!("device={name}")),
            self.port.map(|port| format!("port={port}")),
            self.gid.map(|gid| format!("gid={gid}")),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        f.write_str(&parts.join("&"))
    }
}
