//! An endpoint that misbehaves on purpose, for tests.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::sync::Arc;

use rustix::event::{EventfdFlags, epoll, eventfd};

use crate::endpoint::{
    Completion, Endpoint, LocalSlice, PostError, RegionId, RemoteSlice, WorkError, WorkId,
};
use crate::memory::RegisteredMemory;

/// What goes wrong, and how often. Chances are per thousand requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    /// The same seed, requests and polls give the same faults.
    pub seed: u64,
    /// Requests that never complete; half of them are carried out nevertheless.
    pub lost: u32,
    /// Requests whose completion is held back for 1..=`longest_delay` polls. Others overtake them.
    pub delayed: u32,
    /// The longest delay in polls; with 0 nothing is delayed.
    pub longest_delay: u32,
    /// Successful reads of which one bit is wrong.
    pub corrupted: u32,
    /// Whether completions of one poll come in a random order.
    pub reordered: bool,
    /// The connection breaks when this many requests have been posted.
    pub disconnect_after: Option<u64>,
}

/// Why a plan was not understood.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is no part of a fault plan: write name=number, with names of seed, lost, delayed, longest_delay, corrupted, \
     reordered (0 or 1) and disconnect_after, and commas between"
)]
pub struct PlanError(String);

impl FromStr for FaultPlan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let mut plan = Self::default();
        for part in text.split(',') {
            let wrong = || PlanError(part.to_owned());
            let (name, number) = part.split_once('=').ok_or_else(wrong)?;
            let number: u32 = number.parse().map_err(|_| wrong())?;
            match name {
                "seed" => plan.seed = u64::from(number),
                "lost" => plan.lost = number,
                "delayed" => plan.delayed = number,
                "longest_delay" => plan.longest_delay = number,
                "corrupted" => plan.corrupted = number,
                "reordered" => plan.reordered = number != 0,
                "disconnect_after" => plan.disconnect_after = Some(u64::from(number)),
                _ => return Err(wrong()),
            }
        }
        Ok(plan)
    }
}

/// What will happen to a request, drawn when it is posted.
#[derive(Clone, Copy, Debug)]
struct Fate {
    lost: bool,
    delay: u32,
    /// For reads: which bit to flip, modulo their length.
    corrupt: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    id: WorkId,
    read: Option<LocalSlice>,
    fate: Fate,
    /// How the request ended, and at which poll that is to be told.
    ended: Option<(Result<(), WorkError>, u64)>,
}

/// Wraps an endpoint and lets requests be lost, delayed, reordered, corrupted and cut off.
///
/// Fates are drawn in the order of posting, time is counted in polls. Over a transport that completes at once (shared
/// memory) a run is determined by its seed; over others the fate of each request still is.
#[derive(Debug)]
pub struct FaultyEndpoint<E> {
    /// Gone after a disconnection, so that nothing more arrives in local memory.
    inner: Option<E>,
    window: usize,
    plan: FaultPlan,
    random: SplitMix,
    regions: Vec<Arc<RegisteredMemory>>,
    /// By order of posting. Lost requests stay until the connection breaks.
    flights: BTreeMap<u64, Flight>,
    posted: u64,
    polls: u64,
    epoll: OwnedFd,
    /// Readable while a further poll would bring something on though the inner endpoint's descriptor is silent.
    signal: OwnedFd,
    signalled: bool,
}

