//! The pager's connections to memory nodes: one endpoint per node, with its own queue pairs over RDMA.
//!
//! Where a page has copies on several nodes, one that does not answer is not waited for: its connection is given up, and what
//! was asked of it fails and is asked of another.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farpage_fabric::memory::RegisteredMemory;
use farpage_fabric::{
    Completion, Endpoint, LocalSlice, OwnDevice, PostError, RegionId, WorkError, WorkId,
};

use super::dial::{Dialled, Dialling, Said};
use super::patience::Patience;
use super::wakeups::Source;
use super::{Pager, Wakeups};
use crate::entry::Slot;
use crate::far::{FarMemory, Place};

/// Requests outstanding at once on one connection: enough for all fetches and all staging areas.
pub(super) const WINDOW: usize = 128;
/// Between two attempts to reach a node that did not answer.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
/// A node that has answered nothing for so long, of what was asked of it, is not waited for where others have the same bytes.
/// A thread waits for this once, and a node that is only slow is given up in vain: both should be rare.
const SILENT_AFTER: Duration = Duration::from_millis(500);
/// A connection that owes an answer for so long will not give it: by itself RDMA gives up after some seconds, and a kernel that has
/// lost a request never does. It is made anew; what it was to write may still arrive, and rests.
const OWED_FOR_EVER: Duration = Duration::from_secs(10);

/// What a work request was for. Its 64 bits come back in the completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// A read of a fetch; ahead when nobody waits for it yet.
    Read { place: u8, index: u8, ahead: bool },
    /// A write of a staging area's run to one of its targets.
    Write { area: u8, index: u8, target: u8 },
}

const WRITE: u64 = 1 << 63;
const AHEAD: u64 = 1 << 62;

impl Work {
    fn id(self) -> WorkId {
        match self {
            Self::Read {
                place,
                index,
                ahead,
            } => WorkId(Pager::read_id(place, index).0 | if ahead { AHEAD } else { 0 }),
            Self::Write {
                area,
                index,
                target,
            } => {
                let place = u64::from(target) << 16 | u64::from(area) << 8 | u64::from(index);
                WorkId(WRITE | place)
            }
        }
    }

    fn of(id: WorkId) -> Self {
        let (high, low) = ((id.0 >> 8) as u8, id.0 as u8);
        if id.0 & WRITE == 0 {
            Self::Read {
                place: high,
                index: low,
                ahead: id.0 & AHEAD != 0,
            }
        } else {
            Self::Write {
                area: high,
                index: low,
                target: (id.0 >> 16) as u8,
            }
        }
    }
}

/// Why a request could not be posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkError {
    /// The window is full, or a connection is being made: after the next completion.
    Busy,
    /// A connection is being made anew, to a node that could not be reached before.
    Away,
    /// No connection to that node now.
    Unreachable,
}

struct Link {
    address: String,
    endpoint: Option<Box<dyn Endpoint>>,
    dialling: Option<Dialling>,
    retry_at: Option<Instant>,
    /// Since when no attempt has succeeded.
    away_since: Option<Instant>,
    /// What was posted and has not completed, and when it was posted.
    in_flight: Vec<(WorkId, Instant)>,
    /// When the last of it completed; else when the first of it was posted.
    answered: Instant,
    /// The last that went wrong, for the log.
    last_error: Option<WorkError>,
    dirty: bool,
    /// For its answers; none where they come with the asking (shared memory).
    patience: Option<Patience>,
}

/// The connections of one pager.
pub(crate) struct Links {
    links: Vec<Link>,
    staging: Option<Arc<RegisteredMemory>>,
    wakeups: Wakeups,
    dialled: Dialled,
    device: Arc<OwnDevice>,
}

/// Regions are registered in this order on every endpoint.
const FRAMES: RegionId = RegionId(0);
const STAGING: RegionId = RegionId(1);

