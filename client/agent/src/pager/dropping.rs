//! Which messages may be read while pages are dropped, so that nothing else is dropped in their place.
//!
//! The kernel drops them only once its event has been read, and then whatever is there (`farpage_attach::dropper`). So nothing is
//! read before the dropper waits for that: until then each thread of the program comes as far as its next memory call, and no
//! thread beyond it. Then a look at the pages tells whether such a call has put something else there. If not, messages are
//! read one at a time up to the drop's own, and none behind it before the drop is over. If so, the dropper is ended, which
//! drops at once what is there: of what was unmapped or mapped anew nothing, since nobody has come to use it. What this does not
//! help is an `mremap` to a fixed place that is in use, and is being dropped: it needs no call before (docs/limits.md).

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farpage_attach::control::{Control, outcome};

use super::batch::TakeOut;
use super::take_out::rest_while_settling;
use super::{Noted, Pager};
use crate::sys::pagemap::Pagemap;
use crate::sys::process::Dropper;
use crate::sys::uffd::Message;
use crate::table::{Page, pages_of};

/// How long a drop of whose pages all events seem to be read may take before others are read: what was taken for its own was
/// the program's discard of the same pages.
const MISTAKEN: Duration = Duration::from_millis(1);

/// A drop that waits for its event to be read.
#[derive(Debug)]
struct Call {
    /// Its number.
    begun: u32,
    /// Which of the batch's pages it is to drop: one bit each.
    pages: u64,
}

/// What is known of a batch's dropper.
#[derive(Debug, Default)]
pub(super) struct Drops {
    dropper: Option<Dropper>,
    /// The call under way, as it was last seen, and the pages that it is to drop: only of these an event can be its own.
    begun: Option<u32>,
    pages: u64,
    /// Since when its events seem to be read.
    read: Option<Instant>,
    /// Since when nothing can be read that there is, and in which call.
    rests: Option<(u32, Instant)>,
    /// Which pages were not there any more when the dropper was ended: one bit each.
    pub(super) gone: u64,
    was_ended: bool,
}

/// The drop that is under way, if one is.
fn call(control: &Control, batch: &TakeOut) -> Option<Call> {
    let begun = control.drops_begun.load(Ordering::Acquire);
    if control.drops_over.load(Ordering::Acquire) == begun {
        return None;
    }
    let outcomes = control.batch.outcomes.iter().take(batch.pages.len());
    let outcomes = outcomes.enumerate();
    let dropping = outcomes.filter(|(_, it)| it.load(Ordering::Relaxed) == outcome::DROPPING);
    let pages = dropping.fold(0, |all, (index, _)| all | 1 << index);
    // Another may have begun meanwhile.
    let is_same = control.drops_begun.load(Ordering::Acquire) == begun;
    is_same.then_some(Call { begun, pages })
}

impl Pager {
    /// Reads what may be read now.
    pub(super) fn read_while_dropping(&mut self, out: &mut Vec<Noted>) -> std::io::Result<usize> {
        let mut read = 0;
        while self.may_read_while_dropping() {
            let from = out.len();
            match self.read_sorted(1, out)? {
                0 => break,
                more => read += more,
            }
            self.give_up_what_changes(&out[from..]);
        }
        Ok(read)
    }

    /// Which of a batch's pages are being dropped, as it was last seen before a message was read.
    pub(super) fn drop_under_way(&self) -> Option<u64> {
        let batch = self.take_out.as_ref().filter(|_| self.is_dropping())?;
        Some(batch.drops.pages)
    }

    /// Lets the dropper go on, where there is something to read that may not be read yet.
    pub(super) fn rest_while_dropping(&mut self) {
        let (Some(helper), Some(batch)) = (&self.helper, &mut self.take_out) else {
            return;
        };
        let begun = helper.control().drops_begun.load(Ordering::Relaxed);
        let rests = batch.drops.rests.filter(|(call, _)| *call == begun);
        let (_, since) = *batch
            .drops
            .rests
            .insert(rests.unwrap_or_else(|| (begun, Instant::now())));
        rest_while_settling(since);
    }

    fn may_read_while_dropping(&mut self) -> bool {
        let (Some(helper), Some(batch)) = (&self.helper, &mut self.take_out) else {
            return true;
        };
        let Some(call) = call(helper.control(), batch) else {
            return false;
        };
        if batch.drops.begun != Some(call.begun) {
            (batch.drops.begun, batch.drops.pages) = (Some(call.begun), call.pages);
            batch.drops.read = None;
            // What an earlier call was to drop, and did not, has another event.
            batch.drops_unread |= call.pages;
            let unread = batch.drops_unread;
            self.place.drops_unread.store(unread, Ordering::Release);
        }
        if batch.drops.was_ended {
            return false;
        }
        if batch.drops_unread & call.pages != 0 {
            return self.look_before_drop(call.pages);
        }
        let since = *batch.drops.read.get_or_insert_with(Instant::now);
        since.elapsed() > MISTAKEN && self.look_again_before_drop(call.pages)
    }

