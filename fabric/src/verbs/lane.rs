//! A requester's lane: a queue pair that comes and goes, and the work that outlives it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::device::Device;
use super::sys::{
    CompletionQueue, Ended, MemoryRegion, Path, ProtectionDomain, QueuePair, Status, Work,
};
use super::wire::{Ask, NUMBER_MASK, Port};
use crate::endpoint::{Completion, LocalSlice, RemoteSlice, WorkError, WorkId};
use crate::geometry::PoolGeometry;

/// Every so many requests of a chain one is reported, besides the last: the send queue's places come back by then.
const REPORT_EVERY: u32 = 16;

/// A device's refusal breaks the lane, and may concern another request's grant; the responder is asked for the key again.
/// Who is refused so often although the key is live is refused for good.
const MAX_REFUSALS: u8 = 2;

/// A lane's generation has 24 bits in a work request's id.
const GENERATION_MASK: u32 = (1 << 24) - 1;

/// A request that is not completed yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Posted {
    pub(super) id: WorkId,
    pub(super) write: bool,
    pub(super) local: LocalSlice,
    pub(super) remote: RemoteSlice,
    pub(super) refusals: u8,
}

/// What is known of a key.
#[derive(Clone, Copy, Debug)]
enum Grant {
    Asked(Instant),
    Bound { remote_key: u32, address: u64 },
}

enum State {
    Closed,
    Opening {
        queue: QueuePair,
        packet: u32,
        since: Instant,
    },
    Open(QueuePair),
}

/// What all lanes of an endpoint share.
pub(super) struct Link {
    pub(super) device: Device,
    pub(super) their_port: Port,
    pub(super) geometry: PoolGeometry,
    pub(super) domain: Arc<ProtectionDomain>,
    pub(super) completions: Arc<CompletionQueue>,
    pub(super) regions: Vec<MemoryRegion>,
    /// Most requests in one send queue.
    pub(super) depth: u32,
    /// Frames to be sent on the control connection.
    pub(super) asks: VecDeque<Ask>,
    /// Completions that the caller has not seen yet.
    pub(super) done: VecDeque<Completion>,
}

impl Link {
    fn complete(&mut self, id: WorkId, result: Result<(), WorkError>) {
        self.done.push_back(Completion { id, result });
    }

    /// The other end of a lane of ours.
    fn path(&self, queue: u32, their_packet: u32, our_packet: u32) -> Path {
        let port = self.device.as_told();
        Path {
            port: self.device.port,
            gid_index: self.device.gid_index,
            gid: self.their_port.gid,
            lid: self.their_port.lid,
            mtu: port.mtu_with(&self.their_port),
            queue,
            their_packet,
            our_packet,
            reads_out: port.reads_from(&self.their_port),
            // A responder reads nothing of ours.
            reads_in: 1,
        }
    }
}

/// One of an endpoint's queues.
pub(super) struct Lane {
    number: u8,
    generation: u32,
    state: State,
    /// Accepted and not handed to the device, in order.
    waiting: VecDeque<Posted>,
    /// Handed to the device, in order; the first one's number is `first`.
    sent: VecDeque<Posted>,
    first: u32,
    grants: HashMap<(u32, u64), Grant>,
    /// Grants that were asked for and not answered.
    asked: usize,
    /// Room for where requests go, kept from chain to chain.
    targets: Vec<Target>,
}

/// Where at the peer a request goes, as its device knows it.
#[derive(Clone, Copy, Debug)]
struct Target {
    address: u64,
    key: u32,
}

impl Lane {
    pub(super) fn new(number: u8) -> Self {
        Self {
            number,
            generation: 0,
            state: State::Closed,
            waiting: VecDeque::new(),
            sent: VecDeque::new(),
            first: 0,
            grants: HashMap::new(),
            asked: 0,
            targets: Vec::new(),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::Open(_))
    }

    pub(super) fn outstanding(&self) -> usize {
        self.waiting.len() + self.sent.len()
    }

