//! What pages can travel over.

use std::fs;
use std::net::Ipv6Addr;
use std::path::Path;

use farpage_agent::OwnDevice;

use crate::doctor::report::Report;

/// Where the kernel lists its RDMA devices.
const DEVICES: &str = "/sys/class/infiniband";

/// Names in a folder, sorted; none where there is no such folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    names
}

/// A one-line file, such as `4: ACTIVE`, without the number.
fn word(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let word = text.trim().rsplit(": ").next()?.to_owned();
    (!word.is_empty()).then_some(word)
}

/// A port's addresses, each with its index for `--device`.
fn gids(port: &Path) -> Vec<String> {
    let mut indexes: Vec<u8> = names(&port.join("gids"))
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    indexes.sort_unstable();
    let described = indexes.into_iter().filter_map(|index| {
        let text = fs::read_to_string(port.join(format!("gids/{index}"))).ok()?;
        let gid: Ipv6Addr = text.trim().parse().ok()?;
        let kind = word(&port.join(format!("gid_attrs/types/{index}"))).unwrap_or_default();
        let address = gid
            .to_ipv4_mapped()
            .map_or(gid.to_string(), |address| address.to_string());
        (!gid.is_unspecified()).then(|| format!("gid {index} {address} {kind}").trim().to_owned())
    });
    described.collect()
}

/// The devices' ports, each with its state, rate and addresses, and whether one is up.
fn ports(devices: &Path) -> (Vec<String>, bool) {
    let (mut found, mut up) = (Vec::new(), false);
    for device in names(devices) {
        let ports = devices.join(&device).join("ports");
        for number in names(&ports) {
            let port = ports.join(&number);
            let state = word(&port.join("state")).unwrap_or_default();
            up |= state == "ACTIVE";
            let mut parts = vec![state.to_ascii_lowercase()];
            parts.extend(word(&port.join("link_layer")));
            parts.extend(word(&port.join("rate")));
            parts.extend(gids(&port));
            found.push(format!("{device} port {number} ({})", parts.join(", ")));
        }
    }
    (found, up)
}

pub(crate) fn check(report: &mut Report) {
    let purpose = "--fabric rdma: pages fetched by one-sided reads, without the memory node's CPU";
    let (found, up) = ports(Path::new(DEVICES));
    if found.is_empty() {
        let remedy = "an InfiniBand or RoCE card; or, over an ordinary network card with Debian's own kernel: \
                      modprobe rdma_rxe; rdma link add rxe0 type rxe netdev IFACE; else --fabric tcp or shm";
        report.optional("rdma_device", "none", purpose, remedy);
    } else if up {
        report.ok("rdma_device", found.join("; "), purpose);
        limits(report);
    } else {
        let remedy = "bring a port up: ip link set IFACE up for RoCE; a cable and a subnet manager for InfiniBand";
        report.optional("rdma_device", found.join("; "), purpose, remedy);
    }
}

/// Of the device that is used where none is chosen, as its own library tells them.
fn limits(report: &mut Report) {
    let purpose = "how many programs and nodes one device is enough for: three queue pairs for each pager and node";
    match OwnDevice::default().limits() {
        Ok(limits) => report.ok("rdma_limits", limits, purpose),
        Err(missing) => {
            let remedy = "what it says; until then --fabric tcp or shm";
            report.optional(
                "rdma_limits",
                format!("unknown: {missing}"),
                purpose,
                remedy,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_listed_with_state_and_addresses() {
        let host = tempfile::tempdir().unwrap();
        let port = host.path().join("rxe0/ports/1");
        for (name, text) in [
            ("state", "4: ACTIVE\n"),
            ("link_layer", "Ethernet\n"),
            ("rate", "2.5 Gb/sec (1X SDR)\n"),
            ("gids/0", "0000:0000:0000:0000:0000:0000:0000:0000\n"),
            ("gids/1", "0000:0000:0000:0000:0000:ffff:0a4d:0001\n"),
            ("gid_attrs/types/1", "RoCE v2\n"),
        ] {
            let file = port.join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        let (found, up) = ports(host.path());
        let expected =
            "rxe0 port 1 (active, Ethernet, 2.5 Gb/sec (1X SDR), gid 1 10.77.0.1 RoCE v2)";
        assert_eq!((found, up), (vec![expected.to_owned()], true));
        assert_eq!(ports(&host.path().join("none")), (Vec::new(), false));
    }
}
