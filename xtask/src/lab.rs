//! `cargo xtask lab`: real RDMA on virtual machines (`deploy/softroce/`).

use std::ffi::OsString;
use std::path::PathBuf;

use serde_json::Value;

use crate::step::{Step, StepError, build_programs, release_folder, root};
use crate::tally::Tally;

/// Debian's kernels that farpage is tried on: the newest that backports offer, and the stable release's own.
pub(crate) const KERNELS: [&str; 2] = ["6.12", "6.1"];

/// The fabric's tests that want a device, and how each program of theirs is told to run only those.
const TESTS: [(&str, &str); 3] = [
    ("conformance", "over_rdma"),
    ("death", "over_rdma"),
    ("farpage_fabric", "verbs::"),
];

/// The one that wants two machines.
const TEST_OF_TWO: &str = "two_machines";

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

/// The verbs tests, on real kernels with a device each; both kernels at a time, as a machine keeps one core busy.
pub(crate) fn test(tally: &mut Tally) {
    let programs = match build() {
        Ok(programs) => programs,
        Err(error) => {
            eprintln!("xtask: {error}");
            return tally.fail("build the lab's tests");
        }
    };
    let programs = &programs;
    let runs: Vec<_> = std::thread::scope(|scope| {
        let started = KERNELS.map(|kernel| (kernel, scope.spawn(move || on(kernel, programs))));
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
                printed.lines().for_each(|line| tally.line(line));
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

fn on(kernel: &str, programs: &Programs) -> Run {
    let step = || Step::new(lab()).args(["--kernel", kernel, "--timeout", TIMEOUT_SECONDS]);
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
    let script = format!(
        "export FARPAGE_TEST_PATIENCE={PATIENCE_SECONDS}; failed=0; {}exit $failed",
        tests.collect::<String>()
    );
    let alone = step().args(["--", "bash", "-c", &script]).quietly();
    let serve = format!("FARPAGE_LAB=serve '{}'", programs.of_two.display());
    let endure = format!(
        "FARPAGE_TEST_PATIENCE={PATIENCE_SECONDS} FARPAGE_LAB=10.77.0.2 '{}' --show-output",
        programs.of_two.display()
    );
    let of_two = step()
        .args(["--peer", &serve, "--", "bash", "-c", &endure])
        .quietly();
    let (alone, of_two) = (alone.unwrap_or_default(), of_two.unwrap_or_default());
    Run::Done(alone.0 && of_two.0, alone.1 + &of_two.1)
}

fn lab() -> PathBuf {
    root().join("deploy/softroce/lab")
}

/// The test programs.
struct Programs {
    /// In the order of [`TESTS`].
    alone: Vec<PathBuf>,
    of_two: PathBuf,
}

fn build() -> Result<Programs, String> {
    let step = Step::cargo(&[
        "test",
        "-p",
        "farpage-fabric",
        "--no-run",
        "--message-format=json",
    ]);
    let (built, printed) = step.quietly().ok_or("cargo cannot be started")?;
    if !built {
        return Err(printed);
    }
    let made: Vec<Value> = printed
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let program = |name: &str| {
        made.iter()
            .filter(|made| made["target"]["name"] == name && made["profile"]["test"] == true)
            .find_map(|made| Some(PathBuf::from(made["executable"].as_str()?)))
            .ok_or_else(|| format!("cargo built no test program {name}"))
    };
    Ok(Programs {
        alone: TESTS
            .iter()
            .map(|(name, _)| program(name))
            .collect::<Result<_, _>>()?,
        of_two: program(TEST_OF_TWO)?,
    })
}
