//! What `run` was asked for, judged and with its defaults filled in.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::args::{Fabric, RunArgs, SummaryForm};
use crate::size::Size;

/// Less than this cannot hold a program's stacks and the pages it is working on at the moment.
const MIN_LOCAL_BYTES: u64 = 1 << 20;

/// The default of `--far`, in multiples of `--local`, on a machine too small for that to be its whole memory.
const DEFAULT_FAR_PER_LOCAL: u64 = 4;

/// What to run, and within which bounds.
#[derive(Clone, Debug)]
pub(crate) struct RunOptions {
    pub(crate) local: Size,
    pub(crate) far: Size,
    /// The agent to use; none for one of our own.
    pub(crate) agent: Option<PathBuf>,
    pub(crate) fabric: Fabric,
    pub(crate) replicas: u8,
    pub(crate) fault_deadline: Option<Duration>,
    pub(crate) program: OsString,
    pub(crate) arguments: Vec<OsString>,
}

/// Why the arguments make no sense together.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OptionsError {
    #[error("no program given; write it behind --, as in: farpage run --local 64M -- sort big.txt")]
    NoProgram,
    #[error("--local {0} is too small to run anything; give at least 1M")]
    LocalTooSmall(Size),
    #[error(
        "--local {local} is more than --far {far}; leave out --far, or give it at least what --local has"
    )]
    LocalAboveFar { local: Size, far: Size },
    #[error(
        "--far {far} is more than this machine's {here} of memory, which is where it would lie; give less, \
         or use the agent of a cluster (--agent SOCKET)"
    )]
    FarAboveMachine { far: Size, here: Size },
    #[error(
        "--replicas {0} needs as many memory nodes, and without --agent there is one; leave it out, or use the \
         agent of a cluster (--agent SOCKET)"
    )]
    TooManyReplicas(u8),
    #[error("--summary-file has nothing to hold with --summary none; leave out one of them")]
    FileForNothing,
}

impl RunOptions {
    /// Judges the arguments on this machine.
    pub(crate) fn new(args: &RunArgs) -> Result<Self, OptionsError> {
        Self::judge(args, &MachineMemory::read())
    }

    fn judge(args: &RunArgs, machine: &MachineMemory) -> Result<Self, OptionsError> {
        let (program, arguments) = args.program.split_first().ok_or(OptionsError::NoProgram)?;
        let local = args
            .local
            .unwrap_or_else(|| Size::clamped((machine.available / 2).max(MIN_LOCAL_BYTES)));
        if local.bytes() < MIN_LOCAL_BYTES {
            return Err(OptionsError::LocalTooSmall(local));
        }
        let far = args.far.unwrap_or_else(|| {
            let multiple = local.bytes().saturating_mul(DEFAULT_FAR_PER_LOCAL);
            Size::clamped(machine.total.max(multiple))
        });
        if local > far {
            return Err(OptionsError::LocalAboveFar { local, far });
        }
        if args.agent.is_none() {
            let here = Size::clamped(machine.total.saturating_add(machine.swap));
            // Only what was asked for: the default is a bound that no program on this machine reaches.
            if args.far.is_some_and(|far| far > here) && machine.total > 0 {
                return Err(OptionsError::FarAboveMachine { far, here });
            }
            if args.replicas > 1 {
                return Err(OptionsError::TooManyReplicas(args.replicas));
            }
        }
        if args.summary == SummaryForm::None && args.summary_file.is_some() {
            return Err(OptionsError::FileForNothing);
        }
        Ok(Self {
            local,
            far,
            agent: args.agent.clone(),
            fabric: args.fabric,
            replicas: args.replicas,
            fault_deadline: args.fault_deadline.map(Duration::from_secs),
            program: program.clone(),
            arguments: arguments.to_vec(),
        })
    }
}

/// This machine's memory in bytes, zero where unknown.
struct MachineMemory {
    total: u64,
    available: u64,
    swap: u64,
}

impl MachineMemory {
    fn read() -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let field = |name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|rest| {
                rest.trim()
                    .trim_end_matches("kB")
                    .trim_end()
                    .parse::<u64>()
                    .ok()
            });
            kib.unwrap_or(0).saturating_mul(1024)
        };
        Self {
            total: field("MemTotal"),
            available: field("MemAvailable"),
            swap: field("SwapTotal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn judge(flags: &str) -> Result<RunOptions, OptionsError> {
        let words = format!("farpage run {flags} -- true");
        let Command::Run(args) = Cli::parse_from(words.split_whitespace()).command else {
            panic!()
        };
        RunOptions::judge(
            &args,
            &MachineMemory {
                total: 8 << 30,
                available: 4 << 30,
                swap: 0,
            },
        )
    }

    #[test]
    fn defaults() {
        let options = judge("").unwrap();
        assert_eq!(
            (options.local.bytes(), options.far.bytes()),
            (2 << 30, 8 << 30)
        );
        assert_eq!(judge("--local 4G").unwrap().far.bytes(), 16 << 30);
    }

    #[test]
    fn refusals() {
        let size = |text: &str| text.parse::<Size>().unwrap();
        assert_eq!(
            judge("--local 8K").unwrap_err(),
            OptionsError::LocalTooSmall(size("8K"))
        );
        assert_eq!(
            judge("--local 2G --far 1G").unwrap_err(),
            OptionsError::LocalAboveFar {
                local: size("2G"),
                far: size("1G")
            }
        );
        assert_eq!(
            judge("--far 9G").unwrap_err(),
            OptionsError::FarAboveMachine {
                far: size("9G"),
                here: size("8G")
            }
        );
        assert!(judge("--far 9G --agent /run/a").is_ok());
        assert_eq!(
            judge("--replicas 2").unwrap_err(),
            OptionsError::TooManyReplicas(2)
        );
        assert_eq!(
            judge("--summary none --summary-file x").unwrap_err(),
            OptionsError::FileForNothing
        );
    }
}
