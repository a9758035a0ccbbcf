//! Benchmarks of farpage against its baselines.
//!
//! Every measurement has a baseline that was taken in turn with it, within the same run and under the same
//! regime, several times; both are reported as the median over the turns. [`fault`] compares page faults with a
//! bare userfaultfd loop, [`fits`] compares whole programs that fit in local memory with native runs, [`fabric`] compares
//! reads and writes of pages with what perftest gets out of the same device. [`conformance`] measures nothing: it says
//! which of its cases pass.
//!
//! What is measured runs in processes of its own: this very binary under a hidden subcommand, whose side is
//! [`child`].

#[cfg(feature = "verbs")]
mod async_rdma;
mod awake;
mod bare;
pub mod child;
pub mod conformance;
pub mod fabric;
mod far;
pub mod fault;
pub mod fits;
pub mod fork;
mod median;
mod one_cpu;
#[cfg(feature = "verbs")]
mod perftest;
mod region;
pub mod report;
mod requester;
mod sys;
mod traffic;

use std::io;
use std::path::PathBuf;

pub use report::{Measurement, Report};

/// The hidden subcommand of the `farpage` binary that [`child::command`] implements.
pub const CHILD_COMMAND: &str = "bench-touch";

/// How to run a benchmark.
#[derive(Clone, Debug)]
pub struct Options {
    /// The `farpage` binary.
    pub farpage: PathBuf,
    /// How pages travel: `shm`, `tcp` or `rdma`.
    pub fabric: String,
    /// Where `farpage bench fabric --serve` listens on another machine.
    pub peer: Option<String>,
    /// The agent of a cluster whose memory node is on that machine, to be measured rather than one for each run.
    pub agent: Option<PathBuf>,
    /// Which RDMA device to use, as `device=NAME&port=N&gid=N`; empty for the best one.
    pub device: String,
    /// The program of `bench/async-rdma`, to compare with it too.
    pub async_rdma: Option<PathBuf>,
    /// Bytes of each request on the fabric.
    pub sizes: Vec<usize>,
    /// Over how many queue pairs requests go.
    pub queues: Vec<usize>,
    /// How many far pages are touched by reading, and as many by writing, in each regime of `bench fault`.
    pub touches: u32,
    /// How many times ours and the baseline take turns.
    pub turns: u32,
    /// How long one native run of a whole program lasts, about, seconds.
    pub seconds: f64,
}

/// A benchmark.
#[derive(Debug)]
pub struct Benchmark {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it measures, in one line.
    pub measures: &'static str,
    /// Runs it.
    pub run: Run,
}

/// What kind of answer a benchmark gives.
#[derive(Clone, Copy, Debug)]
pub enum Run {
    /// Figures.
    Measure(fn(&Options) -> Result<Report, BenchError>),
    /// Verdicts: [`conformance::run`].
    Judge,
}

/// All benchmarks.
pub const BENCHMARKS: &[Benchmark] = &[
    Benchmark {
        name: "fault",
        measures: "page faults on far pages, against a bare userfaultfd loop in another process",
        run: Run::Measure(fault::run),
    },
    Benchmark {
        name: "fabric",
        measures: "reads and writes of pages, over rdma against perftest on the same device",
        run: Run::Measure(fabric::run),
    },
    Benchmark {
        name: "fits",
        measures: "whole programs that fit in local memory, against native runs",
        run: Run::Measure(fits::run),
    },
    Benchmark {
        name: "fork",
        measures: "forks of a process whose memory is far, against one whose memory is resident",
        run: Run::Measure(fork::run),
    },
    Benchmark {
        name: "conformance",
        measures: "memory's semantics: every case passes, fails or is skipped",
        run: Run::Judge,
    },
];

/// Why a benchmark could not be run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A system call failed.
    #[error("{what}: {error}")]
    System {
        /// Doing what.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// A measuring process failed; what it wrote to standard error.
    #[error("{what} failed ({status}): {stderr}")]
    Child {
        /// Which.
        what: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// The fabric, or who is to serve it.
    #[error("{what}: {reason}")]
    Fabric {
        /// Doing what.
        what: String,
        /// Why not.
        reason: String,
    },
    /// A measuring process printed something else.
    #[error("{what} printed no result: {error}; are all parts of one version?")]
    Result {
        /// Which.
        what: String,
        /// Why.
        error: serde_json::Error,
    },
}

impl BenchError {
    fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::System { what, error }
    }

    fn fabric<E: ToString>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |error| Self::Fabric {
            what: what.into(),
            reason: error.to_string(),
        }
    }
}
