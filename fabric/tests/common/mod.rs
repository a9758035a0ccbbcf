//! What the fabric's tests share: a pool, a responder of any transport, and an endpoint that can be waited for.

#![allow(dead_code, missing_docs, unreachable_pub)]

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use farpage_fabric::access::AccessTable;
use farpage_fabric::memory::MemoryOptions;
use farpage_fabric::shm::{ShmEndpoint, ShmLimits, ShmResponder};
use farpage_fabric::tcp::{ResponderLimits, TcpEndpoint, TcpResponder};
#[cfg(feature = "verbs")]
use farpage_fabric::verbs::{DeviceChoice, VerbsEndpoint, VerbsLimits, VerbsResponder};
use farpage_fabric::{
    Completion, Endpoint, LocalSlice, PoolGeometry, RegionId, RegisteredMemory, RemoteSlice,
    ShmAddress, WorkError, WorkId,
};

/// Nothing here takes a tenth of it; a hang ends the test.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const EXTENT_BYTES: u64 = 2 << 20;
pub const EXTENTS: u32 = 4;
pub const LOCAL_BYTES: usize = 4 << 20;
pub const WINDOW: usize = 32;

/// [`PATIENCE`] from now; or so many seconds as `FARPAGE_TEST_PATIENCE` says, on emulated machines.
pub fn deadline() -> Instant {
    let seconds = std::env::var("FARPAGE_TEST_PATIENCE").ok();
    let seconds = seconds.and_then(|seconds| seconds.parse().ok());
    Instant::now() + seconds.map_or(PATIENCE, Duration::from_secs)
}

pub fn memory(len: usize) -> Arc<RegisteredMemory> {
    Arc::new(
        RegisteredMemory::create("test", len, MemoryOptions::default())
            .unwrap()
            .0,
    )
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Shm,
    #[cfg(feature = "verbs")]
    Rdma {
        windows: bool,
    },
}

/// Whether this host has what the transport takes. If not, says so for the test of this name.
pub fn can_run(test: &str, transport: Transport) -> bool {
    #[cfg(feature = "verbs")]
    if let Transport::Rdma { windows } = transport
        && let Err(why) = farpage_fabric::verbs::usable_device()
    {
        let how = if windows { "" } else { " without windows" };
        println!("SKIPPED: {test} over rdma{how}: {why}");
        return false;
    }
    let _ = (test, transport);
    true
}

/// Those that every host has.
pub const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Shm];

pub enum Responder {
    Tcp(TcpResponder),
    Shm(ShmResponder),
    #[cfg(feature = "verbs")]
    Rdma(VerbsResponder),
}

impl Responder {
    pub fn stop(&mut self) {
        match self {
            Self::Tcp(responder) => responder.stop(),
            Self::Shm(responder) => responder.stop(),
            #[cfg(feature = "verbs")]
            Self::Rdma(responder) => responder.stop(),
        }
    }
}

/// A responder with its pool.
pub struct Node {
    pub pool: Arc<RegisteredMemory>,
    pub access: Arc<AccessTable>,
    pub responder: Responder,
}