impl Links {
    /// None yet. Whatever they have to wait for wakes `wakeups`; those over RDMA will use this device.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub(super) fn new(wakeups: Wakeups, device: Arc<OwnDevice>) -> io::Result<Self> {
        let dialled = Dialled::new()?;
        wakeups.watch(&dialled, Source::Link)?;
        Ok(Self {
            links: Vec::new(),
            staging: None,
            wakeups,
            dialled,
            device,
        })
    }

    /// The staging's region, the same on every connection.
    pub(super) fn staging_region(&self) -> RegionId {
        STAGING
    }

    /// Writes come from this memory.
    pub(super) fn set_staging(&mut self, staging: Arc<RegisteredMemory>) {
        // On connections made before it is the second region too: they have the frames alone.
        for link in &mut self.links {
            if let Some(endpoint) = &mut link.endpoint {
                endpoint.register(Arc::clone(&staging));
            }
        }
        self.staging = Some(staging);
    }

    fn link(
        &mut self,
        address: &str,
        frames: &Arc<RegisteredMemory>,
    ) -> Result<&mut Link, LinkError> {
        let at = match self.links.iter().position(|link| link.address == address) {
            Some(at) => at,
            None => {
                self.links.push(Link {
                    address: address.to_owned(),
                    endpoint: None,
                    dialling: None,
                    retry_at: None,
                    away_since: None,
                    in_flight: Vec::with_capacity(WINDOW),
                    answered: Instant::now(),
                    last_error: None,
                    dirty: false,
                    patience: None,
                });
                self.links.len() - 1
            }
        };
        let staging = self.staging.clone();
        let link = &mut self.links[at];
        if link
            .endpoint
            .as_ref()
            .is_some_and(|endpoint| !endpoint.is_connected())
            && link.in_flight.is_empty()
        {
            link.endpoint = None;
        }
        if link.endpoint.is_none() {
            let way = (&self.dialled, &self.device);
            link.connect(frames, staging.as_ref(), &self.wakeups, way)?;
        }
        Ok(link)
    }

    /// Posts a read of a run of slots from the first of these places that can be asked now, to frames from `offset` on. Says
    /// which it was.
    pub(super) fn read<'a>(
        &mut self,
        frames: &Arc<RegisteredMemory>,
        work: Work,
        offset: u64,
        places: impl Iterator<Item = &'a Place>,
    ) -> Result<&'a Place, LinkError> {
        let mut worst = LinkError::Unreachable;
        for place in places {
            match self.read_from(frames, work, offset, place) {
                Ok(()) => return Ok(place),
                Err(LinkError::Unreachable) => {}
                Err(error) => worst = error,
            }
        }
        Err(worst)
    }

    fn read_from(
        &mut self,
        frames: &Arc<RegisteredMemory>,
        work: Work,
        offset: u64,
        place: &Place,
    ) -> Result<(), LinkError> {
        let to = LocalSlice {
            region: FRAMES,
            offset,
            len: u32::from(place.len) * 4096,
        };
        let link = self.link(&place.grant.address, frames)?;
        let id = work.id();
        if matches!(work, Work::Read { ahead: true, .. }) {
            return link.post(id, |endpoint| {
                endpoint.post_read_ahead(id, to, place.remote)
            });
        }
        if let Some(patience) = &mut link.patience {
            patience.begin(Instant::now());
        }
        link.post(id, |endpoint| endpoint.post_read(id, to, place.remote))
    }

    /// Posts a write of a run of slots, as long as `from`.
    pub(super) fn write(
        &mut self,
        frames: &Arc<RegisteredMemory>,
        work: Work,
        from: LocalSlice,
        place: &Place,
    ) -> Result<(), LinkError> {
        let link = self.link(&place.grant.address, frames)?;
        let id = work.id();
        link.post(id, |endpoint| endpoint.post_write(id, from, place.remote))
    }

    /// Rings the doorbells.
    pub(super) fn flush(&mut self) {
        for link in &mut self.links {
            if std::mem::take(&mut link.dirty)
                && let Some(endpoint) = &mut link.endpoint
            {
                endpoint.flush();
            }
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let mut total = 0;
        for link in &mut self.links {
            if !link.in_flight.is_empty()
                && let Some(endpoint) = &mut link.endpoint
            {
                let before = out.len();
                let got = endpoint.poll(out);
                if got == 0 {
                    continue;
                }
                link.answered = Instant::now();
                let fresh = out.get(before..).unwrap_or_default();
                for completion in fresh {
                    link.is_over(completion.id);
                    link.last_error = completion.result.err().or(link.last_error);
                }
                if let Some(patience) = &mut link.patience
                    && fresh.iter().any(|completion| is_waited_for(completion.id))
                {
                    patience.came(link.answered);
                }
                total += got;
            }
        }
        total
    }

    /// Gives up connections to nodes that have been silent for long: what was asked of them has failed. Where there are other
    /// copies that is sooner.
    fn give_up_silent(&mut self, has_others: bool, out: &mut Vec<Completion>) {
        if !self.any_in_flight() {
            return;
        }
        let now = Instant::now();
        let waited = |since: Instant| now.saturating_duration_since(since);
        let silent = |link: &&mut Link| {
            !link.in_flight.is_empty()
                && (has_others && waited(link.answered) > SILENT_AFTER || link.owes_for_ever(now))
        };
        for link in self.links.iter_mut().filter(silent) {
            // Nothing that it may still send or receive is wanted, and nothing of ours is touched by it any more.
            link.endpoint = None;
            link.failed("it does not answer");
            let failed = link.in_flight.drain(..).map(|(id, _)| Completion {
                id,
                result: Err(WorkError::Disconnected),
            });
            out.extend(failed);
        }
    }

    /// Fewest requests that any connection takes now.
    pub(super) fn credits(&self) -> usize {
        self.links
            .iter()
            .filter_map(|link| Some(link.endpoint.as_ref()?.credits()))
            .min()
            .unwrap_or(WINDOW)
    }

    /// Whether anything is outstanding.
    pub(super) fn any_in_flight(&self) -> bool {
        self.links.iter().any(|link| !link.in_flight.is_empty())
    }

    /// Whether an answer that a fault waits for is likely to come sooner than a sleeper would wake.
    pub(super) fn looks_on(&mut self) -> bool {
        let waiting = self.links.iter_mut();
        waiting
            .filter(|link| !link.in_flight.is_empty())
            .filter_map(|link| link.patience.as_mut())
            .any(|patience| patience.looks_on(Instant::now()))
    }

    /// Whether a node can be asked for a slot now. If not, connections are made as soon as they may be.
    pub(super) fn reaches(
        &mut self,
        far: &FarMemory,
        frames: &Arc<RegisteredMemory>,
        slot: Slot,
    ) -> bool {
        far.places(slot, 1).iter().any(|place| {
            let link = self.link(&place.grant.address, frames);
            link.is_ok_and(|link| {
                let endpoint = link.endpoint.as_ref();
                endpoint.is_some_and(Endpoint::is_connected)
            })
        })
    }

    /// Whether the connections to all nodes that have a slot have broken.
    pub(super) fn is_away(&self, far: &FarMemory, slot: Slot) -> bool {
        let is_away = |place: &Place| {
            let mut links = self.links.iter();
            let link = links.find(|link| link.address == place.grant.address);
            link.is_some_and(|link| {
                let endpoint = link.endpoint.as_ref();
                !endpoint.is_some_and(Endpoint::is_connected)
            })
        };
        far.places(slot, 1).iter().all(is_away)
    }

    /// Each node and how it is reached, for the log.
    pub(super) fn condition(&self) -> String {
        let links = self.links.iter().map(|link| {
            let endpoint = link.endpoint.as_ref();
            let is_up = endpoint.is_some_and(Endpoint::is_connected);
            let oldest = link.in_flight.iter().map(|(_, since)| since.elapsed());
            format!(
                "{} {}, {} requests under way, the oldest for {:?}, last error {:?}",
                link.address,
                if is_up { "connected" } else { "not connected" },
                link.in_flight.len(),
                oldest.max().unwrap_or_default(),
                link.last_error
            )
        });
        links.collect::<Vec<_>>().join("; ")
    }

    /// Sees to it that answers wake this pager. False where one is there already.
    pub(super) fn arm(&mut self) -> bool {
        let waiting = self.links.iter_mut();
        let waiting = waiting.filter(|link| !link.in_flight.is_empty());
        let mut endpoints = waiting.filter_map(|link| link.endpoint.as_mut());
        endpoints.all(Endpoint::arm)
    }

    /// Some connection has news. One on which nothing is outstanding can only have ended: it is made anew when it is
    /// wanted.
    pub(super) fn look_at_idle(&mut self, completions: &mut Vec<Completion>) {
        self.dialled.quiet();
        let idle = self.links.iter_mut();
        for link in idle.filter(|link| link.in_flight.is_empty()) {
            let ended = link.endpoint.as_mut().is_some_and(|endpoint| {
                // Takes what its descriptor still tells of answers that have been taken.
                endpoint.arm();
                endpoint.poll(completions);
                !endpoint.is_connected()
            });
            if ended {
                link.endpoint = None;
            }
        }
    }

    /// A request failed: broken connections rest before they are made anew.
    pub(super) fn reconnect_later(&mut self) {
        for link in &mut self.links {
            if link
                .endpoint
                .as_ref()
                .is_some_and(|endpoint| !endpoint.is_connected())
            {
                if link.retry_at.is_none() {
                    tracing::warn!(
                        address = link.address,
                        "the connection to a memory node broke; it is made anew"
                    );
                }
                link.retry_at = Some(Instant::now() + RECONNECT_PAUSE);
            }
        }
    }
}

