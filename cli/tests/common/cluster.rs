//! A cluster of real processes on this machine: a coordinator, memory nodes, an agent, and programs that an
//! unprivileged user runs through it.

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::{copy_program, farpage, marked, patience, sys};

/// The user who runs programs: nobody.
pub const USER: u32 = 65534;
/// The group that the agent serves. It needs no name.
pub const GROUP: u32 = 54321;
/// Python without anybody's wrapper scripts around it.
pub const PYTHON: &str = "/usr/bin/python3";

/// Whatever is waited for takes less than this on a busy machine; see [`patience`] for an emulated one.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Builds a list of `argv[1]` strings of 3 KB whose bytes do not repeat, says so, and then prints its hash once per
/// line of input. Ends with its input.
pub const BUILD_AND_CHECK: &str = r#"
import hashlib, random, sys
source = random.Random(7)
data = [source.randbytes(3000) for _ in range(int(sys.argv[1]))]
print("built", flush=True)
for line in sys.stdin:
    digest = hashlib.sha256()
    for piece in data:
        digest.update(piece)
    print(digest.hexdigest(), flush=True)
"#;

/// A process that is killed when the test is over.
pub struct Daemon {
    pub child: Child,
    /// What it said when it was ready.
    pub said: String,
    log: PathBuf,
}

impl Daemon {
    /// Waits for its end and returns its status with what it logged.
    pub fn end(&mut self) -> (ExitStatus, String) {
        let status = wait(&mut self.child, "a daemon's end");
        (status, std::fs::read_to_string(&self.log).unwrap())
    }

    pub fn stop(&mut self) -> (ExitStatus, String) {
        sys::kill(self.child.id() as i32, libc::SIGTERM);
        self.end()
    }

    pub fn kill(&mut self) {
        sys::kill(self.child.id() as i32, libc::SIGKILL);
        let _ = self.child.wait();
    }

    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
    }
}

