//! Reading between moves: what may be read of the uffd while the helper takes pages out by `mremap`, and what it tells.
//!
//! Each of these moves raises an event, and the helper waits for its reading, the move done. As long as it waits nothing else
//! moves, and what the program's threads do once their own events are read can be in nobody's way; the gate has the rule. That a
//! move is done shows in the landing range, by the protected pages that have come there.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farpage_attach::control::{Control, method, staging_offset};
use farpage_core::gate::Remaps;

use super::{Noted, Pager};
use crate::entry::State;
use crate::state::records::undecided;
use crate::sys::pagemap::Pagemap;
use crate::sys::process::{mappings, registered_ranges};
use crate::sys::uffd::{InstallError, MAX_MESSAGES, Message};
use crate::table::Page;

/// How long a move may be under way before its mapping is looked for, where no protected page has come with it: the kernel has
/// reclaimed what the program did not need any more (MADV_FREE), or the program has put another there.
const BARE_MOVE: Duration = Duration::from_millis(20);

/// A page that the program had moved to where the helper was just taking another from. Its bytes were taken instead.
#[derive(Clone, Debug)]
pub(super) struct Replaced {
    page: Page,
    bytes: Box<[u8; 4096]>,
}

fn remaps(control: &Control) -> Remaps<'_> {
    Remaps {
        begun: &control.remaps_begun,
        over: &control.remaps_over,
        read_in: &control.remap_read_in,
    }
}

/// Whether something has come to a place of the landing range, or it is not even kept any more: a call that has failed after
/// something had come waits to be read of too.
fn is_no_more_kept(pid: i32, start: u64) -> bool {
    let holds = |range: &Range<u64>| range.contains(&start);
    let has_come = registered_ranges(pid).is_ok_and(|all| all.iter().any(|(it, _)| holds(it)));
    has_come || mappings(pid).is_ok_and(|all| !all.iter().any(|it| holds(&it.range)))
}

impl Pager {
    /// Whether the helper moves memory by `mremap` just now.
    pub(super) fn is_remapping(&self) -> bool {
        let Some((helper, batch)) = self.helper.as_ref().zip(self.take_out.as_ref()) else {
            return false;
        };
        batch.method == method::REMAP && !batch.is_taken(helper.control())
    }

    /// Reads what there is and may be read, but for what tells of our own moves.
    pub(super) fn read_uffd(&mut self, messages: &mut Vec<Noted>) -> io::Result<usize> {
        if !self.is_remapping() {
            return self.journal.read(&self.uffd, MAX_MESSAGES, messages);
        }
        let mut read = 0;
        while read < MAX_MESSAGES && self.may_read_between() {
            let from = messages.len();
            match self.journal.read(&self.uffd, 1, messages)? {
                0 => break,
                more => read += more,
            }
            let was = messages.len();
            self.leave_out_own(messages);
            if messages.len() < was {
                self.gate.own_event_is_read();
            }
            let is_call = |noted: &Noted| !matches!(noted.message, Message::Fault { .. });
            if let Some(helper) = &self.helper
                && messages.iter().skip(from).any(is_call)
            {
                self.gate.give_up(&helper.control().given_up);
            }
        }
        if read > 0
            && let Some(batch) = &mut self.take_out
        {
            batch.read = Instant::now();
        }
        Ok(read)
    }

    /// Leaves out what tells of our own moves.
    pub(super) fn leave_out_own(&mut self, messages: &mut Vec<Noted>) {
        let Some(helper) = &self.helper else {
            return;
        };
        messages.retain(|noted| {
            let own = match &noted.message {
                Message::Remap { to, .. } => helper.landing().contains(to),
                Message::Unmap(range) => helper.landing().contains(&range.start),
                _ => false,
            };
            if own {
                self.journal.done(noted.at);
            }
            !own
        });
    }

