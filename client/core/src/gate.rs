//! The gate: the one order that decides everything for an address space.
//!
//! Reading an event releases the program: a forking parent runs on, an unmapped address is used again. And
//! `UFFDIO_MOVE` does not check that its source is still the mapping it was. So while the helper is taking
//! pages out, no event may be read; the kernel then answers the helper with EAGAIN as soon as one is queued.
//! Each read of events begins a new epoch. What was decided in an older epoch is decided again: a victim is
//! chosen and handed over, or a page installed, only under the epoch in which the table was last consulted.
//!
//! Installs and take-outs may overlap each other: the table's claims keep them to different pages. Only
//! reading excludes both. One pager thread owns an address space, so the gate is a small state machine rather
//! than a lock; the helper is the only other party, and speaks through one word of shared memory.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU32, Ordering};

/// Counts the reads of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u64);

/// The pager's side of the gate.
#[derive(Debug)]
pub struct Gate {
    epoch: Epoch,
    /// The command that the helper may be moving pages for.
    outstanding: Option<u32>,
    last_command: u32,
}

/// Why events may not be read now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TakingOut;

impl Default for Gate {
    fn default() -> Self {
        Self {
            epoch: Epoch(0),
            outstanding: None,
            last_command: 0,
        }
    }
}

impl Gate {
    /// The gate of an address space that another agent had, whose last command was this. With `outstanding` the helper has
    /// it, and may be moving pages yet.
    #[must_use]
    pub fn resumed(last_command: u32, outstanding: bool) -> Self {
        Self {
            outstanding: outstanding.then_some(last_command),
            last_command,
            ..Self::default()
        }
    }

    /// The epoch in which decisions are made now.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Leave to read events: begins a new epoch. Refused while pages may still be moving.
    ///
    /// # Errors
    /// [`TakingOut`] until the helper has published that its moves are over.
    pub fn read_events(&mut self, taken: &AtomicU32) -> Result<Epoch, TakingOut> {
        if !self.is_settled(taken) {
            return Err(TakingOut);
        }
        self.epoch = Epoch(self.epoch.0 + 1);
        Ok(self.epoch)
    }

    /// Whether no page is being moved. Once true it stays so until the next [`Self::take_out`].
    pub fn is_settled(&mut self, taken: &AtomicU32) -> bool {
        if let Some(command) = self.outstanding
            && taken.load(Ordering::Acquire) == command
        {
            self.outstanding = None;
        }
        self.outstanding.is_none()
    }

    /// Leave to hand a batch to the helper: the number to publish it under. `None` while one is outstanding,
    /// or where the victims were chosen in an older epoch.
    pub fn take_out(&mut self, chosen_in: Epoch, taken: &AtomicU32) -> Option<u32> {
        if chosen_in != self.epoch || !self.is_settled(taken) {
            return None;
        }
        self.last_command = self.last_command.wrapping_add(1);
        self.outstanding = Some(self.last_command);
        Some(self.last_command)
    }

    /// The number for a batch that moves nothing, so that events may be read while it is under way.
    pub fn batch_without_moves(&mut self) -> u32 {
        self.last_command = self.last_command.wrapping_add(1);
        self.last_command
    }

    /// The helper is gone: nothing moves any more.
    pub fn helper_gone(&mut self) {
        self.outstanding = None;
    }
}
