//! What becomes of a fault whose page does not come: unreachable is not lost, and lost is told at once.
//!
//! A fetch that fails gives all of its pages back. Those that threads wait for are asked for again, one by one, so that a
//! page on a node that answers neither waits for another's node nor is taken for lost with it. Until a node can be
//! reached its pages' faults wait, at most until their deadline. Where another node has a copy none of this begins: that one
//! is asked, at once.

use std::time::Instant;

use super::{Fault, Moment, Pager};
use crate::table::Page;

/// How often a page whose bytes fail their check is read again before it counts as lost.
const MAX_RETRIES: u8 = 3;
/// Why a fault ends that has waited for too long.
pub(super) const PAST_DEADLINE: &str = "its memory node could not be reached before the fault's deadline (--fault-deadline); \
     farpage status tells which nodes answer";
/// Why it ends where the page was there but the kernel had no frame for it.
const NO_FRAME: &str = "this machine, or the program's memory cgroup, had no free memory for its page before the fault's deadline \
     (--fault-deadline); end what else is there, or raise the group's limit";
/// Why a fault ends that needs a frame where nothing can be evicted.
pub(super) const FAR_MEMORY_FULL: &str =
    "far memory is full and nothing more fits; give it more (--far, or another memory node)";

impl Pager {
    /// Whether a fault has waited for as long as its job lets it.
    pub(super) fn is_late(&self, fault: &Fault) -> bool {
        self.is_past_deadline(fault.began)
    }

    /// Whether what began then has waited for as long as a fault may.
    pub(super) fn is_past_deadline(&self, began: Moment) -> bool {
        self.attention.waited(began, Instant::now()) > self.job.limits.fault_deadline
    }

    /// Why such a fault has waited for so long: where its page's bytes are here and there is room for them, for a frame.
    pub(super) fn why_late(&self, bytes_are_here: bool) -> &'static str {
        match bytes_are_here && self.room() > 0 {
            true => NO_FRAME,
            false => PAST_DEADLINE,
        }
    }

    /// Ends a fault in SIGBUS, and says why: to the log, and to the program's user at its end.
    pub(super) fn end_in_sigbus(&mut self, fault: &Fault, why: &str) {
        self.job.a_page_is_lost(why);
        tracing::error!(
            page = format_args!("{:#x}", fault.page.address()),
            pid = self.pid(),
            why,
            waited = ?fault.began.at.elapsed(),
            entry = ?self.table.get(fault.page),
            room = self.room(),
            batch = self.take_out.is_some(),
            staged = self.staging.is_busy(),
            nodes = %self.links.condition(),
            "a fault ends in SIGBUS"
        );
        self.deliver_sigbus(fault);
    }

    /// A fetch failed, or brought bytes that do not pass their check. Returns whether it is over.
    pub(super) fn retry_fetch(&mut self, place: usize) -> bool {
        let Some(fetch) = self.fetches.get(place) else {
            return false;
        };
        let (corrupt, alone) = (!fetch.failed, fetch.slots.len() == 1);
        let (first, wanted, tried) = (fetch.first, fetch.wanted, fetch.retries);
        let elsewhere = match corrupt {
            true => self.doubt_sources(place) || alone && wanted,
            false => {
                self.links.reconnect_later();
                self.has_other_sources(place)
            }
        };
        let Some(fetch) = self.fetches.get(place) else {
            return false;
        };
        if elsewhere && tried < MAX_RETRIES {
            fetch.again();
            if corrupt {
                self.complain_of_bytes(first);
            }
            self.post_reads(place);
            return false;
        }
        let waiters = std::mem::take(&mut fetch.waiters);
        self.drop_fetch(place);
        if corrupt && alone {
            for fault in waiters {
                self.end_in_sigbus(&fault, "its bytes keep failing their check; see the memory nodes' logs, and test their memory");
            }
            return true;
        }
        if corrupt {
            self.complain_of_bytes(first);
        }
        let again = waiters.into_iter().map(|fault| Fault {
            alone: true,
            ..fault
        });
        self.waiting.extend(again);
        // They are tried with all that wait, after a rest.
        false
    }

    fn complain_of_bytes(&self, first: Page) {
        tracing::warn!(
            page = format_args!("{:#x}", first.address()),
            "bytes from far memory failed their check; they are read again"
        );
    }

    /// A far page whose fetch has failed before: lost, or fetched once its node can be reached.
    pub(super) fn fetch_again(&mut self, fault: Fault) -> Option<Fault> {
        let (Some(slot), Some(frames)) = (self.table.get(fault.page).slot(), self.fetches.memory())
        else {
            return Some(fault);
        };
        if self.shared.far.is_lost(slot) {
            self.end_in_sigbus(
                &fault,
                "its memory node has lost it (it was ended, or began anew)",
            );
            return None;
        }
        if self.links.reaches(&self.shared.far, &frames, slot) {
            self.start_fetch(fault)
        } else {
            Some(fault)
        }
    }

    /// Threads that have waited long enough for a fetch that is still under way wait no more. Returns whether there were any.
    pub(super) fn give_up_late(&mut self, place: usize) -> bool {
        let deadline = self.job.limits.fault_deadline;
        let Some(fetch) = self.fetches.get(place) else {
            return false;
        };
        let (attention, now) = (&self.attention, Instant::now());
        let is_late = |fault: &Fault| attention.waited(fault.began, now) > deadline;
        if !fetch.waiters.iter().any(is_late) {
            return false;
        }
        let has_arrived = fetch.is_complete() && !fetch.failed;
        let waiters = std::mem::take(&mut fetch.waiters);
        let (late, rest): (Vec<Fault>, Vec<Fault>) = waiters.into_iter().partition(is_late);
        if rest.is_empty() {
            // What arrives after all is as good as read ahead.
            (fetch.wanted, fetch.hinted) = (false, false);
            self.fetches.ahead.push_back(place);
        } else {
            fetch.waiters = rest;
        }
        let why = self.why_late(has_arrived);
        for fault in late {
            self.end_in_sigbus(&fault, why);
        }
        true
    }
}
