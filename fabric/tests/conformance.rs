//! What every transport must do, run against each one for real.

// Helpers outside of #[test] functions may panic here as well.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use common::{
    Client, EXTENT_BYTES, EXTENTS, LOCAL_BYTES, Node, Random, Transport, WINDOW, deadline, sleep_on,
};
use farpage_fabric::{
    LocalSlice, MAX_TRANSFER, PostError, RegionId, RemoteSlice, WorkError, WorkId,
};

/// Each test over each transport, as `over_tcp::reads_return_what_was_written`.
macro_rules! conformance {
    ($($test:ident)*) => {
        conformance!(over_tcp, Transport::Tcp => $($test)*);
        conformance!(over_shm, Transport::Shm => $($test)*);
        #[cfg(feature = "verbs")]
        conformance!(over_rdma, Transport::Rdma { windows: true } => $($test)*);
        #[cfg(feature = "verbs")]
        conformance!(over_rdma_without_windows, Transport::Rdma { windows: false } => $($test)*);
    };
    ($module:ident, $transport:expr => $($test:ident)*) => {
        mod $module {
            use crate::common::{Transport, can_run};
            $(
                #[test]
                fn $test() {
                    if can_run(stringify!($test), $transport) {
                        super::$test($transport);
                    }
                }
            )*
        }
    };
}

conformance! {
    reads_return_what_was_written
    slices_outside_are_refused
    stale_and_guessed_keys_are_refused
    after_a_revocation_nothing_touches_the_extent
    the_window_bounds_what_is_outstanding
    a_refusal_among_a_batch_spoils_nothing_else
    a_stop_completes_everything_once_and_refuses_posts
    an_idle_endpoint_notices_that_its_responder_stopped
    a_requester_that_goes_in_mid_transfer_harms_nobody
    two_endpoints_see_each_others_writes
    random_operations_agree_with_a_model
    deep_windows_of_large_transfers_do_not_lock_up
    registering_twice_gives_the_same_region
    who_sleeps_hears_of_what_has_completed
}

fn reads_return_what_was_written(transport: Transport) {
    let node = Node::start(transport);
    node.access.grant(2, 77).unwrap();
    let mut client = Client::new(node.connect());
    let mut random = Random(1);
    for len in [1, 16, 4095, 4096, 4097, 65536, 65537, MAX_TRANSFER as usize] {
        let bytes = random.bytes(len);
        let offset = random.below(EXTENT_BYTES - len as u64);
        client.write(2, 77, offset, &bytes).unwrap();
        assert!(
            client.read(2, 77, offset, len as u32).unwrap() == bytes,
            "{len} bytes"
        );
        let mut there = vec![0; len];
        node.pool
            .read(2 * EXTENT_BYTES + offset, &mut there)
            .unwrap();
        assert!(there == bytes);
    }
    assert_eq!(client.read(2, 77, 5, 0).unwrap(), []);
    client.write(2, 77, EXTENT_BYTES, &[]).unwrap();
}

fn slices_outside_are_refused(transport: Transport) {
    let node = Node::start(transport);
    node.access.grant(0, 7).unwrap();
    let mut client = Client::new(node.connect());
    for (offset, len) in [
        (EXTENT_BYTES - 10, 11),
        (EXTENT_BYTES, 1),
        (u64::MAX, 1),
        (u64::MAX - 5, 4096),
    ] {
        assert_eq!(
            client.read(0, 7, offset, len).unwrap_err(),
            WorkError::RemoteBounds
        );
        assert_eq!(
            client.write(0, 7, offset, &vec![1; len as usize]),
            Err(WorkError::RemoteBounds)
        );
    }
    let remote = RemoteSlice {
        extent: 0,
        key: 7,
        offset: 0,
    };
    let end = LOCAL_BYTES as u64;
    for (local, error) in [
        (client.slice(end - 5, 6), PostError::LocalBounds),
        (client.slice(u64::MAX, 6), PostError::LocalBounds),
        (
            LocalSlice {
                region: RegionId(9),
                offset: 0,
                len: 1,
            },
            PostError::LocalBounds,
        ),
        (client.slice(0, MAX_TRANSFER + 1), PostError::TooLarge),
    ] {
        assert_eq!(
            client.endpoint.post_read(WorkId(0), local, remote),
            Err(error)
        );
        assert_eq!(
            client.endpoint.post_write(WorkId(0), local, remote),
            Err(error)
        );
    }
    assert_eq!(client.endpoint.credits(), WINDOW);
    // It still works.
    client.write(0, 7, EXTENT_BYTES - 3, b"end").unwrap();
    assert_eq!(client.read(0, 7, EXTENT_BYTES - 3, 3).unwrap(), b"end");
}

