//! What becomes of a connection over RDMA when the other machine is paused, cut off or killed. Runs in the lab, on two
//! machines: `FARPAGE_LAB=serve` on b, `FARPAGE_LAB=b's address` on a; elsewhere it says that it did not.

// Helpers outside of #[test] functions may panic here as well.
#![cfg(feature = "verbs")]
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Client, EXTENT_BYTES, EXTENTS, WINDOW, deadline, memory};
use farpage_fabric::verbs::{DeviceChoice, VerbsLimits, VerbsResponder};
use farpage_fabric::{
    AccessTable, Endpoint, PoolGeometry, RemoteSlice, WorkError, WorkId, connect,
};

const PORT: u16 = 7600;
const KEY: u64 = 7;
const REMOTE: RemoteSlice = RemoteSlice {
    extent: 0,
    key: KEY,
    offset: 0,
};

/// A dead peer is noticed by the device after some seconds of retries, and by the control connection after ten.
const NOTICED_WITHIN: Duration = Duration::from_secs(25);

#[test]
fn a_machine_that_is_paused_cut_off_or_killed() {
    match std::env::var("FARPAGE_LAB").as_deref() {
        Ok("serve") => serve(),
        Ok(host) => endure(host),
        Err(_) => println!("SKIPPED: two_machines: needs the lab's two machines (cargo xtask lab)"),
    }
}

/// Machine b: until it is killed.
fn serve() {
    let geometry = PoolGeometry::new(EXTENT_BYTES, EXTENTS).unwrap();
    let pool = memory(geometry.pool_bytes() as usize);
    let access = AccessTable::new(geometry).unwrap();
    access.grant(0, KEY).unwrap();
    let listener = TcpListener::bind(("0.0.0.0", PORT)).unwrap();
    let choice = DeviceChoice::default();
    let _responder =
        VerbsResponder::start(listener, &choice, pool, access, VerbsLimits::default()).unwrap();
    std::thread::sleep(Duration::from_secs(300));
}

fn control(verb: &str) {
    let done = Command::new("lab-control")
        .args(["b", verb])
        .status()
        .unwrap();
    assert!(done.success(), "lab-control b {verb}");
}

fn dial(host: &str) -> Client {
    let address = format!("rdma:{host}:{PORT}").parse().unwrap();
    let end = deadline();
    loop {
        // Machine b may be a moment late.
        match connect(&address, WINDOW, Instant::now() + Duration::from_secs(5)) {
            Ok(endpoint) => return Client::new(endpoint),
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Posts a window of reads and writes.
fn post(client: &mut Client) {
    for i in 0..WINDOW as u64 {
        let local = client.slice(i * 4096, 4096);
        let posted = if i % 2 == 0 {
            client.endpoint.post_read(WorkId(i), local, REMOTE)
        } else {
            client.endpoint.post_write(WorkId(i), local, REMOTE)
        };
        posted.unwrap();
    }
    client.endpoint.flush();
}

/// Every request ends, once; returns how many by the connection's end, and how long it took.
fn all_end(client: &mut Client) -> (usize, Duration) {
    let start = Instant::now();
    let done = client.complete(WINDOW);
    let mut ids: Vec<u64> = done.iter().map(|completion| completion.id.0).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..WINDOW as u64));
    let broken = done
        .iter()
        .filter(|completion| completion.result == Err(WorkError::Disconnected));
    (broken.count(), start.elapsed())
}

fn dies(client: &mut Client) {
    let (broken, took) = all_end(client);
    println!("{broken} of {WINDOW} requests were broken off after {took:?}");
    assert!(broken > 0 && took < NOTICED_WITHIN);
    assert!(!client.endpoint.is_connected());
    assert_eq!(client.endpoint.credits(), WINDOW);
    assert_eq!(client.endpoint.poll(&mut Vec::new()), 0);
}

fn endure(host: &str) {
    let mut client = dial(host);
    client.write(0, KEY, 5, b"over the wire").unwrap();
    assert_eq!(client.read(0, KEY, 5, 13).unwrap(), b"over the wire");

    control("pause");
    post(&mut client);
    std::thread::sleep(Duration::from_millis(700));
    control("resume");
    let (broken, took) = all_end(&mut client);
    println!("after a pause all went on, {took:?}");
    assert_eq!(broken, 0, "a short pause is no death");

    control("unplug");
    post(&mut client);
    dies(&mut client);
    control("plug");
    let mut client = dial(host);
    assert_eq!(client.read(0, KEY, 8, 3).unwrap().len(), 3);

    control("kill");
    post(&mut client);
    dies(&mut client);
}
