//! `farpage bench`: the benchmarks.

use std::io::{self, Write};

use crate::args::BenchArgs;

/// A benchmark: its name, what it measures in one line, and what runs it.
pub(crate) struct Benchmark {
    pub(crate) name: &'static str,
    pub(crate) measures: &'static str,
    pub(crate) run: fn(&BenchArgs) -> Result<(), BenchError>,
}

/// STUB: the benchmarks of `farpage-bench` go here.
const BENCHMARKS: &[Benchmark] = &[];

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error("there is no benchmark called {0}; farpage bench --list shows what there is")]
    Unknown(String),
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
    (found.ok_or_else(|| BenchError::Unknown(name.clone()))?.run)(args)
}