fn stale_and_guessed_keys_are_refused(transport: Transport) {
    let node = Node::start(transport);
    node.access.grant(0, 7).unwrap();
    node.access.grant(1, 8).unwrap();
    let mut client = Client::new(node.connect());
    client.write(0, 7, 0, b"secret").unwrap();
    for (extent, key) in [
        (0, 8),
        (0, 0),
        (1, 7),
        (2, 7),
        (2, 0),
        (EXTENTS, 7),
        (u32::MAX, 0),
    ] {
        assert_eq!(
            client.read(extent, key, 0, 6).unwrap_err(),
            WorkError::AccessDenied,
            "{extent} {key}"
        );
        assert_eq!(
            client.write(extent, key, 0, b"spoilt"),
            Err(WorkError::AccessDenied),
            "{extent} {key}"
        );
    }
    node.access.revoke(0).unwrap();
    assert_eq!(
        client.read(0, 7, 0, 6).unwrap_err(),
        WorkError::AccessDenied
    );
    node.pool.zero(0, EXTENT_BYTES as usize).unwrap();
    node.access.grant(0, 9).unwrap();
    assert_eq!(
        client.write(0, 7, 0, b"spoilt"),
        Err(WorkError::AccessDenied)
    );
    assert_eq!(client.read(0, 9, 0, 6).unwrap(), [0; 6]);
}

fn after_a_revocation_nothing_touches_the_extent(transport: Transport) {
    let node = Node::start(transport);
    let done = AtomicBool::new(false);
    let end = deadline();
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let (node, done) = (&node, &done);
            scope.spawn(move || {
                let mut client = Client::new(node.connect());
                client.local.write(0, &vec![0xff; 65536]).unwrap();
                let mut out = Vec::new();
                let mut posted = 0;
                while !done.load(Ordering::Acquire) {
                    assert!(Instant::now() < end);
                    // All keys that there ever are, so that most are stale.
                    let remote = RemoteSlice {
                        extent: 1,
                        key: 1 + posted % 50,
                        offset: thread * 65536,
                    };
                    let local = client.slice(0, 65536);
                    while client
                        .endpoint
                        .post_write(WorkId(posted), local, remote)
                        .is_ok()
                    {
                        posted += 1;
                    }
                    client.endpoint.poll(&mut out);
                    out.clear();
                }
            });
        }
        for round in 0..50 {
            node.access.grant(1, 1 + round).unwrap();
            std::thread::sleep(std::time::Duration::from_micros(500));
            node.access.revoke(1).unwrap();
            // Ours alone now: what we write stays.
            let pool = &node.pool;
            let start = EXTENT_BYTES;
            pool.zero(start, 2 * 65536).unwrap();
            let clean = pool.hash128(start, 2 * 65536).unwrap();
            std::thread::sleep(std::time::Duration::from_micros(200));
            assert_eq!(
                pool.hash128(start, 2 * 65536).unwrap(),
                clean,
                "round {round}"
            );
        }
        done.store(true, Ordering::Release);
    });
}

/// Whoever has asked for something and arms before looking is told: at once, or by the descriptor. A pager that slept on what shared
/// memory had answered as it was asked gave a forked child its first far page 100 ms late.
fn who_sleeps_hears_of_what_has_completed(transport: Transport) {
    let node = Node::start(transport);
    node.access.grant(0, 7).unwrap();
    let mut client = Client::new(node.connect());
    let remote = RemoteSlice {
        extent: 0,
        key: 7,
        offset: 0,
    };
    for _ in 0..3 {
        let (id, local) = (client.id(), client.slice(0, 4096));
        client.endpoint.post_read(id, local, remote).unwrap();
        client.endpoint.flush();
        if client.endpoint.wait_fd().is_none() {
            assert!(!client.endpoint.arm(), "nothing would wake who sleeps now");
        }
        sleep_on(&mut *client.endpoint);
        assert_eq!(client.complete(1)[0].id, id);
    }
}

