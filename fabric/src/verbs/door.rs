//! A responder's part of one connection: its lanes, and what each of them is let into.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use super::device::Device;
use super::lane::random_packet;
use super::sys::{
    CompletionQueue, Granted, MemoryRegion, MemoryWindow, Path, ProtectionDomain, QueuePair,
    Status, Work,
};
use super::wire::{LANES, Port, Tell};
use crate::access::{AccessTable, Door};
use crate::memory::RegisteredMemory;

/// Windows are bound one after the other.
const QUEUE_DEPTH: u32 = 4;

/// Binding a window is local work of the device; on SoftRoCE it waits for a kernel thread.
const BIND_DEADLINE: Duration = Duration::from_secs(2);

/// The way in for one requester's device.
pub(super) struct VerbsDoor {
    device: Arc<Device>,
    their_port: Port,
    pool: Arc<RegisteredMemory>,
    access: Arc<AccessTable>,
    use_windows: bool,
    domain: Arc<ProtectionDomain>,
    completions: Arc<CompletionQueue>,
    /// Readable when a lane has gone without the requester's doing.
    wake: OwnedFd,
    inside: Mutex<Inside>,
}

#[derive(Default)]
struct Inside {
    lanes: [Option<Lane>; LANES],
    /// The extents that are open to some lane, each registered on its own, so that only what is granted is pinned.
    regions: HashMap<u32, MemoryRegion>,
    /// Generations of lanes that have gone and that the requester has not been told of.
    gone: [Option<u32>; LANES],
    bindings: u64,
}

struct Lane {
    generation: u32,
    // Goes before the queue pair that it is bound to.
    windows: HashMap<u32, Option<MemoryWindow>>,
    queue: QueuePair,
}

