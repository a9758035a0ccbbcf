//! `bench conformance`: does a program's memory mean under farpage what it means without?
//!
//! The cases are C programs that judge themselves ([`programs`]) and a table of them ([`cases`]). They are compiled here and
//! run under `farpage run`, on this kernel, with so little memory that most of theirs is far. The cargo tests of `cli/` run
//! the same table, watched from outside.

pub mod cases;
pub mod programs;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Serialize;
use serde_json::Value;

use crate::{BenchError, Options};
pub use cases::{CASES, Case, Form};
use programs::{CompileError, Size};

/// What the tree may have above its limit: the larger of this and a twentieth of the limit.
const SLACK_BYTES: u64 = 16 << 20;
/// What a program ends with that misses a feature of the kernel's; it says which on a line that begins with `SKIP`.
pub const SKIPPED: i32 = 77;
/// How often to look whether a case is over.
const LOOK: Duration = Duration::from_millis(5);
/// Names how many seconds a case may take at least, for emulated machines; the programs heed it too.
const PATIENCE: &str = "FARPAGE_TEST_PATIENCE";
/// How much of what a failed program said is repeated.
const REASON_CHARS: usize = 2000;

/// Which cases to run, and how.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Those whose name has one of these in it; all if empty.
    pub names: Vec<String>,
    /// The long forms instead of the short ones.
    pub long: bool,
    /// Only as this kernel does it, not also as older ones would.
    pub plain: bool,
    /// On a quarter of the memory, those that bear it.
    pub small: bool,
    /// What the cases that draw lots begin with.
    pub seed: u64,
}

/// How a case came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As without farpage.
    Pass,
    /// Not so.
    Fail,
    /// It could not be run here.
    Skip,
}

/// One case's entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Of the case and its form, as `forks.child_reads` and `memory_calls.dontneed.without_move`.
    pub name: String,
    /// How it came out.
    pub result: Outcome,
    /// What a passed case shows; why it failed or was skipped.
    pub reason: String,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let result = match self.result {
            Outcome::Pass => "pass",
            Outcome::Fail => "fail",
            Outcome::Skip => "skip",
        };
        write!(f, "{result}  {}: {}", self.name, self.reason)
    }
}

/// All cases' verdicts. Its last line is the sums.
#[derive(Clone, Debug, Serialize)]
pub struct Verdicts {
    bench: &'static str,
    kernel: String,
    fabric: String,
    /// One entry per case and form.
    pub cases: Vec<Verdict>,
}

