//! The other machine of the lab (`deploy/softroce/`): a coordinator and a memory node over RDMA there, told from here what
//! to do, a line each.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use super::cluster::{Cluster, Daemon};
use super::patience;

/// Where the other machine is, and listens.
const HOST: &str = "10.77.0.2";
const PORT: u16 = 7601;
/// Its coordinator.
pub const URL: &str = "http://10.77.0.2:7400";

/// Longer than any outage that is tried: an agent that was cut off from the coordinator as well keeps what it holds.
const LEASE_SECONDS: &str = "300";
/// Soon over for an agent that stands still, and long enough for one that runs on an emulated processor.
const SHORT_LEASE_SECONDS: &str = "20";

/// Is the other machine, until it is ended.
pub fn serve() {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).unwrap();
    let mut cluster = Cluster::empty();
    let mut coordinator = start_coordinator(&mut cluster, LEASE_SECONDS);
    let mut node = start_node(&mut cluster);
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        while let Some(Ok(line)) = lines.next() {
            let answer = match line.as_str() {
                "kill" => {
                    node.kill();
                    "killed".to_owned()
                }
                "start" => {
                    node = start_node(&mut cluster);
                    "started".to_owned()
                }
                "shorten" => {
                    coordinator.kill();
                    coordinator = start_coordinator(&mut cluster, SHORT_LEASE_SECONDS);
                    "shortened".to_owned()
                }
                "cpu" => cpu(&node),
                other => panic!("{other}"),
            };
            if writeln!(stream, "{answer}").is_err() {
                break;
            }
        }
    }
}

/// On what the one before it knew, if there was one.
fn start_coordinator(cluster: &mut Cluster, lease_seconds: &str) -> Daemon {
    let state = format!("file:{}", cluster.path("state.redb").display());
    let listen = URL.trim_start_matches("http://");
    let coordinator = cluster.daemon(&[
        "coordinator",
        "--listen",
        listen,
        "--state",
        &state,
        "--lease-time",
        lease_seconds,
    ]);
    assert!(coordinator.said.contains(URL), "{}", coordinator.said);
    coordinator
}

fn start_node(cluster: &mut Cluster) -> Daemon {
    let listen = format!("{HOST}:7500");
    let node = cluster.daemon(&[
        "node",
        "--capacity",
        "128M",
        "--coordinator",
        URL,
        "--fabric",
        "rdma",
        "--listen",
        &listen,
        "--id",
        "n0",
    ]);
    assert!(node.said.contains("lends memory at"), "{}", node.said);
    node
}

/// Clock ticks that a process has used, in user space and in the kernel, and how often a thread of it went to sleep.
fn cpu(of: &Daemon) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", of.child.id())).unwrap();
    let sleeps: u64 = tasks
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).ok())
        .filter_map(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line?.trim().parse::<u64>().ok()
        })
        .sum();
    let text = std::fs::read_to_string(format!("/proc/{}/stat", of.child.id())).unwrap();
    // Behind the name, which may hold anything, come the state and the fields from the fourth on.
    let (_, fields) = text.rsplit_once(')').unwrap();
    let fields: Vec<&str> = fields.split_whitespace().collect();
    format!("{} {} {sleeps}", fields[11], fields[12])
}

/// What a process has used of its machine's processor.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    pub user: Duration,
    pub kernel: Duration,
    /// How often a thread of it went to sleep: who takes part in each transfer does so for each.
    pub sleeps: u64,
}

impl std::ops::Sub for Cpu {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            user: self.user.saturating_sub(earlier.user),
            kernel: self.kernel.saturating_sub(earlier.kernel),
            sleeps: self.sleeps.saturating_sub(earlier.sleeps),
        }
    }
}

/// The other machine, seen from the first.
pub struct Other {
    lines: BufReader<TcpStream>,
}

impl Other {
    /// Waits until it serves.
    pub fn find() -> Self {
        let deadline = Instant::now() + patience(Duration::from_secs(60));
        loop {
            match TcpStream::connect((HOST, PORT)) {
                Ok(stream) => {
                    let mut other = Self {
                        lines: BufReader::new(stream),
                    };
                    other.cpu();
                    return other;
                }
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.lines.get_mut(), "{what}").unwrap();
        let mut answer = String::new();
        self.lines.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    /// Ends the node by SIGKILL.
    pub fn kill_node(&mut self) {
        assert_eq!(self.ask("kill"), "killed");
    }

    /// Starts it again, empty.
    pub fn start_node(&mut self) {
        assert_eq!(self.ask("start"), "started");
    }

    /// From now on leases end soon.
    pub fn shorten_leases(&mut self) {
        assert_eq!(self.ask("shorten"), "shortened");
    }

    /// What the node's process has used.
    pub fn cpu(&mut self) -> Cpu {
        let answer = self.ask("cpu");
        let numbers: Vec<u64> = answer
            .split(' ')
            .map(|text| text.parse().unwrap())
            .collect();
        let tick = |number: u64| Duration::from_millis(10 * number);
        Cpu {
            user: tick(numbers[0]),
            kernel: tick(numbers[1]),
            sleeps: numbers[2],
        }
    }

    /// Has the lab pause, resume or kill it, or pull and put back its wire.
    pub fn control(verb: &str) {
        let done = Command::new("lab-control")
            .args(["b", verb])
            .status()
            .unwrap();
        assert!(done.success(), "lab-control b {verb}");
    }
}