fn is_waited_for(id: WorkId) -> bool {
    matches!(Work::of(id), Work::Read { ahead: false, .. })
}

impl Link {
    /// Goes on with connecting; in another thread, since that takes seconds where a node does not answer.
    fn connect(
        &mut self,
        frames: &Arc<RegisteredMemory>,
        staging: Option<&Arc<RegisteredMemory>>,
        wakeups: &Wakeups,
        (dialled, device): (&Dialled, &Arc<OwnDevice>),
    ) -> Result<(), LinkError> {
        if self.retry_at.is_some_and(|at| Instant::now() < at) {
            return Err(LinkError::Unreachable);
        }
        let Some(dialling) = &self.dialling else {
            let regions = [frames].into_iter().chain(staging).cloned().collect();
            return match Dialling::start(&self.address, device, regions, dialled) {
                Ok(dialling) => {
                    self.dialling = Some(dialling);
                    Err(self.not_yet())
                }
                Err(error) => Err(self.failed(&error.to_string())),
            };
        };
        match dialling.said() {
            Said::NothingYet => Err(self.not_yet()),
            Said::Failed(why) => Err(self.failed(&why)),
            Said::Connected(endpoint) => {
                self.dialling = None;
                self.take(endpoint, staging, wakeups)
            }
        }
    }

