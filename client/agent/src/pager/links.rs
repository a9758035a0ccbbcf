//! The pager's connections to memory nodes: one endpoint per node, as it would have its own queue pair.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farpage_fabric::memory::RegisteredMemory;
use farpage_fabric::{Completion, Endpoint, LocalSlice, PostError, RegionId, WorkId};

use super::dial::{Dialled, Dialling, Said};
use super::patience::Patience;
use super::wakeups::Source;
use super::{Pager, Wakeups};
use crate::entry::Slot;
use crate::far::FarMemory;

/// Requests outstanding at once on one connection: enough for all fetches and all staging areas.
pub(super) const WINDOW: usize = 128;
/// Between two attempts to reach a node that did not answer.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

/// What a work request was for. Its 64 bits come back in the completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// A read of a fetch; ahead when nobody waits for it yet.
    Read { place: u8, index: u8, ahead: bool },
    /// A write of a staging area's run.
    Write { area: u8, index: u8 },
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
            Self::Write { area, index } => WorkId(WRITE | u64::from(area) << 8 | u64::from(index)),
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
            }
        }
    }
}

/// Why a request could not be posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkError {
    /// The window is full, or a connection is being made: after the next completion.
    Busy,
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
    in_flight: usize,
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
}

/// Regions are registered in this order on every endpoint.
const FRAMES: RegionId = RegionId(0);
const STAGING: RegionId = RegionId(1);

