//! Which device, port and address to use.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use super::DeviceChoice;
use super::sys::{Context, PortState};
use super::wire::Port;

/// Where the kernel lists its devices.
const DEVICES: &str = "/sys/class/infiniband";

/// Addresses of a port that are looked at; real tables have up to 256.
const MAX_GIDS: u16 = 256;

/// A port's address that a connection can come from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    device: String,
    port: u8,
    gid_index: u8,
    gid: [u8; 16],
    rank: Rank,
}

/// How welcome an address is, the best one last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// RoCE v1: not routed.
    RoceV1,
    InfiniBand,
    RoceV2OverIpv6,
    RoceV2OverIpv4,
    /// RoCE v2, from the very address that the control connection has.
    SameAddress,
}

/// An open device, and where on it to connect from.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) context: Arc<Context>,
    pub(super) name: String,
    pub(super) port: u8,
    pub(super) gid_index: u8,
    pub(super) gid: [u8; 16],
    pub(super) state: PortState,
}

impl Device {
    /// Opens the best device within the choice for a connection from this host's address `from`.
    pub(super) fn open(choice: &DeviceChoice, from: Option<IpAddr>) -> io::Result<Self> {
        let candidate = candidates(Path::new(DEVICES), choice, from)
            .into_iter()
            .max_by_key(|candidate| candidate.rank)
            .ok_or_else(|| none(choice))?;
        let context = Context::open(&candidate.device)
            .map_err(|error| explain(&format!("opening {}", candidate.device), &error))?;
        let state = context
            .port(candidate.port)
            .map_err(|error| explain("asking for the port's state", &error))?;
        if !state.active {
            return Err(io::Error::new(
                io::ErrorKind::NetworkDown,
                format!("port {} of {} is down", candidate.port, candidate.device),
            ));
        }
        Ok(Self {
            context,
            name: candidate.device,
            port: candidate.port,
            gid_index: candidate.gid_index,
            gid: candidate.gid,
            state,
        })
    }

    /// What the other end is told of it.
    pub(super) fn as_told(&self) -> Port {
        let limits = self.context.limits();
        Port {
            gid: self.gid,
            lid: self.state.lid,
            mtu: self.state.mtu,
            reads_in: limits.reads_in,
            reads_out: limits.reads_out,
            ethernet: self.state.ethernet,
        }
    }
}

fn none(choice: &DeviceChoice) -> io::Error {
    let what = if *choice == DeviceChoice::default() {
        "this host has no RDMA device with an active port; `farpage doctor` says how to get one"
            .to_owned()
    } else {
        format!(
            "this host has no RDMA device with an active port for {choice}; see {DEVICES}, or leave the choice out"
        )
    };
    io::Error::new(io::ErrorKind::NotFound, what)
}

/// A verb's error, with what to do about it.
pub(super) fn explain(doing: &str, error: &io::Error) -> io::Error {
    let advice = match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            ": too little memory may be locked; raise RLIMIT_MEMLOCK (`ulimit -l`, or LimitMEMLOCK= in the unit)"
        }
        Some(libc::EACCES | libc::EPERM) => ": /dev/infiniband is not open to this user",
        _ => "",
    };
    io::Error::new(error.kind(), format!("RDMA: {doing}: {error}{advice}"))
}

fn candidates(devices: &Path, choice: &DeviceChoice, from: Option<IpAddr>) -> Vec<Candidate> {
    let mut found = Vec::new();
    let mut names = entries(devices);
    names.retain(|name| choice.device.as_ref().is_none_or(|wanted| wanted == name));
    for device in names {
        let ports = devices.join(&device).join("ports");
        for port in entries(&ports)
            .iter()
            .filter_map(|port| port.parse::<u8>().ok())
        {
            let folder = ports.join(port.to_string());
            let active = read(&folder.join("state")).is_some_and(|state| state.contains("ACTIVE"));
            if !active || choice.port.is_some_and(|wanted| wanted != port) {
                continue;
            }
            for index in 0..MAX_GIDS {
                let Ok(gid_index) = u8::try_from(index) else {
                    break;
                };
                if choice.gid.is_some_and(|wanted| wanted != gid_index) {
                    continue;
                }
                let Some(gid) =
                    read(&folder.join(format!("gids/{index}"))).and_then(|text| parse_gid(&text))
                else {
                    continue;
                };
                let kind =
                    read(&folder.join(format!("gid_attrs/types/{index}"))).unwrap_or_default();
                let ethernet =
                    read(&folder.join("link_layer")).is_some_and(|link| link == "Ethernet");
                found.push(Candidate {
                    device: device.clone(),
                    port,
                    gid_index,
                    gid,
                    rank: rank(gid, &kind, ethernet, from),
                });
            }
        }
    }
    found
}

fn rank(gid: [u8; 16], kind: &str, ethernet: bool, from: Option<IpAddr>) -> Rank {
    let address = std::net::Ipv6Addr::from(gid);
    if !ethernet {
        return Rank::InfiniBand;
    }
    if kind != "RoCE v2" {
        return Rank::RoceV1;
    }
    if from.is_some_and(|from| from.to_canonical() == IpAddr::V6(address).to_canonical()) {
        return Rank::SameAddress;
    }
    if address.to_ipv4_mapped().is_some() {
        Rank::RoceV2OverIpv4
    } else {
        Rank::RoceV2OverIpv6
    }
}

