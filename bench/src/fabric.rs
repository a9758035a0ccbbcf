//! `bench fabric`: what reading and writing pages of a memory node costs, without any pager.
//!
//! Latency is of one read at a time; bandwidth of a stream that keeps [`DEPTH`] requests under way. Ours polls as perftest
//! does, and goes through its whole way: keys, windows, lanes. What is compared moves the same bytes over the same device at
//! the same depth, one right after the other.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use farpage_fabric::memory::MemoryOptions;
use farpage_fabric::shm::{ShmLimits, ShmResponder};
use farpage_fabric::tcp::{ResponderLimits, TcpResponder};
#[cfg(feature = "verbs")]
use farpage_fabric::verbs::{DeviceChoice, VerbsLimits, VerbsResponder};
use farpage_fabric::{AccessTable, PoolGeometry, RegisteredMemory, ShmAddress};

#[cfg(feature = "verbs")]
use crate::async_rdma::{self, AsyncRdma};
use crate::far::{finish, spawn_child};
#[cfg(feature = "verbs")]
use crate::perftest::{self, Servers};
use crate::report::{Measurement, Report};
use crate::{BenchError, Options, bare};

/// Requests under way at a time in a stream; perftest's own default.
pub(crate) const DEPTH: usize = 128;

/// What the serving side lends: an extent without anything in it, under a key that everybody may know.
pub(crate) const EXTENT_BYTES: u64 = 2 << 20;
pub(crate) const KEY: u64 = 0x0066_6172_7061_6765;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    ReadLatency,
    ReadBandwidth,
    WriteBandwidth,
}

impl What {
    pub(crate) const ALL: [Self; 3] =
        [Self::ReadLatency, Self::ReadBandwidth, Self::WriteBandwidth];

    fn measurement(self) -> &'static str {
        match self {
            Self::ReadLatency => "read4k.latency.p50",
            Self::ReadBandwidth => "read4k.bandwidth",
            Self::WriteBandwidth => "write4k.bandwidth",
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::ReadLatency => "read-latency",
            Self::ReadBandwidth => "read-bandwidth",
            Self::WriteBandwidth => "write-bandwidth",
        }
    }

    /// That of its [`What::word`].
    pub(crate) fn of(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|what| what.word() == word)
    }

    fn unit(self) -> &'static str {
        match self {
            Self::ReadLatency => "us",
            Self::ReadBandwidth | Self::WriteBandwidth => "B/s",
        }
    }
}

/// Who serves the fabric, until it is dropped.
#[derive(Debug)]
enum Responder {
    Shm(#[expect(dead_code, reason = "serves until dropped")] ShmResponder),
    Tcp(TcpResponder),
    #[cfg(feature = "verbs")]
    Rdma(VerbsResponder),
}

#[derive(Debug)]
struct Served {
    responder: Responder,
    #[cfg(feature = "verbs")]
    _perftest: Option<Servers>,
    #[cfg(feature = "verbs")]
    _async_rdma: Option<async_rdma::Server>,
    shm: ShmAddress,
}

impl Served {
    fn start(options: &Options, listen: SocketAddr) -> Result<Self, BenchError> {
        let (fabric, device) = (options.fabric.as_str(), options.device.as_str());
        let what = || format!("serving {fabric}");
        let geometry = PoolGeometry::new(EXTENT_BYTES, 1).map_err(BenchError::fabric(what()))?;
        let pool = memory("pool", EXTENT_BYTES as usize)?;
        let access = AccessTable::new(geometry).map_err(BenchError::fabric(what()))?;
        access.grant(0, KEY).map_err(BenchError::fabric(what()))?;
        let shm = ShmAddress::Abstract(format!("farpage-bench-{}", std::process::id()));
        let bind =
            || TcpListener::bind(listen).map_err(BenchError::fabric(format!("--serve {listen}")));
        let (tcp, at_shm) = (ResponderLimits::default(), ShmLimits::default());
        let responder = match fabric {
            "tcp" => TcpResponder::start(bind()?, pool, access, tcp).map(Responder::Tcp),
            #[cfg(feature = "verbs")]
            "rdma" => {
                let choice = perftest::device(device, listen)?;
                VerbsResponder::start(bind()?, &choice, pool, access, VerbsLimits::default())
                    .map(Responder::Rdma)
            }
            _ => ShmResponder::start(&shm, pool, access, at_shm).map(Responder::Shm),
        };
        let responder = responder.map_err(BenchError::fabric(what()))?;
        #[cfg(not(feature = "verbs"))]
        let _ = device;
        #[cfg(feature = "verbs")]
        let (perftest, async_rdma) = match &responder {
            Responder::Rdma(responder) => {
                let at = responder.local_addr();
                let device = perftest::device(device, at)?;
                let program = options.async_rdma.as_deref();
                let started =
                    program.map(|program| async_rdma::Server::start(program, &device, at));
                (
                    Some(Servers::start(&device, at, &What::ALL)?),
                    started.transpose()?,
                )
            }
            _ => (None, None),
        };
        Ok(Self {
            responder,
            #[cfg(feature = "verbs")]
            _perftest: perftest,
            #[cfg(feature = "verbs")]
            _async_rdma: async_rdma,
            shm,
        })
    }