pub fn unique_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(
        "farpage-test-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

impl Node {
    pub fn start(transport: Transport) -> Self {
        let geometry = PoolGeometry::new(EXTENT_BYTES, EXTENTS).unwrap();
        let pool = memory(geometry.pool_bytes() as usize);
        let access = AccessTable::new(geometry).unwrap();
        let responder = match transport {
            Transport::Tcp => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let limits = ResponderLimits::default();
                Responder::Tcp(
                    TcpResponder::start(listener, pool.clone(), access.clone(), limits).unwrap(),
                )
            }
            Transport::Shm => {
                let address = ShmAddress::Abstract(unique_name());
                let limits = ShmLimits::default();
                Responder::Shm(
                    ShmResponder::start(&address, pool.clone(), access.clone(), limits).unwrap(),
                )
            }
            #[cfg(feature = "verbs")]
            Transport::Rdma { windows } => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let limits = VerbsLimits {
                    windows,
                    ..VerbsLimits::default()
                };
                let choice = DeviceChoice::default();
                let (pool, access) = (pool.clone(), access.clone());
                Responder::Rdma(
                    VerbsResponder::start(listener, &choice, pool, access, limits).unwrap(),
                )
            }
        };
        Self {
            pool,
            access,
            responder,
        }
    }

    pub fn connect(&self) -> Box<dyn Endpoint> {
        self.connect_with(WINDOW)
    }

    pub fn connect_with(&self, window: usize) -> Box<dyn Endpoint> {
        match &self.responder {
            Responder::Tcp(responder) => {
                Box::new(TcpEndpoint::connect(responder.local_addr(), window, deadline()).unwrap())
            }
            Responder::Shm(responder) => {
                Box::new(ShmEndpoint::connect(responder.address(), window, deadline()).unwrap())
            }
            #[cfg(feature = "verbs")]
            Responder::Rdma(responder) => {
                let (at, choice) = (responder.local_addr(), DeviceChoice::default());
                Box::new(VerbsEndpoint::connect(at, &choice, window, deadline()).unwrap())
            }
        }
    }
}

/// An endpoint with a local region, used one request at a time.
pub struct Client {
    pub endpoint: Box<dyn Endpoint>,
    pub local: Arc<RegisteredMemory>,
    pub region: RegionId,
    next: u64,
}

impl Client {
    pub fn new(mut endpoint: Box<dyn Endpoint>) -> Self {
        let local = memory(LOCAL_BYTES);
        let region = endpoint.register(local.clone());
        Self {
            endpoint,
            local,
            region,
            next: 0,
        }
    }

    pub fn slice(&self, offset: u64, len: u32) -> LocalSlice {
        LocalSlice {
            region: self.region,
            offset,
            len,
        }
    }

    pub fn id(&mut self) -> WorkId {
        self.next += 1;
        WorkId(self.next)
    }

    /// Waits until `count` completions are there.
    pub fn complete(&mut self, count: usize) -> Vec<Completion> {
        let mut out = Vec::new();
        let deadline = deadline();
        while out.len() < count {
            assert!(
                Instant::now() < deadline,
                "only {} of {count} completions came",
                out.len()
            );
            if self.endpoint.poll(&mut out) == 0 {
                sleep_on(&mut *self.endpoint);
            }
        }
        assert_eq!(out.len(), count);
        out
    }

    pub fn read(
        &mut self,
        extent: u32,
        key: u64,
        offset: u64,
        len: u32,
    ) -> Result<Vec<u8>, WorkError> {
        let id = self.id();
        let (local, remote) = (
            self.slice(0, len),
            RemoteSlice {
                extent,
                key,
                offset,
            },
        );
        self.endpoint
            .post_read(id, local, remote)
            .map_err(|_| WorkError::Disconnected)?;
        self.endpoint.flush();
        let completion = self.complete(1)[0];
        assert_eq!(completion.id, id);
        completion.result?;
        let mut bytes = vec![0; len as usize];
        self.local.read(0, &mut bytes).unwrap();
        Ok(bytes)
    }

    pub fn write(
        &mut self,
        extent: u32,
        key: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), WorkError> {
        let id = self.id();
        self.local.write(0, bytes).unwrap();
        let (local, remote) = (
            self.slice(0, bytes.len() as u32),
            RemoteSlice {
                extent,
                key,
                offset,
            },
        );
        self.endpoint
            .post_write(id, local, remote)
            .map_err(|_| WorkError::Disconnected)?;
        self.endpoint.flush();
        let completion = self.complete(1)[0];
        assert_eq!(completion.id, id);
        completion.result
    }
}

/// Sleeps on the wait descriptor, where there is one. Wakes up after a while in any case, to see the deadline.
pub fn sleep_on(endpoint: &mut dyn Endpoint) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    if !endpoint.arm() {
        return;
    }
    if let Some(fd) = endpoint.wait_fd() {
        let timeout = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        let ready = poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
            Some(&timeout),
        )
        .unwrap();
        assert_eq!(ready, 1, "the wait descriptor kept silent");
    } else {
        std::thread::yield_now();
    }
}

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}
