//! A requester's end of a TCP connection.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll;

use crate::connect::{
    ConnectError, check_window, handshake_error, receive_exact, remaining, send_all, welcome,
};
use crate::endpoint::{
    Completion, Endpoint, LocalSlice, PostError, RegionId, RemoteSlice, WorkError, WorkId,
};
use crate::geometry::PoolGeometry;
use crate::memory::RegisteredMemory;
use crate::regions::Regions;
use crate::tcp::inbox::{Expected, Inbox, Lost, Received};
use crate::tcp::outbox::{Frame, Outbox, Sent};
use crate::wire::{ClientHello, Operation, Request, SERVER_HELLO_BYTES, ServerHello, VERSION};

/// One `poll` makes no more receive calls than this, so that a fast responder does not keep its caller from other
/// work. What is left makes the wait descriptor readable at once.
const RECEIVES_PER_POLL: usize = 16;

/// What the epoll descriptor watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watching {
    Input,
    InputAndOutput,
}

/// Whether the connection lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Live,
    /// Nothing can be sent any more. What the responder had answered may still be read.
    SendBroken,
    /// Nothing can be read either.
    Dead(WorkError),
}

/// A connection to a [`crate::tcp::TcpResponder`].
///
/// Requests are gathered until [`Endpoint::flush`] (or `poll`) and sent straight from the registered memory. The
/// wait descriptor is one epoll descriptor for the endpoint's whole life: readable when something arrived, when a
/// send that was blocked can go on, and for ever once the connection is dead (as end of file is).
#[derive(Debug)]
pub struct TcpEndpoint {
    socket: TcpStream,
    epoll: OwnedFd,
    watching: Watching,
    state: State,
    geometry: PoolGeometry,
    max_transfer: u32,
    window: usize,
    next_sequence: u64,
    regions: Regions,
    outbox: Outbox,
    inbox: Inbox,
}

impl TcpEndpoint {
    /// Connects, and exchanges hellos. At most `window` requests, 1..=[`crate::MAX_WINDOW`], will be outstanding.
    /// Blocks until `deadline` at most.
    ///
    /// # Errors
    /// [`ConnectError`], with what to do next.
    pub fn connect(
        address: SocketAddr,
        window: usize,
        deadline: Instant,
    ) -> Result<Self, ConnectError> {
        check_window(window)?;
        let left = remaining(deadline).map_err(handshake_error)?;
        let socket = TcpStream::connect_timeout(&address, left).map_err(|error| {
            ConnectError::Unreachable {
                address: format!("tcp:{address}"),
                error,
            }
        })?;
        crate::tcp::tune(&socket)?;
        send_all(
            &socket,
            &ClientHello { version: VERSION }.encode(),
            deadline,
        )
        .map_err(handshake_error)?;
        let mut hello = [0; SERVER_HELLO_BYTES];
        receive_exact(&socket, &mut hello, deadline).map_err(handshake_error)?;
        let (geometry, max_transfer) = welcome(ServerHello::decode(&hello)?)?;
        socket.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(std::io::Error::from)?;
        epoll::add(
            &epoll,
            &socket,
            epoll::EventData::new_u64(0),
            epoll::EventFlags::IN,
        )
        .map_err(std::io::Error::from)?;
        Ok(Self {
            socket,
            epoll,
            watching: Watching::Input,
            state: State::Live,
            geometry,
            max_transfer,
            window,
            next_sequence: 0,
            regions: Regions::default(),
            outbox: Outbox::default(),
            inbox: Inbox::new(),
        })
    }

    /// The responder's pool.
    #[must_use]
    pub fn geometry(&self) -> PoolGeometry {
        self.geometry
    }

    fn post(
        &mut self,
        operation: Operation,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        if self.state != State::Live {
            return Err(PostError::Disconnected);
        }
        self.regions.check(local, self.max_transfer)?;
        if self.credits() == 0 {
            return Err(PostError::WindowFull);
        }
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let RemoteSlice {
            extent,
            key,
            offset,
        } = remote;
        let header = Request {
            operation,
            id: sequence,
            extent,
            key,
            offset,
            len: local.len,
        }
        .encode();
        let (payload, read) = match operation {
            Operation::Read => (None, Some(local)),
            Operation::Write => (Some(local), None),
        };
        self.outbox.push(Frame { header, payload });
        self.inbox.expect(Expected { id, sequence, read });
        Ok(())
    }

    fn watch(&mut self, watching: Watching) {
        if self.watching == watching {
            return;
        }
        let flags = match watching {
            Watching::Input => epoll::EventFlags::IN,
            Watching::InputAndOutput => epoll::EventFlags::IN | epoll::EventFlags::OUT,
        };
        // Fails for lack of kernel memory only. Then the connection cannot be waited for: give it up.
        match epoll::modify(
            &self.epoll,
            &self.socket,
            epoll::EventData::new_u64(0),
            flags,
        ) {
            Ok(()) => self.watching = watching,
            Err(_) => self.break_send(),
        }
    }

    /// Gives up sending. The shutdown makes the socket readable, so that a sleeper polls and learns of it.
    fn break_send(&mut self) {
        if self.state == State::Live {
            self.state = State::SendBroken;
            self.outbox.clear();
            // Fails if the connection is gone altogether, which is as good.
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
    }

    fn receive(&mut self, out: &mut Vec<Completion>) {
        for _ in 0..RECEIVES_PER_POLL {
            let error = match self
                .inbox
                .receive(self.socket.as_fd(), self.regions.all(), out)
            {
                Ok(Received::Drained) => return,
                Ok(Received::More) => continue,
                Err(Lost::Closed) => WorkError::Disconnected,
                Err(Lost::Protocol) => WorkError::Protocol,
            };
            self.break_send();
            self.state = State::Dead(error);
            return;
        }
    }
}

impl Endpoint for TcpEndpoint {
    fn register(&mut self, memory: Arc<RegisteredMemory>) -> RegionId {
        self.regions.register(memory)
    }

    fn post_read(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post(Operation::Read, id, local, remote)
    }

    fn post_write(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post(Operation::Write, id, local, remote)
    }

    fn flush(&mut self) {
        if self.outbox.is_empty() || self.state != State::Live {
            return;
        }
        match self.outbox.send(self.socket.as_fd(), self.regions.all()) {
            Ok(Sent::All) => self.watch(Watching::Input),
            Ok(Sent::Blocked) => self.watch(Watching::InputAndOutput),
            Err(_) => self.break_send(),
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let before = out.len();
        self.flush();
        if !matches!(self.state, State::Dead(_)) {
            self.receive(out);
        }
        if let State::Dead(error) = self.state {
            self.inbox.fail_all(error, out);
        }
        out.len() - before
    }

    fn credits(&self) -> usize {
        self.window - self.inbox.outstanding()
    }

    fn window(&self) -> usize {
        self.window
    }

    fn is_connected(&self) -> bool {
        self.state == State::Live
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }
}