impl Verdicts {
    /// How many came out so.
    #[must_use]
    pub fn count(&self, result: Outcome) -> usize {
        self.cases.iter().filter(|one| one.result == result).count()
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [passed, failed, skipped] =
            [Outcome::Pass, Outcome::Fail, Outcome::Skip].map(|result| self.count(result));
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// Runs the chosen cases and tells of each as soon as it is judged.
///
/// # Errors
/// [`BenchError`] where no case can be tried at all, or where `tell` fails.
pub fn run(
    options: &Options,
    choice: &Choice,
    tell: &mut dyn FnMut(&Verdict) -> io::Result<()>,
) -> Result<Verdicts, BenchError> {
    let folder = std::env::temp_dir().join(format!("farpage-conformance-{}", std::process::id()));
    std::fs::create_dir_all(&folder)
        .map_err(BenchError::system("making a folder for the programs"))?;
    let machine = Machine::look(options)?;
    let runner = Runner {
        options,
        folder: &folder,
        machine,
        seed: choice.seed,
        patience: patience(),
    };
    let verdicts = runner.run(choice, tell);
    let _ = std::fs::remove_dir_all(&folder);
    Ok(Verdicts {
        bench: "conformance",
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        fabric: options.fabric.clone(),
        cases: verdicts?,
    })
}

/// What a case may take at least.
fn patience() -> Duration {
    let seconds = std::env::var(PATIENCE).ok();
    let seconds = seconds.and_then(|seconds| seconds.parse().ok());
    seconds.map_or(Duration::ZERO, Duration::from_secs)
}

/// What `farpage doctor` says of this machine.
#[derive(Debug)]
struct Machine {
    /// What is missing without which no program has far memory; empty if nothing.
    missing: String,
    /// Whether the kernel can move pages.
    has_move: bool,
    /// Whether pages can travel over the chosen fabric.
    has_fabric: bool,
}

impl Machine {
    fn look(options: &Options) -> Result<Self, BenchError> {
        let out = Command::new(&options.farpage)
            .args(["doctor", "--json"])
            .stdin(Stdio::null())
            .output()
            .map_err(BenchError::system("starting farpage doctor"))?;
        let report: Value =
            serde_json::from_slice(&out.stdout).map_err(|error| BenchError::Result {
                what: "farpage doctor --json".to_owned(),
                error,
            })?;
        let checks = report["checks"].as_array().map_or(&[][..], Vec::as_slice);
        let missing = checks.iter().filter(|check| check["level"] == "missing");
        // An installation without its shim is broken, which the cases are to show.
        let names =
            missing.filter_map(|check| check["id"].as_str().filter(|id| *id != "preload_shim"));
        Ok(Self {
            missing: names.collect::<Vec<_>>().join(", "),
            has_move: !checks
                .iter()
                .any(|check| check["id"] == "uffd_move" && check["found"] == "not in this kernel"),
            has_fabric: options.fabric != "rdma"
                || checks
                    .iter()
                    .any(|check| check["id"] == "rdma_device" && check["level"] == "ok"),
        })
    }

    /// Why a case is not run in this form here, if so.
    fn keeps_from(&self, case: &Case, form: Form) -> Option<String> {
        if !self.missing.is_empty() {
            let missing = &self.missing;
            return Some(format!(
                "no far memory on this machine, farpage doctor misses {missing}"
            ));
        }
        if !self.has_fabric {
            return Some("no RDMA device whose port is up, see farpage doctor".to_owned());
        }
        if case.pins && !self.has_move {
            return Some(
                "before Linux 6.8 the kernel says of no page that a device has it pinned; docs/limits.md"
                    .to_owned(),
            );
        }
        let same = form == Form::WithoutMove && case.forms().contains(&Form::Plain);
        (same && !self.has_move).then(|| {
            let plain = case.full_name(Form::Plain);
            format!("this kernel has no UFFDIO_MOVE, so that {plain} is the same")
        })
    }
}

struct Runner<'a> {
    options: &'a Options,
    folder: &'a Path,
    machine: Machine,
    seed: u64,
    patience: Duration,
}

impl Runner<'_> {
    fn run(
        &self,
        choice: &Choice,
        tell: &mut dyn FnMut(&Verdict) -> io::Result<()>,
    ) -> Result<Vec<Verdict>, BenchError> {
        let mut compiled: BTreeMap<(&str, Size), Result<PathBuf, CompileError>> = BTreeMap::new();
        let mut verdicts = Vec::new();
        for case in CASES.iter().filter(|case| case.long == choice.long) {
            for form in case.forms() {
                let name = case.full_name(*form);
                if choice.plain && *form != Form::Plain {
                    continue;
                }
                if !choice.names.is_empty() && !choice.names.iter().any(|part| name.contains(part))
                {
                    continue;
                }
                let size = if choice.small {
                    case.smallest()
                } else {
                    Size::Whole
                };
                let program = compiled
                    .entry((case.program, size))
                    .or_insert_with(|| programs::compile(case.program, size, self.folder));
                let (result, reason) = match (self.machine.keeps_from(case, *form), program) {
                    (Some(why), _) => (Outcome::Skip, why),
                    (None, Err(error @ CompileError::NoCompiler(_))) => {
                        (Outcome::Skip, error.to_string())
                    }
                    (None, Err(error)) => (Outcome::Fail, error.to_string()),
                    (None, Ok(program)) => self.one(case, *form, size, program)?,
                };
                let verdict = Verdict {
                    name,
                    result,
                    reason,
                };
                tell(&verdict).map_err(BenchError::system("writing a verdict"))?;
                verdicts.push(verdict);
            }
        }
        Ok(verdicts)
    }

