//! What a pager sleeps on: everything that may have news for it, watched once rather than listed anew at every sleep.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll;

/// Who may have news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Source {
    /// Another thread of the agent has a request.
    Mailbox = 1 << 0,
    /// The program waits for a page, or has changed its memory.
    Uffd = 1 << 1,
    /// The program has ended.
    Process = 1 << 2,
    /// The helper has something to say, has ended, or its drain range was touched.
    Helper = 1 << 3,
    /// A memory node has answered, or has gone.
    Link = 1 << 4,
}

/// Who had news.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Woken(u64);

impl Woken {
    pub(super) fn by(self, source: Source) -> bool {
        self.0 & source as u64 != 0
    }
}

/// More than watched descriptors ever have news at once; the others are told at the next sleep.
const MAX_EVENTS: usize = 8;

/// The watched descriptors. Clones watch for the same pager.
#[derive(Clone, Debug)]
pub(crate) struct Wakeups(Arc<OwnedFd>);

impl Wakeups {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self(Arc::new(epoll)))
    }

    /// Watches a descriptor until it is closed.
    pub(super) fn watch(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        let data = epoll::EventData::new_u64(source as u64);
        epoll::add(&*self.0, fd, data, epoll::EventFlags::IN)?;
        Ok(())
    }

    /// Sleeps until somebody has news, at most `limit`.
    pub(super) fn wait(&self, limit: Duration) -> Woken {
        let timeout = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(limit.subsec_nanos()),
        };
        let mut events = [MaybeUninit::uninit(); MAX_EVENTS];
        let Ok((events, _)) = epoll::wait(&*self.0, &mut events[..], Some(&timeout)) else {
            return Woken::default();
        };
        Woken(events.iter().fold(0, |all, event| all | event.data.u64()))
    }
}
