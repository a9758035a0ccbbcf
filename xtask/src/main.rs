//! Everything a developer or CI runs: `cargo xtask --help`.
// The terminal is this program's only interface.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod demo;
mod lint;
mod sample;
mod setup;
mod step;
mod tally;
mod test;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use step::{Step, StepError};
use tally::Tally;

/// Everything a developer or CI runs.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    arg_required_else_help = true
)]
#[command(after_help = "Example:\n  cargo xtask demo")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run a real program at a quarter of its peak memory, and compare with a native run
    Demo,
    /// Everything CI checks: setup, lint, all tests; closes with `N passed, N failed, N skipped`
    Test,
    /// Formatting, clippy, dependencies
    Lint,
    /// Install the Debian packages that the tests need
    Setup,
    /// Build in release and run `farpage bench` with these arguments
    Bench {
        /// As for `farpage bench`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Demo => demo::run().map_err(|error| error.to_string()),
        Task::Test => test::run().map_err(|error| error.to_string()),
        Task::Lint => {
            let mut tally = Tally::default();
            lint::run(&mut tally);
            tally.close()
        }
        Task::Setup => setup::run().map_err(|error| error.to_string()),
        Task::Bench { arguments } => bench(arguments).map_err(|error| error.to_string()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: Vec<OsString>) -> Result<(), StepError> {
    Step::cargo(&[
        "build",
        "--release",
        "-p",
        "farpage-cli",
        "-p",
        "farpage-preload",
    ])
    .run()?;
    Step::new(step::release_folder().join("farpage"))
        .arg("bench")
        .args(arguments)
        .run()
}
