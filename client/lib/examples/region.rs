//! Writes 128 MiB with at most 16 MiB of them in local memory, and verifies every page.
//!
//! `cargo run --release -p farpage --example region -- SOCKET`

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::os::unix::fs::FileExt;

use farpage::{Agent, Region};

const BYTES: usize = 128 << 20;
const LOCAL: usize = 16 << 20;
const PAGE: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let agent = match std::env::args().nth(1) {
        Some(socket) => Agent::connect(&socket)?,
        None => Agent::from_environment()?,
    };
    let mut region = agent.map(BYTES, LOCAL)?;
    println!(
        "{} MiB mapped, {} MiB of them may lie here",
        BYTES >> 20,
        LOCAL >> 20
    );
    for (number, page) in region.chunks_exact_mut(PAGE).enumerate() {
        page[..8].copy_from_slice(&(number as u64 + 1).to_ne_bytes());
    }
    println!("written: {} MiB here", resident(&region)?.div_ceil(1 << 20));
    for (number, page) in region.chunks_exact(PAGE).enumerate() {
        if page[..8] != (number as u64 + 1).to_ne_bytes() {
            return Err(format!("page {number} is not what was written").into());
        }
    }
    let here = resident(&region)?.div_ceil(1 << 20);
    println!("verified: {here} MiB here, every page as it was written");
    Ok(())
}

/// How much of the region lies in local memory.
fn resident(region: &Region) -> std::io::Result<usize> {
    const PRESENT: u64 = 1 << 63;
    let pagemap = std::fs::File::open("/proc/self/pagemap")?;
    let first = region.as_ptr().addr() / PAGE;
    let mut words = vec![0u8; region.len() / PAGE * 8];
    pagemap.read_exact_at(&mut words, first as u64 * 8)?;
    let present = words.chunks_exact(8).filter(|word| {
        let word: [u8; 8] = (*word).try_into().unwrap_or_default();
        u64::from_ne_bytes(word) & PRESENT != 0
    });
    Ok(present.count() * PAGE)
}
