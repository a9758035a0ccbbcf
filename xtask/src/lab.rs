//! `cargo xtask lab`: real RDMA on virtual machines (`deploy/softroce/`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::Value;

use crate::step::{Step, StepError, build_programs, release_folder, root};
use crate::tally::Tally;
use crate::test::CHECKED;

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
    /// A few cases of memory's semantics, one of them over RDMA: on 6.1 pages leave without UFFDIO_MOVE
    Semantics,
    /// Whole programs with their pages on another machine
    Programs,
    /// Every case of farpage bench conformance, most of an hour: only where it is asked for
    Conformance,
}

/// How pages travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fabric {
    /// The machine's own RDMA device
    #[default]
    Rdma,
    /// Its own network
    Tcp,
    /// Its own memory
    Shm,
}

impl Fabric {
    fn name(self) -> &'static str {
        match self {
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
            Self::Shm => "shm",
        }
    }
}

/// What to run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    /// Only on this kernel.
    pub(crate) kernel: Option<String>,
    /// Only this part.
    pub(crate) part: Option<Part>,
    /// For [`Part::Conformance`].
    pub(crate) fabric: Fabric,
    /// For that too: only cases with one of these in their name.
    pub(crate) cases: Vec<String>,
    /// What a machine may take, seconds.
    pub(crate) timeout: Option<u32>,
}

/// Cases of `farpage bench conformance`, some 20 s each there: heaps that grow, forks; and, over RDMA, mappings that move.
const CASES: [&str; 2] = ["growth.small_blocks", "forks.generations"];
const CASE_OVER_RDMA: &str = "memory_calls.remap_move";

/// Handed on to the machines, for who runs a part by hand.
const HANDED_ON: &str = "FARPAGE_OUTAGES";

/// What all cases may take, on a machine that others use too.
const CONFORMANCE_TIMEOUT_SECONDS: u32 = 8 * 3600;

/// What one case may take there: those with many processes need minutes.
const CASE_SECONDS: u32 = 1200;

/// The machine for all cases: the larger ones have some 300 MiB far, and as much in files.
const CONFORMANCE_MIB: &str = "3072";

