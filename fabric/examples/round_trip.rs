//! Measures 4 KiB reads over TCP loopback against a bare ping-pong of the same sizes, in turns within one run.
//!
//! `cargo run --release -p farpage-fabric --example round_trip [ROUNDS]`

#![allow(clippy::print_stdout)]

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farpage_fabric::access::AccessTable;
use farpage_fabric::memory::MemoryOptions;
use farpage_fabric::shm::{ShmEndpoint, ShmLimits, ShmResponder};
use farpage_fabric::tcp::{ResponderLimits, TcpEndpoint, TcpResponder};
use farpage_fabric::{
    Endpoint, LocalSlice, PoolGeometry, RegionId, RegisteredMemory, RemoteSlice, ShmAddress, WorkId,
};

const PAGE: u32 = 4096;
const EXTENT: u64 = 2 << 20;
const BATCH: usize = 32;
const PHASES: usize = 10;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rounds: usize = std::env::args()
        .nth(1)
        .map_or(Ok(20_000), |text| text.parse())?;
    hash()?;
    shm(rounds)?;
    for (name, spin, peer) in [
        ("two cores, both sides look", true, 1),
        ("two cores, both sides sleep", false, 1),
        ("one core, both sides sleep", false, 0),
    ] {
        // Threads inherit the core that their maker is on: the peers' first, then ours.
        pin(peer)?;
        let mut bare = Bare::start(spin)?;
        let mut ours = Ours::start(spin)?;
        pin(0)?;
        let (mut bare_times, mut our_times) = (Vec::new(), Vec::new());
        // In turns, so that both meet the same weather.
        for _ in 0..PHASES {
            for _ in 0..rounds / PHASES {
                let start = Instant::now();
                bare.round_trip()?;
                bare_times.push(start.elapsed());
            }
            for _ in 0..rounds / PHASES {
                let start = Instant::now();
                ours.read_batch(1)?;
                our_times.push(start.elapsed());
            }
        }
        let (bare50, bare99) = quantiles(&mut bare_times);
        let (our50, our99) = quantiles(&mut our_times);
        let ratio = our50.as_secs_f64() / bare50.as_secs_f64();
        println!(
            "{name}: bare p50 {bare50:?} p99 {bare99:?}; ours p50 {our50:?} p99 {our99:?}; ratio of p50 {ratio:.3}"
        );
        let start = Instant::now();
        let batches = rounds / BATCH;
        for _ in 0..batches {
            ours.read_batch(BATCH)?;
        }
        let each = start.elapsed() / (batches * BATCH) as u32;
        println!("  batches of {BATCH}: {each:?} a page");
    }
    Ok(())
}

fn pin(core: usize) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(core % std::thread::available_parallelism()?.get().max(2));
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

fn quantiles(times: &mut [Duration]) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

fn hash() -> Result<(), Box<dyn std::error::Error>> {
    let (memory, _) = RegisteredMemory::create("hash", 1 << 20, MemoryOptions::default())?;
    memory.write(0, &vec![0x5a; 1 << 20])?;
    let start = Instant::now();
    let count = 400_000u64;
    let mut all = 0;
    for i in 0..count {
        all ^= memory.hash128(i % 8 * 4096, 4096)?;
    }
    println!(
        "hash128 of a page: {} ns ({all:x})",
        start.elapsed().as_nanos() / u128::from(count)
    );
    Ok(())
}

fn shm(rounds: usize) -> Result<(), Box<dyn std::error::Error>> {
    let (pool, access) = pool()?;
    let address = ShmAddress::Abstract(format!("farpage-round-trip-{}", std::process::id()));
    let _responder = ShmResponder::start(&address, pool, access, ShmLimits::default())?;
    let mut endpoint = ShmEndpoint::connect(&address, 1, Instant::now() + Duration::from_secs(5))?;
    let (local, _) = RegisteredMemory::create("local", PAGE as usize, MemoryOptions::default())?;
    let region = endpoint.register(Arc::new(local));
    let mut out = Vec::new();
    let start = Instant::now();
    for i in 0..rounds as u64 {
        let remote = RemoteSlice {
            extent: 0,
            key: 1,
            offset: i % 512 * u64::from(PAGE),
        };
        endpoint.post_read(
            WorkId(i),
            LocalSlice {
                region,
                offset: 0,
                len: PAGE,
            },
            remote,
        )?;
        endpoint.poll(&mut out);
    }
    let each = start.elapsed() / rounds as u32;
    for completion in out {
        completion.result?;
    }
    println!("shared memory: {each:?} a page");
    Ok(())
}