/// Waits for a child's end, not for ever.
pub fn wait(child: &mut Child, what: &str) -> ExitStatus {
    let deadline = Instant::now() + patience(PATIENCE);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("not in time: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The parts of a cluster. Fields are dropped in order: who uses something goes before it.
pub struct Cluster {
    pub agent: Option<Daemon>,
    pub nodes: Vec<Daemon>,
    pub coordinator: Option<Daemon>,
    pub url: String,
    logs: usize,
    folder: tempfile::TempDir,
}

impl Cluster {
    /// A folder that every user may read, with the executable and the shim in it. Nothing runs yet.
    pub fn empty() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("farpage-cluster-")
            .permissions(Permissions::from_mode(0o755))
            .tempdir()
            .unwrap();
        let built = farpage();
        for name in ["farpage", "libfarpage_preload.so"] {
            let copy = folder.path().join(name);
            copy_program(&built.with_file_name(name), &copy);
            std::fs::set_permissions(&copy, Permissions::from_mode(0o755)).unwrap();
        }
        std::fs::write(folder.path().join("program.py"), BUILD_AND_CHECK).unwrap();
        Self {
            agent: None,
            nodes: Vec::new(),
            coordinator: None,
            url: "http://127.0.0.1:0".to_owned(),
            logs: 0,
            folder,
        }
    }

    /// A coordinator, nodes `n0`, `n1`, ... of these capacities, and an agent.
    pub fn start(fabric: &str, capacities: &[&str]) -> Self {
        let mut cluster = Self::empty();
        cluster.start_coordinator();
        for (number, capacity) in capacities.iter().enumerate() {
            cluster.start_node(&format!("n{number}"), capacity, fabric);
        }
        cluster.start_agent(&[]);
        cluster
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("agent.sock")
    }

    /// A command of the copied executable.
    pub fn farpage(&self) -> Command {
        let mut command = Command::new(self.path("farpage"));
        command
            .env_remove("FARPAGE_AGENT")
            .env_remove("FARPAGE_COORDINATOR")
            .env_remove("LD_PRELOAD")
            .current_dir("/");
        command
    }

    /// Starts a daemon and waits for its first line.
    pub fn daemon(&mut self, arguments: &[&str]) -> Daemon {
        self.logs += 1;
        let log = self.path(&format!("log{}", self.logs));
        let mut command = self.farpage();
        command.args(arguments).stdin(Stdio::null());
        command
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let (sender, said) = channel();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut line = String::new();
            let _ = out.read_line(&mut line);
            let _ = sender.send(line);
            // Its standard output stays open for as long as it lives.
            let _ = out.read_to_end(&mut Vec::new());
        });
        let said = said.recv_timeout(patience(PATIENCE)).unwrap_or_default();
        Daemon { child, said, log }
    }

    /// Starts a daemon that must not come up: its status and what it complained of.
    pub fn refused(&mut self, arguments: &[&str]) -> (ExitStatus, String) {
        let mut daemon = self.daemon(arguments);
        assert_eq!(daemon.said, "", "{arguments:?} came up");
        daemon.end()
    }

    pub fn start_coordinator(&mut self) {
        let state = format!("file:{}", self.path("state.redb").display());
        // A second life takes the address of the first.
        let listen = self.url.trim_start_matches("http://").to_owned();
        let coordinator = self.daemon(&["coordinator", "--listen", &listen, "--state", &state]);
        self.url = coordinator
            .said
            .trim()
            .rsplit(' ')
            .next()
            .unwrap()
            .to_owned();
        assert!(self.url.starts_with("http://"), "{}", coordinator.said);
        self.coordinator = Some(coordinator);
    }

    /// A node's command line.
    pub fn node_arguments(&self, id: &str, capacity: &str, fabric: &str) -> Vec<String> {
        let listen = match fabric {
            "tcp" => "127.0.0.1:0".to_owned(),
            _ => format!(
                "@{}-{id}",
                self.folder.path().display().to_string().replace('/', "-")
            ),
        };
        let words = [
            "node",
            "--capacity",
            capacity,
            "--coordinator",
            &self.url,
            "--fabric",
            fabric,
            "--listen",
            &listen,
            "--id",
            id,
        ];
        words.map(str::to_owned).to_vec()
    }

    pub fn start_node(&mut self, id: &str, capacity: &str, fabric: &str) {
        let words = self.node_arguments(id, capacity, fabric);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let node = self.daemon(&words);
        assert!(node.said.contains("lends memory at"), "{}", node.said);
        self.nodes.push(node);
    }

    pub fn agent_arguments(&self) -> Vec<String> {
        let (socket, group) = (self.socket().display().to_string(), GROUP.to_string());
        let words = [
            "agent",
            "--coordinator",
            &self.url,
            "--socket",
            &socket,
            "--group",
            &group,
        ];
        words.map(str::to_owned).to_vec()
    }

    pub fn start_agent(&mut self, more: &[&str]) {
        let words = self.agent_arguments();
        let words: Vec<&str> = words
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .collect();
        let agent = self.daemon(&words);
        assert_eq!(agent.said, "ready\n");
        self.agent = Some(agent);
    }

    pub fn agent_runs(&mut self) -> bool {
        self.agent.as_mut().is_some_and(Daemon::runs)
    }

    /// `farpage run` by the unprivileged user, at this cluster's agent. The summary goes to a file of that name.
    pub fn run_command(&self, local: &str, summary: &str) -> Command {
        let path = self.path(summary);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        let mut command = self.farpage();
        command
            .args([
                "run",
                "--local",
                local,
                "--summary",
                "json",
                "--summary-file",
            ])
            .arg(path)
            .arg("--agent")
            .arg(self.socket());
        as_user(&mut command, &[GROUP]);
        command
    }

    /// Runs [`BUILD_AND_CHECK`] as the unprivileged user.
    pub fn run_program(&self, local: &str, pieces: u32, summary: &str) -> Program {
        self.run_program_with(&[], local, pieces, summary)
    }

    /// The same with more options of `farpage run`.
    pub fn run_program_with(
        &self,
        options: &[&str],
        local: &str,
        pieces: u32,
        summary: &str,
    ) -> Program {
        let mut command = self.run_command(local, summary);
        command
            .args(options)
            .args(["--", PYTHON])
            .arg(self.path("program.py"))
            .arg(pieces.to_string());
        Program::start(command)
    }

    /// The same without farpage.
    pub fn run_native(&self, pieces: u32) -> Program {
        let mut command = Command::new(PYTHON);
        command.arg(self.path("program.py")).arg(pieces.to_string());
        Program::start(command)
    }

    pub fn summary(&self, name: &str) -> serde_json::Value {
        let text = std::fs::read_to_string(self.path(name)).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"))
    }

    pub fn status(&self) -> serde_json::Value {
        let mut command = self.farpage();
        command.args(["status", "--json", "--coordinator", &self.url]);
        let out = command.output().unwrap();
        assert!(out.status.success(), "{out:?}");
        serde_json::from_slice(&out.stdout).unwrap()
    }

    pub fn status_text(&self) -> String {
        let mut command = self.farpage();
        command.args(["status", "--coordinator", &self.url]);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    }

    /// Stops everything in order, and fails if anything of this cluster's is left running.
    pub fn stop(mut self) -> Vec<String> {
        let daemons = self
            .agent
            .iter_mut()
            .chain(self.nodes.iter_mut())
            .chain(self.coordinator.iter_mut());
        let mut logs = Vec::new();
        for daemon in daemons {
            let (status, log) = daemon.stop();
            assert!(status.success(), "{status}: {log}");
            logs.push(log);
        }
        assert!(!self.socket().exists());
        self.assert_nothing_runs();
        logs
    }

    pub fn assert_nothing_runs(&self) {
        let mark = self.folder.path().display().to_string();
        super::eventually("nothing of the cluster is left running", || {
            marked(&mark).is_empty()
        });
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

/// Makes a command run as the unprivileged user with these groups.
pub fn as_user(command: &mut Command, groups: &[u32]) {
    let groups = groups.to_vec();
    sys::before_exec(command, move || sys::become_user(USER, &groups));
}

/// A [`BUILD_AND_CHECK`] program, spoken to.
pub struct Program {
    pub child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    errors: Receiver<String>,
}

impl Program {
    pub fn start(mut command: Command) -> Self {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (line, lines) = channel();
        let out: ChildStdout = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for text in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = line.send(text);
            }
        });
        let (all, errors) = channel();
        let mut err = child.stderr.take().unwrap();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = err.read_to_end(&mut text);
            let _ = all.send(String::from_utf8_lossy(&text).into_owned());
        });
        Self {
            input: child.stdin.take(),
            child,
            lines,
            errors,
        }
    }

    /// The next line that it says within the time.
    pub fn line_within(&self, time: Duration) -> Option<String> {
        self.lines.recv_timeout(time).ok()
    }

    pub fn built(&mut self) {
        let line = self.line_within(patience(PATIENCE));
        if line.as_deref() != Some("built") {
            let status = self.child.try_wait();
            panic!("{line:?}, {status:?}, {:?}", self.errors.try_recv());
        }
    }

    pub fn ask(&mut self) {
        writeln!(self.input.as_mut().unwrap(), "check").unwrap();
    }

    /// The hash over all its data.
    pub fn check(&mut self) -> String {
        self.ask();
        self.line_within(patience(PATIENCE))
            .unwrap_or_else(|| panic!("no hash in time: {:?}", self.errors.try_recv()))
    }

    /// The most memory that it has held, bytes.
    pub fn peak(&self) -> u64 {
        let status = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"));
        let kib = line.unwrap().split_whitespace().nth(1).unwrap();
        kib.parse::<u64>().unwrap() << 10
    }

    /// Waits for the end; its status and what it said on standard error.
    pub fn end(mut self) -> (ExitStatus, String) {
        drop(self.input.take());
        let status = wait(&mut self.child, "the program's end");
        (
            status,
            self.errors
                .recv_timeout(patience(PATIENCE))
                .unwrap_or_default(),
        )
    }

    /// Builds, checks `times` times, ends well. Returns the hashes.
    pub fn complete(mut self, times: usize) -> Vec<String> {
        self.built();
        let hashes = (0..times).map(|_| self.check()).collect();
        let (status, errors) = self.end();
        assert!(status.success(), "{status}: {errors}");
        hashes
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
