//! `cargo xtask test`: everything that CI checks.

use std::path::PathBuf;

use crate::step::{Step, build_programs, root, target_folder};
use crate::tally::Tally;
use crate::{demo, lab, lint, setup};

/// What is tested with overflow checks and debug assertions, in cargo's words. The lab's tests are of these, chosen by the same
/// words: with other features on they would be built again.
pub(crate) const CHECKED: [&str; 3] = ["--workspace", "--exclude", "farpage-cli"];

/// Runs everything, also after something has failed, and prints the sums.
pub(crate) fn run() -> Result<(), String> {
    let mut tally = Tally::default();
    // A test that misses a package says so itself.
    if let Err(error) = setup::run() {
        eprintln!("xtask: {error}");
        tally.skip("setup", "not all packages are there, see above");
    }
    lint::run(&mut tally);
    // The shim is loaded from beside the executable, so that both are built before any test runs either. Not the whole
    // workspace: with other features on, all that users have would be built a second time for the tests below.
    let built = build_programs();
    tally.check("cargo build --release", built.is_ok());
    let show = ["--no-fail-fast", "--", "--show-output"];
    // With overflow checks and debug assertions, all but what runs whole programs; that runs as users have it.
    cargo_test(&mut tally, Step::cargo(&["test"]).args(CHECKED).args(show));
    cargo_test(
        &mut tally,
        Step::cargo(&["test", "--release", "-p", "farpage-cli"]).args(show),
    );
    lab::test(&mut tally, &lab::Choice::default());
    for (name, _) in crates_with_models() {
        // A target folder of its own: the flag rebuilds everything, so that what has no models is left out.
        let step = Step::cargo(&["test", "--release", "--no-default-features", "-p", &name])
            .args(["--lib", "loom"])
            .args(show);
        cargo_test(
            &mut tally,
            step.env("RUSTFLAGS", "--cfg loom")
                .env("CARGO_TARGET_DIR", target_folder().join("loom")),
        );
    }
    // Last, since it needs nothing but what users have, and says itself what it found.
    let shown = demo::run();
    if let Err(error) = &shown {
        eprintln!("xtask: {error}");
    }
    tally.check("cargo xtask demo", shown.is_ok());
    tally.close()
}

fn cargo_test(tally: &mut Tally, step: Step) {
    let name = step.words();
    let failed_before = tally.failed;
    let result = step.run_looking(|line| {
        tally.line(line);
        tally.is_news()
    });
    // It may have failed without any test doing so, as when something does not compile.
    if result.is_err() && tally.failed == failed_before {
        tally.fail(&name);
    }
}

/// The crates with models for loom, by name and folder: those that depend on it.
fn crates_with_models() -> Vec<(String, PathBuf)> {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap_or_default();
    let members = manifest
        .split_once("members = [")
        .and_then(|(_, rest)| rest.split_once(']'));
    let members = members.map_or("", |(members, _)| members);
    let folders = members
        .split(',')
        .map(|member| member.trim().trim_matches('"'))
        .filter(|name| !name.is_empty());
    folders
        .filter_map(|folder| {
            let folder = root().join(folder);
            let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).ok()?;
            let name = manifest
                .lines()
                .find_map(|line| line.strip_prefix("name = "))?
                .trim_matches('"')
                .to_owned();
            manifest
                .lines()
                .any(|line| line.starts_with("loom"))
                .then_some((name, folder))
        })
        .collect()
}
