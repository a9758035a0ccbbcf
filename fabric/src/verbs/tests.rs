//! What the device itself refuses: a requester that asks for no key and uses those that it finds as it pleases. Needs a
//! device; the lab has one.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::device::Device;
use super::sys::{
    CompletionQueue, Granted, MemoryRegion, Path, ProtectionDomain, QueuePair, Status, Work,
};
use super::wire::{Answer, Ask, FRAME_BYTES, HELLO_BYTES, LANES, Port, Tell, encode_hello};
use super::{DeviceChoice, VerbsEndpoint, VerbsLimits, VerbsResponder};
use crate::connect::{receive_exact, send_all};
use crate::memory::MemoryOptions;
use crate::{
    AccessTable, Completion, Endpoint, LocalSlice, MAX_TRANSFER, PoolGeometry, RegisteredMemory,
    RemoteSlice, WorkId,
};

const EXTENT_BYTES: u64 = 2 << 20;
const KEY: u64 = 7;
const DEPTH: u32 = 16;

/// Emulated machines on a busy host are slow; a hang ends the test all the same.
fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(150)
}

fn memory(len: u64) -> Arc<RegisteredMemory> {
    let (memory, _) =
        RegisteredMemory::create("test", len as usize, MemoryOptions::default()).unwrap();
    Arc::new(memory)
}

struct Node {
    pool: Arc<RegisteredMemory>,
    access: Arc<AccessTable>,
    responder: VerbsResponder,
}

