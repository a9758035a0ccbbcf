//! Checks that need no test: formatting, clippy, dependencies.

use crate::step::{Step, installed};
use crate::tally::Tally;

/// Runs every check, also after one has failed.
pub(crate) fn run(tally: &mut Tally) {
    for (name, component, arguments) in [
        (
            "cargo fmt",
            "cargo-fmt",
            ["fmt", "--all", "--check"].as_slice(),
        ),
        (
            "cargo clippy",
            "cargo-clippy",
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
        ),
        // The documented choice of a build that needs no RDMA library.
        (
            "cargo clippy without verbs",
            "cargo-clippy",
            &[
                "clippy",
                "-p",
                "farpage-cli",
                "--all-targets",
                "--no-default-features",
                "--",
                "-D",
                "warnings",
            ],
        ),
    ] {
        if installed(component).is_some() {
            check(tally, name, Step::cargo(arguments));
        } else {
            tally.skip(name, "not installed; rustup component add rustfmt clippy");
        }
    }
    shell(tally);
    deny(tally);
}

/// The lab's scripts.
fn shell(tally: &mut Tally) {
    if installed("shellcheck").is_none() {
        tally.skip("shellcheck", "not installed; cargo xtask setup");
        return;
    }
    let scripts = [
        "lab",
        "build-machine",
        "machine-init",
        "rdma-up",
        "check",
        "lab-control",
        "bench-fault",
    ];
    let scripts = scripts.map(|name| format!("deploy/softroce/{name}"));
    check(tally, "shellcheck", Step::new("shellcheck").args(scripts));
}

fn check(tally: &mut Tally, name: &str, step: Step) {
    let result = step.run();
    if let Err(error) = &result {
        eprintln!("xtask: {error}");
    }
    tally.check(name, result.is_ok());
}

/// Licences, sources and duplicates of dependencies, and known flaws in them.
fn deny(tally: &mut Tally) {
    // Building it takes minutes: CI can wait for that, a developer is not made to. It is run once, so that optimising it would
    // take longer than it saves.
    if installed("cargo-deny").is_none() && std::env::var_os("CI").is_some() {
        let _ = Step::cargo(&["install", "cargo-deny", "--locked", "--debug"]).run();
    }
    if installed("cargo-deny").is_none() {
        tally.skip(
            "cargo deny",
            "not installed; cargo install cargo-deny --locked",
        );
        return;
    }
    check(
        tally,
        "cargo deny",
        Step::cargo(&["deny", "check", "bans", "licenses", "sources"]),
    );
    // The list of known flaws comes over the network, and a machine may have none.
    let step = Step::cargo(&["deny", "check", "advisories"]);
    println!("--- {}", step.words());
    match step.quietly() {
        Some((true, _)) => tally.check("cargo deny advisories", true),
        Some((false, printed)) if printed.contains("failed to fetch advisory database") => {
            tally.skip(
                "cargo deny advisories",
                "the list of known flaws cannot be fetched from here",
            );
        }
        other => {
            eprintln!("{}", other.map(|(_, printed)| printed).unwrap_or_default());
            tally.check("cargo deny advisories", false);
        }
    }
}
