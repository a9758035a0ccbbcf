//! Far memory is full: what gives way, and how long that is borne.
//!
//! Whoever finds no slot first has pages that are here give up the clean copies that they keep far. If there are none, pages
//! that were taken out go home again and eviction rests a little, in case the control plane is granted more. Faults that
//! need a frame wait meanwhile; once it has been in vain for long they end in SIGBUS.

use std::time::{Duration, Instant};

use farpage_attach::control::BATCH_PAGES;

use super::Pager;
use super::batch::Batch;
use crate::entry::{Entry, State};
use crate::table::Page;

/// How long no slot may be had before a fault that needs a frame ends in SIGBUS.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long nobody need have asked in vain for the next who does to be the first again.
const LAPSE: Duration = Duration::from_secs(1);
/// How long nobody looks for clean copies once none was found: it takes a look at every page that is here.
const COPIES_REST: Duration = Duration::from_millis(100);

/// That no slot could be had.
#[derive(Debug, Default)]
pub(crate) struct Shortage {
    /// Since when, and when one was last asked for in vain. What was so a while ago need not be so now.
    asked: Option<(Instant, Instant)>,
    /// When no page was found that is here and has a clean copy far.
    no_copies_at: Option<Instant>,
}

impl Shortage {
    /// No slot was to be had. While a node is silent that does not say that there are none: the time begins when it is back.
    pub(super) fn go_on(&mut self, a_node_is_silent: bool) {
        let now = Instant::now();
        let since = self
            .asked
            .filter(|(_, last)| !a_node_is_silent && last.elapsed() < LAPSE)
            .map_or(now, |(since, _)| since);
        self.asked = Some((since, now));
    }

    /// A slot was.
    pub(super) fn end(&mut self) {
        self.asked = None;
    }

    /// Whether no slot could be had when one was last asked for.
    pub(super) fn is_known(&self) -> bool {
        self.asked.is_some()
    }

    /// Whether it has gone on for too long to wait for its end.
    pub(super) fn is_lasting(&self) -> bool {
        self.asked
            .is_some_and(|(since, last)| last - since > DEADLINE && last.elapsed() < LAPSE)
    }
}

impl Pager {
    /// No slot is to be had: pages that are here give up their clean copies. Returns whether one did.
    pub(super) fn give_up_copies(&mut self) -> bool {
        let tried = self.shortage.no_copies_at;
        if tried.is_some_and(|at| at.elapsed() < COPIES_REST) {
            return false;
        }
        let has_copy = |page: &Page| {
            let entry = self.table.get(*page);
            entry.state() == State::Local && entry.slot().is_some()
        };
        let here = self.residents.last_to_go();
        let pages: Batch = here.filter(has_copy).take(BATCH_PAGES).collect();
        for page in &pages {
            self.drop_copy(*page);
        }
        self.shortage.no_copies_at = pages.is_empty().then(Instant::now);
        !pages.is_empty()
    }

    /// A page that is here, or in staging, loses the copy that it has far.
    pub(super) fn drop_copy(&mut self, page: Page) {
        self.keep_reference(page);
        if let Some((before, _)) = self.table.change(page, Entry::dropped_copy) {
            self.release_slot_of(before);
        }
    }
}
