//! Randomness from the kernel: keys and tokens must not be guessable.

use rustix::rand::{GetRandomFlags, getrandom};

/// The kernel has no randomness to give.
#[derive(Debug, thiserror::Error)]
#[error("getrandom: {0}; this kernel gives no randomness, and without it keys could be guessed")]
pub struct NoRandomness(rustix::io::Errno);

/// Random bytes. Waits for the kernel's pool only at early boot.
pub(crate) fn bytes<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(NoRandomness(error)),
        }
    }
    Ok(bytes)
}

/// A random number.
pub(crate) fn number() -> Result<u64, NoRandomness> {
    bytes().map(u64::from_ne_bytes)
}

/// As many random numbers as asked for.
pub(crate) fn numbers(count: usize) -> Result<Vec<u64>, NoRandomness> {
    (0..count).map(|_| number()).collect()
}
