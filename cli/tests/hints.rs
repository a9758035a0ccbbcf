//! What a program says of memory to come has its effect.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::programs_in_c::run_registered;

#[test]
fn what_will_be_needed_comes_home() {
    run_registered("hints", "will_need");
}

#[test]
fn what_is_to_be_paged_out_goes_at_once() {
    run_registered("hints", "page_out");
}

#[test]
fn what_is_cold_goes_before_all_else() {
    run_registered("hints", "cold");
}