    /// Looks whether a drop would drop what it should. Returns whether it may: if not, its dropper is ended; or it does not
    /// wait yet.
    fn look_before_drop(&mut self, pages: u64) -> bool {
        let Some(protected) = self.protected_while_it_waits(pages) else {
            return false;
        };
        let Some(batch) = &mut self.take_out else {
            return false;
        };
        let gone = pages & batch.drops_unread & !protected;
        if gone == 0 {
            return true;
        }
        (batch.drops.gone, batch.drops.was_ended) = (gone, true);
        tracing::debug!(
            space = self.handle.id,
            pages = ?batch.pages,
            gone,
            "the program changes what is being dropped"
        );
        if let Some(dropper) = self.dropper() {
            dropper.end();
        }
        false
    }

    /// The same where all events of a call seem to be read and it waits for another: of what is still in its place the event is
    /// its own, whoever's the one before was.
    fn look_again_before_drop(&mut self, pages: u64) -> bool {
        let Some(protected) = self.protected_while_it_waits(pages) else {
            return false;
        };
        if let Some(batch) = &mut self.take_out {
            batch.drops_unread |= protected;
            let unread = batch.drops_unread;
            self.place.drops_unread.store(unread, Ordering::Release);
        }
        true
    }

    /// Which of these pages of the batch are in their place and protected, once the dropper waits for its event to be read.
    fn protected_while_it_waits(&mut self, pages: u64) -> Option<u64> {
        // Waiting for the address space's lock looks the same. To look at a page one has to come behind it there, and who then
        // waits yet waits for the reading.
        let mut protected = None;
        for _ in 0..2 {
            self.dropper().filter(|dropper| dropper.is_waiting())?;
            protected = self.protected(pages);
        }
        protected
    }

    /// The batch's dropper, if it lives and is a child of the helper's.
    fn dropper(&mut self) -> Option<&Dropper> {
        let helper = self.helper.as_ref()?;
        let drops = &mut self.take_out.as_mut()?.drops;
        if drops.dropper.is_none() {
            let pid = helper.control().dropper.load(Ordering::Acquire);
            let pid = i32::try_from(pid).ok().filter(|pid| *pid > 0)?;
            drops.dropper = Dropper::open(pid, helper.pid()?);
        }
        drops.dropper.as_ref()
    }

    /// Which of these pages of the batch are in their place and protected.
    fn protected(&mut self, which: u64) -> Option<u64> {
        self.open_program();
        let batch = self.take_out.as_ref()?;
        protected_pages(self.pagemap.as_ref()?, &batch.pages, which)
    }

    /// Where the program changes what a batch is to drop, the rest of it stays: from now on a page that is protected may be
    /// another one than was copied.
    fn give_up_what_changes(&self, messages: &[Noted]) {
        let (Some(helper), Some(batch)) = (&self.helper, &self.take_out) else {
            return;
        };
        let touches = |range: &Range<u64>| {
            let pages = pages_of(range.clone());
            batch.pages.iter().any(|page| pages.contains(page))
        };
        let changes = messages.iter().any(|noted| match &noted.message {
            Message::Fault { .. } | Message::Fork(_) => false,
            Message::Remap { from, to, len } => {
                touches(&(*from..from.saturating_add(*len)))
                    || touches(&(*to..to.saturating_add(*len)))
            }
            Message::Remove(range) | Message::Unmap(range) => touches(range),
        });
        if changes {
            let control = helper.control();
            control.give_up.store(batch.command, Ordering::Release);
        }
    }
}

/// Which of some pages are in their place and protected.
pub(super) fn protected_pages(pagemap: &Pagemap, pages: &[Page], which: u64) -> Option<u64> {
    let (mut pages, mut protected, mut index) = (pages, 0, 0);
    while let Some((run, rest)) = first_run(pages) {
        let bits = u64::MAX >> (u64::BITS as usize - run.len()) << index;
        if let ([first, ..], true) = (run, which & bits != 0) {
            let found = pagemap.write_protected(first.0, run.len()).ok()?;
            protected |= found << index;
        }
        (index, pages) = (index + run.len(), rest);
    }
    Some(protected & which)
}

/// The first pages that lie one behind the other, and those behind them.
fn first_run(pages: &[Page]) -> Option<(&[Page], &[Page])> {
    let len = pages
        .chunk_by(|page, next| page.plus(1) == *next)
        .next()?
        .len();
    pages.split_at_checked(len)
}
