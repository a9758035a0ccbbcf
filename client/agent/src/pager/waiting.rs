//! Faults that cannot be answered yet: kept, tried again each time round, and ended where waiting has no end.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::failure::{FAR_MEMORY_FULL, PAST_DEADLINE};
use super::{Fault, Pager};

/// How long threads may wait for room while nothing can be taken out.
const STARVED_DEADLINE: Duration = Duration::from_secs(3);

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
                let why = if full { FAR_MEMORY_FULL } else { PAST_DEADLINE };
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
        let evicted = self.job.counters.pages_evicted.load(Ordering::Relaxed);
        match self.starved {
            Some((at, before)) if needs_room && before == evicted => {
                // Pages in staging are out already, and wait for a node: that has its own deadline.
                if at.elapsed() > STARVED_DEADLINE
                    && !self.shortage.is_known()
                    && !self.staging.is_busy()
                {
                    let stuck = self
                        .job
                        .unmanaged()
                        .saturating_sub(self.job.sharing.pages());
                    let stuck = (stuck * 4096) >> 20;
                    let limit = (self.job.local_pages() * 4096) >> 20;
                    self.job.fail(format!(
                        "nothing of it can be taken out any more to make room: of {limit} MiB allowed, {stuck} MiB are \
                         stacks, small or locked mappings and processes that are not managed, and the rest is locked \
                         or pinned; {}",
                        self.job.remedy()
                    ));
                    self.closing = true;
                }
            }
            _ if needs_room => self.starved = Some((Instant::now(), evicted)),
            _ => self.starved = None,
        }
    }
}