/// What a run may take: from boot to power-off the longest, all that wants one machine, is eight minutes with the other kernel's
/// beside it, and several times that where others build.
const TIMEOUT_SECONDS: u32 = 1800;

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
pub(crate) fn test(tally: &mut Tally, choice: &Choice) {
    let kernels = match &choice.kernel {
        Some(kernel) => vec![kernel.as_str()],
        None => KERNELS.to_vec(),
    };
    if choice.part == Some(Part::Conformance) {
        for kernel in kernels {
            conformance(tally, kernel, choice);
        }
        return;
    }
    let programs = match build() {
        Ok(programs) => programs,
        Err(error) => {
            eprintln!("xtask: {error}");
            return tally.fail("build the lab's tests");
        }
    };
    let programs = &programs;
    let runs: Vec<_> = std::thread::scope(|scope| {
        let started: Vec<_> = kernels
            .into_iter()
            .map(|kernel| (kernel, scope.spawn(move || on(kernel, choice, programs))))
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

/// Sees to it that the kernel can be booted; why it cannot, if so.
fn prepared(kernel: &str) -> Result<(), String> {
    let step = Step::new(lab()).args(["--kernel", kernel, "--prepare"]);
    match step.quietly() {
        Some((true, _)) => Ok(()),
        Some((false, printed)) => {
            let reason = printed.lines().last();
            Err(reason.unwrap_or("see deploy/softroce/README.md").to_owned())
        }
        None => Err("there is no bash to run it".to_owned()),
    }
}

/// All cases on one machine, each told as soon as it is judged.
fn conformance(tally: &mut Tally, kernel: &str, choice: &Choice) {
    let fabric = choice.fabric.name();
    let name = format!("conformance over {fabric} on Linux {kernel}");
    if let Err(error) = build_programs() {
        eprintln!("xtask: {error}");
        return tally.fail(&name);
    }
    if let Err(reason) = prepared(kernel) {
        return tally.skip(&name, &reason);
    }
    let timeout = choice.timeout.unwrap_or(CONFORMANCE_TIMEOUT_SECONDS);
    let step = Step::new(lab())
        .args(["--kernel", kernel, "--memory", CONFORMANCE_MIB])
        .args(["--timeout", &timeout.to_string()])
        .args(["--env", "FARPAGE_TEST_PATIENCE", "--"])
        .arg(release_folder().join("farpage"))
        .args(["bench", "conformance", "--plain", "--small"])
        .args(["--fabric", fabric])
        .args(choice.cases.iter().flat_map(|case| ["--case", case]))
        .env("FARPAGE_TEST_PATIENCE", CASE_SECONDS.to_string());
    let failed_before = tally.failed;
    let result = step.run_looking(|line| {
        tally.verdict(line);
        true
    });
    if let Err(error) = result
        && tally.failed == failed_before
    {
        eprintln!("xtask: {error}");
        tally.fail(&name);
    }
}

fn on(kernel: &str, choice: &Choice, programs: &Programs) -> Run {
    if let Err(reason) = prepared(kernel) {
        return Run::Missing(reason);
    }
    let timeout = choice.timeout.unwrap_or(TIMEOUT_SECONDS).to_string();
    let step = || {
        let options = ["--kernel", kernel, "--timeout", &timeout];
        Step::new(lab()).args(options).args(["--env", HANDED_ON])
    };
    let tests = programs
        .alone
        .iter()
        .zip(TESTS)
        .map(|(program, (_, filter))| {
            let program = program.display();
            format!("'{program}' --test-threads 1 --show-output {filter} || failed=1; ")
        });
    let of_two = |program: &Path| {
        let (program, patience) = (program.display(), PATIENCE_SECONDS);
        let serve = format!("FARPAGE_TEST_PATIENCE={patience} FARPAGE_LAB=serve '{program}'");
        let endure = format!(
            "FARPAGE_TEST_PATIENCE={patience} FARPAGE_LAB=10.77.0.2 '{program}' --show-output"
        );
        step().args(["--peer", &serve, "--", "bash", "-c", &endure])
    };
    let farpage = release_folder().join("farpage");
    let bench = format!("'{}' bench conformance --plain --small", farpage.display());
    let cases = CASES
        .iter()
        .fold(bench.clone(), |words, case| words + " --case " + case);
    let semantics =
        format!("{cases} || failed=1; {bench} --fabric rdma --case {CASE_OVER_RDMA} || failed=1; ");
    let wanted = |its: Part| match choice.part {
        Some(part) => part == its,
        // Minutes each: on one kernel, unless asked for.
        None => its != Part::Programs || kernel == KERNELS[0],
    };
    // What wants one machine shares it: each start of one takes as long as a case.
    let on_one: String = [
        (Part::One, tests.collect::<String>()),
        (Part::Semantics, semantics),
    ]
    .into_iter()
    .filter_map(|(its, commands)| wanted(its).then_some(commands))
    .collect();
    let of_one = (!on_one.is_empty()).then(|| {
        let all = format!(
            "export FARPAGE_TEST_PATIENCE={PATIENCE_SECONDS}; failed=0; {on_one}exit $failed"
        );
        step().args(["--", "bash", "-c", &all])
    });
    let of_two = [
        (Part::Two, of_two(&programs.of_two)),
        (Part::Programs, of_two(&programs.whole)),
    ]
    .into_iter()
    .filter_map(|(its, step)| wanted(its).then_some(step));
    let (mut all_well, mut all_printed) = (true, String::new());
    for step in of_one.into_iter().chain(of_two) {
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
    let checked = built(&CHECKED)?;
    let cli = built(&["--release", "-p", "farpage-cli", "--test", TEST_OF_TWO])?;
    Ok(Programs {
        alone: TESTS
            .iter()
            .map(|(name, _)| program(&checked, name))
            .collect::<Result<_, _>>()?,
        of_two: program(&checked, TEST_OF_TWO)?,
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
