//! `bench fabric`: what reading and writing pages of a memory node costs, without any pager.
//!
//! Latency is of one read at a time; bandwidth, and messages per second, of a stream that keeps a number of requests under
//! way ([`Traffic::depth`]). Ours polls as perftest does, and goes through its whole way: keys, windows, lanes. What is
//! compared moves the same bytes over the same device, queue pairs and depth, one right after the other.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
use crate::traffic::{Traffic, What};
use crate::{BenchError, Options, bare};

/// What the serving side lends: an extent without anything in it, under a key that everybody may know.
pub(crate) const EXTENT_BYTES: u64 = 2 << 20;
pub(crate) const KEY: u64 = 0x0066_6172_7061_6765;

/// A run of what ours is compared with that takes longer than this, and than ten times ours, hangs.
const WITHIN: Duration = Duration::from_secs(60);

/// Who serves the fabric, until it is dropped.
#[derive(Debug)]
enum Responder {
    Shm(#[expect(dead_code, reason = "serves until dropped")] ShmResponder),
    Tcp(TcpResponder),
    #[cfg(feature = "verbs")]
    Rdma(VerbsResponder),
}

#[derive(Debug)]
pub(crate) struct Served {
    responder: Responder,
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
        Ok(Self { responder, shm })
    }

    /// Within this machine.
    fn here(options: &Options) -> Result<Self, BenchError> {
        Self::start(options, ([127, 0, 0, 1], 0).into())
    }

    /// Where a requester finds it.
    fn address(&self, options: &Options) -> String {
        match self.listens_at() {
            Some(at) => address(options, at),
            None => format!("shm:{}", self.shm),
        }
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

/// Who serves a run.
#[derive(Debug)]
pub(crate) struct Server {
    /// Held until all is measured, where it is this process.
    #[cfg_attr(
        not(feature = "verbs"),
        expect(dead_code, reason = "only verbs' measurements ask what is served")
    )]
    here: Option<Served>,
    /// Where it listens, if that is a port.
    at: Option<SocketAddr>,
    /// Where a requester finds it.
    pub(crate) address: String,
}

impl Server {
    /// The other machine that was named, or this process.
    pub(crate) fn of(options: &Options) -> Result<Self, BenchError> {
        match &options.peer {
            Some(_) if options.fabric == "shm" => Err(one_machine("--peer")),
            Some(peer) => {
                let at = resolve(peer)?;
                Ok(Self {
                    here: None,
                    at: Some(at),
                    address: address(options, at),
                })
            }
            None => {
                let served = Served::here(options)?;
                Ok(Self {
                    at: served.listens_at(),
                    address: served.address(options),
                    here: Some(served),
                })
            }
        }
    }
}

/// Where another machine serves `ib_read_lat` of pages, if one was named.
#[cfg(feature = "verbs")]
pub(crate) fn page_latency_at(options: &Options) -> Result<Option<SocketAddr>, BenchError> {
    let Some(peer) = &options.peer else {
        return Ok(None);
    };
    Ok(Beside::new(options, resolve(peer)?).perftest(Traffic::PAGE_LATENCY))
}

/// The serving sides of what ours is compared with, until they are dropped.
#[cfg(feature = "verbs")]
#[derive(Debug)]
struct Others {
    _perftest: Servers,
    _async_rdma: Option<async_rdma::Server>,
}