    /// Runs one case to its end or its deadline.
    fn one(
        &self,
        case: &Case,
        form: Form,
        size: Size,
        program: &Path,
    ) -> Result<(Outcome, String), BenchError> {
        let local = case.local_at(size);
        let account = self.folder.join("account.json");
        let _ = std::fs::remove_file(&account);
        let mut command = Command::new(&self.options.farpage);
        command
            .args(["run", "--local", &local.to_string(), "--fabric"])
            .arg(&self.options.fabric)
            .args(["--summary", "json", "--summary-file"])
            .arg(&account)
            .arg("--")
            .arg(program)
            .args(case.words(self.seed))
            .env_remove("FARPAGE_AGENT")
            .env_remove("FARPAGE_COORDINATOR")
            .envs(form.environment().iter().copied());
        let (status, said) = match self.watch(command, case)? {
            Ok(ended) => ended,
            Err(reason) => return Ok((Outcome::Fail, reason)),
        };
        if status.code() == Some(SKIPPED) {
            let why = said.lines().find_map(|line| line.strip_prefix("SKIP "));
            return Ok((
                Outcome::Skip,
                why.unwrap_or("the program does not say why").to_owned(),
            ));
        }
        if shell_status(status) != Some(case.status) {
            return Ok((Outcome::Fail, format!("{status}: {}", ends_of(&said))));
        }
        let account = std::fs::read(&account).unwrap_or_default();
        let account: Value = serde_json::from_slice(&account).unwrap_or(Value::Null);
        let judged = match judge(case, local, &account) {
            Ok(()) if !case.twin.is_empty() => self.twin(case, program)?,
            judged => judged,
        };
        Ok(match judged {
            Ok(()) => (Outcome::Pass, case.shows.to_owned()),
            Err(reason) => (Outcome::Fail, reason),
        })
    }

    /// Whether the program comes to the same in plain memory as it has just done.
    fn twin(&self, case: &Case, program: &Path) -> Result<Result<(), String>, BenchError> {
        let mut command = Command::new(program);
        command.args(case.twin);
        Ok(match self.watch(command, case)? {
            Ok((status, _)) if status.success() => Ok(()),
            Ok((status, said)) => Err(format!("in plain memory: {status}: {}", ends_of(&said))),
            Err(reason) => Err(format!("in plain memory: {reason}")),
        })
    }

    /// Runs a command of a case to its end, or says why it had none. Returns its status and what it said on standard error.
    fn watch(
        &self,
        mut command: Command,
        case: &Case,
    ) -> Result<Result<(ExitStatus, String), String>, BenchError> {
        let said = self.folder.join("said");
        let errors = File::create(&said).map_err(BenchError::system("making a file"))?;
        let child = command
            .current_dir(self.folder)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .map_err(BenchError::system("starting a case's program"))?;
        let deadline = case.deadline.max(self.patience);
        let status = wait(child, deadline).map_err(BenchError::system("waiting for a case"))?;
        let said = std::fs::read(&said).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).into_owned();
        Ok(match status {
            Some(status) => Ok((status, said)),
            None => Err(format!(
                "it did not end within {} s: {}",
                deadline.as_secs(),
                ends_of(&said)
            )),
        })
    }
}

/// What every run must come to, by farpage's own account of it.
fn judge(case: &Case, local: u64, account: &Value) -> Result<(), String> {
    let number = |key: &str| {
        let value = account[key].as_u64();
        value.ok_or_else(|| format!("the summary has no {key}: {account}"))
    };
    let left = number("far_slots_in_use_at_exit")?;
    if left != 0 {
        return Err(format!("{left} far slots are in use after its end"));
    }
    if number("pages_evicted")? == 0 {
        return Err("nothing went far".to_owned());
    }
    let (peak, allowed) = (number("local_peak_bytes")?, allowed_bytes(local));
    // Between two samples the account guesses what a fork's processes share: their peaks are judged by the tests, from outside.
    if number("processes")? == 1 && case.bounded && peak > allowed {
        return Err(format!("{peak} bytes were here, {allowed} were allowed"));
    }
    Ok(())
}

/// What a tree may have here whose limit is `local`.
#[must_use]
pub fn allowed_bytes(local: u64) -> u64 {
    local + SLACK_BYTES.max(local / 20)
}

/// The status as a shell has it: 128 and the signal's number if it ended by one.
#[must_use]
pub fn shell_status(status: ExitStatus) -> Option<i32> {
    status.code().or(status.signal().map(|signal| 128 + signal))
}

/// Waits for a process that leads a group; none if the group had to be killed.
fn wait(mut child: Child, deadline: Duration) -> io::Result<Option<ExitStatus>> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if began.elapsed() > deadline {
            let group = Pid::from_raw(child.id() as i32).ok_or(io::ErrorKind::NotFound)?;
            kill_process_group(group, Signal::KILL)?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
}

/// What a program said first and last, on one line: the first is why it failed, the last how to see it again.
fn ends_of(said: &str) -> String {
    let line: Vec<char> = said.trim().replace('\n', " | ").chars().collect();
    if line.len() <= 2 * REASON_CHARS {
        return line.into_iter().collect();
    }
    let (first, last) = (&line[..REASON_CHARS], &line[line.len() - REASON_CHARS..]);
    first.iter().chain(&[' ', '…', ' ']).chain(last).collect()
}
