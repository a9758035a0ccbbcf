//! The `farpage` command: one binary for the launcher, the daemons and the diagnosis.
//!
//! Exit status: 2 for bad arguments, 1 for failures. `run` passes on the program's own.

mod agent;
mod args;
mod bench;
mod coordinator;
mod daemon;
mod doctor;
mod drain;
mod far_memory;
mod metrics;
mod node;
mod run;
mod size;
mod status;
mod sys;

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};

fn main() -> ExitCode {
    // `parse` prints help to standard output and complaints to standard error, and exits with 2 on the latter.
    match Cli::parse().command {
        Command::Run(args) => run::command(&args),
        Command::Node(args) => ended(node::command(&args)),
        Command::Coordinator(args) => ended(coordinator::command(&args)),
        Command::Agent(args) => ended(agent::command(&args)),
        Command::Status(args) => ended(status::command(&args)),
        Command::Drain(args) => ended(drain::command(&args)),
        Command::Doctor(args) => ended(doctor::command(&args)),
        Command::Bench(args) => ended(bench::command(&args)),
        Command::BenchTouch(args) => ended(farpage_bench::child::command(&args.words)),
        Command::FarMemory(args) => ended(far_memory::command(&args)),
    }
}

/// Turns how a command ended into an exit status, with its reason on standard error.
fn ended<E: Error>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// Writes an error, whose message names its cause, on one line. A closed standard error is no reason to fail
/// differently.
fn complain(error: &dyn Error) {
    tell(&error.to_string());
}

/// Writes something that the user should know on one line of standard error.
fn tell(what: &str) {
    let _ = std::io::stderr().write_all(format!("farpage: {what}\n").as_bytes());
}