impl VerbsDoor {
    pub(super) fn new(
        device: &Arc<Device>,
        their_port: Port,
        pool: &Arc<RegisteredMemory>,
        access: &Arc<AccessTable>,
        use_windows: bool,
    ) -> io::Result<Self> {
        Ok(Self {
            device: Arc::clone(device),
            their_port,
            pool: Arc::clone(pool),
            access: Arc::clone(access),
            use_windows: use_windows && device.context.limits().windows,
            domain: ProtectionDomain::new(&device.context)?,
            completions: CompletionQueue::new(&device.context, 2 * QUEUE_DEPTH * LANES as u32)?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            inside: Mutex::default(),
        })
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        // Every critical section leaves consistent data behind at each step.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// What the requester has to be told.
    pub(super) fn take_news(&self) -> Vec<Tell> {
        let mut bytes = [0; 8];
        // Empty when somebody else took it, which is as good.
        let _ = rustix::io::read(&self.wake, &mut bytes);
        let mut inside = self.inside();
        let gone = std::mem::take(&mut inside.gone);
        (0..)
            .zip(gone)
            .filter_map(|(lane, generation)| {
                Some(Tell::Gone {
                    lane,
                    generation: generation?,
                })
            })
            .collect()
    }

    /// Makes the other end of a requester's lane, in place of the one there was.
    pub(super) fn open(
        &self,
        lane: u8,
        generation: u32,
        queue: u32,
        packet: u32,
    ) -> io::Result<Tell> {
        let mut inside = self.inside();
        let place = inside
            .lanes
            .get_mut(usize::from(lane))
            .ok_or(io::ErrorKind::InvalidInput)?;
        *place = None;
        let mut ours = QueuePair::new(&self.domain, &self.completions, QUEUE_DEPTH)?;
        let our_packet = random_packet()?;
        let port = self.device.as_told();
        let path = Path {
            port: self.device.port,
            gid_index: self.device.gid_index,
            gid: self.their_port.gid,
            lid: self.their_port.lid,
            mtu: port.mtu_with(&self.their_port),
            queue,
            their_packet: packet,
            our_packet,
            // We read nothing of theirs.
            reads_out: 1,
            reads_in: self.their_port.reads_from(&port),
        };
        ours.connect(&path, true)?;
        let told = Tell::Opened {
            lane,
            generation,
            queue: ours.number(),
            packet: our_packet,
        };
        *place = Some(Lane {
            generation,
            windows: HashMap::new(),
            queue: ours,
        });
        Ok(told)
    }

    /// Opens an extent to a lane, if the key is live.
    pub(super) fn bind(
        &self,
        lane: u8,
        generation: u32,
        extent: u32,
        key: u64,
    ) -> io::Result<Tell> {
        let mut guard = self.inside();
        let inside = &mut *guard;
        let place = inside
            .lanes
            .get_mut(usize::from(lane))
            .and_then(Option::as_mut);
        let Some(open) = place.filter(|open| open.generation == generation) else {
            return Ok(Tell::Gone { lane, generation });
        };
        // Looked at under the lock that a revocation takes after it has taken the key away.
        if !self.access.is_live(extent, key) {
            return Ok(Tell::Refused {
                lane,
                generation,
                extent,
                key,
            });
        }
        let region = match inside.regions.entry(extent) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let bytes = self.access.geometry().extent_bytes();
                let granted = if self.use_windows {
                    Granted::ByWindow
                } else {
                    Granted::ByKey
                };
                entry.insert(MemoryRegion::new(
                    &self.domain,
                    Arc::clone(&self.pool),
                    u64::from(extent) * bytes,
                    bytes as usize,
                    granted,
                )?)
            }
        };
        let remote_key = match open.windows.get(&extent) {
            Some(Some(window)) => window.key(),
            Some(None) => region.remote_key(),
            None => {
                let window = if self.use_windows {
                    let window = MemoryWindow::new(&self.domain)?;
                    inside.bindings += 1;
                    let id = inside.bindings;
                    let work = Work::Bind {
                        window: &window,
                        region,
                    };
                    open.queue.post(std::iter::once((id, true, work)))?;
                    self.await_binding(id)?;
                    Some(window)
                } else {
                    None
                };
                let key = window
                    .as_ref()
                    .map_or(region.remote_key(), MemoryWindow::key);
                open.windows.insert(extent, window);
                key
            }
        };
        Ok(Tell::Bound {
            lane,
            generation,
            extent,
            key,
            remote_key,
            address: region.address(),
        })
    }

    fn await_binding(&self, id: u64) -> io::Result<()> {
        let deadline = Instant::now() + BIND_DEADLINE;
        let mut status = None;
        while status.is_none() {
            self.completions.poll(1, |ended| {
                if ended.id == id {
                    status = Some(ended.status);
                }
            });
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if status.is_none() {
                std::thread::yield_now();
            }
        }
        if status == Some(Status::Done) {
            Ok(())
        } else {
            Err(io::Error::other("the device does not bind the window"))
        }
    }

    /// Ends everything that the requester is let into.
    pub(super) fn close(&self) {
        let mut inside = self.inside();
        inside.lanes = Default::default();
        inside.regions.clear();
    }
}

impl Door for VerbsDoor {
    fn shut(&self, extent: u32) -> bool {
        let mut guard = self.inside();
        let inside = &mut *guard;
        let mut told = false;
        for (place, gone) in inside.lanes.iter_mut().zip(&mut inside.gone) {
            if let Some(mut lane) = place.take_if(|lane| lane.windows.contains_key(&extent)) {
                // First the way in, then whatever came in by it before: see the module on ends of grants.
                drop(lane.windows.remove(&extent));
                // A queue pair that cannot be stopped is destroyed all the same.
                let _ = lane.queue.stop();
                *gone = Some(lane.generation);
                told = true;
            }
        }
        if told {
            // Fails when it is readable already, which is as good.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
        let out = inside
            .regions
            .get_mut(&extent)
            .is_none_or(MemoryRegion::deregister);
        if out {
            inside.regions.remove(&extent);
        }
        out
    }
}

impl std::fmt::Debug for VerbsDoor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsDoor")
            .field("their_port", &self.their_port)
            .finish_non_exhaustive()
    }
}
