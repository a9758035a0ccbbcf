//! A requester's end of a connection over verbs.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFlags, epoll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::DeviceChoice;
use super::device::{Device, explain};
use super::lane::{Lane, Link, Posted};
use super::sys::{CompletionQueue, Granted, MemoryRegion, ProtectionDomain};
use super::wire::{Answer, FRAME_BYTES, HELLO_BYTES, LANES, Tell, VERSION, encode_hello};
use crate::connect::{
    ConnectError, check_window, handshake_error, receive_exact, remaining, send_all, wait_for,
};
use crate::endpoint::{
    Completion, Endpoint, LocalSlice, PostError, RegionId, RemoteSlice, WorkError, WorkId,
};
use crate::geometry::PoolGeometry;
use crate::memory::RegisteredMemory;
use crate::regions::Regions;
use crate::wire::WireError;

/// Every so many polls the control connection is looked at as well. Looking at the device's queue costs no system call, and
/// this one should not be felt beside it. Who sleeps is woken by it.
const HEAR_EVERY: u32 = 1024;

/// A responder that takes longer over a key or a lane is stopped or broken.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// Frames received at a time.
const INPUT_BYTES: usize = 64 * FRAME_BYTES;

/// Which queue a request goes to.
#[derive(Clone, Copy, Debug)]
enum Queue {
    Demand,
    Ahead,
    Write,
}

/// A connection to a [`crate::verbs::VerbsResponder`].
///
/// Requests wait until their extent's window is known (asked for once per extent and lane) and [`Endpoint::flush`] or `poll`
/// hands them to the device in one chain per lane. A refused access breaks the lane; it is opened again, and what was under
/// way on it is sent again, so that a refusal costs others only time. The wait descriptor is an epoll descriptor over the
/// device's notifications, which `arm` asks for, and the control connection.
pub struct VerbsEndpoint {
    // Lanes go first: the device must be done with the regions' memory.
    lanes: [Lane; LANES],
    link: Link,
    socket: TcpStream,
    epoll: OwnedFd,
    input: [u8; INPUT_BYTES],
    received: usize,
    /// Bytes of frames that the socket did not take yet, in whole frames when first put here.
    output: VecDeque<u8>,
    watching_output: bool,
    polls: u32,
    armed: bool,
    dead: Option<WorkError>,
    window: usize,
    max_transfer: u32,
    regions: Regions,
}

impl VerbsEndpoint {
    /// Connects the control connection to `address`, and all lanes. At most `window` requests, 1..=[`crate::MAX_WINDOW`],
    /// will be outstanding. Blocks until `deadline` at most.
    ///
    /// # Errors
    /// [`ConnectError`], with what to do next.
    pub fn connect(
        address: SocketAddr,
        choice: &DeviceChoice,
        window: usize,
        deadline: Instant,
    ) -> Result<Self, ConnectError> {
        Self::connect_with_depth(address, choice, window, window as u32, deadline)
    }

    /// The same with at most `depth` requests in each send queue: a device may take fewer than a window of them.
    pub(super) fn connect_with_depth(
        address: SocketAddr,
        choice: &DeviceChoice,
        window: usize,
        depth: u32,
        deadline: Instant,
    ) -> Result<Self, ConnectError> {
        check_window(window)?;
        let left = remaining(deadline).map_err(handshake_error)?;
        let socket = TcpStream::connect_timeout(&address, left).map_err(|error| {
            ConnectError::Unreachable {
                address: format!("rdma:{address}"),
                error,
            }
        })?;
        crate::tcp::tune(&socket)?;
        let device = Device::open(choice, Some(socket.local_addr()?.ip()))?;
        send_all(&socket, &encode_hello(device.as_told()), deadline).map_err(handshake_error)?;
        let mut answer = [0; HELLO_BYTES];
        receive_exact(&socket, &mut answer, deadline).map_err(handshake_error)?;
        let (their_port, geometry, max_transfer) = match Answer::decode(&answer)? {
            Answer::Welcome {
                port,
                geometry,
                max_transfer,
            } => (port, geometry, max_transfer),
            Answer::Busy => return Err(ConnectError::Busy),
            Answer::OtherVersion(version) if version == VERSION => {
                return Err(WireError::Reserved.into());
            }
            Answer::OtherVersion(version) => return Err(WireError::Version(version).into()),
        };
        socket.set_nonblocking(true)?;
        let domain = ProtectionDomain::new(&device.context)
            .map_err(|error| explain("making a protection domain", &error))?;
        // Each request ends once; one that was flushed with its lane and is sent again has a stale entry besides.
        let entries = 2 * window as u32 + 64;
        let completions = CompletionQueue::new(&device.context, entries)
            .map_err(|error| explain("making a completion queue", &error))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(std::io::Error::from)?;
        for fd in [socket.as_fd(), completions.as_fd()] {
            epoll::add(
                &epoll,
                fd,
                epoll::EventData::new_u64(0),
                epoll::EventFlags::IN,
            )
            .map_err(std::io::Error::from)?;
        }
        let depth = depth.min(device.context.limits().completions / 4);
        let mut endpoint = Self {
            lanes: [Lane::new(0), Lane::new(1), Lane::new(2)],
            link: Link {
                device,
                their_port,
                geometry,
                domain,
                completions,
                regions: Vec::new(),
                depth,
                asks: VecDeque::new(),
                done: VecDeque::new(),
            },
            socket,
            epoll,
            input: [0; INPUT_BYTES],
            received: 0,
            output: VecDeque::new(),
            watching_output: false,
            polls: 0,
            armed: false,
            dead: None,
            window,
            max_transfer,
            regions: Regions::default(),
        };
        endpoint.open_lanes(deadline)?;
        Ok(endpoint)
    }