/// None, after saying so, on a host without a device.
fn node(test: &str, windows: bool) -> Option<Node> {
    if let Err(why) = super::usable_device() {
        println!("SKIPPED: {test} over rdma: {why}");
        return None;
    }
    let geometry = PoolGeometry::new(EXTENT_BYTES, 3).unwrap();
    let (pool, access) = (
        memory(3 * EXTENT_BYTES),
        AccessTable::new(geometry).unwrap(),
    );
    let limits = VerbsLimits {
        windows,
        ..VerbsLimits::default()
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let choice = DeviceChoice::default();
    let responder =
        VerbsResponder::start(listener, &choice, pool.clone(), access.clone(), limits).unwrap();
    Some(Node {
        pool,
        access,
        responder,
    })
}

/// A requester without scruples.
struct Rogue {
    lanes: [Option<QueuePair>; LANES],
    region: MemoryRegion,
    completions: Arc<CompletionQueue>,
    domain: Arc<ProtectionDomain>,
    device: Device,
    told: Port,
    their_port: Port,
    socket: TcpStream,
    generation: u32,
}

impl Rogue {
    fn new(node: &Node) -> Self {
        Self::telling(node, |_| {})
    }

    /// One that says other things of its device than are true, and keeps to what it says.
    fn telling(node: &Node, untruth: impl FnOnce(&mut Port)) -> Self {
        let socket = TcpStream::connect(node.responder.local_addr()).unwrap();
        let device = Device::open(&DeviceChoice::default(), None).unwrap();
        let mut told = device.as_told();
        untruth(&mut told);
        send_all(&socket, &encode_hello(told), deadline()).unwrap();
        let mut answer = [0; HELLO_BYTES];
        receive_exact(&socket, &mut answer, deadline()).unwrap();
        let Answer::Welcome { port, .. } = Answer::decode(&answer).unwrap() else {
            panic!("not let in");
        };
        let domain = ProtectionDomain::new(&device.context).unwrap();
        let local = memory(MAX_TRANSFER.into());
        local.write(0, &vec![0xee; MAX_TRANSFER as usize]).unwrap();
        let len = MAX_TRANSFER as usize;
        Self {
            lanes: Default::default(),
            region: MemoryRegion::new(&domain, local, 0, len, Granted::Local).unwrap(),
            completions: CompletionQueue::new(&device.context, 256).unwrap(),
            domain,
            device,
            told,
            their_port: port,
            socket,
            generation: 0,
        }
    }

    /// Asks, and returns the answer to that; news in between is passed over.
    fn ask(&mut self, ask: Ask) -> Tell {
        send_all(&self.socket, &ask.encode(), deadline()).unwrap();
        loop {
            let mut frame = [0; FRAME_BYTES];
            receive_exact(&self.socket, &mut frame, deadline()).unwrap();
            match Tell::decode(&frame).unwrap() {
                Tell::Gone { .. } => {}
                answer => return answer,
            }
        }
    }

    fn open(&mut self, lane: u8) {
        self.lanes[usize::from(lane)] = None;
        self.generation += 1;
        let mut ours = QueuePair::new(&self.domain, &self.completions, DEPTH).unwrap();
        let ask = Ask::Open {
            lane,
            generation: self.generation,
            queue: ours.number(),
            packet: 1,
        };
        let Tell::Opened { queue, packet, .. } = self.ask(ask) else {
            panic!("not opened");
        };
        let path = Path {
            port: self.device.port,
            gid_index: self.device.gid_index,
            gid: self.their_port.gid,
            lid: self.their_port.lid,
            mtu: self.told.mtu_with(&self.their_port),
            queue,
            their_packet: packet,
            our_packet: 1,
            reads_out: self.told.reads_from(&self.their_port),
            reads_in: 1,
        };
        ours.connect(&path, false).unwrap();
        self.lanes[usize::from(lane)] = Some(ours);
    }

    /// Opens a lane, and an extent to it; returns the window's key and the extent's address.
    fn bind(&mut self, lane: u8, extent: u32, key: u64) -> Option<(u32, u64)> {
        self.open(lane);
        let generation = self.generation;
        match self.ask(Ask::Bind {
            lane,
            generation,
            extent,
            key,
        }) {
            Tell::Bound {
                remote_key,
                address,
                ..
            } => Some((remote_key, address)),
            _ => None,
        }
    }

    fn post(
        &mut self,
        lane: u8,
        count: u64,
        write: bool,
        remote_address: u64,
        remote_key: u32,
        len: u32,
    ) {
        let (region, queue) = (&self.region, self.lanes[usize::from(lane)].as_mut());
        let works = (0..count).map(|id| {
            let work = Work::Transfer {
                write,
                region,
                offset: 0,
                len,
                remote_address,
                remote_key,
            };
            (id, true, work)
        });
        queue.unwrap().post(works).unwrap();
    }

    /// Tries one transfer.
    fn transfer(&mut self, lane: u8, write: bool, address: u64, key: u32, len: u32) -> Status {
        self.post(lane, 1, write, address, key, len);
        let (end, mut status) = (deadline(), None);
        while status.is_none() {
            assert!(Instant::now() < end, "no completion");
            self.completions
                .poll(1, |ended| status = Some(ended.status));
        }
        status.unwrap()
    }

    /// Tries a read and a write that must not succeed, each on a fresh lane.
    fn must_be_refused(&mut self, lane: u8, address: u64, key: u32, what: &str) {
        for write in [false, true] {
            self.open(lane);
            let status = self.transfer(lane, write, address, key, 8);
            assert_eq!(status, Status::Refused, "{what}, write: {write}");
        }
    }
}

#[test]
fn the_device_refuses_keys_that_are_guessed_stale_or_anothers() {
    for windows in [true, false] {
        let Some(node) = node("the_device_refuses_keys", windows) else {
            return;
        };
        node.access.grant(1, KEY).unwrap();
        let (mut rogue, mut other) = (Rogue::new(&node), Rogue::new(&node));
        assert_eq!(rogue.bind(0, 1, KEY + 1), None);
        assert_eq!(rogue.bind(0, 0, KEY), None);
        let (key, address) = rogue.bind(0, 1, KEY).unwrap();
        assert_eq!(rogue.transfer(0, true, address, key, 4096), Status::Done);
        let end = address + EXTENT_BYTES - 8;
        assert_eq!(rogue.transfer(0, false, end, key, 8), Status::Done);
        // On that very lane, while the window is open: one beyond, before and across its bounds.
        let mut keys = vec![key];
        for (from, len) in [(end + 8, 8), (address - 8, 8), (end, 16)] {
            let key = *keys.last().unwrap();
            let status = rogue.transfer(0, true, from, key, len);
            assert_eq!(status, Status::Refused, "{from:#x}");
            let (again, _) = rogue.bind(0, 1, KEY).unwrap();
            if windows {
                assert!(!keys.contains(&again), "a window's key came again");
            }
            keys.push(again);
        }
        if windows {
            // They went with their lanes.
            for &old in &keys[..keys.len() - 1] {
                rogue.must_be_refused(0, address, old, "a former window");
            }
        }
        let (key, _) = rogue.bind(0, 1, KEY).unwrap();
        if windows {
            rogue.must_be_refused(2, address, key, "a window of another lane");
        }
        for guess in [
            0,
            1,
            key ^ 1,
            key.wrapping_add(0x100),
            key.wrapping_sub(0x100),
            u32::MAX,
        ] {
            rogue.must_be_refused(1, address, guess, "a guessed key");
        }
        other.must_be_refused(0, address, key, "another connection's key");

        let (key, _) = rogue.bind(0, 1, KEY).unwrap();
        node.access.revoke(1).unwrap();
        node.pool.zero(EXTENT_BYTES, EXTENT_BYTES as usize).unwrap();
        rogue.must_be_refused(0, address, key, "a revoked key");
        assert_eq!(rogue.bind(0, 1, KEY), None);
        // Granted to somebody else, under a new key.
        node.access.grant(1, KEY + 1).unwrap();
        let (new, _) = other.bind(0, 1, KEY + 1).unwrap();
        rogue.must_be_refused(0, address, key, "a stale key");
        rogue.must_be_refused(0, address, new, "the new holder's key");
        let clean = memory(EXTENT_BYTES);
        let len = EXTENT_BYTES as usize;
        assert_eq!(node.pool.hash128(EXTENT_BYTES, len), clean.hash128(0, len));
    }
}

/// A window's key has eight bits that a device counts up: after 256 binds of one window the first key would open it again.
#[test]
fn no_key_of_a_window_comes_again() {
    let Some(node) = node("no_key_of_a_window_comes_again", true) else {
        return;
    };
    let mut rogue = Rogue::new(&node);
    let mut seen = Vec::new();
    for round in 0..300 {
        node.access.grant(1, KEY + round).unwrap();
        let (key, address) = rogue.bind(0, 1, KEY + round).unwrap();
        assert!(!seen.contains(&key), "{key:#x} came again in round {round}");
        if round % 100 == 99 {
            for old in [seen[0], seen[seen.len() - 1]] {
                rogue.must_be_refused(0, address, old, "a key of before");
            }
        }
        seen.push(key);
        node.access.revoke(1).unwrap();
    }
}

#[test]
fn a_transfer_under_way_does_not_outlive_the_grant() {
    for windows in [true, false] {
        let Some(node) = node("a_transfer_under_way", windows) else {
            return;
        };
        let mut rogue = Rogue::new(&node);
        let len = EXTENT_BYTES as usize;
        let clean = memory(EXTENT_BYTES).hash128(0, len).unwrap();
        for round in 0..8 {
            node.access.grant(1, KEY + round).unwrap();
            let (key, address) = rogue.bind(0, 1, KEY + round).unwrap();
            rogue.post(0, DEPTH.into(), true, address, key, MAX_TRANSFER);
            // Until the first bytes are there: all but one of the writes are still to come.
            let (end, mut first) = (deadline(), [0]);
            while first == [0] {
                assert!(Instant::now() < end, "nothing was written");
                node.pool.read(EXTENT_BYTES, &mut first).unwrap();
            }
            node.access.revoke(1).unwrap();
            node.pool.zero(EXTENT_BYTES, len).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(
                node.pool.hash128(EXTENT_BYTES, len).unwrap(),
                clean,
                "round {round}"
            );
        }
    }
}

/// Both ends keep to the packets that the lesser device can, 256 bytes here: larger ones would not be taken.
#[test]
fn a_lesser_device_is_served_within_what_it_can() {
    let Some(node) = node("a_lesser_device", true) else {
        return;
    };
    node.access.grant(1, KEY).unwrap();
    let mut rogue = Rogue::telling(&node, |port| {
        port.mtu = 1;
        port.reads_out = 1;
    });
    let (key, address) = rogue.bind(0, 1, KEY).unwrap();
    let len = 64 << 10;
    assert_eq!(rogue.transfer(0, true, address, key, len), Status::Done);
    assert_eq!(rogue.transfer(0, false, address, key, len), Status::Done);
    let mut there = vec![0; len as usize];
    node.pool.read(EXTENT_BYTES, &mut there).unwrap();
    assert!(there.iter().all(|&byte| byte == 0xee));
}

/// An endpoint that holds extent 1 of a node's, and what it has completed.
struct Requester {
    endpoint: VerbsEndpoint,
    _node: Node,
    local: Arc<RegisteredMemory>,
    done: Vec<Completion>,
}

impl Requester {
    /// None, after saying so, on a host without a device.
    fn new(test: &str, window: usize, depth: u32) -> Option<Self> {
        let node = node(test, true)?;
        node.access.grant(1, KEY).unwrap();
        let (at, choice) = (node.responder.local_addr(), DeviceChoice::default());
        let mut endpoint =
            VerbsEndpoint::connect_with_depth(at, &choice, window, depth, deadline()).unwrap();
        let local = memory(2 * EXTENT_BYTES);
        endpoint.register(Arc::clone(&local));
        Some(Self {
            endpoint,
            _node: node,
            local,
            done: Vec::new(),
        })
    }

    /// Where a request of this number goes: pieces of `len` bytes one behind the other.
    fn slices(number: u64, len: u32) -> (LocalSlice, RemoteSlice) {
        let offset = number * u64::from(len);
        let local = LocalSlice {
            region: crate::RegionId(0),
            offset,
            len,
        };
        let remote = RemoteSlice {
            extent: 1,
            key: KEY,
            offset: offset % EXTENT_BYTES,
        };
        (local, remote)
    }

    fn write(&mut self, id: u64, number: u64, len: u32) {
        let (local, remote) = Self::slices(number, len);
        self.endpoint.post_write(WorkId(id), local, remote).unwrap();
    }

    fn read(&mut self, id: u64, number: u64, len: u32) {
        let (local, remote) = Self::slices(number, len);
        self.endpoint.post_read(WorkId(id), local, remote).unwrap();
    }

    fn read_ahead(&mut self, id: u64, number: u64, len: u32) {
        let (local, remote) = Self::slices(number, len);
        self.endpoint
            .post_read_ahead(WorkId(id), local, remote)
            .unwrap();
    }

    /// Polls until it holds, and sees to it that all has gone well.
    fn until(&mut self, mut holds: impl FnMut(&[Completion]) -> bool) {
        let end = deadline();
        while !holds(&self.done) {
            assert!(Instant::now() < end, "only {:?}", self.done);
            self.endpoint.poll(&mut self.done);
        }
        assert!(self.done.iter().all(|done| done.result == Ok(())));
    }
}

/// The demand read is posted last, behind megabytes in both directions, and is done while most of them are still to come: in one
/// queue with either kind it would wait for all of that. SoftRoCE of Linux 6.1 does part of them while they are posted; those do not count.
#[test]
fn a_demand_read_waits_for_no_bulk() {
    const BULK: u64 = 24;
    let Some(mut requester) = Requester::new("a_demand_read", 64, 64) else {
        return;
    };
    let mut left_in_all = 0;
    for round in 0..4 {
        // A touch of each lane, so that none has to ask for its window.
        requester.write(0, 0, 8);
        requester.read(1, 0, 8);
        requester.read_ahead(2, 0, 8);
        requester.until(|done| done.len() == 3);
        requester.done.clear();
        for id in 0..BULK / 2 {
            requester.write(2 * id, 0, MAX_TRANSFER);
            requester.read_ahead(2 * id + 1, 2, MAX_TRANSFER);
        }
        requester.endpoint.flush();
        requester.endpoint.poll(&mut requester.done);
        let at_once = requester.done.len() as u64;
        requester.read(BULK, 3, 4096);
        requester.endpoint.flush();
        requester.until(|done| done.iter().any(|done| done.id == WorkId(BULK)));
        let (left, before) = (BULK - at_once, requester.done.len() as u64 - 1 - at_once);
        println!("round {round}: {before} of {left} transfers of 1 MiB went before it");
        assert!(2 * before < left || left == 0, "{before} of {left}");
        left_in_all += left;
        requester.until(|done| done.len() as u64 == BULK + 1);
        requester.done.clear();
    }
    assert!(left_in_all > 0, "there was nothing to wait behind");
}

/// One request in sixteen is reported, and a chain's last: a completion's cost is shared.
#[test]
fn few_of_a_chain_are_reported() {
    let Some(mut requester) = Requester::new("few_of_a_chain", 64, 64) else {
        return;
    };
    requester.write(0, 0, 8);
    requester.until(|done| done.len() == 1);
    requester.done.clear();
    for id in 0..64 {
        requester.write(id, id, 4096);
    }
    requester.endpoint.flush();
    let (end, mut entries) = (deadline(), 0);
    while requester.endpoint.outstanding() > 0 {
        assert!(Instant::now() < end);
        entries += requester.endpoint.take_completions().unwrap();
    }
    requester.until(|done| done.len() == 64);
    assert!(
        (4..=5).contains(&entries),
        "{entries} entries for 64 requests"
    );
}

/// What a send queue does not take waits in its order, and all is done once.
#[test]
fn a_window_larger_than_the_send_queue_waits_its_turn() {
    const REQUESTS: u64 = 128;
    let Some(mut requester) = Requester::new("a_window_larger", REQUESTS as usize, 4) else {
        return;
    };
    let pages: Vec<u8> = (0..REQUESTS / 2)
        .flat_map(|page| [page as u8 + 1; 4096])
        .collect();
    requester.local.write(0, &pages).unwrap();
    for id in 0..REQUESTS / 2 {
        requester.write(id, id, 4096);
    }
    requester.until(|done| done.len() as u64 == REQUESTS / 2);
    let order: Vec<u64> = requester.done.iter().map(|done| done.id.0).collect();
    assert!(order.is_sorted(), "{order:?}");
    requester.done.clear();
    requester.local.zero(0, pages.len()).unwrap();
    for id in 0..REQUESTS / 2 {
        requester.read(id, id, 4096);
        requester.read_ahead(id + REQUESTS / 2, id, 4096);
    }
    requester.until(|done| done.len() as u64 == REQUESTS);
    let mut here = vec![0; pages.len()];
    requester.local.read(0, &mut here).unwrap();
    assert!(here == pages);
}