#[cfg(feature = "verbs")]
impl Others {
    /// Next to ours; none where it does not serve by RDMA.
    fn start(options: &Options, ours: &Served) -> Result<Option<Self>, BenchError> {
        let Responder::Rdma(responder) = &ours.responder else {
            return Ok(None);
        };
        let at = responder.local_addr();
        let device = perftest::device(&options.device, at)?;
        let beside = Beside::new(options, at);
        let program = options.async_rdma.as_deref();
        let async_rdma =
            program.map(|program| async_rdma::Server::start(program, &device, beside.async_rdma()));
        Ok(Some(Self {
            _perftest: Servers::start(&device, &beside.perftests())?,
            _async_rdma: async_rdma.transpose()?,
        }))
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
    #[cfg(feature = "verbs")]
    let _others = Others::start(options, &served)?;
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

/// Where a requester finds who listens there.
fn address(options: &Options, at: SocketAddr) -> String {
    match options.fabric.as_str() {
        "rdma" if !options.device.is_empty() => format!("rdma:{at}?{}", options.device),
        fabric => format!("{fabric}:{at}"),
    }
}

/// Where what ours is compared with listens: at the ports next to ours, one for each kind of traffic and the last for
/// async-rdma. So both machines have to be told of the same traffic.
#[cfg(feature = "verbs")]
#[derive(Clone, Debug)]
struct Beside {
    ours: SocketAddr,
    all: Vec<Traffic>,
}

#[cfg(feature = "verbs")]
impl Beside {
    fn new(options: &Options, ours: SocketAddr) -> Self {
        Self {
            ours,
            all: Traffic::all(options),
        }
    }

    fn nth(&self, n: usize) -> SocketAddr {
        let port = self.ours.port().wrapping_add(1 + n as u16);
        SocketAddr::new(self.ours.ip(), port)
    }

    fn perftest(&self, traffic: Traffic) -> Option<SocketAddr> {
        let n = self.all.iter().position(|its| *its == traffic)?;
        Some(self.nth(n))
    }

    fn perftests(&self) -> Vec<(Traffic, u16)> {
        let all = self.all.iter().enumerate();
        all.map(|(n, traffic)| (*traffic, self.nth(n).port()))
            .collect()
    }

    fn async_rdma(&self) -> SocketAddr {
        self.nth(self.all.len())
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
    Perftest(DeviceChoice, Beside),
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
                let beside = Beside::new(options, peer);
                let program = options.async_rdma.clone();
                let other = program.map(|program| {
                    Self::AsyncRdma(AsyncRdma {
                        program,
                        device: device.clone(),
                        at: beside.async_rdma(),
                    })
                });
                std::iter::once(Self::Perftest(device, beside))
                    .chain(other)
                    .collect()
            }
            ("tcp", _) if options.peer.is_none() => vec![Self::RoundTrip],
            _ => Vec::new(),
        })
    }

    /// What it is called in the report, and what is put behind the measurement's name.
    fn names(&self, traffic: Traffic) -> (&'static str, &'static str) {
        match (self, traffic.what) {
            (Self::RoundTrip, _) => ("bare 4 KiB round trip over TCP", ""),
            #[cfg(feature = "verbs")]
            (Self::Perftest(..), what) => (what.perftest(), ""),
            #[cfg(feature = "verbs")]
            (Self::AsyncRdma(_), _) => ("the crate async-rdma", ".async_rdma"),
        }
    }

    /// What it finds; nothing where it cannot do that.
    #[cfg_attr(
        not(feature = "verbs"),
        expect(unused_variables, reason = "a round trip ends by itself")
    )]
    fn take(
        &self,
        options: &Options,
        traffic: Traffic,
        count: usize,
        within: Duration,
    ) -> Result<Option<f64>, BenchError> {
        match self {
            Self::RoundTrip if traffic == Traffic::PAGE_LATENCY => {
                bare::tcp_round_trip(options, count).map(|(p50, _)| Some(p50))
            }
            Self::RoundTrip => Ok(None),
            #[cfg(feature = "verbs")]
            Self::Perftest(device, beside) => beside
                .perftest(traffic)
                .map(|at| traffic.by_perftest(device, at, count, within))
                .transpose(),
            #[cfg(feature = "verbs")]
            Self::AsyncRdma(other) if traffic.is_usual() => {
                other.measure(traffic, count, within).map(Some)
            }
            #[cfg(feature = "verbs")]
            Self::AsyncRdma(_) => Ok(None),
        }
    }

    fn note(&self) -> String {
        match self {
            Self::RoundTrip => {
                "streams over TCP have no baseline: there is no tool that reads pages by it".into()
            }
            #[cfg(feature = "verbs")]
            Self::Perftest(device, _) => format!(
                "perftest and ours on {device}, as many requests each; perftest uses one buffer, ours all of an extent"
            ),
            #[cfg(feature = "verbs")]
            Self::AsyncRdma(_) => {
                "async-rdma has a task for each request under way; pages over one queue pair only"
                    .into()
            }
        }
    }
}

/// The runs of one kind.
struct Runs {
    traffic: Traffic,
    /// Requests of each.
    count: usize,
    ours: Vec<f64>,
    /// Of each baseline.
    theirs: Vec<Vec<f64>>,
    /// Why one of them has none.
    missing: Vec<String>,
}

