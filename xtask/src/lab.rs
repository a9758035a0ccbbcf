//! `cargo xtask lab`: real RDMA on virtual machines (`deploy/softroce/`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::Value;

use crate::step::{Step, StepError, build_programs, release_folder, root};
use crate::tally::Tally;

/// Debian's kernels that farpage is tried on: the newest that backports offer, and the stable release's own.
pub(crate) const KERNELS: [&str; 2] = ["6.12", "6.1"];

/// The fabric's tests that want a device, and how each program of theirs is told to run only those.
const TESTS: [(&str, &str); 4] = [
    ("conformance", "over_rdma"),
    ("death", "over_rdma"),
    ("leaks", "over_rdma"),
    ("farpage_fabric", "verbs::"),
];

/// The ones that want two machines have one name: the fabric's alone, and whole programs'.
const TEST_OF_TWO: &str = "two_machines";

/// The parts of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// The fabric, on one machine
    One,
    /// The fabric, between two machines
    Two,
    /// Memory's semantics on this kernel, over shared memory: on 6.1 pages leave without UFFDIO_MOVE
    Semantics,
    /// Whole programs with their pages on another machine
    Programs,
}

/// Cases of `farpage bench conformance`, some 20 s each there: heaps that grow, mappings that move, forks.
const CASES: [&str; 3] = [
    "growth.small_blocks",
    "memory_calls.remap_move",
    "forks.generations",
];

/// Handed on to the machines, for who runs a part by hand.
const HANDED_ON: &str = "FARPAGE_OUTAGES";

/// What a run may take: boot to power-off is 90 seconds on two idle cores, and ten times that where others build.
const TIMEOUT_SECONDS: &str = "900";

/// What one test may wait for.
const PATIENCE_SECONDS: u32 = 150;

/// The memory node of a lab with two machines, on the second one.
const NODE_ON_B: &str = "coordinator --listen 10.77.0.2:7400 --state file:/tmp/state.redb & sleep 1; \
                         exec \"$FARPAGE\" node --capacity 512M --coordinator http://10.77.0.2:7400 --fabric rdma \
                         --listen 10.77.0.2:7500 --id far-node";

/// Runs a command in the lab; returns its status, or the lab's own when it cannot run.
pub(crate) fn run(machines: u8, kernel: &str, command: &[OsString]) -> Result<u8, StepError> {
    let mut step = Step::new(lab()).args(["--kernel", kernel]);
    if machines == 2 {
        let farpage = release_folder().join("farpage");
        build_programs()?;
        let node = format!("FARPAGE='{0}'; \"$FARPAGE\" {NODE_ON_B}", farpage.display());
        step = step.arg("--peer").arg(node);
    }
    match step.arg("--").args(command).run() {
        Ok(()) => Ok(0),
        Err(StepError::Failed(words, status)) => match status.code() {
            Some(code) => Ok(u8::try_from(code).unwrap_or(1)),
            None => Err(StepError::Failed(words, status)),
        },
        Err(error) => Err(error),
    }
}

/// The verbs tests, on real kernels with a device each; the kernels at a time, as a machine keeps one core busy. All of
/// either where none is chosen.
pub(crate) fn test(tally: &mut Tally, kernel: Option<&str>, part: Option<Part>) {
    let programs = match build() {
        Ok(programs) => programs,
        Err(error) => {
            eprintln!("xtask: {error}");
            return tally.fail("build the lab's tests");
        }
    };
    let programs = &programs;
    let kernels = kernel.map_or(KERNELS.to_vec(), |kernel| vec![kernel]);
    let runs: Vec<_> = std::thread::scope(|scope| {
        let started: Vec<_> = kernels
            .into_iter()
            .map(|kernel| (kernel, scope.spawn(move || on(kernel, part, programs))))
            .collect();
        started
            .into_iter()
            .map(|(kernel, run)| (kernel, run.join()))
            .collect()
    });
    for (kernel, run) in runs {
        let name = format!("the lab on Linux {kernel}");
        match run {
            Ok(Run::Missing(reason)) => tally.skip(&name, &reason),
            Ok(Run::Done(all_well, printed)) => {
                println!("--- {name}\n{printed}");
                let failed_before = tally.failed;
                for line in printed.lines() {
                    tally.line(line);
                    tally.verdict(line);
                }
                if !all_well && tally.failed == failed_before {
                    tally.fail(&name);
                }
            }
            Err(_) => tally.fail(&name),
        }
    }
}