    fn open_lanes(&mut self, deadline: Instant) -> Result<(), ConnectError> {
        for lane in &mut self.lanes {
            lane.open(&mut self.link)
                .map_err(|error| explain("making a queue pair", &error))?;
        }
        loop {
            self.say()
                .and_then(|()| self.hear())
                .map_err(|error| match error {
                    WorkError::Protocol => WireError::Order.into(),
                    _ => ConnectError::HungUp,
                })?;
            if self.lanes.iter().all(Lane::is_open) {
                return Ok(());
            }
            wait_for(&self.socket, PollFlags::IN, deadline).map_err(handshake_error)?;
        }
    }

    /// The responder's pool.
    #[must_use]
    pub fn geometry(&self) -> PoolGeometry {
        self.link.geometry
    }

    fn post(
        &mut self,
        queue: Queue,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        if self.dead.is_some() {
            return Err(PostError::Disconnected);
        }
        self.regions.check(local, self.max_transfer)?;
        if self.credits() == 0 {
            return Err(PostError::WindowFull);
        }
        let posted = Posted {
            id,
            write: matches!(queue, Queue::Write),
            local,
            remote,
            refusals: 0,
        };
        let [demand, ahead, write] = &mut self.lanes;
        match queue {
            Queue::Demand => demand,
            Queue::Ahead => ahead,
            Queue::Write => write,
        }
        .post(posted);
        Ok(())
    }

    /// Hands over to the device and to the responder what can be handed over.
    fn advance(&mut self) -> Result<(), WorkError> {
        for lane in &mut self.lanes {
            lane.advance(&mut self.link)
                .map_err(|_| WorkError::Disconnected)?;
        }
        self.say()
    }

    /// Sends what there is to ask.
    fn say(&mut self) -> Result<(), WorkError> {
        if self.link.asks.is_empty() && self.output.is_empty() && !self.watching_output {
            return Ok(());
        }
        self.output
            .extend(self.link.asks.drain(..).flat_map(super::wire::Ask::encode));
        while !self.output.is_empty() {
            let (bytes, _) = self.output.as_slices();
            match send(
                &self.socket,
                bytes,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => return Err(WorkError::Disconnected),
            }
        }
        let wanted = !self.output.is_empty();
        if wanted != self.watching_output {
            let mut flags = epoll::EventFlags::IN;
            flags.set(epoll::EventFlags::OUT, wanted);
            // Fails for lack of kernel memory only. Then the connection cannot be waited for: give it up.
            epoll::modify(
                &self.epoll,
                &self.socket,
                epoll::EventData::new_u64(0),
                flags,
            )
            .map_err(|_| WorkError::Disconnected)?;
            self.watching_output = wanted;
        }
        Ok(())
    }