    fn may_read_between(&mut self) -> bool {
        self.open_pagemap();
        let is_late = self.is_remap_late();
        let (Some(helper), Some(pagemap), Some(process)) =
            (&self.helper, &self.pagemap, &self.process)
        else {
            return false;
        };
        let control = helper.control();
        if is_late {
            // Where it shows in nothing else whether the call waits to be read of, it had better be the last.
            self.gate.give_up(&control.given_up);
        }
        let has_moved = |_| {
            let run = control.remap_run.load(Ordering::Acquire);
            let (first, pages) = (u64::from(run & 0xffff), u64::from(run >> 16));
            let start = helper.landing().start + first * 4096;
            let protected = pagemap.any_protected(start..start + pages * 4096);
            protected.unwrap_or(false) || is_late && is_no_more_kept(process.pid(), start)
        };
        self.gate.read_between(remaps(control), has_moved).is_ok()
    }

    /// Whether the `mremap` that is under way, if one is, has been so for long.
    fn is_remap_late(&mut self) -> bool {
        let (Some(helper), Some(batch)) = (&self.helper, &mut self.take_out) else {
            return false;
        };
        let control = helper.control();
        let call = control.remaps_begun.load(Ordering::Acquire);
        if control.remaps_over.load(Ordering::Acquire) == call {
            return false;
        }
        let seen = batch.remap_seen.filter(|(before, _)| *before == call);
        let (_, since) = *batch
            .remap_seen
            .insert(seen.unwrap_or_else(|| (call, Instant::now())));
        since.elapsed() > BARE_MOVE
    }

    /// The program's pagemap, opened when it is first wanted.
    pub(super) fn open_pagemap(&mut self) -> bool {
        if self.pagemap.is_none() {
            let process = self.process.as_ref();
            self.pagemap = process.and_then(|process| Pagemap::open(process.pid()).ok());
        }
        self.pagemap.is_some()
    }

    /// Keeps what was taken from where it had just been put, until the table says that it is there.
    pub(super) fn keep_replaced(&mut self, page: Page, area: usize, index: usize) {
        let Some(helper) = &self.helper else {
            return;
        };
        let mut bytes = Box::new([0; 4096]);
        let offset = staging_offset(area, index) as u64;
        if helper
            .shared()
            .memory()
            .read(offset, &mut bytes[..])
            .is_ok()
        {
            tracing::debug!(space = self.handle.id, page = page.0, "was replaced");
            self.replaced.push(Replaced { page, bytes });
            // Another agent would take it for being here.
            self.place
                .undecided
                .fetch_or(undecided::EVENTS, Ordering::AcqRel);
        }
    }

    pub(super) fn is_to_be_put_back(&self, page: Page) -> bool {
        self.replaced.iter().any(|replaced| replaced.page == page)
    }

    /// Pages have moved on: what is to be put back among them goes along.
    pub(super) fn replaced_have_moved(&mut self, from: &Range<Page>, to: Page) {
        let moved = self.replaced.iter_mut();
        for it in moved.filter(|it| from.contains(&it.page)) {
            it.page = to.plus(it.page.0 - from.start.0);
        }
    }

    /// Puts back what was taken by mistake. The kernel refuses it for as long as the event is unread that says what it is.
    pub(super) fn put_back_replaced(&mut self) -> bool {
        let mut replaced = std::mem::take(&mut self.replaced);
        let before = replaced.len();
        if replaced.is_empty() || self.uffd.is_changing() {
            self.replaced = replaced;
            return false;
        }
        replaced.retain(|it| {
            if self.table.get(it.page).state() != State::Local {
                return false;
            }
            match self
                .uffd
                .copy(it.page.address(), it.bytes.as_ptr(), 4096, false)
            {
                Ok(()) | Err(InstallError::Present(_)) => false,
                Err(InstallError::EventsPending(_) | InstallError::NoMemory(_)) => true,
                Err(error) => {
                    tracing::error!(
                        ?error,
                        pid = self.pid(),
                        page = it.page.0,
                        "a page could not be put back"
                    );
                    false
                }
            }
        });
        self.replaced = replaced;
        self.replaced.len() < before
    }
}
