//! Processes that are killed in the middle: requesters and responders.

// Helpers outside of #[test] functions may panic here as well.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Client, Node, Responder, Transport, WINDOW, deadline};
use farpage_fabric::{
    Endpoint, FabricAddress, MAX_TRANSFER, RemoteSlice, WorkError, WorkId, connect,
};

/// Tells the test below to be the other process.
const ROLE: &str = "FARPAGE_TEST_ROLE";
const KEY: u64 = 7;

/// Not a test of its own: what the other process runs. Serves, or writes for ever, until it is killed.
#[test]
fn the_other_process() {
    match std::env::var(ROLE).as_deref() {
        Ok(role @ ("tcp" | "shm" | "rdma")) => {
            let node = Node::start(match role {
                "tcp" => Transport::Tcp,
                "shm" => Transport::Shm,
                #[cfg(feature = "verbs")]
                "rdma" => Transport::Rdma { windows: true },
                other => panic!("no transport {other}"),
            });
            node.access.grant(0, KEY).unwrap();
            println!("\nready {}", address(&node));
            std::thread::sleep(common::PATIENCE);
        }
        Ok(address) => {
            let mut client =
                Client::new(connect(&address.parse().unwrap(), WINDOW, deadline()).unwrap());
            let remote = RemoteSlice {
                extent: 0,
                key: KEY,
                offset: 0,
            };
            let mut out = Vec::new();
            println!("\nready");
            let end = deadline();
            while std::time::Instant::now() < end {
                while client
                    .endpoint
                    .post_write(WorkId(0), client.slice(0, MAX_TRANSFER), remote)
                    .is_ok()
                {}
                client.endpoint.poll(&mut out);
                out.clear();
            }
        }
        Err(_) => {}
    }
}

fn address(node: &Node) -> FabricAddress {
    match &node.responder {
        Responder::Tcp(responder) => {
            let address = responder.local_addr();
            FabricAddress::Tcp {
                host: address.ip().to_string(),
                port: address.port(),
            }
        }
        Responder::Shm(responder) => FabricAddress::Shm(responder.address().clone()),
        #[cfg(feature = "verbs")]
        Responder::Rdma(responder) => format!("rdma:{}", responder.local_addr()).parse().unwrap(),
    }
}

/// Starts the other process; returns what it says once it is ready.
fn spawn(role: &str) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_other_process", "--nocapture"])
        .env(ROLE, role)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines.find_map(|line| {
        line.unwrap()
            .strip_prefix("ready")
            .map(|rest| rest.trim().to_owned())
    });
    (child, ready.expect("the other process failed"))
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_requester_that_is_killed_inside_an_extent_does_not_keep_it() {
    common::TRANSPORTS.into_iter().for_each(kill_requesters);
}

#[cfg(feature = "verbs")]
#[test]
fn a_requester_that_is_killed_over_rdma_does_not_keep_an_extent() {
    let transport = Transport::Rdma { windows: true };
    if common::can_run("a_requester_that_is_killed", transport) {
        kill_requesters(transport);
    }
}

fn kill_requesters(transport: Transport) {
    let node = Node::start(transport);
    for round in 0..5 {
        node.access.grant(0, KEY).unwrap();
        let (child, _) = spawn(&address(&node).to_string());
        std::thread::sleep(Duration::from_millis(5 + round));
        kill(child);
        // The responder learns of the death from the socket; on a busy machine that may take a while.
        let end = deadline();
        while let Err(error) = node.access.revoke(0) {
            assert!(std::time::Instant::now() < end, "{error}");
        }
        node.pool.zero(0, MAX_TRANSFER as usize).unwrap();
    }
}

#[test]
fn a_responder_that_is_killed_completes_everything_once() {
    for (role, round) in [("tcp", 0), ("tcp", 1), ("tcp", 2), ("shm", 3)] {
        kill_a_responder(role, round);
    }
}

#[cfg(feature = "verbs")]
#[test]
fn a_responder_that_is_killed_over_rdma_completes_everything_once() {
    if common::can_run(
        "a_responder_that_is_killed",
        Transport::Rdma { windows: true },
    ) {
        (0..3).for_each(|round| kill_a_responder("rdma", 10 * round));
    }
}

fn kill_a_responder(role: &str, round: u64) {
    {
        let (child, address) = spawn(role);
        let address: FabricAddress = address.parse().unwrap();
        let mut client = Client::new(connect(&address, WINDOW, deadline()).unwrap());
        let remote = RemoteSlice {
            extent: 0,
            key: KEY,
            offset: 0,
        };
        for i in 0..WINDOW as u64 {
            client
                .endpoint
                .post_read(WorkId(i), client.slice(0, MAX_TRANSFER), remote)
                .unwrap();
        }
        client.endpoint.flush();
        std::thread::sleep(Duration::from_millis(round));
        kill(child);
        let completions = client.complete(WINDOW);
        let mut ids: Vec<u64> = completions
            .iter()
            .map(|completion| completion.id.0)
            .collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..WINDOW as u64));
        assert!(
            completions
                .iter()
                .all(|c| matches!(c.result, Ok(()) | Err(WorkError::Disconnected)))
        );
        let end = deadline();
        while client.endpoint.is_connected() {
            assert!(std::time::Instant::now() < end, "the death went unnoticed");
            client.endpoint.poll(&mut Vec::new());
        }
    }
}