/// `0000:0000:0000:0000:0000:ffff:0a4d:0001`; an empty place is all zeros.
fn parse_gid(text: &str) -> Option<[u8; 16]> {
    let address: std::net::Ipv6Addr = text.parse().ok()?;
    (!address.is_unspecified()).then(|| address.octets())
}

/// Names in a folder, sorted, so that the same host chooses alike each time.
fn entries(folder: &Path) -> Vec<String> {
    let found = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = found
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn read(file: &Path) -> Option<String> {
    fs::read_to_string(file)
        .ok()
        .map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> tempfile::TempDir {
        let host = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = host.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (device, state, address) in [
            ("rxe0", "4: ACTIVE\n", "0a4d:0001"),
            ("rxe1", "4: ACTIVE\n", "0a4d:0002"),
            ("down0", "1: DOWN\n", "0a4d:0003"),
        ] {
            put(&format!("{device}/ports/1/state"), state);
            put(&format!("{device}/ports/1/link_layer"), "Ethernet\n");
            put(
                &format!("{device}/ports/1/gids/0"),
                "fe80:0000:0000:0000:5054:00ff:fe77:0001\n",
            );
            put(&format!("{device}/ports/1/gid_attrs/types/0"), "RoCE v2\n");
            put(
                &format!("{device}/ports/1/gids/1"),
                &format!("0000:0000:0000:0000:0000:ffff:{address}\n"),
            );
            put(&format!("{device}/ports/1/gid_attrs/types/1"), "RoCE v2\n");
            put(
                &format!("{device}/ports/1/gids/2"),
                "0000:0000:0000:0000:0000:0000:0000:0000\n",
            );
        }
        host
    }

    fn best(choice: &str, from: Option<&str>) -> Option<(String, u8)> {
        let host = host();
        let choice = if choice.is_empty() {
            DeviceChoice::default()
        } else {
            choice.parse().unwrap()
        };
        candidates(host.path(), &choice, from.map(|from| from.parse().unwrap()))
            .into_iter()
            .max_by_key(|candidate| candidate.rank)
            .map(|candidate| (candidate.device, candidate.gid_index))
    }

    #[test]
    fn an_ipv4_address_is_preferred_and_the_control_connections_own_most() {
        assert_eq!(best("device=rxe0", None), Some(("rxe0".into(), 1)));
        assert_eq!(best("", Some("10.77.0.1")), Some(("rxe0".into(), 1)));
        assert_eq!(best("", Some("10.77.0.2")), Some(("rxe1".into(), 1)));
        assert_eq!(best("", Some("::ffff:10.77.0.2")), Some(("rxe1".into(), 1)));
        assert_eq!(
            best("device=rxe1&gid=0", Some("10.77.0.1")),
            Some(("rxe1".into(), 0))
        );
    }

    #[test]
    fn roce_v2_goes_before_infiniband_and_that_before_roce_v1() {
        let gid = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        let (local, mapped) = (gid("fe80::1"), gid("::ffff:10.77.0.1"));
        let from = |text: &str| Some(text.parse().unwrap());
        let ranked = [
            (
                rank(mapped, "IB/RoCE v1", true, from("10.77.0.1")),
                Rank::RoceV1,
            ),
            // Before Linux 5.15 InfiniBand's own table has no kinds.
            (rank(local, "", false, from("10.77.0.1")), Rank::InfiniBand),
            (
                rank(local, "RoCE v2", true, from("10.77.0.1")),
                Rank::RoceV2OverIpv6,
            ),
            (
                rank(mapped, "RoCE v2", true, from("10.77.0.2")),
                Rank::RoceV2OverIpv4,
            ),
            (
                rank(mapped, "RoCE v2", true, from("10.77.0.1")),
                Rank::SameAddress,
            ),
        ];
        for (rank, expected) in ranked {
            assert_eq!(rank, expected);
        }
        assert!(ranked.is_sorted_by_key(|(rank, _)| *rank));
        // Over IPv6 the control connection's own address is an IPv6 one.
        assert_eq!(
            rank(gid("2001:db8::7"), "RoCE v2", true, from("2001:db8::7")),
            Rank::SameAddress
        );
    }

    #[test]
    fn a_device_that_is_refused_memory_or_access_says_what_to_do() {
        for (code, advice) in [
            (libc::ENOMEM, "RLIMIT_MEMLOCK"),
            (libc::EACCES, "/dev/infiniband"),
        ] {
            let error = explain("registering", &io::Error::from_raw_os_error(code));
            assert!(error.to_string().contains(advice), "{error}");
        }
    }

    #[test]
    fn what_is_down_empty_or_not_there_is_not_chosen() {
        for choice in [
            "device=down0",
            "device=rxe0&gid=2",
            "device=rxe0&port=2",
            "device=none",
        ] {
            assert_eq!(best(choice, None), None, "{choice}");
        }
    }
}