impl Runs {
    /// One of ours and one of each baseline.
    fn turn(
        &mut self,
        options: &Options,
        address: &str,
        baselines: &[Baseline],
    ) -> Result<(), BenchError> {
        let (traffic, count) = (self.traffic, self.count);
        let began = Instant::now();
        let words = ["fabric", address, &traffic.word(), &count.to_string()];
        self.ours.push(requested(options, &words)?);
        let within = WITHIN + began.elapsed() * 10;
        for (baseline, theirs) in baselines.iter().zip(&mut self.theirs) {
            if !self.missing.is_empty() {
                continue;
            }
            match baseline.take(options, traffic, count, within) {
                Ok(found) => theirs.extend(found),
                // perftest does not come to its end with several queue pairs on some devices.
                Err(error) if traffic.queues > 1 => {
                    theirs.clear();
                    self.missing
                        .push(format!("{}: {error}", traffic.name("baseline")));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Adds its measurements to a report: against each baseline that could be taken.
    fn report(&self, baselines: &[Baseline], fabric: &str, report: &mut Report) {
        let traffic = self.traffic;
        let unit = traffic.what.unit();
        let per_second =
            |bytes: &[f64]| -> Vec<f64> { bytes.iter().map(|b| b / traffic.size as f64).collect() };
        let mut add = |theirs: &[f64], theirs_name: &str, suffix: &str| {
            let mut one = |of: &str, unit, ours: &[f64], theirs: &[f64]| {
                let name = traffic.name(of) + suffix;
                let one = Measurement::new(name, unit, ours, theirs, theirs_name, fabric);
                report.measurements.push(one);
            };
            if traffic.what == What::ReadLatency {
                return one("latency.p50", unit, &self.ours, theirs);
            }
            one("bandwidth", unit, &self.ours, theirs);
            let (ours, theirs) = (per_second(&self.ours), per_second(theirs));
            one("messages", "1/s", &ours, &theirs);
        };
        let compared = baselines.iter().zip(&self.theirs);
        let compared: Vec<_> = compared.filter(|(_, theirs)| !theirs.is_empty()).collect();
        for (baseline, theirs) in &compared {
            let (name, suffix) = baseline.names(traffic);
            add(theirs, name, suffix);
        }
        if compared.is_empty() {
            add(&[], "none", "");
        }
    }
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
    let server = Server::of(options)?;
    #[cfg(feature = "verbs")]
    let _others = server
        .here
        .as_ref()
        .map(|served| Others::start(options, served))
        .transpose()?;
    let baselines = Baseline::all(options, server.at)?;
    let mut all = Vec::new();
    for traffic in Traffic::all(options) {
        let seconds = options.seconds.to_string();
        let words = ["fabric-count", &server.address, &traffic.word(), &seconds];
        all.push(Runs {
            traffic,
            count: requested(options, &words)?,
            ours: Vec::new(),
            theirs: vec![Vec::new(); baselines.len()],
            missing: Vec::new(),
        });
    }
    for _ in 0..options.turns.max(1) {
        for runs in &mut all {
            runs.turn(options, &server.address, &baselines)?;
        }
    }
    let mut report = Report {
        bench: "fabric",
        ..Report::default()
    };
    for runs in &all {
        runs.report(&baselines, fabric, &mut report);
    }
    report.notes.push(format!(
        "latency of one read at a time, bandwidth with {} under way; a queue pair is a connection of ours; {}",
        all.iter()
            .filter(|runs| runs.traffic.what == What::ReadBandwidth)
            .map(|runs| {
                let Traffic { size, queues, .. } = runs.traffic;
                format!("{queues} x {} of {size} B", runs.traffic.depth())
            })
            .collect::<Vec<_>>()
            .join(", "),
        if options.peer.is_some() {
            "memory of another machine"
        } else {
            "memory of this machine; --peer measures another's"
        },
    ));
    report.notes.extend(baselines.iter().map(Baseline::note));
    report
        .notes
        .extend(all.into_iter().flat_map(|runs| runs.missing));
    if baselines.is_empty() {
        let none = "there is no tool to compare this transport with";
        report.notes.push(none.to_owned());
    }
    Ok(report)
}
