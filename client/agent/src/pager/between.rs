//! Reading between moves: what may be read of the uffd while the helper takes pages out by `mremap`, and what it tells.
//!
//! Each of these moves raises an event, and the helper waits for its reading, the move done. As long as it waits nothing else
//! moves, and what the program's threads do once their own events are read can be in nobody's way; the gate has the rule. That a
//! move is done shows in the landing range, by the protected pages that have come there.

use std::io;
use std::time::{Duration, Instant};

use farpage_attach::control::{Control, method, staging_offset};
use farpage_core::gate::Remaps;

use super::{Noted, Pager};
use crate::entry::State;
use crate::sys::pagemap::Pagemap;
use crate::sys::process::registered_ranges;
use crate::sys::uffd::{InstallError, MAX_MESSAGES, Message};
use crate::table::Page;

/// How long a move may be under way before its mapping is looked for, where no protected page has come with it: the kernel has
/// reclaimed what the program did not need any more (MADV_FREE), or the program has put another there.
const BARE_MOVE: Duration = Duration::from_millis(20);

/// A page that the program had moved to where the helper was just taking another from. Its bytes were taken instead.
#[derive(Debug)]
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
        while self.may_read_between() {
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
            let own = matches!(noted.message, Message::Remap { to, .. } if helper.landing().contains(&to));
            if own {
                self.journal.done(noted.at);
            }
            !own
        });
    }

    fn may_read_between(&mut self) -> bool {
        self.open_pagemap();
        let (Some(helper), Some(batch), Some(pagemap), Some(process)) = (
            &self.helper,
            &mut self.take_out,
            &self.pagemap,
            &self.process,
        ) else {
            return false;
        };
        let control = helper.control();
        let seen = &mut batch.remap_seen;
        let has_moved = |call: u32| {
            let run = control.remap_run.load(std::sync::atomic::Ordering::Acquire);
            let (first, pages) = (u64::from(run & 0xffff), u64::from(run >> 16));
            let start = helper.landing().start + first * 4096;
            if pagemap
                .any_protected(start..start + pages * 4096)
                .unwrap_or(false)
            {
                return true;
            }
            let (_, since) = *seen.insert(match *seen {
                Some((before, since)) if before == call => (before, since),
                _ => (call, Instant::now()),
            });
            since.elapsed() > BARE_MOVE
                && registered_ranges(process.pid())
                    .is_ok_and(|ranges| ranges.iter().any(|(range, _)| range.contains(&start)))
        };
        self.gate.read_between(remaps(control), has_moved).is_ok()
    }

    fn open_pagemap(&mut self) {
        if self.pagemap.is_none() {
            let process = self.process.as_ref();
            self.pagemap = process.and_then(|process| Pagemap::open(process.pid()).ok());
        }
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
        }
    }

    pub(super) fn is_to_be_put_back(&self, page: Page) -> bool {
        self.replaced.iter().any(|replaced| replaced.page == page)
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
