//! Everything a developer or CI runs: `cargo xtask --help`.
// The terminal is this program's only interface.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod demo;
mod lab;
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
    /// Run a command on virtual machines with real RDMA (SoftRoCE); without one, the fabric's tests for it on each kernel
    #[command(
        after_help = "Examples:\n  cargo xtask lab --kernel 6.1 -- ibv_devinfo\n  \
                            FARPAGE_OUTAGES=60 cargo xtask lab --kernel 6.12 --part programs\n  \
                            cargo xtask lab --kernel 6.1 --part conformance --fabric rdma --case forks."
    )]
    Lab {
        /// Two: the command runs on the first, with a memory node on the second (coordinator: http://10.77.0.2:7400)
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
        machines: u8,
        /// Debian kernel to boot [default: 6.12; for the tests, both]
        #[arg(long, value_name = "VERSION")]
        kernel: Option<String>,
        /// Only this part of the tests
        #[arg(long, value_enum, conflicts_with = "command")]
        part: Option<lab::Part>,
        /// How pages travel, for --part conformance
        #[arg(long, value_enum, default_value_t, requires = "part")]
        fabric: lab::Fabric,
        /// Only cases with this in their name, for --part conformance; may be given again
        #[arg(long = "case", value_name = "NAME", requires = "part")]
        cases: Vec<String>,
        /// End a machine after this time [default: 900; for --part conformance, 8 hours]
        #[arg(long, value_name = "SECONDS", conflicts_with = "command")]
        timeout: Option<u32>,
        /// What to run
        #[arg(last = true)]
        command: Vec<OsString>,
    },
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
        Task::Lab {
            kernel,
            part,
            fabric,
            cases,
            timeout,
            command,
            ..
        } if command.is_empty() => {
            let choice = lab::Choice {
                kernel,
                part,
                fabric,
                cases,
                timeout,
            };
            let mut tally = Tally::default();
            lab::test(&mut tally, &choice);
            tally.close()
        }
        Task::Lab {
            machines,
            kernel,
            command,
            ..
        } => {
            let kernel = kernel.as_deref().unwrap_or(lab::KERNELS[0]);
            match lab::run(machines, kernel, &command) {
                Ok(status) => return ExitCode::from(status),
                Err(error) => Err(error.to_string()),
            }
        }
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
    step::build_programs()?;
    Step::new(step::release_folder().join("farpage"))
        .arg("bench")
        .args(arguments)
        .run()
}
