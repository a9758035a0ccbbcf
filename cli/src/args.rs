//! The command line. Names here are a contract that scripts rely on.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

use farpage_proto::limits::MAX_REPLICAS;

use crate::size::Size;

/// Runs programs with part of their memory on other machines.
#[derive(Debug, Parser)]
#[command(
    name = "farpage",
    version,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
#[command(after_help = "Example:\n  farpage run --local 64M -- sort big.txt")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run an unmodified program with a bounded part of its memory here and the rest on memory nodes
    Run(RunArgs),
    /// Lend this machine's memory
    Node(NodeArgs),
    /// Serve the control plane: nodes, capacity, leases
    Coordinator(CoordinatorArgs),
    /// Serve the programs of this machine: the per-host pager
    Agent(AgentArgs),
    /// Show nodes, capacity, agents and processes
    Status(StatusArgs),
    /// Have what a memory node holds moved to others, so that it can be stopped
    Drain(DrainArgs),
    /// Show what this machine offers, what each thing is for, and how to get what is missing
    Doctor(DoctorArgs),
    /// Run a benchmark
    Bench(BenchArgs),
    /// The memory node of one `farpage run`
    #[command(hide = true)]
    FarMemory(FarMemoryArgs),
    /// A measuring process of `farpage bench`
    #[command(hide = true)]
    BenchTouch(BenchTouchArgs),
}

/// How pages travel between this machine and a memory node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fabric {
    /// Shared memory, within one machine
    Shm,
    /// TCP
    Tcp,
    /// RDMA verbs: InfiniBand, RoCE or SoftRoCE
    Rdma,
}

impl Fabric {
    /// As the control plane knows it.
    pub(crate) fn kind(self) -> farpage_proto::FabricKind {
        match self {
            Self::Shm => farpage_proto::FabricKind::Shm,
            Self::Tcp => farpage_proto::FabricKind::Tcp,
            Self::Rdma => farpage_proto::FabricKind::Rdma,
        }
    }

    /// The name as it is written on the command line and in the summary.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
        }
    }
}

/// In which form `run` tells what it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SummaryForm {
    /// A few lines for people
    Text,
    /// One JSON object
    Json,
    /// Nothing
    None,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The exit status is the program's own. A program that dies by signal N makes farpage die by signal N too (128+N \
in the JSON summary). 127: program not found; 126: found but not executable; 2: bad arguments; 1: farpage failed.

Examples:
  farpage run --local 64M -- sort big.txt
  farpage run --local 1G --far 8G --summary json --summary-file run.json -- python3 train.py
  farpage run --agent /run/farpage/agent.sock --local 1G -- redis-server")]
pub(crate) struct RunArgs {
    /// How much of the anonymous memory of the program and its children may stay here [default: half of what is
    /// available]
    #[arg(long, value_name = "SIZE")]
    pub(crate) local: Option<Size>,
    /// How much may lie on memory nodes [default: this machine's memory, or four times --local if that is more]
    #[arg(long, value_name = "SIZE")]
    pub(crate) far: Option<Size>,
    /// Use the agent at this socket; without it, run brings up its own and takes it down again
    #[arg(long, value_name = "SOCKET", env = "FARPAGE_AGENT")]
    pub(crate) agent: Option<PathBuf>,
    /// How pages travel
    #[arg(long, value_enum, default_value_t = Fabric::Shm)]
    pub(crate) fabric: Fabric,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
    /// On how many memory nodes each page is kept, up to 4; so many times --far is taken there
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_replicas)]
    pub(crate) replicas: u8,
    /// How long a touch of a page may wait for a memory node that does not answer, before it ends in SIGBUS [default: the
    /// agent's, 60]
    #[arg(long, value_name = "SECONDS", value_parser = fault_deadline())]
    pub(crate) fault_deadline: Option<u64>,
    /// What to tell on standard error when the program has ended
    #[arg(long, value_enum, default_value_t = SummaryForm::Text)]
    pub(crate) summary: SummaryForm,
    /// Write the summary to this file instead
    #[arg(long, value_name = "PATH")]
    pub(crate) summary_file: Option<PathBuf>,
    /// The program and its arguments
    #[arg(value_name = "CMD", required = true, num_args = 1.., trailing_var_arg = true, allow_hyphen_values = false)]
    pub(crate) program: Vec<OsString>,
}