    /// Whether the responder owes an answer.
    pub(super) fn has_questions(&self) -> bool {
        self.asked > 0 || matches!(self.state, State::Opening { .. })
    }

    pub(super) fn post(&mut self, posted: Posted) {
        self.waiting.push_back(posted);
    }

    /// Makes a queue pair and asks the responder for its other end.
    pub(super) fn open(&mut self, link: &mut Link) -> io::Result<()> {
        let queue = QueuePair::new(&link.domain, &link.completions, link.depth)?;
        let packet = random_packet()?;
        self.generation = (self.generation + 1) & GENERATION_MASK;
        self.first = 0;
        link.asks.push_back(Ask::Open {
            lane: self.number,
            generation: self.generation,
            queue: queue.number(),
            packet,
        });
        self.state = State::Opening {
            queue,
            packet,
            since: Instant::now(),
        };
        Ok(())
    }

    /// The responder has made the other end.
    pub(super) fn opened(
        &mut self,
        link: &Link,
        generation: u32,
        queue: u32,
        their_packet: u32,
    ) -> io::Result<()> {
        if generation != self.generation {
            return Ok(());
        }
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Opening {
                queue: mut ours,
                packet,
                ..
            } => {
                ours.connect(&link.path(queue, their_packet, packet), false)?;
                self.state = State::Open(ours);
            }
            other => self.state = other,
        }
        Ok(())
    }

    /// Destroys the queue pair. What it had not completed waits for the next one, in its order.
    fn close(&mut self) {
        self.state = State::Closed;
        self.grants.clear();
        self.asked = 0;
        self.sent.append(&mut self.waiting);
        std::mem::swap(&mut self.sent, &mut self.waiting);
    }

    /// The responder has ended its end.
    pub(super) fn gone(&mut self, generation: u32) {
        if generation == self.generation {
            self.close();
        }
    }

    /// The responder has opened an extent to us.
    pub(super) fn bound(
        &mut self,
        generation: u32,
        extent: u32,
        key: u64,
        remote_key: u32,
        address: u64,
    ) {
        if generation == self.generation
            && let Some(grant @ Grant::Asked(_)) = self.grants.get_mut(&(extent, key))
        {
            *grant = Grant::Bound {
                remote_key,
                address,
            };
            self.asked -= 1;
        }
    }

    /// The responder knows no such key.
    pub(super) fn refused(&mut self, link: &mut Link, generation: u32, extent: u32, key: u64) {
        if generation != self.generation
            || !matches!(self.grants.get(&(extent, key)), Some(Grant::Asked(_)))
        {
            return;
        }
        self.grants.remove(&(extent, key));
        self.asked -= 1;
        self.waiting.retain(|posted| {
            let concerned = posted.remote.extent == extent && posted.remote.key == key;
            if concerned {
                link.complete(posted.id, Err(WorkError::AccessDenied));
            }
            !concerned
        });
    }

    /// Hands over what can be handed over, in one chain, and asks for what is missing.
    pub(super) fn advance(&mut self, link: &mut Link) -> io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        if matches!(self.state, State::Closed) {
            return self.open(link);
        }
        let State::Open(queue) = &mut self.state else {
            return Ok(());
        };
        let before = self.sent.len();
        self.targets.clear();
        let mut kept = 0;
        for _ in 0..self.waiting.len() {
            if self.sent.len() >= queue.depth() {
                break;
            }
            let Some(posted) = self.waiting.pop_front() else {
                break;
            };
            let RemoteSlice {
                extent,
                key,
                offset,
            } = posted.remote;
            match self.grants.get(&(extent, key)) {
                None => {
                    self.grants
                        .insert((extent, key), Grant::Asked(Instant::now()));
                    self.asked += 1;
                    link.asks.push_back(Ask::Bind {
                        lane: self.number,
                        generation: self.generation,
                        extent,
                        key,
                    });
                    self.waiting.push_back(posted);
                    kept += 1;
                }
                Some(Grant::Asked(_)) => {
                    self.waiting.push_back(posted);
                    kept += 1;
                }
                Some(&Grant::Bound {
                    remote_key,
                    address,
                }) => {
                    if link
                        .geometry
                        .pool_offset(extent, offset, posted.local.len)
                        .is_none()
                    {
                        link.complete(posted.id, Err(WorkError::RemoteBounds));
                    } else if posted.local.len == 0 {
                        link.complete(posted.id, Ok(()));
                    } else {
                        self.sent.push_back(posted);
                        self.targets.push(Target {
                            address: address.wrapping_add(offset),
                            key: remote_key,
                        });
                    }
                }
            }
        }
        // What waits for its grant goes before what was not looked at: requests of one key stay in their order.
        self.waiting.rotate_right(kept);
        let (first, count) = (self.first.wrapping_add(before as u32), self.targets.len());
        let label = u64::from(self.number) << 56 | u64::from(self.generation) << 32;
        let works = self.sent.iter().skip(before).zip(&self.targets).enumerate();
        let works = works.filter_map(|(index, (posted, target))| {
            let sequence = first.wrapping_add(index as u32);
            let report = index + 1 == count || sequence.is_multiple_of(REPORT_EVERY);
            let work = Work::Transfer {
                write: posted.write,
                region: link.regions.get(posted.local.region.0 as usize)?,
                offset: posted.local.offset,
                len: posted.local.len,
                remote_address: target.address,
                remote_key: target.key,
            };
            Some((label | u64::from(sequence), report, work))
        });
        queue.post(works)
    }

    /// The device is done with a request, and so with all before it.
    pub(super) fn ended(&mut self, link: &mut Link, ended: Ended) -> Result<(), WorkError> {
        let generation = (ended.id >> 32) as u32 & GENERATION_MASK;
        if generation != self.generation || !self.is_open() {
            return Ok(());
        }
        let index = (ended.id as u32).wrapping_sub(self.first) as usize;
        if index >= self.sent.len() {
            return Err(WorkError::Protocol);
        }
        for posted in self.sent.drain(..index) {
            link.complete(posted.id, Ok(()));
        }
        self.first = self.first.wrapping_add(index as u32);
        match ended.status {
            Status::Done => {
                if let Some(posted) = self.sent.pop_front() {
                    link.complete(posted.id, Ok(()));
                }
                self.first = self.first.wrapping_add(1);
                Ok(())
            }
            Status::Refused => {
                if let Some(posted) = self.sent.front_mut() {
                    posted.refusals += 1;
                    if posted.refusals >= MAX_REFUSALS {
                        link.complete(posted.id, Err(WorkError::AccessDenied));
                        self.sent.pop_front();
                    }
                }
                self.close();
                Ok(())
            }
            Status::Failed(code) => {
                tracing::debug!(
                    lane = self.number,
                    why = link.completions.name_of(code),
                    "a queue pair has failed"
                );
                Err(WorkError::Disconnected)
            }
        }
    }

    /// When the oldest question was asked that has no answer yet.
    pub(super) fn oldest_question(&self) -> Option<Instant> {
        let opening = match &self.state {
            State::Opening { since, .. } => Some(*since),
            _ => None,
        };
        let asked = self.grants.values().filter_map(|grant| match grant {
            Grant::Asked(since) => Some(*since),
            Grant::Bound { .. } => None,
        });
        asked.chain(opening).min()
    }

    /// Ends it for good: first the queue pair, so that the device touches nothing any more, then everything outstanding.
    pub(super) fn fail(&mut self, link: &mut Link, error: WorkError) {
        self.close();
        for posted in std::mem::take(&mut self.waiting) {
            link.complete(posted.id, Err(error));
        }
    }
}

/// A first packet number that no packet of an earlier queue pair of this number is likely to have.
pub(super) fn random_packet() -> io::Result<u32> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_le_bytes(bytes) & NUMBER_MASK)
}
