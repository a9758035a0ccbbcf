//! What `run` was asked for, judged and with its defaults filled in.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use farpage_agent::{ceiling, cgroup};
use farpage_proto::limits::DEFAULT_EXTENT_BYTES;

use crate::args::{Fabric, RunArgs, SummaryForm};
use crate::size::{Size, readable};

/// Less than this cannot hold a program's stacks and the pages it is working on at the moment.
const MIN_LOCAL_BYTES: u64 = farpage_agent::LEAST_LOCAL_BYTES;

/// The default of `--far`, in multiples of `--local`, on a machine too small for that to be its whole memory.
const DEFAULT_FAR_PER_LOCAL: u64 = 4;

/// What an agent and a memory node of our own hold besides pages, as they start.
const OWN_PARTS_BYTES: u64 = 32 << 20;
/// What they hold of each page that lies far, as a share of it.
const METADATA_SHARE: u64 = 128;

/// What to run, and within which bounds.
#[derive(Clone, Debug)]
pub(crate) struct RunOptions {
    pub(crate) local: Size,
    pub(crate) far: Size,
    /// The agent to use; none for one of our own.
    pub(crate) agent: Option<PathBuf>,
    pub(crate) fabric: Fabric,
    /// By which device, over RDMA.
    pub(crate) device: String,
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
    #[error("--local {0} is too small to run anything; give at least 4M")]
    LocalTooSmall(Size),
    #[error("--device is the agent's to choose; give it to farpage agent, or leave out --agent")]
    DeviceOfAgent,
    #[error("--device is for --fabric rdma; add that, or leave it out")]
    DeviceWithoutRdma,
    #[error(
        "--local {local} is more than --far {far}; leave out --far, or give it at least what --local has"
    )]
    LocalAboveFar { local: Size, far: Size },
    #[error(
        "--far {far} is more than this machine's {here} of memory, which is where it would lie{}; give less, \
         or use the agent of a cluster (--agent SOCKET)", times(*.replicas)
    )]
    FarAboveMachine { far: Size, here: Size, replicas: u8 },
    #[error(
        "--local {local} is here, and without --agent far memory is too; but the memory cgroup {} is limited to {}, which \
         leaves {} for both. Give less (--local, --far), give the group more ({}), or use the agent of a cluster \
         (--agent SOCKET)",
        .confines.group, readable(.confines.limit), readable(.confines.room), .confines.file
    )]
    Confined { local: Size, confines: Confines },
    #[error("--summary-file has nothing to hold with --summary none; leave out one of them")]
    FileForNothing,
}

