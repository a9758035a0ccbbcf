//! The gate: the one order that decides everything for an address space.
//!
//! Reading an event releases the program: a forking parent runs on, an unmapped address is used again. And
//! `UFFDIO_MOVE` does not check that its source is still the mapping it was. So while the helper is taking
//! pages out, no event may be read; the kernel then answers the helper with EAGAIN as soon as one is queued.
//! Each read of events begins a new epoch. A batch is handed over only in the epoch that its pager names. Installs
//! need no leave: the pager makes none while it follows events, and the kernel refuses them while one is unread.
//!
//! Where the helper has no `UFFDIO_MOVE` it moves memory by `mremap`, which asks nothing and raises an event of its own: it
//! waits, its move done, until that has been read. So there one message may be read after the other, but only while the helper
//! waits in that way; and once the program's own calls have been among them, nothing more is moved in that batch.
//!
//! Installs and take-outs may overlap each other: the table's claims keep them to different pages. Only
//! reading excludes both. One pager thread owns an address space, so the gate is a small state machine rather
//! than a lock; the helper is the only other party, and speaks through a few words of shared memory.

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
    /// The helper's `mremap` during which something may be read, and the one whose own event has been: its caller is on its way
    /// back from it.
    reads_in: u32,
    read_of: Option<u32>,
    /// Whether the helper knows that it is to move nothing more in this batch.
    given_up: bool,
}

/// The helper's count of its `mremap` calls: one is under way while they differ.
#[derive(Clone, Copy, Debug)]
pub struct Remaps<'a> {
    /// Those that it has begun.
    pub begun: &'a AtomicU32,
    /// Those that are over.
    pub over: &'a AtomicU32,
    /// The last one during which something was read.
    pub read_in: &'a AtomicU32,
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
            reads_in: 0,
            read_of: None,
            given_up: false,
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
        (self.read_of, self.given_up) = (None, false);
        Some(self.last_command)
    }

    /// Leave to read one message while the helper moves memory by `mremap`: what it has begun to move has moved, as
    /// `has_moved` says of that call, so that it does nothing more before its event is read.
    ///
    /// # Errors
    /// [`TakingOut`] while it may move something more.
    pub fn read_between(
        &mut self,
        remaps: Remaps<'_>,
        has_moved: impl FnOnce(u32) -> bool,
    ) -> Result<Epoch, TakingOut> {
        let call = remaps.begun.load(Ordering::SeqCst);
        let may_read = if remaps.over.load(Ordering::SeqCst) == call {
            // It may be about to begin the next.
            self.given_up
        } else {
            (self.given_up || self.read_of != Some(call))
                && has_moved(call)
                && remaps.begun.load(Ordering::SeqCst) == call
        };
        if !may_read {
            return Err(TakingOut);
        }
        self.reads_in = call;
        remaps.read_in.store(call, Ordering::SeqCst);
        self.epoch = Epoch(self.epoch.0 + 1);
        Ok(self.epoch)
    }

    /// The message that was read was of the helper's own `mremap`.
    pub fn own_event_is_read(&mut self) {
        self.read_of = Some(self.reads_in);
    }

    /// Tells the helper by `word` to move nothing more in this batch. What it is moving already it does.
    pub fn give_up(&mut self, word: &AtomicU32) {
        word.store(self.last_command, Ordering::SeqCst);
        self.given_up = true;
    }

    /// The helper is gone: nothing moves any more.
    pub fn helper_gone(&mut self) {
        self.outstanding = None;
    }
}
