//! Fork: the table is cloned, every slot gains a reference, and what was writable becomes readable in both.
//!
//! What the program has set to be left out of its children, or wiped in them (MADV_DONTFORK, MADV_WIPEONFORK), is cloned
//! too: the event does not say what was set when it was made, and by the time it is handled the program may have set
//! something else. The child's own mappings say it, as soon as the child stands at the door; see [`Inheritance`].

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Pager, Registered, Table};
use crate::entry::State;
use crate::state::SpacePlace;
use crate::state::records::space;
use crate::sys::process::{Process, ranges_not_inherited};
use crate::sys::uffd::Uffd;
use crate::table::{Page, pages_of};

/// What is known of what a forked child did not inherit although its table says so.
#[derive(Debug)]
pub(crate) enum Inheritance {
    /// The table is right.
    Known,
    /// The child has not come to the door, and may never do (a raw clone).
    Unknown {
        /// Whose child it is.
        parent: Option<i32>,
    },
    /// As before, and it has touched something already: what its parent would not hand on.
    Guessed(Vec<Range<Page>>),
}

impl Pager {
    /// Whether a table says nothing yet of pages but that somebody had them: no other than those asked for may be brought.
    pub(super) fn is_inheritance_known(&self) -> bool {
        matches!(self.inheritance, Inheritance::Known)
    }

    /// Before a page of a forked child is brought that has not come to the door: if its parent would not hand it on, the
    /// child has zeros there. The parent may have changed its mind since the fork; this is as near as can be come.
    pub(super) fn leave_out_if_guessed(&mut self, page: Page) {
        if self.guess().iter().any(|range| range.contains(&page)) {
            self.discard_pages(page..page.plus(1));
        }
    }

    fn guess(&mut self) -> &[Range<Page>] {
        if let Inheritance::Unknown { parent } = self.inheritance {
            let ranges = parent.and_then(|pid| ranges_not_inherited(pid).ok());
            let pages = ranges.into_iter().flatten().map(pages_of);
            self.inheritance = Inheritance::Guessed(pages.collect());
        }
        match &self.inheritance {
            Inheritance::Guessed(ranges) => ranges,
            _ => &[],
        }
    }

    /// Counts what a forked child has here since its fork. While it waits at the door it has nothing for itself, and
    /// nothing of it could be taken out.
    pub(super) fn charge_inherited(&mut self) {
        let pages = std::mem::take(&mut self.uncharged);
        self.job.sharing.forked(pages);
        self.job.charge(pages as i64);
    }

    /// A child that forks is past the door, or will not come to it: what it hands on is what was guessed.
    fn settle_for_the_guess(&mut self) {
        for range in self.guess().to_vec() {
            let touched: Vec<_> = self.table.touched(range).collect();
            for (page, _) in touched.into_iter().filter(|(_, entry)| entry.is_far()) {
                self.discard_pages(page..page.plus(1));
            }
        }
        self.inheritance_is_known();
    }

    /// Nothing is to be guessed any more.
    pub(super) fn inheritance_is_known(&mut self) {
        self.inheritance = Inheritance::Known;
        self.place
            .inheritance_unknown
            .store(false, Ordering::Release);
    }

    /// The program has forked; reading the event has let the parent go on, and the child may run. Neither can
    /// get at a far page but through us, so the clone below is as if made at that moment: pages on their way
    /// out are settled first, pages on their way in are found far by the child.
    pub(super) fn forked(&mut self, uffd: Uffd, at: Option<u32>) {
        let kept = self.settle(Some(&uffd));
        self.handle.forked();
        self.settle_for_the_guess();
        let registered = self.registered.clone();
        if let Err(error) = self.start_child(uffd, registered, at) {
            tracing::error!(%error, pid = self.pid(), "a forked child cannot be served");
        }
        self.keep_messages(kept);
    }

    fn clone_table(&mut self, place: &SpacePlace) -> Table {
        let mut child = Table::new(place.chunks());
        let everything = Page(0)..Page(u64::MAX >> 12);
        for (page, entry) in self.table.touched(everything).collect::<Vec<_>>() {
            let Some((ours, theirs)) = entry.forked() else {
                // It was not waited for any longer: what was on its way out the child cannot have.
                child.change(page, |_| Some(entry.poisoned()));
                continue;
            };
            self.table.change(page, |_| Some(ours));
            child.change(page, |_| Some(theirs));
            if let Some(slot) = theirs.slot() {
                self.shared.far.share(slot);
            }
        }
        child
    }

    fn start_child(
        &mut self,
        uffd: Uffd,
        registered: Registered,
        at: Option<u32>,
    ) -> std::io::Result<()> {
        let handle = self.shared.spawner.new_handle(0)?;
        handle.forked();
        let place = self.shared.spawner.new_place(&handle, &self.job)?;
        let parent = self.process.as_ref().map(Process::pid);
        place.parent.store(self.handle.id, Ordering::Relaxed);
        place
            .parent_pid
            .store(parent.unwrap_or(0), Ordering::Relaxed);
        place.inheritance_unknown.store(true, Ordering::Relaxed);
        let soft_dirty = self.place.soft_dirty.load(Ordering::Relaxed);
        place.soft_dirty.store(soft_dirty, Ordering::Relaxed);
        let table = self.clone_table(&place);
        let mut child = Pager::new(
            self.shared.clone(),
            Arc::clone(&self.job),
            Arc::clone(&handle),
            None,
            uffd,
            place,
        )?;
        for (page, entry) in table.touched(Page(0)..Page(u64::MAX >> 12)) {
            if entry.state() == State::Local {
                child.residents.arrived(page);
            }
        }
        child.uncharged = table.local_pages();
        child.table = table;
        child.registered = registered;
        child.soft_dirty = self.soft_dirty.inherited();
        child.replaced = self.replaced.clone();
        child.inheritance = Inheritance::Unknown { parent };
        child.is_recovered = self.is_recovered;
        // It is whole. From here on the event says nothing that is not in the state: its descriptor may be closed at any time.
        child.place.state.store(space::LIVE, Ordering::Release);
        self.journal.done(at);
        self.shared
            .spawner
            .start_forked(self.handle.id, child, handle)
    }
}