/// What became of the tests on one kernel.
enum Run {
    /// The lab cannot run it, for this reason.
    Missing(String),
    /// Whether all is well, and what was printed.
    Done(bool, String),
}

fn on(kernel: &str, part: Option<Part>, programs: &Programs) -> Run {
    let step = || {
        let options = [
            "--kernel",
            kernel,
            "--timeout",
            TIMEOUT_SECONDS,
            "--env",
            HANDED_ON,
        ];
        Step::new(lab()).args(options)
    };
    match step().arg("--prepare").quietly() {
        Some((true, _)) => {}
        Some((false, printed)) => {
            let reason = printed.lines().last();
            return Run::Missing(reason.unwrap_or("see deploy/softroce/README.md").to_owned());
        }
        None => return Run::Missing("there is no bash to run it".to_owned()),
    }
    let tests = programs
        .alone
        .iter()
        .zip(TESTS)
        .map(|(program, (_, filter))| {
            let program = program.display();
            format!("'{program}' --test-threads 1 --show-output {filter} || failed=1; ")
        });
    let on_one = format!(
        "export FARPAGE_TEST_PATIENCE={PATIENCE_SECONDS}; failed=0; {}exit $failed",
        tests.collect::<String>()
    );
    let of_two = |program: &Path| {
        let (program, patience) = (program.display(), PATIENCE_SECONDS);
        let serve = format!("FARPAGE_TEST_PATIENCE={patience} FARPAGE_LAB=serve '{program}'");
        let endure = format!(
            "FARPAGE_TEST_PATIENCE={patience} FARPAGE_LAB=10.77.0.2 '{program}' --show-output"
        );
        step().args(["--peer", &serve, "--", "bash", "-c", &endure])
    };
    let farpage = release_folder().join("farpage");
    let semantics = CASES.iter().fold(
        format!("'{}' bench conformance", farpage.display()),
        |words, case| words + " --case " + case,
    );
    let steps = [
        (Part::One, step().args(["--", "bash", "-c", &on_one])),
        (
            Part::Semantics,
            step().args(["--", "bash", "-c", &semantics]),
        ),
        (Part::Two, of_two(&programs.of_two)),
        (Part::Programs, of_two(&programs.whole)),
    ];
    let (mut all_well, mut all_printed) = (true, String::new());
    let wanted = |its: Part| match part {
        Some(part) => part == its,
        // Minutes each: on one kernel, unless asked for.
        None => its != Part::Programs || kernel == KERNELS[0],
    };
    for (_, step) in steps.into_iter().filter(|(its, _)| wanted(*its)) {
        let (well, printed) = step.quietly().unwrap_or_default();
        all_well &= well;
        all_printed += &printed;
    }
    Run::Done(all_well, all_printed)
}

fn lab() -> PathBuf {
    root().join("deploy/softroce/lab")
}

/// The test programs.
struct Programs {
    /// In the order of [`TESTS`].
    alone: Vec<PathBuf>,
    of_two: PathBuf,
    /// Whole programs, between two machines.
    whole: PathBuf,
}

fn build() -> Result<Programs, String> {
    // The shim is loaded from beside the executable.
    build_programs().map_err(|error| error.to_string())?;
    let fabric = built(&["-p", "farpage-fabric"])?;
    let cli = built(&["--release", "-p", "farpage-cli", "--test", TEST_OF_TWO])?;
    Ok(Programs {
        alone: TESTS
            .iter()
            .map(|(name, _)| program(&fabric, name))
            .collect::<Result<_, _>>()?,
        of_two: program(&fabric, TEST_OF_TWO)?,
        whole: program(&cli, TEST_OF_TWO)?,
    })
}

/// Builds test programs; returns what cargo says that it made.
fn built(of: &[&str]) -> Result<Vec<Value>, String> {
    let step = Step::cargo(&["test", "--no-run", "--message-format=json"]).args(of);
    let (built, printed) = step.quietly().ok_or("cargo cannot be started")?;
    if !built {
        return Err(printed);
    }
    let made = printed
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok());
    Ok(made.collect())
}

fn program(made: &[Value], name: &str) -> Result<PathBuf, String> {
    made.iter()
        .filter(|made| made["target"]["name"] == name && made["profile"]["test"] == true)
        .find_map(|made| Some(PathBuf::from(made["executable"].as_str()?)))
        .ok_or_else(|| format!("cargo built no test program {name}"))
}