    fn not_yet(&self) -> LinkError {
        match self.away_since {
            Some(_) => LinkError::Away,
            None => LinkError::Busy,
        }
    }

    /// An attempt has failed. Said once, until one succeeds.
    fn failed(&mut self, why: &str) -> LinkError {
        self.dialling = None;
        self.retry_at = Some(Instant::now() + RECONNECT_PAUSE);
        if self.away_since.is_none() {
            tracing::warn!(
                address = self.address,
                why,
                "no connection to a memory node; what needs it waits"
            );
            self.away_since = Some(Instant::now());
        }
        LinkError::Unreachable
    }

    fn take(
        &mut self,
        mut endpoint: Box<dyn Endpoint>,
        staging: Option<&Arc<RegisteredMemory>>,
        wakeups: &Wakeups,
    ) -> Result<(), LinkError> {
        if let Some(staging) = staging {
            // It may have come after the attempt began; twice is once.
            endpoint.register(Arc::clone(staging));
        }
        if let Some(fd) = endpoint.wait_fd()
            && let Err(error) = wakeups.watch(fd, Source::Link)
        {
            tracing::error!(%error, "a connection cannot be waited for");
            return Err(LinkError::Unreachable);
        }
        if let Some(since) = self.away_since.take() {
            tracing::warn!(address = self.address, away = ?since.elapsed(), "a memory node can be reached again");
        }
        self.patience = endpoint.wait_fd().map(|_| Patience::default());
        self.endpoint = Some(endpoint);
        self.retry_at = None;
        Ok(())
    }

    /// A request has completed.
    fn is_over(&mut self, id: WorkId) {
        if let Some(at) = self.in_flight.iter().position(|(it, _)| *it == id) {
            self.in_flight.swap_remove(at);
        }
    }

    fn owes_for_ever(&self, now: Instant) -> bool {
        let old = |since: Instant| now.saturating_duration_since(since) > OWED_FOR_EVER;
        self.in_flight.iter().any(|(_, since)| old(*since))
    }

    fn post(
        &mut self,
        id: WorkId,
        post: impl FnOnce(&mut dyn Endpoint) -> Result<(), PostError>,
    ) -> Result<(), LinkError> {
        let endpoint = self.endpoint.as_deref_mut().ok_or(LinkError::Unreachable)?;
        match post(endpoint) {
            Ok(()) => {
                let now = Instant::now();
                if self.in_flight.is_empty() {
                    self.answered = now;
                }
                self.in_flight.push((id, now));
                self.dirty = true;
                Ok(())
            }
            Err(PostError::WindowFull) => Err(LinkError::Busy),
            Err(PostError::Disconnected) => Err(LinkError::Unreachable),
            Err(error @ (PostError::LocalBounds | PostError::TooLarge)) => {
                tracing::error!(%error, "a work request was refused");
                Err(LinkError::Unreachable)
            }
        }
    }
}

impl Pager {
    /// Takes completions and hands each to what it was for.
    pub(super) fn poll_links(&mut self) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        self.links.poll(&mut completions);
        let has_others = self.job.limits.copies > 1;
        self.links.give_up_silent(has_others, &mut completions);
        let worked = !completions.is_empty();
        for completion in completions.drain(..) {
            if let Err(error) = completion.result {
                tracing::debug!(%error, "a work request failed");
            }
            match Work::of(completion.id) {
                Work::Read { place, index, .. } => {
                    let (place, index) = (usize::from(place), usize::from(index));
                    self.read_done(place, index, completion.result.is_ok());
                }
                Work::Write {
                    area,
                    index,
                    target,
                } => {
                    let (area, index) = (usize::from(area), usize::from(index));
                    let target = usize::from(target);
                    self.write_done(area, index, target, completion.result.is_ok());
                }
            }
        }
        self.completions = completions;
        worked
    }
}
