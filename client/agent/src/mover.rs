//! The mover: one thread that gives copies of extents what they lack.
//!
//! Slots in use are never overwritten, so that they can be copied while programs use them; what is written meanwhile goes to
//! the new copy by itself. So there is no order to keep but one: a slot that is being copied is not given to anybody else
//! ([`FarMemory::next_transfer`]).
//!
//! It has connections and a buffer of its own, takes one run of slots at a time, and rests as long as that took: faults and
//! write-back, which others wait for, find the network free for half of the time at least.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farpage_fabric::memory::{MemoryOptions, RegisteredMemory};
use farpage_fabric::{Endpoint, LocalSlice, OwnDevice, RegionId, RemoteSlice, WorkId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::entry::Slot;
use crate::far::{FarMemory, MAX_TRANSFER_SLOTS, Place, Transfer};
use crate::pager::dial;

/// How often it is looked whether there is something to copy while there is not.
const IDLE: Duration = Duration::from_millis(250);
/// How long one run may take from a copy or to one. A node that takes longer is not worth waiting for.
const DEADLINE: Duration = Duration::from_secs(5);
/// The rest after a failure: what failed is tried again, and should not be all the time.
const REST: Duration = Duration::from_millis(200);
/// The longest rest after a success.
const LONGEST_REST: Duration = Duration::from_millis(100);
/// Connections kept at once: more nodes than that are rarely copied between.
const MAX_CONNECTIONS: usize = 8;
/// The precedence of this thread: behind everybody's whom somebody waits for.
const BEHIND: i32 = 5;

const PAGE: u64 = 4096;
/// The buffer, the one region of each connection.
const BUFFER: RegionId = RegionId(0);
const BUFFER_BYTES: usize = MAX_TRANSFER_SLOTS * PAGE as usize;

/// Copies what is to be copied until `ended` says so; over RDMA by this device.
pub fn run(far: &FarMemory, device: Arc<OwnDevice>, ended: &dyn Fn() -> bool) {
    crate::sys::process::raise_priority(0, BEHIND);
    let buffer = RegisteredMemory::create("farpage-mover", BUFFER_BYTES, MemoryOptions::default());
    let buffer = match buffer {
        Ok((buffer, _)) => Arc::new(buffer),
        Err(error) => {
            tracing::error!(%error, "no memory to copy extents by: they keep the copies that they have");
            return;
        }
    };
    let mut mover = Mover {
        buffer,
        connections: Vec::new(),
        device,
        next: 0,
    };
    while !ended() {
        let Some(transfer) = far.next_transfer(mover.next) else {
            std::thread::sleep(IDLE);
            continue;
        };
        let began = Instant::now();
        let rest = match mover.carry(far, &transfer) {
            Ok(()) => began.elapsed().min(LONGEST_REST),
            Err(failure) => {
                tracing::debug!(?failure, extent = transfer.first.extent(), "not copied");
                // Others have their turn before this one comes again.
                mover.next = transfer.first.extent() + 1;
                REST
            }
        };
        std::thread::sleep(rest);
    }
}

struct Mover {
    buffer: Arc<RegisteredMemory>,
    connections: Vec<Connection>,
    device: Arc<OwnDevice>,
    /// Where the next look begins.
    next: u32,
}

struct Connection {
    address: String,
    endpoint: Box<dyn Endpoint>,
}

/// Why a run was not copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// The node cannot be reached: nothing was sent.
    Unreachable,
    /// It did not confirm what it was sent, or not give what it was asked for.
    Unconfirmed,
}

#[derive(Clone, Copy)]
enum Way {
    Read,
    Write,
}

impl Mover {
    /// Copies one run.
    fn carry(&mut self, far: &FarMemory, transfer: &Transfer) -> Result<(), Failure> {
        let (from, to) = (&transfer.from, &transfer.to);
        let whole = (0, usize::from(from.len));
        if let Err(failure) = self.move_bytes(Way::Read, from, whole) {
            far.transferred(transfer, 0, false);
            return Err(failure);
        }
        let mut good = 0u64;
        let slots = std::iter::successors(Some(transfer.first), |slot| slot.next());
        for (index, slot) in slots.take(whole.1).enumerate() {
            if self.is_good(far, slot, index) {
                good |= 1 << index;
            } else {
                tracing::warn!(
                    address = from.grant.address,
                    "bytes of a copy failed their check"
                );
                far.doubt(slot, from.copy);
            }
        }
        for run in runs(good) {
            if let Err(failure) = self.move_bytes(Way::Write, to, run) {
                far.transferred(transfer, 0, failure == Failure::Unconfirmed);
                return Err(failure);
            }
        }
        far.transferred(transfer, good, false);
        Ok(())
    }