/// How a message says that each page takes so many times its size.
fn times(replicas: u8) -> String {
    match replicas {
        1 => String::new(),
        _ => format!(" {replicas} times (--replicas)"),
    }
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
            .unwrap_or_else(|| Size::clamped((machine.free() / 2).max(MIN_LOCAL_BYTES)));
        if local.bytes() < MIN_LOCAL_BYTES {
            return Err(OptionsError::LocalTooSmall(local));
        }
        let mut far = args.far.unwrap_or_else(|| {
            let multiple = local.bytes().saturating_mul(DEFAULT_FAR_PER_LOCAL);
            Size::clamped(machine.total.max(multiple))
        });
        if local > far {
            return Err(OptionsError::LocalAboveFar { local, far });
        }
        if args.agent.is_none() {
            if let Some(confines) = &machine.confines {
                let most = confines.most_far(local.bytes(), args.replicas.into());
                if most == 0 || args.far.is_some_and(|far| far.bytes() > most) {
                    let confines = confines.clone();
                    return Err(OptionsError::Confined { local, confines });
                }
                far = Size::clamped(far.bytes().min(most));
            }
            let here = Size::clamped(machine.total.saturating_add(machine.swap));
            // Only what was asked for: the default is a bound that no program on this machine reaches.
            let replicas = args.replicas;
            let too_much = |far: Size| far.bytes().saturating_mul(replicas.into()) > here.bytes();
            if args.far.is_some_and(too_much) && machine.total > 0 {
                return Err(OptionsError::FarAboveMachine {
                    far,
                    here,
                    replicas,
                });
            }
        }
        if !args.rdma.device.is_empty() && args.agent.is_some() {
            return Err(OptionsError::DeviceOfAgent);
        }
        if !args.rdma.device.is_empty() && args.fabric != Fabric::Rdma {
            return Err(OptionsError::DeviceWithoutRdma);
        }
        if args.summary == SummaryForm::None && args.summary_file.is_some() {
            return Err(OptionsError::FileForNothing);
        }
        Ok(Self {
            local,
            far,
            agent: args.agent.clone(),
            fabric: args.fabric,
            device: args.rdma.device.clone(),
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
    confines: Option<Confines>,
}

/// A memory cgroup that everything which runs here without `--agent` is in: program, agent and memory node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Confines {
    group: String,
    file: &'static str,
    limit: u64,
    /// What it leaves to memory here and far memory together.
    room: u64,
}

impl Confines {
    /// Of those above this process the one that leaves least.
    fn above_us() -> Option<Self> {
        let membership = cgroup::membership(std::process::id().cast_signed())?;
        let groups = cgroup::limited_above(&membership).into_iter().map(|group| {
            let others = group.held_bytes().saturating_add(OWN_PARTS_BYTES);
            Self {
                room: ceiling::room(group.limit_bytes, others),
                group: group.folder.display().to_string(),
                file: group.file,
                limit: group.limit_bytes,
            }
        });
        groups.min_by_key(|confines| confines.room)
    }

    /// How much may lie far, so many times, beside so much here, in whole extents: a memory node comes to fill all of those it
    /// lends.
    fn most_far(&self, local: u64, replicas: u64) -> u64 {
        let both = self.room.saturating_sub(local) / replicas.max(1);
        (both - both / METADATA_SHARE) / DEFAULT_EXTENT_BYTES * DEFAULT_EXTENT_BYTES
    }
}

impl MachineMemory {
    /// What is available to us.
    fn free(&self) -> u64 {
        let room = self
            .confines
            .as_ref()
            .map_or(u64::MAX, |confines| confines.room);
        self.available.min(room)
    }

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
            confines: Confines::above_us(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn judge(flags: &str) -> Result<RunOptions, OptionsError> {
        judge_within(flags, None)
    }

    fn judge_within(flags: &str, confines: Option<Confines>) -> Result<RunOptions, OptionsError> {
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
                confines,
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
    fn in_a_memory_cgroup_both_must_fit() {
        let confines = |room: u64| {
            Some(Confines {
                group: "/g".to_owned(),
                file: "memory.max",
                limit: 2 * room,
                room,
            })
        };
        let sizes = |flags: &str| {
            let options = judge_within(flags, confines(256 << 20)).unwrap();
            (options.local.bytes() >> 20, options.far.bytes() >> 20)
        };
        assert_eq!(sizes(""), (128, 112));
        assert_eq!(sizes("--local 64M"), (64, 176));
        assert_eq!(sizes("--local 64M --far 100M"), (64, 100));
        // Far memory is elsewhere.
        assert_eq!(sizes("--local 1G --far 8G --agent /run/a"), (1024, 8192));
        for flags in ["--local 64M --far 200M", "--local 250M", "--local 1G"] {
            let error = judge_within(flags, confines(256 << 20)).unwrap_err();
            let text = error.to_string();
            assert!(
                ["/g", "512.0 MiB", "256.0 MiB", "memory.max", "--agent"]
                    .iter()
                    .all(|word| text.contains(word)),
                "{flags}: {text}"
            );
        }
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
                here: size("8G"),
                replicas: 1
            }
        );
        assert!(judge("--far 9G --agent /run/a").is_ok());
        assert_eq!(judge("--far 4G --replicas 2").unwrap().replicas, 2);
        let twice = judge("--far 5G --replicas 2").unwrap_err();
        assert!(twice.to_string().contains("2 times"), "{twice}");
        assert_eq!(
            judge("--summary none --summary-file x").unwrap_err(),
            OptionsError::FileForNothing
        );
    }
}
