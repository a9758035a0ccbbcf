//! What pages can travel over.

use crate::doctor::report::Report;

/// Where the kernel lists its RDMA devices.
const DEVICES: &str = "/sys/class/infiniband";

/// The devices, each with the state of its first port.
fn devices() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(DEVICES) else {
        return Vec::new();
    };
    let mut devices: Vec<String> = entries
        .flatten()
        .map(|entry| {
            let state =
                std::fs::read_to_string(entry.path().join("ports/1/state")).unwrap_or_default();
            let state = state
                .split(':')
                .next_back()
                .unwrap_or_default()
                .trim()
                .to_ascii_lowercase();
            let name = entry.file_name().to_string_lossy().into_owned();
            if state.is_empty() {
                name
            } else {
                format!("{name} ({state})")
            }
        })
        .collect();
    devices.sort_unstable();
    devices
}

pub(crate) fn check(report: &mut Report) {
    let purpose = "--fabric rdma: pages fetched by one-sided reads, without the memory node's CPU";
    let found = devices();
    if found.is_empty() {
        let remedy = "an InfiniBand or RoCE card; or, over an ordinary network card with Debian's own kernel: \
                      modprobe rdma_rxe; rdma link add rxe0 type rxe netdev IFACE; else --fabric tcp or shm";
        report.optional("rdma_device", "none", purpose, remedy);
    } else {
        report.ok("rdma_device", found.join(", "), purpose);
    }
}
