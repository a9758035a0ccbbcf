//! Memory of which a bounded part is local.

use std::ops::{Deref, DerefMut, Range};

use farpage_attach::attach::{AttachError, Attached, attach};
use farpage_attach::hints::{self, Hint};
use farpage_attach::message::{Packet, kind, tag};
use farpage_attach::sys::socket;

use crate::agent::Error;
use crate::job::Job;
use crate::soft_dirty::Questions;
use crate::sys::Mapping;

const PAGE: usize = 4096;

/// What the program knows about how it will use a part of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Soon: brings the pages home and returns when they are here. More than the local limit is in vain.
    WillNeed,
    /// Not soon: when something has to go within the next 10 s, this goes first. Under `farpage run` the kernel alone is told,
    /// which knows nothing of that.
    Cold,
    /// Never again: the contents are given up, here and far; the next read gets zeros.
    DontNeed,
}

/// Memory of which a bounded part is local, a `[u8]` otherwise. Dropping it unmaps it and gives its far memory
/// back.
#[derive(Debug)]
pub struct Region {
    mapping: Mapping,
    managed: Option<Managed>,
}

/// The agent's hold on a region.
#[derive(Debug)]
struct Managed {
    attached: Attached,
    job: Job,
    /// Its socket.
    agent: String,
}

impl Region {
    pub(crate) fn map(
        agent: Option<&str>,
        bytes: usize,
        local_bytes: usize,
    ) -> Result<Self, Error> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE);
        let bytes = bytes.ok_or(Error::OutOfRange)?;
        let mapping = Mapping::new(bytes).map_err(Error::system("mapping the region"))?;
        let managed = match agent {
            Some(agent) => Some(Managed::new(agent, &mapping, local_bytes)?),
            None => None,
        };
        Ok(Self { mapping, managed })
    }

    /// All of it.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        self.mapping.as_slice()
    }

    /// All of it, to be written.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.mapping.as_mut_slice()
    }

    /// Tells how a part will be used: the pages that lie wholly within `range` for [`Advice::DontNeed`], all that
    /// it touches otherwise.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; or the kernel's errno, for [`Advice::WillNeed`] where it has no
    /// `MADV_POPULATE_READ` (before 5.14).
    pub fn advise(&mut self, range: Range<usize>, advice: Advice) -> Result<(), Error> {
        let mut pages = self.pages_touched(&range)?;
        if advice == Advice::DontNeed {
            pages = range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE;
        }
        if pages.is_empty() {
            return Ok(());
        }
        self.mapping
            .advise(pages.clone(), advice)
            .map_err(Error::system("advising the kernel"))?;
        if let (Advice::Cold, Some(managed)) = (advice, &self.managed) {
            managed.attached.control.hint(Hint {
                advice: hints::COLD,
                from: (self.as_slice().as_ptr().addr() + pages.start) as u64,
                bytes: pages.len() as u64,
            });
        }
        Ok(())
    }

    /// The pages that `range` touches and that were written since [`Self::clear_soft_dirty`] (if that was never called,
    /// since they were mapped), as runs of neighbouring pages. Nothing is fetched: of pages that are far the agent knows.
    ///
    /// What is told is a change of contents: a page that holds again what it held may be left out, one that was written
    /// never is, and one that cannot be looked at (its memory node has lost it) is among the written ones.
    ///
    /// # Errors
    /// [`Error::OutOfRange`]; [`Error::NoAgent`] where the agent is gone; [`Error::Refused`] under `farpage run` for a
    /// region of less than 128 KiB, which is not managed there, and in a forked child for a region of its parent's.
    pub fn soft_dirty(&self, range: Range<usize>) -> Result<Vec<Range<usize>>, Error> {
        self.questions()?
            .ask(self, self.pages_touched(&range)?, false)
    }

    /// The same, and from now on these pages count as written only if they are written again. Each page is looked at and
    /// cleared at one moment, so that a write is told by this call or by the next: what a checkpoint needs that copies
    /// what is told.
    ///
    /// # Errors
    /// As [`Self::soft_dirty`]. Part of the range may have been cleared by then: all of it is to be taken for written.
    pub fn clear_soft_dirty(&self, range: Range<usize>) -> Result<Vec<Range<usize>>, Error> {
        self.questions()?
            .ask(self, self.pages_touched(&range)?, true)
    }

    fn questions(&self) -> Result<Questions, Error> {
        match &self.managed {
            Some(managed) => Ok(Questions::new(&managed.agent, managed.job.token)),
            None => Questions::of_this_run(),
        }
    }

    fn pages_touched(&self, range: &Range<usize>) -> Result<Range<usize>, Error> {
        if range.start > range.end || range.end > self.len() {
            return Err(Error::OutOfRange);
        }
        let start = range.start / PAGE * PAGE;
        let end = match range.is_empty() {
            true => start,
            false => range.end.next_multiple_of(PAGE),
        };
        Ok(start..end)
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.as_mut_slice()
    }
}

impl Managed {
    fn new(agent: &str, mapping: &Mapping, local_bytes: usize) -> Result<Self, Error> {
        let far_bytes = mapping.as_slice().len() as u64;
        let job = Job::open(agent, local_bytes as u64, far_bytes)?;
        let attached = attach(agent.as_bytes(), kind::LIBRARY, job.token, 0, true)
            .map_err(|error| Error::attach(&error, agent))?;
        let managed = Self {
            attached,
            job,
            agent: agent.to_owned(),
        };
        let mut region = Packet::new(tag::REGION);
        region.holding = mapping.as_slice().as_ptr().addr() as u64;
        region.drain = far_bytes;
        match managed.ask(&region) {
            Ok(()) => Ok(managed),
            Err(error) => {
                managed.leave();
                Err(error)
            }
        }
    }

    fn ask(&self, request: &Packet) -> Result<(), Error> {
        let fd = self.attached.socket;
        let failed = |errno| Error::attach(&AttachError::Handshake(errno), "");
        socket::send(fd, request, &[]).map_err(failed)?;
        let reply = socket::receive(fd).map_err(failed)?;
        match reply.packet.tag {
            tag::DONE => Ok(()),
            tag::REFUSAL => Err(Error::attach(
                &AttachError::Refused(reply.text, reply.text_len),
                "",
            )),
            _ => Err(Error::Malformed),
        }
    }

    /// Ends the agent's hold. The region must be unmapped by now, or not managed yet.
    fn leave(self) {
        // Where the agent does not answer it is gone, and takes the helper for an orphan: nothing is left to do.
        if self.ask(&Packet::new(tag::LEAVE)).is_ok() {
            self.attached.detach();
            self.job.finish();
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // The order matters: while it is mapped, somebody must answer for its pages.
        self.mapping.unmap();
        if let Some(managed) = self.managed.take() {
            managed.leave();
        }
    }
}
