//! Faults that cannot be answered yet: kept, tried again each time round, and ended where waiting has no end.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::failure::FAR_MEMORY_FULL;
use super::{Fault, Pager};

/// How long threads may wait for room while nothing can be taken out.
const STARVED_DEADLINE: Duration = Duration::from_secs(3);
/// What counts of the time between two looks at that. They come every few milliseconds; what is more was spent waiting for a
/// processor, in which nothing was tried.
const LOOK_AT_MOST: Duration = Duration::from_millis(10);

/// That threads wait for room and nothing goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Starved {
    /// Pages taken out when it began.
    evicted: u64,
    looked: Instant,
    /// How long nothing was on its way out.
    in_vain: Duration,
}

impl Starved {
    fn begun(evicted: u64) -> Self {
        Self {
            evicted,
            looked: Instant::now(),
            in_vain: Duration::ZERO,
        }
    }

    fn go_on(self, on_their_way: bool) -> Self {
        let now = Instant::now();
        let spent = match on_their_way {
            true => Duration::ZERO,
            false => (now - self.looked).min(LOOK_AT_MOST),
        };
        Self {
            looked: now,
            in_vain: self.in_vain + spent,
            ..self
        }
    }
}

impl Pager {
    pub(super) fn answer_or_keep(&mut self, fault: Fault) {
        if let Some(fault) = self.answer(fault) {
            self.waiting.push_back(fault);
        }
    }

    /// Tries the faults that could not be answered before. Past their deadline they end in SIGBUS.
    pub(super) fn retry_waiting(&mut self) -> bool {
        let mut worked = false;
        for _ in 0..self.waiting.len() {
            let Some(fault) = self.waiting.pop_front() else {
                break;
            };
            // Memory of a node that is silent is not full: it may be back before the deadline.
            let full = self.shortage.is_lasting()
                && self.room() <= 0
                && !self.shared.far.any_unreachable();
            if full || self.is_late(&fault) {
                let is_far = self.table.get(fault.page).slot().is_some();
                let why = if full {
                    FAR_MEMORY_FULL
                } else {
                    self.why_late(!is_far)
                };
                self.end_in_sigbus(&fault, why);
                worked = true;
                continue;
            }
            match self.answer(fault) {
                Some(fault) => self.waiting.push_back(fault),
                None => worked = true,
            }
        }
        worked |= self.install_arrived();
        self.check_starved();
        worked
    }

    /// Threads wait for room, and nothing has been taken out for long: what is resident cannot be. That is the
    /// user's to know, not a wait without end.
    fn check_starved(&mut self) {
        let needs_room =
            (!self.waiting.is_empty() || self.fetches.any_to_install()) && self.room() <= 0;
        if !needs_room {
            self.starved = None;
            return;
        }
        let evicted = self.job.counters.pages_evicted.load(Ordering::Relaxed);
        // Pages with the helper or in staging are on their way, which has deadlines of its own.
        let on_their_way = self.take_out.is_some()
            || self.staging.is_busy()
            || self.shortage.is_known()
            || self.job.any_settles();
        let before = self.starved.filter(|before| before.evicted == evicted);
        let starved = before.map_or(Starved::begun(evicted), |before| before.go_on(on_their_way));
        self.starved = Some(starved);
        if starved.in_vain <= STARVED_DEADLINE {
            return;
        }
        if self.job.is_suspended() {
            self.starved = None;
        } else {
            self.end_starved();
        }
    }

    fn end_starved(&mut self) {
        let stuck = self
            .job
            .unmanaged()
            .saturating_sub(self.job.sharing.pages());
        let stuck = (stuck * 4096) >> 20;
        let limit = (self.job.local_pages() * 4096) >> 20;
        tracing::warn!(
            pid = self.pid(),
            here = self.table.local_pages(),
            may_go = self.residents.len(),
            room = self.job.room(),
            waiting = self.waiting.len(),
            helper = self.helper.is_some(),
            "starved"
        );
        self.job.fail(format!(
            "nothing of it can be taken out any more to make room: of {limit} MiB allowed, {stuck} MiB are stacks, small or \
             locked mappings and processes that are not managed, and the rest is locked or pinned; {}",
            self.job.remedy()
        ));
        self.closing = true;
    }
}