fn pool() -> Result<(Arc<RegisteredMemory>, Arc<AccessTable>), Box<dyn std::error::Error>> {
    let (pool, _) = RegisteredMemory::create("pool", EXTENT as usize, MemoryOptions::default())?;
    pool.write(0, &vec![7; EXTENT as usize])?;
    let access = AccessTable::new(PoolGeometry::new(EXTENT, 1)?)?;
    access.grant(0, 1)?;
    Ok((Arc::new(pool), access))
}

/// The floor: 32 bytes there, a page back, nothing else.
struct Bare {
    socket: TcpStream,
    spin: bool,
    page: Vec<u8>,
}

impl Bare {
    fn start(spin: bool) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        std::thread::spawn(move || -> io::Result<()> {
            let (mut socket, _) = listener.accept()?;
            socket.set_nodelay(true)?;
            socket.set_nonblocking(spin)?;
            let (mut request, page) = ([0; 32], vec![7; PAGE as usize]);
            loop {
                fill(&mut socket, &mut request, spin)?;
                socket.write_all(&page)?;
            }
        });
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(spin)?;
        Ok(Self {
            socket,
            spin,
            page: vec![0; PAGE as usize],
        })
    }

    fn round_trip(&mut self) -> io::Result<()> {
        self.socket.write_all(&[1; 32])?;
        fill(&mut self.socket, &mut self.page, self.spin)
    }
}

/// Fills `bytes`. Looks for half a millisecond, so as not to burn a core while the other one is measured.
fn fill(socket: &mut TcpStream, bytes: &mut [u8], spin: bool) -> io::Result<()> {
    let mut done = 0;
    let start = Instant::now();
    while done < bytes.len() {
        if spin && start.elapsed() > Duration::from_micros(500) {
            let fd = rustix::event::PollFd::new(socket, rustix::event::PollFlags::IN);
            rustix::event::poll(&mut [fd], None)?;
        }
        match socket.read(&mut bytes[done..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            // With fewer cores than threads that look, whoever finds nothing lets the others run.
            Err(error) if spin && error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::yield_now();
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

struct Ours {
    endpoint: TcpEndpoint,
    region: RegionId,
    spin: bool,
    _responder: TcpResponder,
}

impl Ours {
    fn start(spin: bool) -> Result<Self, Box<dyn std::error::Error>> {
        let (pool, access) = pool()?;
        let mut limits = ResponderLimits::default();
        if !spin {
            limits.spin = Duration::ZERO;
        }
        let responder =
            TcpResponder::start(TcpListener::bind("127.0.0.1:0")?, pool, access, limits)?;
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut endpoint = TcpEndpoint::connect(responder.local_addr(), BATCH, deadline)?;
        let (local, _) =
            RegisteredMemory::create("local", BATCH * PAGE as usize, MemoryOptions::default())?;
        local.zero(0, BATCH * PAGE as usize)?;
        let region = endpoint.register(Arc::new(local));
        Ok(Self {
            endpoint,
            region,
            spin,
            _responder: responder,
        })
    }

    fn read_batch(&mut self, count: usize) -> Result<(), Box<dyn std::error::Error>> {
        for i in 0..count as u64 {
            let local = LocalSlice {
                region: self.region,
                offset: i * u64::from(PAGE),
                len: PAGE,
            };
            let remote = RemoteSlice {
                extent: 0,
                key: 1,
                offset: i * u64::from(PAGE),
            };
            self.endpoint.post_read(WorkId(i), local, remote)?;
        }
        self.endpoint.flush();
        let mut out = Vec::with_capacity(count);
        while out.len() < count {
            if self.endpoint.poll(&mut out) > 0 {
                continue;
            }
            if self.spin {
                std::thread::yield_now();
            } else if self.endpoint.arm() {
                let fd = self.endpoint.wait_fd().ok_or("no descriptor to wait on")?;
                let fd = rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN);
                rustix::event::poll(&mut [fd], None)?;
            }
        }
        for completion in out {
            completion.result?;
        }
        Ok(())
    }
}
