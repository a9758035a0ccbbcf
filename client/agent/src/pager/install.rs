//! Putting pages into the program's memory and waking who waits for them.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::Pager;
use super::fault::Fault;
use crate::entry::Entry;
use crate::sys::uffd::InstallError;
use crate::table::Page;

/// An install of one page that takes longer than this has woken a thread on another CPU, and shown that waking is dear here:
/// with a hypervisor in between it costs some ten microseconds at each end.
const DEAR_WAKE: Duration = Duration::from_micros(5);

/// How far an install came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Installed {
    /// All pages are there.
    All,
    /// This many are; the next has no place any more: its mapping is gone, as an event to come will say.
    Gone(u64),
    /// This many are; then an event must be read first.
    UntilEvent(u64),
    /// This many are; then the kernel had no memory for the next. It is tried again until the deadline.
    NoMemory(u64),
}

impl Pager {
    /// Installs `pages` pages of bytes that lie at `source`, one behind the other, and wakes their waiters.
    pub(super) fn install_copies(
        &mut self,
        first: Page,
        pages: u64,
        source: *const u8,
    ) -> Installed {
        let (mut done, mut most) = (0, pages);
        while done < pages {
            let from = source.wrapping_add((done * 4096) as usize);
            let len = most.min(pages - done);
            let began = (pages == 1).then(Instant::now);
            let installed = self
                .uffd
                .copy(first.plus(done).address(), from, len * 4096, false);
            if let Some(began) = began {
                self.look_for_next_fault(began);
            }
            match installed {
                Ok(()) => done += len,
                Err(InstallError::EventsPending(bytes)) if bytes > 0 => done += bytes / 4096,
                Err(InstallError::EventsPending(_)) => return Installed::UntilEvent(done),
                Err(InstallError::NoMemory(bytes)) => {
                    return Installed::NoMemory(done + bytes / 4096);
                }
                Err(InstallError::Present(bytes)) => {
                    done += bytes / 4096;
                    self.wake(first.plus(done), 1);
                    done += 1;
                }
                // The kernel takes no run that crosses from one mapping to the next, so a run of pages whose
                // mappings differ goes one by one; a single page that has no place has lost its mapping.
                Err(InstallError::Gone(0)) if len > 1 => most = 1,
                Err(InstallError::Gone(bytes)) => return Installed::Gone(done + bytes / 4096),
                Err(InstallError::NoProcess) => {
                    self.closing = true;
                    return Installed::All;
                }
                Err(InstallError::Other(errno)) => {
                    tracing::error!(
                        errno,
                        pid = self.pid(),
                        page = format_args!("{:#x}", first.address()),
                        "a page could not be installed"
                    );
                    return Installed::Gone(done);
                }
            }
        }
        Installed::All
    }

    /// One page's thread has been woken by an install that began then. Where waking is dear, the thread runs on another CPU,
    /// and has its next page sooner if this one stays awake for it; on the same CPU it runs only when this one sleeps.
    fn look_for_next_fault(&mut self, began: Instant) {
        let now = Instant::now();
        if now.duration_since(began) > DEAR_WAKE {
            self.next_fault.begin(now);
        }
    }

    /// Installs zeros over a run of pages that were never written, of which a thread waits for `wanted`. A single page
    /// to be written gets a page of its own at once; a run gets the kernel's shared zero page, copied on write without a
    /// message. Returns false while that cannot be done.
    pub(super) fn install_zeros(&mut self, wanted: Page, run: Range<Page>, write: bool) -> bool {
        let (first, pages) = (run.start, run.end.0 - run.start.0);
        let done = if pages == 1 && write {
            match self.install_copies(first, 1, self.fetches.zero_page()) {
                Installed::All => 1,
                Installed::Gone(_) => 0,
                Installed::UntilEvent(_) | Installed::NoMemory(_) => return false,
            }
        } else {
            match self.uffd.zero(&(run.start.address()..run.end.address())) {
                Ok(()) => pages,
                Err(InstallError::EventsPending(0) | InstallError::NoMemory(0)) => return false,
                Err(InstallError::EventsPending(bytes) | InstallError::NoMemory(bytes)) => {
                    bytes / 4096
                }
                // What was believed untouched is there: from now on the table knows.
                Err(InstallError::Present(bytes)) => bytes / 4096 + 1,
                // A run across two mappings, or one that ends before its run.
                Err(InstallError::Gone(0)) if pages > 1 => {
                    return self.install_zeros(wanted, wanted..wanted.plus(1), write);
                }
                Err(InstallError::Gone(bytes)) => bytes / 4096,
                Err(InstallError::NoProcess) => {
                    self.closing = true;
                    return true;
                }
                Err(InstallError::Other(errno)) => {
                    tracing::error!(errno, pid = self.pid(), "zeros could not be installed");
                    0
                }
            }
        };
        // Whoever waits for a page that was there, or that the run did not come to, or that has no place, looks again.
        self.wake(wanted, 1);
        for i in 0..done {
            if self
                .table
                .change(first.plus(i), Entry::filled_with_zeros)
                .is_some()
            {
                self.residents.arrived(first.plus(i));
                self.job.charge(1);
            }
        }
        true
    }

    /// Zeros where there is nothing, a wake-up where there is something. Returns false while an event must be
    /// read first.
    pub(super) fn zero_or_wake(&mut self, page: Page) -> bool {
        match self.uffd.zero(&(page.address()..page.plus(1).address())) {
            Ok(()) => {
                tracing::debug!(
                    space = self.handle.id,
                    page = page.0,
                    "believed present, was not: zeros"
                );
                true
            }
            Err(InstallError::EventsPending(_) | InstallError::NoMemory(_)) => false,
            Err(InstallError::NoProcess) => {
                self.closing = true;
                true
            }
            Err(InstallError::Present(_) | InstallError::Gone(_) | InstallError::Other(_)) => {
                self.wake(page, 1);
                true
            }
        }
    }

    /// A write to a page under write protection: it is not leaving, so the protection is lifted.
    pub(super) fn lift_protection(&mut self, fault: Fault) -> Option<Fault> {
        let range = fault.page.address()..fault.page.plus(1).address();
        match self.uffd.lift_protection(&range) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Some(fault),
            _ => {
                self.wake(fault.page, 1);
                self.answered(&fault);
                None
            }
        }
    }

    /// Has waiters in a range look again.
    pub(super) fn wake(&self, first: Page, pages: u64) {
        let _ = self
            .uffd
            .wake(&(first.address()..first.plus(pages).address()));
    }
}
