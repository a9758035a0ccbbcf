//! One command that a task runs.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why a step is not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StepError {
    #[error("cannot start `{0}`: {1}")]
    Start(String, io::Error),
    #[error("`{0}` failed ({1}); what it printed is above")]
    Failed(String, std::process::ExitStatus),
}

/// A command, run in the workspace's root.
#[derive(Debug)]
pub(crate) struct Step(Command);

impl Step {
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.current_dir(root()).stdin(Stdio::null());
        Self(command)
    }

    /// The cargo that runs this program.
    pub(crate) fn cargo(arguments: &[&str]) -> Self {
        Self::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).args(arguments)
    }

    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.0.arg(argument);
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.0.args(arguments);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// The command as one would type it.
    pub(crate) fn words(&self) -> String {
        let program = Path::new(self.0.get_program())
            .file_name()
            .unwrap_or(self.0.get_program());
        let mut words = vec![program.to_string_lossy().into_owned()];
        words.extend(
            self.0
                .get_args()
                .map(|word| word.to_string_lossy().into_owned()),
        );
        words.join(" ")
    }

    /// Runs it, with its output where ours goes.
    pub(crate) fn run(mut self) -> Result<(), StepError> {
        println!("--- {}", self.words());
        match self.0.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(StepError::Failed(self.words(), status)),
            Err(error) => Err(StepError::Start(self.words(), error)),
        }
    }

    /// Runs it, shows each line that it prints to `look`, and repeats on standard output those for which that says so.
    pub(crate) fn run_looking(
        mut self,
        mut look: impl FnMut(&str) -> bool,
    ) -> Result<(), StepError> {
        let words = self.words();
        println!("--- {words}");
        let mut child = match self.0.stdout(Stdio::piped()).spawn() {
            Ok(child) => child,
            Err(error) => return Err(StepError::Start(words, error)),
        };
        if let Some(output) = child.stdout.take() {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line);
                if look(&line) {
                    println!("{line}");
                }
            }
        }
        match child.wait() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(StepError::Failed(words, status)),
            Err(error) => Err(StepError::Start(words, error)),
        }
    }

    /// Runs it unseen and returns all that it printed, and whether it succeeded.
    pub(crate) fn quietly(mut self) -> Option<(bool, String)> {
        let out = self.0.output().ok()?;
        let printed = [out.stdout, out.stderr].concat();
        Some((
            out.status.success(),
            String::from_utf8_lossy(&printed).into_owned(),
        ))
    }
}

/// What building the RDMA fabric takes: two headers and pkg-config. (And libclang, which has many names and comes with them by setup.)
const FOR_VERBS: [&str; 2] = [
    "/usr/include/infiniband/verbs.h",
    "/usr/include/rdma/rdma_cma.h",
];

/// Builds the `farpage` command and its shim in release, without RDMA where the packages for it are missing.
pub(crate) fn build_programs() -> Result<(), StepError> {
    let mut arguments = vec![
        "build",
        "--release",
        "-p",
        "farpage-cli",
        "-p",
        "farpage-preload",
    ];
    let there = FOR_VERBS.iter().all(|file| Path::new(file).exists());
    if !there || installed("pkg-config").is_none() {
        println!(
            "Without --fabric rdma, for lack of packages that building it takes: cargo xtask setup"
        );
        arguments.push("--no-default-features");
    }
    Step::cargo(&arguments).run()
}

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Where cargo builds.
pub(crate) fn target_folder() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root().join(folder),
        None => root().join("target"),
    }
}

/// Where release binaries are.
pub(crate) fn release_folder() -> PathBuf {
    target_folder().join("release")
}

/// The program's path, if it is installed.
pub(crate) fn installed(program: &str) -> Option<PathBuf> {
    let path: OsString = std::env::var_os("PATH").unwrap_or_default();
    // The administrator's programs are not in everybody's PATH.
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}
