//! The endpoint that misbehaves on purpose does so as its plan says.

// Helpers outside of #[test] functions may panic here as well.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::{Client, Node, TRANSPORTS, Transport, WINDOW, deadline};
use farpage_fabric::faulty::{FaultPlan, FaultyEndpoint};
use farpage_fabric::shm::ShmEndpoint;
use farpage_fabric::tcp::TcpEndpoint;
use farpage_fabric::{Completion, Endpoint, PostError, RemoteSlice, WorkError, WorkId};

const KEY: u64 = 7;
const REMOTE: RemoteSlice = RemoteSlice {
    extent: 0,
    key: KEY,
    offset: 0,
};

fn faulty(node: &Node, plan: FaultPlan) -> FaultyEndpoint<Box<dyn Endpoint>> {
    FaultyEndpoint::new(node.connect(), plan).unwrap()
}

fn node(transport: Transport) -> Node {
    let node = Node::start(transport);
    node.access.grant(0, KEY).unwrap();
    node
}

#[test]
fn without_faults_it_changes_nothing() {
    for transport in TRANSPORTS {
        let node = node(transport);
        let mut client = Client::new(Box::new(faulty(&node, FaultPlan::default())));
        client.write(0, KEY, 3, b"plain").unwrap();
        assert_eq!(client.read(0, KEY, 3, 5).unwrap(), b"plain");
        assert_eq!(
            client.read(0, 1, 3, 5).unwrap_err(),
            WorkError::AccessDenied
        );
        assert_eq!(client.endpoint.credits(), WINDOW);
    }
}

/// Posts reads and polls, for a while; returns what came, poll by poll, and the bytes read.
fn run(plan: FaultPlan) -> (Vec<Vec<Completion>>, u128, usize) {
    let node = node(Transport::Shm);
    let mut endpoint = faulty(&node, plan);
    let local = common::memory(1 << 20);
    let region = endpoint.register(local.clone());
    let mut polls = Vec::new();
    let mut next = 0;
    for _ in 0..500 {
        if endpoint.credits() > 0 {
            let slice = farpage_fabric::LocalSlice {
                region,
                offset: next % 256 * 4096,
                len: 4096,
            };
            match endpoint.post_read(WorkId(next), slice, REMOTE) {
                Ok(()) => next += 1,
                Err(error) => assert_eq!(error, PostError::Disconnected),
            }
        }
        let mut out = Vec::new();
        assert_eq!(endpoint.poll(&mut out), out.len());
        polls.push(out);
    }
    (polls, local.hash128(0, 1 << 20).unwrap(), endpoint.lost())
}

#[test]
fn the_seed_decides() {
    let plan = FaultPlan {
        seed: 1,
        lost: 20,
        delayed: 300,
        longest_delay: 9,
        corrupted: 100,
        reordered: true,
        disconnect_after: None,
    };
    let first = run(plan);
    assert!(first == run(plan));
    assert!(first != run(FaultPlan { seed: 2, ..plan }));
    assert!(first.2 > 0, "nothing was lost");
    let ids: Vec<u64> = first
        .0
        .concat()
        .iter()
        .map(|completion| completion.id.0)
        .collect();
    assert!(!ids.is_sorted(), "nothing was overtaken");
    let zeros = common::memory(1 << 20).hash128(0, 1 << 20).unwrap();
    assert_ne!(first.1, zeros, "nothing was corrupted");
    assert_eq!(
        run(FaultPlan {
            corrupted: 0,
            ..plan
        })
        .1,
        zeros
    );
}