impl Links {
    /// None yet. Whatever they have to wait for wakes `wakeups`.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub(super) fn new(wakeups: Wakeups) -> io::Result<Self> {
        let dialled = Dialled::new()?;
        wakeups.watch(&dialled, Source::Link)?;
        Ok(Self {
            links: Vec::new(),
            staging: None,
            wakeups,
            dialled,
        })
    }

    /// The frames' region, the same on every connection.
    pub(super) fn frames_region(&self) -> RegionId {
        FRAMES
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
                    in_flight: 0,
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
            && link.in_flight == 0
        {
            link.endpoint = None;
        }
        if link.endpoint.is_none() {
            link.connect(frames, staging.as_ref(), &self.wakeups, &self.dialled)?;
        }
        Ok(link)
    }

    /// Posts a read of a slot (and its neighbours, as long as `to`).
    pub(super) fn read(
        &mut self,
        far: &FarMemory,
        frames: &Arc<RegisteredMemory>,
        work: Work,
        to: LocalSlice,
        slot: Slot,
    ) -> Result<(), LinkError> {
        let (extent, remote) = far.locate(slot).ok_or(LinkError::Unreachable)?;
        let link = self.link(&extent.grant.address, frames)?;
        if matches!(work, Work::Read { ahead: true, .. }) {
            return link.post(|endpoint| endpoint.post_read_ahead(work.id(), to, remote));
        }
        if let Some(patience) = &mut link.patience {
            patience.begin(Instant::now());
        }
        link.post(|endpoint| endpoint.post_read(work.id(), to, remote))
    }

    /// Posts a write to a slot (and its neighbours).
    pub(super) fn write(
        &mut self,
        far: &FarMemory,
        frames: &Arc<RegisteredMemory>,
        work: Work,
        from: LocalSlice,
        slot: Slot,
    ) -> Result<(), LinkError> {
        let (extent, remote) = far.locate(slot).ok_or(LinkError::Unreachable)?;
        let link = self.link(&extent.grant.address, frames)?;
        link.post(|endpoint| endpoint.post_write(work.id(), from, remote))
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
            if link.in_flight > 0
                && let Some(endpoint) = &mut link.endpoint
            {
                let before = out.len();
                let got = endpoint.poll(out);
                link.in_flight = link.in_flight.saturating_sub(got);
                let mut fresh = out.iter().skip(before);
                if let Some(patience) = &mut link.patience
                    && fresh.any(|completion| is_waited_for(completion.id))
                {
                    patience.came(Instant::now());
                }
                total += got;
            }
        }
        total
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
        self.links.iter().any(|link| link.in_flight > 0)
    }

    /// Whether an answer that a fault waits for is likely to come sooner than a sleeper would wake.
    pub(super) fn looks_on(&mut self) -> bool {
        let waiting = self.links.iter_mut().filter(|link| link.in_flight > 0);
        waiting
            .filter_map(|link| link.patience.as_mut())
            .any(|patience| patience.looks_on(Instant::now()))
    }

    /// Whether a slot's node can be asked for it now. If not, a connection is made as soon as it may be.
    pub(super) fn reaches(
        &mut self,
        far: &FarMemory,
        frames: &Arc<RegisteredMemory>,
        slot: Slot,
    ) -> bool {
        let Some((extent, _)) = far.locate(slot) else {
            return false;
        };
        let link = self.link(&extent.grant.address, frames);
        link.is_ok_and(|link| {
            let endpoint = link.endpoint.as_ref();
            endpoint.is_some_and(Endpoint::is_connected)
        })
    }

    /// Whether the connection to a slot's node has broken.
    pub(super) fn is_away(&self, far: &FarMemory, slot: Slot) -> bool {
        let Some((extent, _)) = far.locate(slot) else {
            return true;
        };
        let mut links = self.links.iter();
        let link = links.find(|link| link.address == extent.grant.address);
        link.is_some_and(|link| {
            let endpoint = link.endpoint.as_ref();
            !endpoint.is_some_and(Endpoint::is_connected)
        })
    }

    /// Sees to it that answers wake this pager. False where one is there already.
    pub(super) fn arm(&mut self) -> bool {
        let waiting = self.links.iter_mut().filter(|link| link.in_flight > 0);
        let mut endpoints = waiting.filter_map(|link| link.endpoint.as_mut());
        endpoints.all(Endpoint::arm)
    }

    /// Some connection has news. One on which nothing is outstanding can only have ended: it is made anew when it is
    /// wanted.
    pub(super) fn look_at_idle(&mut self, completions: &mut Vec<Completion>) {
        self.dialled.quiet();
        for link in self.links.iter_mut().filter(|link| link.in_flight == 0) {
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
        dialled: &Dialled,
    ) -> Result<(), LinkError> {
        if self.retry_at.is_some_and(|at| Instant::now() < at) {
            return Err(LinkError::Unreachable);
        }
        let Some(dialling) = &self.dialling else {
            let regions = [frames].into_iter().chain(staging).cloned().collect();
            return match Dialling::start(&self.address, regions, dialled) {
                Ok(dialling) => {
                    self.dialling = Some(dialling);
                    Err(LinkError::Busy)
                }
                Err(error) => Err(self.failed(&error.to_string())),
            };
        };
        match dialling.said() {
            Said::NothingYet => Err(LinkError::Busy),
            Said::Failed(why) => Err(self.failed(&why)),
            Said::Connected(endpoint) => {
                self.dialling = None;
                self.take(endpoint, staging, wakeups)
            }
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

    fn post(
        &mut self,
        post: impl FnOnce(&mut dyn Endpoint) -> Result<(), PostError>,
    ) -> Result<(), LinkError> {
        let endpoint = self.endpoint.as_deref_mut().ok_or(LinkError::Unreachable)?;
        match post(endpoint) {
            Ok(()) => {
                self.in_flight += 1;
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
        let worked = !completions.is_empty();
        for completion in completions.drain(..) {
            if let Err(error) = completion.result {
                tracing::debug!(%error, "a work request failed");
            }
            match Work::of(completion.id) {
                Work::Read { place, .. } => {
                    self.read_done(usize::from(place), completion.result.is_ok());
                }
                Work::Write { area, index } => {
                    self.write_done(
                        usize::from(area),
                        usize::from(index),
                        completion.result.is_ok(),
                    );
                }
            }
        }
        self.completions = completions;
        worked
    }
}