fn the_window_bounds_what_is_outstanding(transport: Transport) {
    let node = Node::start(transport);
    node.access.grant(0, 7).unwrap();
    let mut client = Client::new(node.connect_with(5));
    assert_eq!(
        (client.endpoint.window(), client.endpoint.credits()),
        (5, 5)
    );
    let remote = RemoteSlice {
        extent: 0,
        key: 7,
        offset: 0,
    };
    for round in 0..3 {
        for i in 0..5 {
            let local = client.slice(i * 4096, 4096);
            client.endpoint.post_read(WorkId(i), local, remote).unwrap();
            assert_eq!(client.endpoint.credits(), 4 - i as usize, "round {round}");
        }
        let local = client.slice(0, 1);
        assert_eq!(
            client.endpoint.post_write(WorkId(9), local, remote),
            Err(PostError::WindowFull)
        );
        client.endpoint.flush();
        let mut ids: Vec<u64> = client
            .complete(5)
            .iter()
            .map(|completion| completion.id.0)
            .collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2, 3, 4]);
        assert_eq!(client.endpoint.credits(), 5);
    }
}

fn a_refusal_among_a_batch_spoils_nothing_else(transport: Transport) {
    let node = Node::start(transport);
    node.access.grant(0, 7).unwrap();
    node.pool.write(0, &Random(3).bytes(1 << 20)).unwrap();
    let mut client = Client::new(node.connect());
    for round in 0..20 {
        let mut random = Random(round);
        let mut expected = HashMap::new();
        for i in 0..WINDOW as u64 {
            let len = 1 + random.below(20_000) as u32;
            let (bad, write) = (random.below(4) == 0, random.below(3) == 0);
            let offset = random.below((1 << 20) - 20_000);
            let remote = RemoteSlice {
                extent: 0,
                key: if bad { 8 } else { 7 },
                offset,
            };
            let local = client.slice(i * 65536, len);
            if write {
                // Writes go to a part that is not read.
                let remote = RemoteSlice {
                    offset: offset + (1 << 20),
                    ..remote
                };
                client
                    .endpoint
                    .post_write(WorkId(i), local, remote)
                    .unwrap();
            } else {
                client.endpoint.post_read(WorkId(i), local, remote).unwrap();
            }
            expected.insert(i, (bad, write, offset, len));
        }
        client.endpoint.flush();
        for completion in client.complete(WINDOW) {
            let (bad, write, offset, len) = expected.remove(&completion.id.0).unwrap();
            assert_eq!(
                completion.result,
                if bad {
                    Err(WorkError::AccessDenied)
                } else {
                    Ok(())
                }
            );
            if !bad && !write {
                let there = node.pool.hash128(offset, len as usize).unwrap();
                assert_eq!(
                    client
                        .local
                        .hash128(completion.id.0 * 65536, len as usize)
                        .unwrap(),
                    there
                );
            }
        }
    }
}

fn a_stop_completes_everything_once_and_refuses_posts(transport: Transport) {
    let mut node = Node::start(transport);
    node.access.grant(0, 7).unwrap();
    let mut client = Client::new(node.connect());
    client.write(0, 7, 0, b"x").unwrap();
    let remote = RemoteSlice {
        extent: 0,
        key: 7,
        offset: 0,
    };
    for i in 0..WINDOW as u64 {
        let local = client.slice(0, MAX_TRANSFER);
        client.endpoint.post_read(WorkId(i), local, remote).unwrap();
    }
    client.endpoint.flush();
    node.responder.stop();
    let mut ids: Vec<u64> = client
        .complete(WINDOW)
        .iter()
        .inspect(|completion| {
            assert!(matches!(
                completion.result,
                Ok(()) | Err(WorkError::Disconnected)
            ));
        })
        .map(|completion| completion.id.0)
        .collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..WINDOW as u64));
    let mut out = Vec::new();
    let end = deadline();
    while client.endpoint.is_connected() {
        assert!(Instant::now() < end);
        client.endpoint.poll(&mut out);
    }
    assert_eq!(client.endpoint.poll(&mut out), 0);
    assert!(out.is_empty());
    let local = client.slice(0, 1);
    assert_eq!(
        client.endpoint.post_read(WorkId(1), local, remote),
        Err(PostError::Disconnected)
    );
    assert_eq!(client.endpoint.credits(), WINDOW);
}

fn an_idle_endpoint_notices_that_its_responder_stopped(transport: Transport) {
    let mut node = Node::start(transport);
    let mut client = Client::new(node.connect());
    node.responder.stop();
    let end = deadline();
    while client.endpoint.is_connected() {
        assert!(Instant::now() < end);
        common::sleep_on(&mut *client.endpoint);
        assert_eq!(client.endpoint.poll(&mut Vec::new()), 0);
    }
}