fn parse_replicas(text: &str) -> Result<u8, String> {
    match text.parse() {
        Ok(copies) if (1..=MAX_REPLICAS).contains(&copies) => Ok(copies),
        _ => Err(format!(
            "each copy of a page is sent and kept: give a number from 1 to {MAX_REPLICAS}"
        )),
    }
}

fn fault_deadline() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=farpage_agent::MAX_FAULT_DEADLINE.as_secs())
}

/// By which device a side of RDMA works.
#[derive(Debug, Args)]
pub(crate) struct RdmaArgs {
    /// Which RDMA device, port and address, as device=NAME&port=N&gid=N, or a part of it [default: the best]
    #[arg(
        long,
        value_name = "CHOICE",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) device: String,
}

/// What a daemon tells of itself.
#[derive(Debug, Args)]
pub(crate) struct MetricsArgs {
    /// Serve metrics for Prometheus at http://ADDR:PORT/metrics, to everybody who can connect: give it the loopback's address
    /// or that of a network for management. Port 0 takes any; the start line says which [default: none are served]
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) metrics: Option<std::net::SocketAddr>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  farpage node --capacity 64G --coordinator http://10.0.0.1:7400 --fabric tcp --listen 10.0.0.2:7500 --id rack1-a")]
pub(crate) struct NodeArgs {
    /// How much memory to lend
    #[arg(long, value_name = "SIZE")]
    pub(crate) capacity: Size,
    /// Where the coordinator is
    #[arg(long, value_name = "URL", env = "FARPAGE_COORDINATOR", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) coordinator: String,
    /// How pages travel
    #[arg(long, value_enum)]
    pub(crate) fabric: Fabric,
    /// Where the data path is served
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Option<String>,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
    /// The node's name, unique in the cluster [default: the host name]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) id: Option<String>,
    /// Take the memory from reserved huge pages (vm.nr_hugepages) over shm too; over tcp and rdma it is, where there are enough
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// Lock the whole capacity in memory at the start; else each page once it is used. Where neither is allowed (RLIMIT_MEMLOCK,
    /// CAP_IPC_LOCK) the log says so
    #[arg(long)]
    pub(crate) lock: bool,
    /// A label, shown by `farpage status --json`; may be repeated. Placement does not look at it
    #[arg(long = "label", value_name = "K=V", value_parser = parse_label)]
    pub(crate) labels: Vec<Label>,
    #[command(flatten)]
    pub(crate) metrics: MetricsArgs,
}

/// A node's label, for who looks at the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) key: String,
    pub(crate) value: String,
}

fn parse_label(text: &str) -> Result<Label, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok(Label {
            key: key.to_owned(),
            value: value.to_owned(),
        }),
        _ => Err("a label is KEY=VALUE, such as rack=r1".to_owned()),
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  farpage coordinator --listen 10.0.0.1:7400 --state file:/var/lib/farpage/state.redb")]
pub(crate) struct CoordinatorArgs {
    /// Where gRPC is served
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: std::net::SocketAddr,
    /// Where the state is kept: file:PATH (etcd:URL,... is not there yet)
    #[arg(long, value_name = "STORE", value_parser = parse_state)]
    pub(crate) state: StateStore,
    /// How long an agent that is not heard of keeps what it holds; more than --fault-deadline where agents may be cut off
    /// from both this and the nodes
    #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(5..=86400))]
    pub(crate) lease_time: u64,
    #[command(flatten)]
    pub(crate) metrics: MetricsArgs,
}

/// Where a coordinator keeps its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StateStore {
    /// A file of this machine.
    File(PathBuf),
    /// The URLs of an etcd cluster.
    Etcd(Vec<String>),
}