    /// Takes in what the responder tells.
    fn hear(&mut self) -> Result<(), WorkError> {
        loop {
            let room = self.input.get_mut(self.received..).unwrap_or_default();
            match recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(WorkError::Disconnected),
                Ok((got, _)) => self.received += got,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(WorkError::Disconnected),
            }
            let input = self.input;
            let (frames, _) = input
                .get(..self.received)
                .unwrap_or_default()
                .as_chunks::<FRAME_BYTES>();
            for frame in frames {
                let tell = Tell::decode(frame).map_err(|_| WorkError::Protocol)?;
                self.follow(tell)?;
            }
            let used = frames.len() * FRAME_BYTES;
            self.input.copy_within(used..self.received, 0);
            self.received -= used;
        }
    }

    fn follow(&mut self, tell: Tell) -> Result<(), WorkError> {
        let (Tell::Opened { lane, .. }
        | Tell::Bound { lane, .. }
        | Tell::Refused { lane, .. }
        | Tell::Gone { lane, .. }) = tell;
        // What the device completed before the lane went need not be done again.
        if matches!(tell, Tell::Gone { .. }) {
            self.take_completions()?;
        }
        let lane = self
            .lanes
            .get_mut(usize::from(lane))
            .ok_or(WorkError::Protocol)?;
        match tell {
            Tell::Opened {
                generation,
                queue,
                packet,
                ..
            } => lane
                .opened(&self.link, generation, queue, packet)
                .map_err(|_| WorkError::Disconnected)?,
            Tell::Bound {
                generation,
                extent,
                key,
                remote_key,
                address,
                ..
            } => {
                lane.bound(generation, extent, key, remote_key, address);
            }
            Tell::Refused {
                generation,
                extent,
                key,
                ..
            } => {
                lane.refused(&mut self.link, generation, extent, key);
            }
            Tell::Gone { generation, .. } => lane.gone(generation),
        }
        Ok(())
    }

    /// Requests that the device or the responder has still to do.
    pub(super) fn outstanding(&self) -> usize {
        self.lanes.iter().map(Lane::outstanding).sum()
    }

    /// Takes what the device has completed. Returns how many entries there were.
    pub(super) fn take_completions(&mut self) -> Result<usize, WorkError> {
        let completions = Arc::clone(&self.link.completions);
        let (lanes, link) = (&mut self.lanes, &mut self.link);
        let mut result = Ok(());
        let count = completions.poll(self.window, |ended| {
            let lane = lanes.get_mut((ended.id >> 56) as usize);
            let followed = lane.map_or(Err(WorkError::Protocol), |lane| lane.ended(link, ended));
            if result.is_ok() {
                result = followed;
            }
        });
        result.map(|()| count)
    }

    fn progress(&mut self) -> Result<(), WorkError> {
        if self.take_completions()? > 0 {
            self.take_notifications();
        }
        let asked = self.lanes.iter().any(Lane::has_questions);
        if asked || self.polls.is_multiple_of(HEAR_EVERY) {
            self.hear()?;
        }
        self.polls = self.polls.wrapping_add(1);
        self.advance()?;
        let late = |lane: &Lane| {
            lane.oldest_question()
                .is_some_and(|since| since.elapsed() > ANSWER_DEADLINE)
        };
        if asked && self.lanes.iter().any(late) {
            return Err(WorkError::Disconnected);
        }
        Ok(())
    }

    /// Who has taken what it was woken for is not to be woken for it again.
    fn take_notifications(&mut self) {
        if self.armed && self.link.completions.take_notifications() {
            self.armed = false;
        }
    }

    /// Sees to it that the next completion wakes a sleeper, and looks once more: what came before the arming does not.
    fn await_completions(&mut self) -> Result<(), WorkError> {
        self.take_notifications();
        if !self.armed {
            self.link
                .completions
                .arm()
                .map_err(|_| WorkError::Disconnected)?;
            self.armed = true;
        }
        // What wakes the sleeper may be the control connection.
        self.polls = 0;
        self.take_completions()?;
        self.advance()
    }

    /// Ends the connection. The socket's shutdown makes the wait descriptor readable for good.
    fn die(&mut self, error: WorkError) {
        if self.dead.is_none() {
            self.dead = Some(error);
            for lane in &mut self.lanes {
                lane.fail(&mut self.link, error);
            }
            // Fails if the connection is gone altogether, which is as good.
            let _ = self.socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Endpoint for VerbsEndpoint {
    /// Memory that the device does not take (RLIMIT_MEMLOCK) ends the connection, and is logged.
    fn register(&mut self, memory: Arc<RegisteredMemory>) -> RegionId {
        let id = self.regions.register(Arc::clone(&memory));
        if id.0 as usize == self.link.regions.len() {
            let len = memory.len();
            match MemoryRegion::new(&self.link.domain, memory, 0, len, Granted::Local) {
                Ok(region) => self.link.regions.push(region),
                Err(error) => {
                    let reason = explain("registering local memory", &error);
                    tracing::error!(%reason, bytes = len, "no pages can travel over this connection");
                    self.die(WorkError::Disconnected);
                }
            }
        }
        id
    }

    fn post_read(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post(Queue::Demand, id, local, remote)
    }

    fn post_read_ahead(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post(Queue::Ahead, id, local, remote)
    }

    fn post_write(
        &mut self,
        id: WorkId,
        local: LocalSlice,
        remote: RemoteSlice,
    ) -> Result<(), PostError> {
        self.post(Queue::Write, id, local, remote)
    }

    fn flush(&mut self) {
        if self.dead.is_none()
            && let Err(error) = self.advance()
        {
            self.die(error);
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        if self.dead.is_none()
            && let Err(error) = self.progress()
        {
            self.die(error);
        }
        let count = self.link.done.len().min(self.window);
        out.extend(self.link.done.drain(..count));
        count
    }

    fn credits(&self) -> usize {
        self.window
            .saturating_sub(self.outstanding() + self.link.done.len())
    }

    fn window(&self) -> usize {
        self.window
    }

    fn is_connected(&self) -> bool {
        self.dead.is_none()
    }

    fn wait_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn arm(&mut self) -> bool {
        if self.dead.is_none()
            && let Err(error) = self.await_completions()
        {
            self.die(error);
        }
        self.link.done.is_empty()
    }
}
