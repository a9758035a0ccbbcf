//! The requester's end of a connection: post work, poll completions.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::memory::RegisteredMemory;

/// The requester's own name for a work request; it comes back in the completion, unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkId(pub u64);

/// A local memory region registered with one endpoint (an `lkey`, in verbs' terms).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegionId(pub u32);

/// Bytes of a registered local region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalSlice {
    /// Which region.
    pub region: RegionId,
    /// Offset in it, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// Bytes of a remote extent. The length is the local slice's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteSlice {
    /// The extent's index in the responder's pool.
    pub extent: u32,
    /// The key under which this extent was granted (an `rkey`, in verbs' terms). A stale one is refused.
    pub key: u64,
    /// Offset in the extent, in bytes.
    pub offset: u64,
}

/// How one work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The id it was posted with.
    pub id: WorkId,
    /// What became of it. After an error of any kind the bytes of a read's local slice are unspecified.
    pub result: Result<(), WorkError>,
}

/// Why a work request was not accepted. Nothing was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// The window is full: poll completions, then post again.
    #[error("the window of outstanding work requests is full")]
    WindowFull,
    /// The local slice is outside its region, or the region is not registered here.
    #[error("the local slice lies outside its registered region")]
    LocalBounds,
    /// A single request is larger than [`crate::MAX_TRANSFER`].
    #[error("one request moves more than the fabric's maximum transfer")]
    TooLarge,
    /// The connection is gone; connect anew.
    #[error("the endpoint is disconnected")]
    Disconnected,
}

/// How a work request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// The responder holds no such grant: a stale or guessed key, or a lease that ended.
    #[error("the responder refused the key")]
    AccessDenied,
    /// The remote slice is outside the extent.
    #[error("the remote slice lies outside the extent")]
    RemoteBounds,
    /// The connection broke before the answer came. A write may or may not have been carried out.
    #[error("the connection broke")]
    Disconnected,
    /// The other end broke the protocol; the connection was closed.
    #[error("the responder broke the protocol")]
    Protocol,
}

/// One connection to one responder. Not shared between threads: each pager has its own, over RDMA with
/// queue pairs of its own.
pub trait Endpoint: Send {
    /// Registers local memory, so that work requests may name slices of it.
    fn register(&mut self, memory: Arc<RegisteredMemory>) -> RegionId;

    /// Posts a one-sided read: remote bytes to the local slice. Sent at the latest by [`Self::flush`].
    fn post_read(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError>;

    /// Posts a read that nobody waits for yet. Where a transport has queues of their own for such reads, they hold up no
    /// [`Self::post_read`]; elsewhere they are the same.
    fn post_read_ahead(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post_read(id, local, remote)
    }

    /// Posts a one-sided write: the local slice's bytes to remote ones. The local bytes may be read at any
    /// time until the completion. Sent at the latest by [`Self::flush`].
    fn post_write(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError>;

    /// Rings the doorbell: hands over what was posted and not yet sent. Does not block.
    fn flush(&mut self);

    /// Moves completions to the end of `out`, as many as there are (at most [`Self::window`]), and makes
    /// progress on what is in flight. Does not block. Returns how many were added. After a disconnection
    /// every outstanding request completes with [`WorkError::Disconnected`], once.
    fn poll(&mut self, out: &mut Vec<Completion>) -> usize;

    /// How many more requests may be posted now.
    fn credits(&self) -> usize;

    /// How many requests may be outstanding at once.
    fn window(&self) -> usize;

    /// Whether posts can still succeed.
    fn is_connected(&self) -> bool;

    /// What to sleep on when [`Self::poll`] has nothing: once armed, readable when calling `poll` makes sense again. `None`
    /// where posts complete at once (shared memory).
    fn wait_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Has whatever comes from now on make [`Self::wait_fd`] readable; to be called before each sleep on it, since polling
    /// alone may ask nobody but the device. False where there is something to poll for already.
    fn arm(&mut self) -> bool {
        true
    }
}

impl<E: Endpoint + ?Sized> Endpoint for Box<E> {
    fn register(&mut self, memory: Arc<RegisteredMemory>) -> RegionId {
        (**self).register(memory)
    }

    fn post_read(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        (**self).post_read(id, local, remote)
    }

    fn post_read_ahead(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        (**self).post_read_ahead(id, local, remote)
    }

    fn post_write(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        (**self).post_write(id, local, remote)
    }

    fn flush(&mut self) {
        (**self).flush();
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        (**self).poll(out)
    }

    fn credits(&self) -> usize {
        (**self).credits()
    }

    fn window(&self) -> usize {
        (**self).window()
    }

    fn is_connected(&self) -> bool {
        (**self).is_connected()
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        (**self).wait_fd()
    }

    fn arm(&mut self) -> bool {
        (**self).arm()
    }
}
