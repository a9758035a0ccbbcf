//! `cargo xtask lab`: real RDMA on virtual machines (`deploy/softroce/`).

use std::ffi::OsString;
use std::path::PathBuf;

use serde_json::Value;

use crate::step::{Step, StepError, release_folder, root};
use crate::tally::Tally;

/// Debian's kernels that farpage is tried on: the newest that backports offer, and the stable release's own.
pub(crate) const KERNELS: [&str; 2] = ["6.12", "6.1"];

/// The fabric's tests that want a device, and how each program of theirs is told to run only those.
const TESTS: [(&str, &[&str]); 3] = [
    ("conformance", &["over_rdma"]),
    ("death", &["over_rdma"]),
    ("farpage_fabric", &["verbs::"]),
];

/// What a kernel's run may take: boot to power-off is 90 seconds on two cores.
const TIMEOUT_SECONDS: &str = "400";

/// The memory node of a lab with two machines, on the second one.
const NODE_ON_B: &str = "coordinator --listen 10.77.0.2:7400 --state file:/tmp/state.redb & sleep 1; \
                         exec \"$FARPAGE\" node --capacity 512M --coordinator http://10.77.0.2:7400 --fabric rdma \
                         --listen 10.77.0.2:7500 --id far-node";

/// Runs a command in the lab. Its status is not told from other failures, but what it printed is.
pub(crate) fn run(machines: u8, kernel: &str, command: &[OsString]) -> Result<(), StepError> {
    let mut step = Step::new(lab()).args(["--kernel", kernel]);
    if machines == 2 {
        let farpage = release_folder().join("farpage");
        Step::cargo(&[
            "build",
            "--release",
            "-p",
            "farpage-cli",
            "-p",
            "farpage-preload",
        ])
        .run()?;
        let node = format!("FARPAGE='{0}'; \"$FARPAGE\" {NODE_ON_B}", farpage.display());
        step = step.arg("--peer").arg(node);
    }
    step.arg("--").args(command).run()
}

/// The verbs tests, on real kernels with a device each.
pub(crate) fn test(tally: &mut Tally) {
    let programs = match build() {
        Ok(programs) => programs,
        Err(error) => {
            eprintln!("xtask: {error}");
            return tally.fail("build the lab's tests");
        }
    };
    for kernel in KERNELS {
        let prepared = Step::new(lab())
            .args(["--kernel", kernel, "--prepare"])
            .quietly();
        if let Some((false, printed)) = &prepared {
            let reason = printed
                .lines()
                .last()
                .unwrap_or("see deploy/softroce/README.md");
            tally.skip(&format!("the lab on Linux {kernel}"), reason);
            continue;
        }
        let mut words = Vec::new();
        for (program, (_, filters)) in programs.iter().zip(TESTS) {
            words.push(format!(
                "'{}' --test-threads 1 --show-output {} || failed=1",
                program.display(),
                filters.join(" ")
            ));
        }
        let script = format!("failed=0; {}; exit $failed", words.join("; "));
        let step = Step::new(lab()).args(["--kernel", kernel, "--timeout", TIMEOUT_SECONDS]);
        let failed_before = tally.failed;
        let result = step
            .args(["--", "bash", "-c", &script])
            .run_looking(|line| tally.line(line));
        if result.is_err() && tally.failed == failed_before {
            tally.fail(&format!("the lab on Linux {kernel}"));
        }
    }
}

fn lab() -> PathBuf {
    root().join("deploy/softroce/lab")
}

/// Builds the test programs; returns them in the order of [`TESTS`].
fn build() -> Result<Vec<PathBuf>, String> {
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
    TESTS
        .iter()
        .map(|(name, _)| {
            made.iter()
                .filter(|made| made["target"]["name"] == *name && made["profile"]["test"] == true)
                .find_map(|made| Some(PathBuf::from(made["executable"].as_str()?)))
                .ok_or_else(|| format!("cargo built no test program {name}"))
        })
        .collect()
}
