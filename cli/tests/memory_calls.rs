//! The program's own calls on far memory: what it unmaps, discards, moves and protects is as without farpage, and
//! what it gives up costs no slot.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use common::programs_in_c::run_registered;

fn case(name: &str) {
    run_registered("memory_calls", name);
}

#[test]
fn munmap_whole() {
    case("unmap_whole");
}

#[test]
fn munmap_at_three_offsets() {
    case("unmap_part");
}

#[test]
fn madvise_dontneed() {
    case("dontneed");
}

#[test]
fn madvise_free() {
    case("free");
}

#[test]
fn madvise_remove() {
    case("remove");
}

#[test]
fn mremap_in_place() {
    case("remap_grow");
}

#[test]
fn mremap_elsewhere() {
    case("remap_move");
}

#[test]
fn mremap_to_less() {
    case("remap_shrink");
}

#[test]
fn mremap_dontunmap() {
    case("remap_dontunmap");
}

#[test]
fn mremap_over_far_memory() {
    case("remap_fixed");
}

/// Pages were taken out of what had been mapped anew while it was being registered, and were dropped when something else was there.
#[test]
fn what_takes_the_place_of_leaving_memory_stays() {
    case("reuse");
}

/// Both ways in which pages leave, by turns: the helper could take the next batch for the one that was not its own.
#[test]
fn read_only_memory_among_other() {
    case("protect_some");
}

#[test]
fn memory_under_a_protection_key() {
    case("protect_key");
}

#[test]
fn brk_given_back() {
    case("brk_shrink");
}

#[test]
fn inaccessible_keeps_contents() {
    case("protect_none");
}

#[test]
fn read_only_keeps_contents() {
    case("protect_read");
}

#[test]
fn exit_without_unmapping() {
    case("exit");
}

#[test]
fn exec_frees_the_old_image() {
    case("exec");
}

#[test]
fn sigkill_frees_everything() {
    case("killed");
}

#[test]
fn pieces_cut_out_of_huge_pages() {
    run_registered("parts", "huge_unmap");
}

#[test]
fn locked_as_it_is_touched() {
    run_registered("parts", "locked_on_fault");
}

#[test]
fn mappings_that_grow_and_shrink_partly_managed() {
    run_registered("parts", "remap_grown");
}

#[test]
fn pieces_moved_apart() {
    run_registered("parts", "remap_pieces");
}

#[test]
fn calls_across_the_border_of_what_is_managed() {
    run_registered("parts", "joined");
}

#[test]
fn mremap_across_that_border_is_refused() {
    run_registered("parts", "remap_joined");
}
