//! `farpage doctor`: what this machine offers, what each thing is for, and how to get what is missing.
//!
//! Needs no privileges and changes nothing. Kernel features are probed by asking the kernel, never by its version.

mod fabric;
mod kernel;
mod memory;
mod privileges;
mod report;
mod sys;
mod userfaultfd;

use std::io::{self, Write};

use crate::args::DoctorArgs;

use report::Report;

pub(crate) use userfaultfd::{UserfaultfdError, usable as userfaultfd_is_usable};

/// The report could not be printed.
#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output: {0}")]
pub(crate) struct DoctorError(#[from] io::Error);

/// Looks at everything and prints what it finds. That something is missing is a finding and no failure.
pub(crate) fn command(args: &DoctorArgs) -> Result<(), DoctorError> {
    let mut report = Report::default();
    kernel::check(&mut report);
    userfaultfd::check(&mut report);
    privileges::check(&mut report);
    memory::check(&mut report);
    fabric::check(&mut report);
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &report.to_json()).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(out.flush()?)
}
