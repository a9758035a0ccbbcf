//! A hundred connections come and go, and nothing of them is left: at neither end, both being this process.

// Helpers outside of #[test] functions may panic here as well.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::{Client, Node, Transport, deadline};
use farpage_fabric::{Endpoint, RemoteSlice, WorkId};

const CONNECTIONS: u64 = 100;
const EXTENT: u32 = 1;

/// What is held unchanged for so long stays.
const FOR_GOOD: Duration = Duration::from_secs(5);

/// How much of what.
type Held = Vec<(String, usize)>;

/// Counts are of this whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn a_hundred_connections_leave_nothing() {
    common::TRANSPORTS
        .into_iter()
        .for_each(a_hundred_connections);
}

#[cfg(feature = "verbs")]
#[test]
fn a_hundred_connections_over_rdma_leave_nothing() {
    for windows in [true, false] {
        let transport = Transport::Rdma { windows };
        if common::can_run("a_hundred_connections_leave_nothing", transport) {
            a_hundred_connections(transport);
        }
    }
}

fn a_hundred_connections(transport: Transport) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let node = Node::start(transport);
    // What is made once for all stays.
    come_and_go(&node, 0);
    let before = settled(None);
    #[cfg(feature = "verbs")]
    if let Transport::Rdma { .. } = transport {
        let counted = before.iter().any(|(what, _)| what == "qp");
        assert!(
            counted,
            "`rdma resource show` (Debian: iproute2) counts no queue pairs: {before:?}"
        );
    }
    for round in 1..=CONNECTIONS {
        come_and_go(&node, round);
    }
    let after = settled(Some(&before));
    println!("{transport:?}: {before:?} before, {after:?} after {CONNECTIONS} connections");
    assert_eq!(after, before);
}

/// Uses all lanes, and leaves in one of three ways: in order, with requests under way, after its grant was revoked.
fn come_and_go(node: &Node, round: u64) {
    let key = 2 * round + 1;
    node.access.grant(EXTENT, key).unwrap();
    let mut client = Client::new(node.connect());
    client.write(EXTENT, key, 0, b"here").unwrap();
    assert_eq!(client.read(EXTENT, key, 0, 4).unwrap(), b"here");
    let remote = RemoteSlice {
        extent: EXTENT,
        key,
        offset: 0,
    };
    let slice = client.slice(0, 4096);
    let endpoint = &mut client.endpoint;
    endpoint.post_read_ahead(WorkId(0), slice, remote).unwrap();
    endpoint.flush();
    client.complete(1);
    match round % 3 {
        0 => {}
        1 => {
            for id in 0..8 {
                let endpoint = &mut client.endpoint;
                endpoint.post_read(WorkId(id), slice, remote).unwrap();
            }
            client.endpoint.flush();
        }
        _ => {
            node.access.revoke(EXTENT).unwrap();
            assert!(client.read(EXTENT, key, 0, 4).is_err());
            return;
        }
    }
    drop(client);
    let end = deadline();
    while let Err(error) = node.access.revoke(EXTENT) {
        assert!(Instant::now() < end, "{error}");
    }
}

/// What is held once it is as much as `wanted`; or what is held for good. A node learns of a connection's end from its
/// socket.
fn settled(wanted: Option<&Held>) -> Held {
    let (mut last, mut since) = (held(), Instant::now());
    while Some(&last) != wanted && since.elapsed() < FOR_GOOD {
        std::thread::sleep(Duration::from_millis(100));
        let now = held();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    last
}

/// How many descriptors this process has open, and what the kernel counts of the devices' objects, all processes' together.
/// Windows are not counted there, but the kernel keeps a protection domain for as long as there is a window in it.
fn held() -> Held {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut held = vec![("descriptors".to_owned(), descriptors)];
    if let Ok(out) = Command::new("rdma").args(["resource", "show"]).output() {
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let words: Vec<&str> = text.split_whitespace().collect();
        let pairs = words.iter().zip(words.iter().skip(1));
        held.extend(
            pairs.filter_map(|(what, count)| Some(((*what).to_owned(), count.parse().ok()?))),
        );
    }
    held
}