fn parse_state(text: &str) -> Result<StateStore, String> {
    match text.split_once(':') {
        Some(("file", path)) if !path.is_empty() => Ok(StateStore::File(path.into())),
        Some(("etcd", urls)) if urls.split(',').all(|url| !url.is_empty()) => Ok(StateStore::Etcd(
            urls.split(',').map(str::to_owned).collect(),
        )),
        _ => Err(
            "state is file:PATH, such as file:/var/lib/farpage/state.redb, or etcd:URL,..."
                .to_owned(),
        ),
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  sudo farpage agent --coordinator http://10.0.0.1:7400 --socket /run/farpage/agent.sock --group farpage")]
pub(crate) struct AgentArgs {
    /// Where the coordinator is
    #[arg(long, value_name = "URL", env = "FARPAGE_COORDINATOR", required_unless_present = "own_far_memory",
        value_parser = NonEmptyStringValueParser::new())]
    pub(crate) coordinator: Option<String>,
    /// Where programs connect
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// The group whose members may connect, by name or number
    #[arg(long, value_name = "GROUP", default_value = "farpage")]
    pub(crate) group: String,
    /// How pages travel [default: whatever a node offers, one that crosses hosts first]
    #[arg(long, value_enum)]
    pub(crate) fabric: Option<Fabric>,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
    /// Its name in the cluster [default: the host name and the pid]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) id: Option<String>,
    /// How long a touch of a page may wait for a memory node that does not answer, before it ends in SIGBUS; for runs that
    /// do not say
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = fault_deadline())]
    pub(crate) fault_deadline: u64,
    /// How long programs wait for the next agent on this socket when this one is killed, before they are ended; no longer than
    /// four fifths of the lease's time
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub(crate) takeover_deadline: u64,
    #[command(flatten)]
    pub(crate) metrics: MetricsArgs,
    /// Bring up a coordinator and a memory node of this capacity for this agent alone
    #[arg(long, value_name = "SIZE", hide = true)]
    pub(crate) own_far_memory: Option<Size>,
    /// So many memory nodes, each of that capacity
    #[arg(long, value_name = "N", default_value_t = 1, hide = true, value_parser = parse_replicas)]
    pub(crate) own_replicas: u8,
    /// End when this inherited descriptor reads end-of-file
    #[arg(long, value_name = "FD", hide = true)]
    pub(crate) lifeline: Option<i32>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  farpage status --coordinator http://10.0.0.1:7400")]