impl<E: Endpoint> FaultyEndpoint<E> {
    /// Wraps `inner`, which has nothing outstanding and nothing registered.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub fn new(inner: E, plan: FaultPlan) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(0);
        epoll::add(&epoll, &signal, data, epoll::EventFlags::IN)?;
        if let Some(fd) = inner.wait_fd() {
            epoll::add(&epoll, fd, data, epoll::EventFlags::IN)?;
        }
        Ok(Self {
            window: inner.window(),
            inner: Some(inner),
            random: SplitMix(plan.seed),
            plan,
            regions: Vec::new(),
            flights: BTreeMap::new(),
            posted: 0,
            polls: 0,
            epoll,
            signal,
            signalled: false,
        })
    }

    /// Breaks the connection: at the next poll everything outstanding, the lost requests too, completes with
    /// [`WorkError::Disconnected`].
    pub fn disconnect(&mut self) {
        self.inner = None;
        self.set_signal();
    }

    /// How many requests are lost so far and will complete only when the connection breaks.
    #[must_use]
    pub fn lost(&self) -> usize {
        self.flights
            .values()
            .filter(|flight| flight.fate.lost)
            .count()
    }

    fn draw(&mut self) -> Fate {
        let lost = self.random.chance(self.plan.lost);
        let delay = if self.random.chance(self.plan.delayed) && self.plan.longest_delay > 0 {
            1 + (self.random.next() % u64::from(self.plan.longest_delay)) as u32
        } else {
            0
        };
        let bit = self.random.next();
        let corrupt = self.random.chance(self.plan.corrupted).then_some(bit);
        Fate {
            lost,
            delay,
            corrupt,
        }
    }

    fn post(
        &mut self,
        id: WorkId,
        read: Option<LocalSlice>,
        post: impl FnOnce(&mut E, WorkId) -> Result<(), PostError>,
    ) -> Result<(), PostError> {
        if self
            .plan
            .disconnect_after
            .is_some_and(|after| self.posted >= after)
        {
            self.disconnect();
        }
        let Some(mut inner) = self.inner.take() else {
            return Err(PostError::Disconnected);
        };
        let result = if self.credits() == 0 {
            Err(PostError::WindowFull)
        } else {
            let fate = self.draw();
            let number = self.posted;
            let withheld = fate.lost && self.random.next().is_multiple_of(2);
            let posted = if withheld {
                Ok(())
            } else {
                post(&mut inner, WorkId(number))
            };
            if posted.is_ok() {
                self.posted += 1;
                self.flights.insert(
                    number,
                    Flight {
                        id,
                        read,
                        fate,
                        ended: None,
                    },
                );
            }
            posted
        };
        self.inner = Some(inner);
        self.set_signal();
        result
    }

    /// Flips a bit of a read's bytes.
    fn corrupt(&self, slice: LocalSlice, bit: u64) {
        let Some(region) = self
            .regions
            .get(slice.region.0 as usize)
            .filter(|_| slice.len > 0)
        else {
            return;
        };
        let offset = slice.offset + bit / 8 % u64::from(slice.len);
        let mut byte = [0];
        if region.read(offset, &mut byte).is_ok() {
            byte[0] ^= 1 << (bit % 8);
            // The slice was writable a moment ago, when the read landed in it.
            let _ = region.write(offset, &byte);
        }
    }

    fn set_signal(&mut self) {
        let silent = self
            .inner
            .as_ref()
            .is_none_or(|inner| inner.wait_fd().is_none());
        let wanted = if self.inner.is_none() {
            !self.flights.is_empty()
        } else {
            self.flights
                .values()
                .any(|flight| !flight.fate.lost && (silent || flight.ended.is_some()))
        };
        if wanted == self.signalled {
            return;
        }
        self.signalled = wanted;
        // A counter of 0 or 1 neither overflows nor blocks.
        if wanted {
            let _ = rustix::io::write(&self.signal, &1u64.to_ne_bytes());
        } else {
            let _ = rustix::io::read(&self.signal, &mut [0u8; 8]);
        }
    }
}

impl<E: Endpoint> Endpoint for FaultyEndpoint<E> {
    fn register(&mut self, memory: Arc<RegisteredMemory>) -> RegionId {
        match &mut self.inner {
            Some(inner) => {
                let region = inner.register(memory.clone());
                if self.regions.len() <= region.0 as usize {
                    self.regions.push(memory);
                }
                region
            }
            None => RegionId(u32::MAX),
        }
    }

    fn post_read(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post(id, Some(local), |inner, id| {
            inner.post_read(id, local, remote)
        })
    }

    fn post_write(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post(id, None, |inner, id| inner.post_write(id, local, remote))
    }

    fn flush(&mut self) {
        if let Some(inner) = &mut self.inner {
            inner.flush();
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        self.polls += 1;
        let before = out.len();
        if let Some(inner) = &mut self.inner {
            let mut ended = Vec::new();
            inner.poll(&mut ended);
            for Completion {
                id: WorkId(number),
                result,
            } in ended
            {
                if let Some(flight) = self.flights.get_mut(&number) {
                    flight.ended = Some((result, self.polls + u64::from(flight.fate.delay)));
                    // A broken connection tells about the lost ones too.
                    flight.fate.lost &=
                        !matches!(result, Err(WorkError::Disconnected | WorkError::Protocol));
                }
            }
            if !inner.is_connected()
                && self
                    .flights
                    .values()
                    .all(|flight| flight.fate.lost || flight.ended.is_some())
            {
                self.inner = None;
            }
        }
        let connected = self.inner.is_some();
        let due: Vec<u64> = self
            .flights
            .iter()
            .filter(|(_, flight)| match flight.ended {
                _ if !connected => true,
                Some((_, at)) => !flight.fate.lost && at <= self.polls,
                None => false,
            })
            .map(|(&number, _)| number)
            .collect();
        for number in due {
            let Some(Flight {
                id,
                read,
                fate,
                ended,
            }) = self.flights.remove(&number)
            else {
                continue;
            };
            let result = match ended {
                Some((result, at)) if !fate.lost && at <= self.polls => result,
                _ => Err(WorkError::Disconnected),
            };
            if let (Ok(()), Some(slice), Some(bit)) = (result, read, fate.corrupt) {
                self.corrupt(slice, bit);
            }
            out.push(Completion { id, result });
        }
        if self.plan.reordered
            && let Some(added) = out.get_mut(before..)
        {
            self.random.shuffle(added);
        }
        self.set_signal();
        out.len() - before
    }

    fn credits(&self) -> usize {
        self.window - self.flights.len()
    }

    fn window(&self) -> usize {
        self.window
    }

    fn is_connected(&self) -> bool {
        self.inner.as_ref().is_some_and(Endpoint::is_connected)
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn arm(&mut self) -> bool {
        self.inner.as_mut().is_none_or(Endpoint::arm)
    }
}

/// Vigna's splitmix64: enough to draw faults with.
#[derive(Debug)]
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn chance(&mut self, per_mille: u32) -> bool {
        self.next() % 1000 < u64::from(per_mille)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = (self.next() % (i as u64 + 1)) as usize;
            items.swap(i, j);
        }
    }
}
