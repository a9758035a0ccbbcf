//! `farpage run`: one program, with part of its memory elsewhere, as if it had been started without us.
//!
//! The order is: judge the arguments, find and judge the program, open what the summary goes to, bring up far memory,
//! start the program, follow it to its end, take everything down, tell, and end the way the program did. Whatever can
//! be refused is refused before anything is brought up.

mod elf;
mod helper;
mod launch;
mod options;
mod preload;
mod program;
mod session;
mod signals;
mod summary;

use std::io::Write;
use std::process::ExitCode;

use crate::args::RunArgs;
use crate::{complain, sys, tell};

use options::RunOptions;
use session::Session;
use signals::Ended;
use summary::SummarySink;

pub(crate) use helper::{Helper, HelperError, READY};
pub(crate) use preload::find as find_preload;

/// The status for bad arguments.
const BAD_ARGUMENTS: u8 = 2;

/// Runs the command. Returns only where this process lives on to exit with a status.
pub(crate) fn command(args: &RunArgs) -> ExitCode {
    let options = match RunOptions::new(args) {
        Ok(options) => options,
        Err(error) => {
            let _ = writeln!(
                std::io::stderr(),
                "error: {error}\n\nFor more information, try '--help'."
            );
            return ExitCode::from(BAD_ARGUMENTS);
        }
    };
    let path = match program::find(&options.program, std::env::var_os("PATH").as_deref()) {
        Ok(path) => path,
        Err(error) => {
            complain(&error);
            return ExitCode::from(error.exit_status());
        }
    };
    if let Err(error) = program::check(&path) {
        complain(&error);
        return ExitCode::from(error.exit_status());
    }
    let mut sink = match SummarySink::open(args.summary, args.summary_file.as_deref()) {
        Ok(sink) => sink,
        Err(error) => {
            complain(&error);
            return ExitCode::FAILURE;
        }
    };
    // From here on a signal must neither kill us before everything is down again, nor be lost to the program.
    sys::take_signals();
    let session = match Session::open(&options) {
        Ok(session) => session,
        Err(error) => {
            complain(&error);
            return ExitCode::FAILURE;
        }
    };
    if let Some(notice) = session.notice(options.local) {
        tell(&notice);
    }
    if let Some(signal) = signals::fatal_before_start() {
        drop(session);
        return Ended::Killed(signal).pass_on();
    }
    let pid = match launch::launch(&path, &options, session.environment()) {
        Ok(pid) => pid,
        Err(error) => {
            drop(session);
            complain(&error);
            return ExitCode::from(error.exit_status());
        }
    };
    session.started(pid);
    let ended = match signals::follow(pid) {
        Ok(ended) => ended,
        Err(error) => {
            drop(session);
            complain(&error);
            return ExitCode::FAILURE;
        }
    };
    match session.finish(ended) {
        Ok(summary) => {
            if let Some(why) = &summary.loss {
                tell(why);
            }
            sink.write(&summary);
        }
        Err(error) => {
            complain(&error);
            if error.ended_the_program() {
                return ExitCode::FAILURE;
            }
        }
    }
    ended.pass_on()
}
