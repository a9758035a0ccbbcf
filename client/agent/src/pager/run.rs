//! A run: neighbouring pages in staging on their way to neighbouring slots, in each copy of their extent.

use smallvec::SmallVec;

use crate::entry::Slot;
use crate::far::{MAX_COPIES, Place, Places, SlotRun};
use crate::table::Page;

/// A page in staging.
#[derive(Clone, Copy, Debug)]
pub(super) struct Staged {
    /// Its place in the area.
    pub(super) index: usize,
    pub(super) page: Page,
    pub(super) hash: u128,
    /// Still what the page is: not discarded, not turned round.
    pub(super) live: bool,
}

/// Neighbouring staged pages on their way to neighbouring slots.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) first: usize,
    pub(super) pages: Vec<Staged>,
    pub(super) slots: SlotRun,
    pub(super) targets: SmallVec<[Target; MAX_COPIES]>,
}

/// One copy of a run's extent, and whether it has the run.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) place: Place,
    pub(super) write: Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Write {
    Unsent,
    UnderWay,
    Done,
    Failed,
}

impl Write {
    pub(super) fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed)
    }
}

impl Run {
    pub(super) fn new(first: usize, pages: Vec<Staged>, slots: SlotRun, targets: Places) -> Self {
        let unsent = |place| Target {
            place,
            write: Write::Unsent,
        };
        Self {
            first,
            pages,
            slots,
            targets: targets.into_iter().map(unsent).collect(),
        }
    }

    pub(super) fn has(&self, write: Write) -> bool {
        self.targets.iter().any(|target| target.write == write)
    }

    pub(super) fn is_over(&self) -> bool {
        self.targets.iter().all(|target| target.write.is_over())
    }

    /// Whether something is to be posted. Where all copies fell silent just when its slots were taken that is nothing, and
    /// posting it ends it.
    pub(super) fn is_unsent(&self) -> bool {
        self.targets.is_empty() || self.has(Write::Unsent)
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = Slot> + use<> {
        std::iter::successors(Some(self.slots.first), |slot| slot.next()).take(self.pages.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its staging area stayed taken for good.
    #[test]
    fn a_run_without_targets_is_posted_and_so_ended() {
        let first = Slot::new(0, 0).unwrap();
        let run = Run::new(0, Vec::new(), SlotRun { first, len: 1 }, Places::new());
        assert!(run.is_unsent() && run.is_over());
    }
}