    fn listens_at(&self) -> Option<SocketAddr> {
        match &self.responder {
            Responder::Shm(_) => None,
            Responder::Tcp(responder) => Some(responder.local_addr()),
            #[cfg(feature = "verbs")]
            Responder::Rdma(responder) => Some(responder.local_addr()),
        }
    }
}

pub(crate) fn memory(name: &str, len: usize) -> Result<Arc<RegisteredMemory>, BenchError> {
    RegisteredMemory::create(name, len, MemoryOptions::default())
        .map(|(memory, _)| Arc::new(memory))
        .map_err(BenchError::fabric("mapping memory"))
}

/// Is the other machine of a [`run`] until `stop` is set; says when it is `ready`.
///
/// # Errors
/// [`BenchError`] where nothing can be served.
pub fn serve(
    options: &Options,
    listen: SocketAddr,
    stop: &AtomicBool,
    ready: impl FnOnce(),
) -> Result<(), BenchError> {
    if options.fabric == "shm" {
        return Err(one_machine("--serve"));
    }
    let served = Served::start(options, listen)?;
    ready();
    while !stop.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(served);
    Ok(())
}

fn one_machine(flag: &str) -> BenchError {
    BenchError::Fabric {
        what: flag.into(),
        reason: "shared memory is shared within one machine; use --fabric tcp or rdma".into(),
    }
}

/// The first address of HOST:PORT.
fn resolve(text: &str) -> Result<SocketAddr, BenchError> {
    let what = || format!("--peer {text}");
    let mut found = text.to_socket_addrs().map_err(BenchError::fabric(what()))?;
    found.next().ok_or_else(|| BenchError::Fabric {
        what: what(),
        reason: "the name has no address".into(),
    })
}

/// What ours is compared with.
enum Baseline {
    /// Of TCP on this machine: latency only.
    RoundTrip,
    #[cfg(feature = "verbs")]
    Perftest(DeviceChoice, SocketAddr),
    #[cfg(feature = "verbs")]
    AsyncRdma(AsyncRdma),
}

impl Baseline {
    /// All that there are.
    fn all(options: &Options, peer: Option<SocketAddr>) -> Result<Vec<Self>, BenchError> {
        Ok(match (options.fabric.as_str(), peer) {
            #[cfg(feature = "verbs")]
            ("rdma", Some(peer)) => {
                let device = perftest::device(&options.device, peer)?;
                let program = options.async_rdma.clone();
                let other = program.map(|program| {
                    Self::AsyncRdma(AsyncRdma {
                        program,
                        device: device.clone(),
                        peer,
                    })
                });
                std::iter::once(Self::Perftest(device, peer))
                    .chain(other)
                    .collect()
            }
            ("tcp", _) if options.peer.is_none() => vec![Self::RoundTrip],
            _ => Vec::new(),
        })
    }

    /// What it is called in the report, and what is put behind the measurement's name.
    fn names(&self, what: What) -> (&'static str, &'static str) {
        match (self, what) {
            (Self::RoundTrip, _) => ("bare 4 KiB round trip over TCP", ""),
            #[cfg(feature = "verbs")]
            (Self::Perftest(..), what) => (what.perftest(), ""),
            #[cfg(feature = "verbs")]
            (Self::AsyncRdma(_), _) => ("the crate async-rdma", ".async_rdma"),
        }
    }