    fn is_good(&self, far: &FarMemory, slot: Slot, index: usize) -> bool {
        self.buffer.hash128(index as u64 * PAGE, PAGE as usize).ok() == far.hash(slot)
    }

    /// Moves some of a place's slots, `first` and how many, between it and the buffer.
    fn move_bytes(
        &mut self,
        way: Way,
        place: &Place,
        (first, len): (usize, usize),
    ) -> Result<(), Failure> {
        let address = &place.grant.address;
        let endpoint = self.endpoint(address)?;
        let offset = first as u64 * PAGE;
        let local = LocalSlice {
            region: BUFFER,
            offset,
            len: len as u32 * PAGE as u32,
        };
        let remote = RemoteSlice {
            offset: place.remote.offset + offset,
            ..place.remote
        };
        let posted = match way {
            Way::Read => endpoint.post_read(WorkId(0), local, remote),
            Way::Write => endpoint.post_write(WorkId(0), local, remote),
        };
        let outcome = match posted {
            Ok(()) => wait(endpoint),
            Err(_) => Err(Failure::Unreachable),
        };
        if outcome.is_err() {
            // What is still under way must not be taken for what is asked next.
            self.connections.retain(|it| it.address != *address);
        }
        outcome
    }

    fn endpoint(&mut self, address: &str) -> Result<&mut dyn Endpoint, Failure> {
        self.connections
            .retain(|it| it.endpoint.is_connected() || it.address != address);
        let known = self.connections.iter().position(|it| it.address == address);
        let at = match known {
            Some(at) => at,
            None => {
                let regions = vec![Arc::clone(&self.buffer)];
                let endpoint =
                    dial::dial(address, &self.device, regions).map_err(|_| Failure::Unreachable)?;
                if self.connections.len() >= MAX_CONNECTIONS {
                    self.connections.remove(0);
                }
                self.connections.push(Connection {
                    address: address.to_owned(),
                    endpoint,
                });
                self.connections.len() - 1
            }
        };
        let connection = self.connections.get_mut(at).ok_or(Failure::Unreachable)?;
        Ok(&mut *connection.endpoint)
    }
}

/// Waits for the one request that is under way.
fn wait(endpoint: &mut dyn Endpoint) -> Result<(), Failure> {
    let deadline = Instant::now() + DEADLINE;
    let mut completions = Vec::new();
    endpoint.flush();
    while Instant::now() < deadline {
        endpoint.poll(&mut completions);
        if let Some(completion) = completions.first() {
            return completion.result.map_err(|_| Failure::Unconfirmed);
        }
        if endpoint.arm()
            && let Some(fd) = endpoint.wait_fd()
        {
            let limit = Timespec {
                tv_sec: 0,
                tv_nsec: IDLE.subsec_nanos().into(),
            };
            // Whatever ends it, it is looked again.
            let _ = poll(
                &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
                Some(&limit),
            );
        }
    }
    Err(Failure::Unconfirmed)
}

/// The runs of ones in a word: where each begins and how long it is.
fn runs(word: u64) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = word.checked_shr(at).unwrap_or(0);
        if rest == 0 {
            return None;
        }
        let start = at + rest.trailing_zeros();
        let len = (word >> start).trailing_ones();
        at = start + len;
        Some((start as usize, len as usize))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_ones() {
        let of = |word| runs(word).collect::<Vec<_>>();
        assert!(of(0).is_empty());
        assert_eq!(of(0b1_0110), [(1, 2), (4, 1)]);
        assert_eq!(of(u64::MAX), [(0, 64)]);
        assert_eq!(of(1 << 63), [(63, 1)]);
    }
}
