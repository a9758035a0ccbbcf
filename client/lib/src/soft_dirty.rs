//! Asking the agent which pages of this process were written.

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use farpage_attach::attach::AttachError;
use farpage_attach::message::{JOB_VARIABLE, MAX_PAGES_ASKED, Packet, SOCKET_VARIABLE, kind, tag};
use farpage_attach::sys::socket::{self, Received};

use crate::agent::Error;
use crate::sys::owned;

const PAGE: usize = 4096;

/// Whom to ask: the agent's socket, and the job that the memory belongs to.
pub(crate) struct Questions {
    socket: String,
    job: u64,
}

impl Questions {
    pub(crate) fn new(socket: &str, job: u64) -> Self {
        Self {
            socket: socket.to_owned(),
            job,
        }
    }

    /// Under `farpage run`, which manages all of the program's memory.
    pub(crate) fn of_this_run() -> Result<Self, Error> {
        let socket = std::env::var(SOCKET_VARIABLE).map_err(|_| Error::NotNamed)?;
        let job = std::env::var(JOB_VARIABLE).map_err(|_| Error::NotNamed)?;
        let job = u64::from_str_radix(&job, 16).map_err(|_| Error::NotNamed)?;
        Ok(Self { socket, job })
    }

    /// The soft-dirty ones among whole pages of `bytes`, as runs of them, counted in bytes from its start. With `clear`
    /// they are not any more. The connection is this question's alone: a forked child asks about its own memory.
    pub(crate) fn ask(
        &self,
        bytes: &[u8],
        pages: Range<usize>,
        clear: bool,
    ) -> Result<Vec<Range<usize>>, Error> {
        let connected = socket::connect(self.socket.as_bytes())
            .map_err(|errno| Error::attach(&AttachError::Unreachable(errno), &self.socket))?;
        let agent = owned(connected);
        let mut hello = Packet::new(tag::HELLO);
        (hello.kind, hello.job) = (kind::PAGES, self.job);
        exchange(&agent, &hello)?;

        let mut dirty = Vec::new();
        let mut next = pages.start;
        while next < pages.end {
            let count = ((pages.end - next) / PAGE).min(MAX_PAGES_ASKED);
            let mut question = Packet::new(tag::SOFT_DIRTY);
            question.kind = clear.into();
            question.holding = (bytes.as_ptr().addr() + next) as u64;
            question.drain = (count * PAGE) as u64;
            let reply = exchange(&agent, &question)?;
            if reply.text_len != count.div_ceil(8) {
                return Err(Error::Malformed);
            }
            for page in (0..count).filter(|page| reply.text[page / 8] >> (page % 8) & 1 == 1) {
                add_page(&mut dirty, next + page * PAGE);
            }
            next += count * PAGE;
        }
        Ok(dirty)
    }
}

fn exchange(agent: &OwnedFd, request: &Packet) -> Result<Received, Error> {
    let failed = |errno| Error::attach(&AttachError::Handshake(errno), "");
    socket::send(agent.as_raw_fd(), request, &[]).map_err(failed)?;
    let reply = socket::receive(agent.as_raw_fd()).map_err(failed)?;
    match reply.packet.tag {
        tag::DONE => Ok(reply),
        tag::REFUSAL => Err(Error::attach(
            &AttachError::Refused(reply.text, reply.text_len),
            "",
        )),
        _ => Err(Error::Malformed),
    }
}

/// Adds the page behind the last run to it, any other as a run of its own.
fn add_page(runs: &mut Vec<Range<usize>>, start: usize) {
    match runs.last_mut() {
        Some(run) if run.end == start => run.end += PAGE,
        _ => runs.push(start..start + PAGE),
    }
}