    fn take(&self, options: &Options, what: What, count: usize) -> Result<Option<f64>, BenchError> {
        match (self, what) {
            (Self::RoundTrip, What::ReadLatency) => {
                bare::tcp_round_trip(options, count).map(|(p50, _)| Some(p50))
            }
            (Self::RoundTrip, _) => Ok(None),
            #[cfg(feature = "verbs")]
            (Self::Perftest(device, peer), what) => {
                what.perftest_run(device, *peer, count, DEPTH).map(Some)
            }
            #[cfg(feature = "verbs")]
            (Self::AsyncRdma(other), what) => other.measure(what, count, DEPTH).map(Some),
        }
    }

    fn note(&self) -> String {
        match self {
            Self::RoundTrip => {
                "streams over TCP have no baseline: there is no tool that reads pages by it".into()
            }
            #[cfg(feature = "verbs")]
            Self::Perftest(device, _) => format!(
                "perftest and ours on {device}, as many requests each; perftest uses one page, ours all of an extent"
            ),
            #[cfg(feature = "verbs")]
            Self::AsyncRdma(_) => "async-rdma has a task for each request under way".into(),
        }
    }
}

/// The runs of one kind.
struct Runs {
    what: What,
    /// Requests of each.
    count: usize,
    ours: Vec<f64>,
    /// Of each baseline.
    theirs: Vec<Vec<f64>>,
}

/// What a requester in a process of its own finds.
fn requested<T: serde::de::DeserializeOwned>(
    options: &Options,
    words: &[&str],
) -> Result<T, BenchError> {
    finish(spawn_child(options, words, &[])?, words)
}

/// Runs it.
///
/// # Errors
/// [`BenchError`] where nothing can be measured.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let fabric = options.fabric.as_str();
    // Held until all is measured.
    let (served, peer) = match &options.peer {
        Some(_) if fabric == "shm" => return Err(one_machine("--peer")),
        Some(peer) => (None, Some(resolve(peer)?)),
        None => {
            let served = Served::start(options, ([127, 0, 0, 1], 0).into())?;
            let at = served.listens_at();
            (Some(served), at)
        }
    };
    let address = match (peer, &served) {
        (None, Some(served)) => format!("shm:{}", served.shm),
        (None, None) => return Err(one_machine("--peer")),
        (Some(at), _) if fabric == "rdma" && !options.device.is_empty() => {
            format!("rdma:{at}?{}", options.device)
        }
        (Some(at), _) => format!("{fabric}:{at}"),
    };
    let baselines = Baseline::all(options, peer)?;
    let mut all = Vec::new();
    for what in What::ALL {
        all.push(Runs {
            what,
            count: requested(
                options,
                &[
                    "fabric-count",
                    &address,
                    what.word(),
                    &options.seconds.to_string(),
                ],
            )?,
            ours: Vec::new(),
            theirs: vec![Vec::new(); baselines.len()],
        });
    }
    for _ in 0..options.turns.max(1) {
        for runs in &mut all {
            let count = runs.count.to_string();
            let words = ["fabric", &address, runs.what.word(), &count];
            runs.ours.push(requested(options, &words)?);
            for (baseline, theirs) in baselines.iter().zip(&mut runs.theirs) {
                theirs.extend(baseline.take(options, runs.what, runs.count)?);
            }
        }
    }
    let mut report = Report {
        bench: "fabric",
        ..Report::default()
    };
    for runs in &all {
        let (unit, measurement) = (runs.what.unit(), runs.what.measurement());
        let mut add = |name: String, theirs: &[f64], theirs_name: &str| {
            let one = Measurement::new(name, unit, &runs.ours, theirs, theirs_name, fabric);
            report.measurements.push(one);
        };
        let compared = baselines.iter().zip(&runs.theirs);
        let compared: Vec<_> = compared.filter(|(_, theirs)| !theirs.is_empty()).collect();
        for (baseline, theirs) in &compared {
            let (name, suffix) = baseline.names(runs.what);
            add(format!("{measurement}{suffix}"), theirs, name);
        }
        if compared.is_empty() {
            add(measurement.to_owned(), &[], "none");
        }
    }
    report.notes.push(format!(
        "4 KiB each; latency of one read at a time, bandwidth with {DEPTH} requests under way; {}",
        if options.peer.is_some() {
            "memory of another machine"
        } else {
            "memory of this machine; --peer measures another's"
        },
    ));
    report.notes.extend(baselines.iter().map(Baseline::note));
    if baselines.is_empty() {
        let none = "there is no tool to compare this transport with";
        report.notes.push(none.to_owned());
    }
    Ok(report)
}
