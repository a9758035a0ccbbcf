//! `farpage bench`: the benchmarks.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use farpage_bench::conformance::{self, Choice, Outcome, Verdicts};
use farpage_bench::{BENCHMARKS, Options, Run};

use crate::args::{BenchArgs, Fabric};
use crate::daemon;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error("there is no benchmark called {0}; farpage bench --list shows what there is")]
    Unknown(String),
    #[error("--fabric rdma: this build has no rdma transport; use tcp or shm")]
    NoRdma,
    #[error(
        "--serve is for bench fabric, which serves bench fault as well; leave it out of bench {0}"
    )]
    NoServer(String),
    #[error(
        "--peer is for bench fabric and, with --agent, for bench fault; bench {0} runs on one machine"
    )]
    OneMachine(String),
    #[error(
        "--agent is for bench fault --fabric rdma, with --peer: the machine of the agent's memory node"
    )]
    OtherAgent,
    #[error("--sizes and --queues are for bench fabric; leave them out of bench {0}")]
    OneTraffic(String),
    #[error("--async-rdma is for bench fabric --fabric rdma; leave it out, or choose those")]
    NotAsyncRdma,
    #[error("--sizes {0}: measured are powers of two from 4K to 1M")]
    Size(crate::size::Size),
    #[error("cannot find this executable, which the measuring processes run: {0}")]
    Executable(io::Error),
    #[error("{0} cases failed; the lines above say why")]
    Failed(usize),
    #[error("no case has such a name; farpage bench conformance without --case shows all")]
    NoCase,
    #[error("nothing was measured: {0}")]
    Bench(#[from] farpage_bench::BenchError),
    #[error("--json: cannot write {path}: {error}")]
    Json { path: String, error: io::Error },
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

/// Lists the benchmarks or runs one.
pub(crate) fn command(args: &BenchArgs) -> Result<(), BenchError> {
    let Some(name) = &args.name else {
        for benchmark in BENCHMARKS {
            writeln!(io::stdout(), "{:12} {}", benchmark.name, benchmark.measures)?;
        }
        return Ok(());
    };
    let found = BENCHMARKS.iter().find(|benchmark| benchmark.name == name);
    let benchmark = found.ok_or_else(|| BenchError::Unknown(name.clone()))?;
    if args.fabric == Fabric::Rdma && !cfg!(feature = "verbs") {
        return Err(BenchError::NoRdma);
    }
    let of_two = matches!(
        (name.as_str(), &args.agent),
        ("fabric", _) | ("fault", Some(_))
    );
    if args.serve.is_some() && name != "fabric" {
        return Err(BenchError::NoServer(name.clone()));
    }
    if args.peer.is_some() && !of_two {
        return Err(BenchError::OneMachine(name.clone()));
    }
    if args.agent.is_some()
        && (name != "fault" || args.fabric != Fabric::Rdma || args.peer.is_none())
    {
        return Err(BenchError::OtherAgent);
    }
    if benchmark.name != "fabric" && !(args.sizes.is_empty() && args.queues.is_empty()) {
        return Err(BenchError::OneTraffic(name.clone()));
    }
    if args.async_rdma.is_some() && (benchmark.name != "fabric" || args.fabric != Fabric::Rdma) {
        return Err(BenchError::NotAsyncRdma);
    }
    let options = Options {
        farpage: std::env::current_exe().map_err(BenchError::Executable)?,
        fabric: args.fabric.name().to_owned(),
        peer: args.peer.clone(),
        agent: args.agent.clone(),
        device: args.rdma.device.clone(),
        async_rdma: args.async_rdma.clone(),
        sizes: sizes(args)?,
        queues: queues(args),
        touches: args.touches,
        turns: args.turns,
        seconds: f64::from(args.seconds),
    };
    if let Some(listen) = args.serve {
        let stop = Arc::new(AtomicBool::new(false));
        daemon::stop_on_signals(&stop)?;
        let ready = || daemon::say(&format!("serving bench fabric at {listen}\n"));
        return Ok(farpage_bench::fabric::serve(
            &options, listen, &stop, ready,
        )?);
    }
    // Opened before anything is measured: a path that cannot be written is found out at once.
    let mut json = match &args.json {
        Some(path) => Some(std::fs::File::create(path).map_err(|error| json_error(args, error))?),
        None => None,
    };
    let mut write_json = |value: serde_json::Result<String>| match &mut json {
        Some(file) => value
            .map_err(io::Error::from)
            .and_then(|text| writeln!(file, "{text}"))
            .map_err(|error| json_error(args, error)),
        None => Ok(()),
    };
    match benchmark.run {
        Run::Measure(run) => {
            let report = run(&options)?;
            write!(io::stdout(), "{report}")?;
            write_json(serde_json::to_string_pretty(&report))
        }
        Run::Judge => {
            let verdicts = judged(&options, args)?;
            write_json(serde_json::to_string_pretty(&verdicts))?;
            match verdicts.count(Outcome::Fail) {
                0 if verdicts.cases.is_empty() => Err(BenchError::NoCase),
                0 => Ok(()),
                failed => Err(BenchError::Failed(failed)),
            }
        }
    }
}

/// A request is within an extent, and what the transports take at once.
fn sizes(args: &BenchArgs) -> Result<Vec<usize>, BenchError> {
    if args.sizes.is_empty() {
        return Ok(vec![4096]);
    }
    let judged = args.sizes.iter().map(|size| match size.bytes() {
        bytes @ 4096..=0x10_0000 if bytes.is_power_of_two() => Ok(bytes as usize),
        _ => Err(BenchError::Size(*size)),
    });
    judged.collect()
}

fn queues(args: &BenchArgs) -> Vec<usize> {
    match args.queues[..] {
        [] => vec![1],
        ref some => some.iter().map(|count| *count as usize).collect(),
    }
}

fn judged(options: &Options, args: &BenchArgs) -> Result<Verdicts, BenchError> {
    let choice = Choice {
        names: args.cases.clone(),
        long: args.long,
        plain: args.plain,
        small: args.small,
        seed: args.seed,
    };
    let verdicts = conformance::run(options, &choice, &mut |verdict| {
        writeln!(io::stdout(), "{verdict}")
    })?;
    writeln!(io::stdout(), "{verdicts}")?;
    Ok(verdicts)
}

fn json_error(args: &BenchArgs, error: io::Error) -> BenchError {
    BenchError::Json {
        path: args
            .json
            .as_ref()
            .map_or(String::new(), |path| path.display().to_string()),
        error,
    }
}