fn a_requester_that_goes_in_mid_transfer_harms_nobody(transport: Transport) {
    let node = Node::start(transport);
    node.access.grant(0, 7).unwrap();
    let mut other = Client::new(node.connect());
    for _ in 0..10 {
        let mut client = Client::new(node.connect());
        let remote = RemoteSlice {
            extent: 0,
            key: 7,
            offset: 0,
        };
        for i in 0..WINDOW as u64 {
            let local = client.slice(0, MAX_TRANSFER);
            if i % 2 == 0 {
                client
                    .endpoint
                    .post_write(WorkId(i), local, remote)
                    .unwrap();
            } else {
                client.endpoint.post_read(WorkId(i), local, remote).unwrap();
            }
        }
        client.endpoint.flush();
        drop(client);
        other.write(0, 7, EXTENT_BYTES - 4, b"mine").unwrap();
        assert_eq!(other.read(0, 7, EXTENT_BYTES - 4, 4).unwrap(), b"mine");
    }
    node.access.revoke(0).unwrap();
}

fn two_endpoints_see_each_others_writes(transport: Transport) {
    let node = Node::start(transport);
    node.access.grant(3, 5).unwrap();
    let (mut a, mut b) = (Client::new(node.connect()), Client::new(node.connect()));
    for i in 0..100u8 {
        a.write(3, 5, 64, &[i; 100]).unwrap();
        assert_eq!(b.read(3, 5, 64, 100).unwrap(), [i; 100]);
        b.write(3, 5, 64, &[!i; 100]).unwrap();
        assert_eq!(a.read(3, 5, 64, 100).unwrap(), [!i; 100]);
    }
}

fn random_operations_agree_with_a_model(transport: Transport) {
    for seed in 0..4 {
        let node = Node::start(transport);
        let mut client = Client::new(node.connect());
        let mut random = Random(seed);
        let mut model = vec![vec![0u8; EXTENT_BYTES as usize]; EXTENTS as usize];
        let mut keys = vec![None; EXTENTS as usize];
        for step in 1..400u64 {
            let extent = random.below(u64::from(EXTENTS)) as u32;
            let (key, bytes) = (&mut keys[extent as usize], &mut model[extent as usize]);
            match random.below(12) {
                0 => {
                    if key.is_none() {
                        node.access.grant(extent, step).unwrap();
                        *key = Some(step);
                    } else {
                        node.access.revoke(extent).unwrap();
                        *key = None;
                    }
                }
                1 => {
                    let stale = key.map_or(step, |key| key + 1);
                    assert_eq!(
                        client.read(extent, stale, 0, 8).unwrap_err(),
                        WorkError::AccessDenied
                    );
                }
                draw => {
                    let len = 1 + random.below(9000) as usize;
                    let offset = random.below(EXTENT_BYTES + 100);
                    let expected = match key {
                        None => Err(WorkError::AccessDenied),
                        Some(_) if offset + len as u64 > EXTENT_BYTES => {
                            Err(WorkError::RemoteBounds)
                        }
                        Some(_) => Ok(offset as usize..offset as usize + len),
                    };
                    let key = key.unwrap_or(step);
                    if draw < 7 {
                        let new = random.bytes(len);
                        let done = client.write(extent, key, offset, &new);
                        assert_eq!(
                            done,
                            expected.clone().map(|_| ()),
                            "seed {seed} step {step}"
                        );
                        if let Ok(range) = expected {
                            bytes[range].copy_from_slice(&new);
                        }
                    } else {
                        let got = client.read(extent, key, offset, len as u32);
                        let expected = expected.map(|range| bytes[range].to_vec());
                        assert!(got == expected, "seed {seed} step {step}");
                    }
                }
            }
        }
    }
}

fn deep_windows_of_large_transfers_do_not_lock_up(transport: Transport) {
    let node = Node::start(transport);
    node.access.grant(0, 7).unwrap();
    let mut client = Client::new(node.connect_with(256));
    let remote = RemoteSlice {
        extent: 0,
        key: 7,
        offset: 0,
    };
    for i in 0..256u64 {
        let local = client.slice(0, MAX_TRANSFER);
        if i % 2 == 0 {
            client
                .endpoint
                .post_write(WorkId(i), local, remote)
                .unwrap();
        } else {
            client.endpoint.post_read(WorkId(i), local, remote).unwrap();
        }
        client.endpoint.flush();
    }
    assert!(
        client
            .complete(256)
            .iter()
            .all(|completion| completion.result.is_ok())
    );
}

fn registering_twice_gives_the_same_region(transport: Transport) {
    let node = Node::start(transport);
    let mut client = Client::new(node.connect());
    assert_eq!(
        client.endpoint.register(client.local.clone()),
        client.region
    );
    let other = common::memory(4096);
    assert_ne!(client.endpoint.register(Arc::clone(&other)), client.region);
}
