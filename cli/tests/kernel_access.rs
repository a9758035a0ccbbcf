//! Far pages that the kernel touches for the program or for others, and the kernel's limits there.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::programs_in_c::run_registered;

fn case(name: &str) {
    run_registered("kernel_access", name);
}

/// A dump has holes where pages are far. It is written to its end, and the program ends as it would have.
#[test]
fn core_dumps_have_holes() {
    case("dump");
}

#[test]
fn read_and_write() {
    case("plain");
}

#[test]
fn direct_io() {
    case("direct");
}

#[test]
fn vectors() {
    case("vectors");
}

#[test]
fn process_vm_readv_and_writev() {
    case("from_outside");
}

#[test]
fn pinned_buffers_stay() {
    case("pinned");
}

#[test]
fn pinned_buffers_stay_over_forks() {
    case("pinned_fork");
}

#[test]
fn proc_mem_says_eio() {
    case("proc_mem");
}

#[test]
fn guard_pages() {
    case("guard");
}