#[test]
fn lost_requests_hold_their_credits_until_the_connection_breaks() {
    for transport in TRANSPORTS {
        let node = node(transport);
        let mut endpoint = faulty(
            &node,
            FaultPlan {
                seed: 3,
                lost: 500,
                ..FaultPlan::default()
            },
        );
        let region = endpoint.register(common::memory(4096));
        let slice = farpage_fabric::LocalSlice {
            region,
            offset: 0,
            len: 4096,
        };
        for i in 0..WINDOW as u64 {
            endpoint.post_write(WorkId(i), slice, REMOTE).unwrap();
        }
        let lost = endpoint.lost();
        assert!(lost > 0 && lost < WINDOW);
        let mut out = Vec::new();
        let end = deadline();
        while out.len() < WINDOW - lost {
            assert!(std::time::Instant::now() < end);
            endpoint.poll(&mut out);
        }
        assert!(out.iter().all(|completion| completion.result.is_ok()));
        assert_eq!(endpoint.poll(&mut out), 0);
        assert_eq!(endpoint.credits(), WINDOW - lost);
        endpoint.disconnect();
        common::sleep_on(&mut endpoint);
        assert_eq!(endpoint.poll(&mut out), lost);
        assert!(
            out[WINDOW - lost..]
                .iter()
                .all(|completion| completion.result == Err(WorkError::Disconnected))
        );
        let mut ids: Vec<u64> = out.iter().map(|completion| completion.id.0).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..WINDOW as u64));
        assert!(!endpoint.is_connected());
        assert_eq!(
            endpoint.post_write(WorkId(0), slice, REMOTE),
            Err(PostError::Disconnected)
        );
    }
}

#[test]
fn it_disconnects_when_told_and_a_delayed_completion_wakes_its_sleeper() {
    let plan = FaultPlan {
        delayed: 1000,
        longest_delay: 20,
        disconnect_after: Some(10),
        ..FaultPlan::default()
    };
    for transport in TRANSPORTS {
        let node = node(transport);
        let mut client = Client::new(Box::new(faulty(&node, plan)));
        for _ in 0..9 {
            assert_eq!(client.read(0, KEY, 0, 8).unwrap(), [0; 8]);
        }
        client
            .endpoint
            .post_read(WorkId(100), client.slice(0, 8), REMOTE)
            .unwrap();
        let refused = client
            .endpoint
            .post_read(WorkId(101), client.slice(0, 8), REMOTE);
        assert_eq!(refused, Err(PostError::Disconnected));
        assert_eq!(
            client.complete(1),
            [Completion {
                id: WorkId(100),
                result: Err(WorkError::Disconnected)
            }]
        );
    }
}

#[test]
fn a_real_disconnection_ends_the_lost_ones_too() {
    for transport in TRANSPORTS {
        let mut node = node(transport);
        let mut endpoint = faulty(
            &node,
            FaultPlan {
                lost: 1000,
                ..FaultPlan::default()
            },
        );
        let region = endpoint.register(common::memory(4096));
        let slice = farpage_fabric::LocalSlice {
            region,
            offset: 0,
            len: 4096,
        };
        for i in 0..4 {
            endpoint.post_read(WorkId(i), slice, REMOTE).unwrap();
        }
        node.responder.stop();
        let mut out = Vec::new();
        let end = deadline();
        while out.len() < 4 {
            assert!(std::time::Instant::now() < end);
            endpoint.poll(&mut out);
        }
        assert!(
            out.iter()
                .all(|completion| completion.result == Err(WorkError::Disconnected))
        );
    }
}

#[test]
fn it_wraps_concrete_endpoints_too() {
    fn wraps<E: Endpoint>() {
        let _ = FaultyEndpoint::<E>::new;
    }
    wraps::<TcpEndpoint>();
    wraps::<ShmEndpoint>();
}

#[test]
fn plans_parse_and_say_what_is_wrong() {
    let plan: FaultPlan = "seed=7,corrupted=5,reordered=1,disconnect_after=4000"
        .parse()
        .unwrap();
    let meant = FaultPlan {
        seed: 7,
        corrupted: 5,
        reordered: true,
        disconnect_after: Some(4000),
        ..FaultPlan::default()
    };
    assert_eq!(plan, meant);
    for wrong in ["", "seed", "seed=x", "sede=7", "seed=7,"] {
        let error = wrong.parse::<FaultPlan>().unwrap_err().to_string();
        assert!(error.contains("write name=number"), "{error}");
    }
}
