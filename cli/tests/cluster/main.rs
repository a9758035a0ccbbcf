//! Programs of an unprivileged user through a cluster of separate processes, and what each part's failure does.
#![allow(missing_docs)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "../common/mod.rs"]
mod common;
mod drain;
mod embedded;
mod failures;
mod output;
mod pool;
mod replicas;
mod restart;
mod strangers;

use common::cluster::{Cluster, PYTHON};
use common::{skip, sys, without_far_memory};

/// 27 MB of data in a program of some 40 MB: a quarter of its peak may stay.
const PIECES: u32 = 9_000;
const LOCAL: &str = "10M";
const LOCAL_BYTES: u64 = 10 << 20;

/// Fits into [`LOCAL`] whatever happens to far memory.
const SMALL: u32 = 10;

fn cannot_run(test: &str) -> bool {
    if !sys::is_root() {
        skip(test, "starting programs as another user needs root");
        return true;
    }
    if !std::path::Path::new(PYTHON).exists() {
        skip(test, "/usr/bin/python3 is not installed");
        return true;
    }
    without_far_memory(test)
}

fn granted(cluster: &Cluster, node: usize) -> u64 {
    cluster.status()["nodes"][node]["used_bytes"]
        .as_u64()
        .unwrap()
}