pub(crate) struct StatusArgs {
    /// Where the coordinator is
    #[arg(long, value_name = "URL", env = "FARPAGE_COORDINATOR", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) coordinator: String,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Waits until the node holds nothing, and tells how far it has come. Programs run on meanwhile. Exit status 1: it holds \
something still, and why; nothing is lost then.

Examples:
  farpage drain rack1-a --coordinator http://10.0.0.1:7400
  farpage drain rack1-a --undo")]
pub(crate) struct DrainArgs {
    /// The node's name
    #[arg(value_name = "NODE", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) node: String,
    /// Where the coordinator is
    #[arg(long, value_name = "URL", env = "FARPAGE_COORDINATOR", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) coordinator: String,
    /// How long to wait; 0 has it begin, and waits for nothing
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u64,
    /// Lend its memory again
    #[arg(long)]
    pub(crate) undo: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  farpage doctor --json")]
pub(crate) struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  farpage bench --list\n  farpage bench fault --fabric tcp --json fault.json\n  \
                  farpage bench fits --seconds 10\n  farpage bench conformance --case forks --case anon.write\n  \
                  farpage bench conformance --long --case fork_tree --seed 7\n  \
                  farpage bench fabric --fabric rdma --serve 10.0.0.2:7700\n  \
                  farpage bench fabric --fabric rdma --peer 10.0.0.2:7700
  farpage bench fault --fabric rdma --peer 10.0.0.2:7700 --agent /run/farpage/agent.sock"
)]
pub(crate) struct BenchArgs {
    /// Which benchmark
    #[arg(value_name = "NAME", required_unless_present = "list")]
    pub(crate) name: Option<String>,
    /// List the benchmarks
    #[arg(long, conflicts_with_all = ["name", "json"])]
    pub(crate) list: bool,
    /// Write every measurement to this file
    #[arg(long, value_name = "PATH")]
    pub(crate) json: Option<PathBuf>,
    /// How pages travel
    #[arg(long, value_enum, default_value_t = Fabric::Shm)]
    pub(crate) fabric: Fabric,
    /// The other machine, where bench fabric --serve runs (bench fabric, bench fault --agent) [default: this one]
    #[arg(long, value_name = "ADDR:PORT", conflicts_with = "serve")]
    pub(crate) peer: Option<String>,
    /// Be the other machine, until a signal comes (bench fabric); over rdma the ports above this one serve the baselines, one
    /// for each measurement, so that --sizes and --queues have to be the same on both
    #[arg(long, value_name = "ADDR:PORT", conflicts_with = "json")]
    pub(crate) serve: Option<std::net::SocketAddr>,
    /// Measure the agent at this socket, whose memory node is on the machine of --peer (bench fault --fabric rdma) [default:
    /// one for each run, with a memory node on this machine]
    #[arg(long, value_name = "SOCKET")]
    pub(crate) agent: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
    /// The program built from bench/async-rdma, to compare with that crate too (bench fabric --fabric rdma); for --serve as well
    #[arg(long, value_name = "PATH")]
    pub(crate) async_rdma: Option<PathBuf>,
    /// How much a request moves, from 4K to 1M; several with commas (bench fabric) [default: 4K]
    #[arg(long, value_name = "SIZES", value_delimiter = ',')]
    pub(crate) sizes: Vec<Size>,
    /// Over how many queue pairs requests go, from 1 to 64; several with commas (bench fabric) [default: 1]
    #[arg(long, value_name = "COUNTS", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) queues: Vec<u32>,
    /// How many far pages are touched by reading, and as many by writing (bench fault); fewer are for a slow fabric, many let
    /// the scheduler place the two ends of a fault in more than one way
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(100..=30_000))]
    pub(crate) touches: u32,
    /// How many times ours and the baseline take turns; the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) turns: u32,
    /// About how long one run of a whole program lasts (bench fits), or one stream of pages (bench fabric)
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) seconds: u32,
    /// Only cases with this in their name; may be given again (bench conformance)
    #[arg(long = "case", value_name = "NAME")]
    pub(crate) cases: Vec<String>,
    /// The long forms, which take minutes each, instead of the short ones (bench conformance)
    #[arg(long)]
    pub(crate) long: bool,
    /// Each case once, as this kernel does it, not also as older ones would (bench conformance)
    #[arg(long)]
    pub(crate) plain: bool,
    /// A quarter of the memory for the cases that bear it, for emulated machines (bench conformance)
    #[arg(long)]
    pub(crate) small: bool,
    /// What the cases that draw lots begin with (bench conformance)
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct BenchTouchArgs {
    /// What to do, for the benchmark that calls
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 1..)]
    pub(crate) words: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct FarMemoryArgs {
    /// The abstract socket's name, with a leading @
    #[arg(long)]
    pub(crate) socket: String,
    /// How much memory to lend
    #[arg(long)]
    pub(crate) capacity: Size,
    /// How pages travel
    #[arg(long, value_enum, default_value_t = Fabric::Shm)]
    pub(crate) fabric: Fabric,
    #[command(flatten)]
    pub(crate) rdma: RdmaArgs,
    /// Be a further node, of the coordinator of this socket
    #[arg(long, value_name = "SOCKET")]
    pub(crate) beside: Option<String>,
    /// End when this inherited descriptor reads end-of-file
    #[arg(long, value_name = "FD")]
    pub(crate) lifeline: Option<i32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_sound_and_every_help_has_an_example() {
        let cli = Cli::command();
        cli.clone().debug_assert();
        for command in cli
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
        {
            let help = command.clone().render_long_help().to_string();
            assert!(
                help.contains("Example"),
                "{} has no example",
                command.get_name()
            );
        }
    }

    #[test]
    fn the_program_keeps_its_own_flags() {
        let cli = Cli::try_parse_from([
            "farpage", "run", "--local", "64M", "--", "sort", "--local", "-S", "1M",
        ]);
        let Ok(Cli {
            command: Command::Run(run),
        }) = cli
        else {
            panic!("{cli:?}")
        };
        assert_eq!(run.program, ["sort", "--local", "-S", "1M"]);
        assert_eq!(run.local.map(Size::bytes), Some(64 << 20));
    }

    #[test]
    fn labels_and_stores() {
        assert!(
            parse_label("rack=r1").is_ok()
                && parse_label("=x").is_err()
                && parse_label("x").is_err()
        );
        assert_eq!(
            parse_state("file:/a:b"),
            Ok(StateStore::File("/a:b".into()))
        );
        assert_eq!(
            parse_state("etcd:http://a,http://b"),
            Ok(StateStore::Etcd(vec!["http://a".into(), "http://b".into()]))
        );
        assert!(
            parse_state("etcd:").is_err()
                && parse_state("redis:x").is_err()
                && parse_state("file:").is_err()
        );
    }
}
