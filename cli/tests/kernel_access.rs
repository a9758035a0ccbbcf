//! Far pages that the kernel touches for the program or for others, and the kernel's limits there.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use common::programs_in_c::{LOCAL, compiled, run_registered};
use common::runs::run_far;
use common::{alone, skip, without_far_memory, without_program};

fn case(name: &str) {
    run_registered("kernel_access", name);
}

/// A dump has zeros where pages are far, and no page is wrong in any other way. It is written to its end, and the program ends
/// as it would have.
#[test]
fn core_dumps_have_holes() {
    const TEST: &str = "core_dumps_have_holes";
    let _alone = alone();
    if without_far_memory(TEST) || without_program(TEST, "cc") {
        return;
    }
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    if pattern.contains(['|', '/', '%']) {
        let pattern = pattern.trim();
        skip(
            TEST,
            &format!("dumps do not go to the program's folder: kernel.core_pattern is {pattern}"),
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let program = compiled("kernel_access");
    let words = [program.to_str().unwrap(), "dump"];
    let outcome = run_far(LOCAL, &words, folder.path(), Duration::from_secs(60));
    assert_eq!(
        outcome.status.signal(),
        Some(libc::SIGABRT),
        "{}",
        outcome.errors
    );
    let summary = outcome.summary.expect("a summary");
    assert_eq!(summary["far_slots_in_use_at_exit"], 0, "{summary}");

    let data: Vec<u64> = outcome
        .errors
        .lines()
        .find_map(|line| line.strip_prefix("DATA "))
        .expect("where the data lies")
        .split(' ')
        .map(|word| u64::from_str_radix(word, 16).unwrap())
        .collect();
    let dumps: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(dumps.len(), 1, "{dumps:?}");
    let dump = std::fs::read(&dumps[0]).unwrap();
    let (mut here, mut holes) = (0, 0);
    for page in 0..data[1] / 4096 {
        let words = dumped(&dump, data[0] + page * 4096).expect("a page of the data");
        if words.iter().all(|word| *word == 0) {
            holes += 1;
        } else {
            // As `word_of` in bench/c/far.h has it.
            let right = words.iter().zip(0u64..).all(|(word, index)| {
                let mixed = page
                    .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                    .wrapping_add(0xbf58_476d_1ce4_e5b9)
                    .wrapping_add(index.wrapping_mul(0x94d0_49bb_1331_11eb))
                    .wrapping_add(1);
                *word == (mixed ^ (mixed >> 29)).wrapping_mul(0xff51_afd7_ed55_8ccd)
            });
            assert!(right, "page {page} is neither itself nor a hole");
            here += 1;
        }
    }
    println!("{TEST}: {here} pages in the dump, {holes} holes");
    assert!(here > 0 && holes > here, "{here} pages, {holes} holes");
}

#[test]
fn a_dump_keeps_to_the_limit() {
    case("dump");
}

/// The words of the page at `address` in a core dump.
fn dumped(dump: &[u8], address: u64) -> Option<Vec<u64>> {
    const PT_LOAD: u64 = 1;
    let word = |at: usize| u64::from_le_bytes(dump[at..at + 8].try_into().unwrap());
    // In the header: where the program headers begin, and how many there are of 56 bytes.
    let (headers, count) = (word(32) as usize, (word(56) & 0xffff) as usize);
    (0..count)
        .map(|index| headers + index * 56)
        .find_map(|header| {
            let (offset, start, bytes) = (word(header + 8), word(header + 16), word(header + 32));
            let inside =
                word(header) & 0xffff_ffff == PT_LOAD && (start..start + bytes).contains(&address);
            inside.then(|| {
                let at = (offset + address - start) as usize;
                (at..at + 4096).step_by(8).map(word).collect()
            })
        })
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
fn debuggers_are_told_eio() {
    case("peek");
}

#[test]
fn guard_pages() {
    case("guard");
}

#[test]
fn guard_pages_by_the_bare_system_call() {
    case("guard_raw");
}

#[test]
fn direct_io_under_way_as_it_forks() {
    case("direct_fork");
}
