//! What an agent says of its processes' pages, against what `/proc` says and what the program knows of itself.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::path::Path;
use std::process::Command;

use common::held::{Proc, Program, kernels_slack, proc};
use common::programs_in_c::{LOCAL, compiled};
use common::{Part, alone, eventually, farpage, without_far_memory, without_program};
use farpage_agent::client;
use farpage_agent::protocol::ProcessFigures;

/// Of our own in a managed program beside what it has natively: the shim's and the helper's few pages.
const OURS: u64 = 64;

/// An agent with memory of its own, ended with the test.
struct Agent {
    _part: Part,
    socket: String,
}

impl Agent {
    fn start() -> Self {
        let socket = format!("@farpage-accounting-{}", std::process::id());
        let part = Part::start(&["agent", "--own-far-memory", "512M", "--socket", &socket]);
        Self {
            _part: part,
            socket,
        }
    }

    fn figures(&self, pid: i32) -> ProcessFigures {
        let all = client::status(&self.socket).unwrap();
        let found = all.into_iter().find(|figures| figures.pid == pid);
        found.unwrap_or_default()
    }
}

/// Waits until the agent's figures are those of the kernel and of the program; every one of them must be.
fn agree(agent: &Agent, pid: i32, touched: u64) -> ProcessFigures {
    let mut last = (ProcessFigures::default(), Proc::default());
    let mut agrees = || {
        last = (agent.figures(pid), proc(pid));
        let (ours, kernels) = &last;
        ours.managed_pages == kernels.managed
            && ours.managed_pages + ours.far_pages == touched
            && ours.local_pages.abs_diff(kernels.anonymous) <= kernels_slack()
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !agrees() {
        assert!(
            std::time::Instant::now() < deadline,
            "{touched} pages were touched, but: {last:?}"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    println!("{touched} pages touched: {last:?}");
    last.0
}

/// The same program natively, at each of its rests: how many pages are resident.
fn natively(program: &Path) -> Vec<u64> {
    let mut command = Command::new(program);
    command.arg("parent_and_child");
    let mut program = Program::start(command);
    let mut resident = Vec::new();
    for who in ["filled", "far", "child", "written", "alone", "discarded"] {
        let (pid, _) = program.holds(who);
        resident.push(proc(pid).anonymous);
        program.goes_on();
    }
    program.end();
    resident
}

#[test]
fn local_far_and_total_agree_with_proc_and_with_the_program() {
    let test = "local_far_and_total_agree_with_proc_and_with_the_program";
    if without_far_memory(test) || without_program(test, "cc") {
        return;
    }
    let _alone = alone();
    let path = compiled("accounting");
    let native = natively(&path);
    let agent = Agent::start();
    let summary = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(farpage());
    command
        .args([
            "run",
            "--local",
            &LOCAL.to_string(),
            "--agent",
            &agent.socket,
        ])
        .args(["--summary", "json", "--summary-file"])
        .arg(summary.path())
        .args(["--", path.to_str().unwrap(), "parent_and_child"]);
    let mut program = Program::start(command);

    let (parent, pages) = program.holds("filled");
    let filled = agree(&agent, parent, pages);
    assert_eq!(filled.shared_far_pages, 0);
    program.goes_on();

    let (_, pages) = program.holds("far");
    let far = agree(&agent, parent, pages);
    program.goes_on();

    let (child, pages) = program.holds("child");
    let inherited = agree(&agent, child, pages);
    // What both have far, in slots that both name: a quarter and more of it cannot have come home in the child.
    eventually("both say what they share", || {
        let (ours, theirs) = (agent.figures(parent), agent.figures(child));
        let most = ours.far_pages - ours.zero_pages;
        ours.shared_far_pages > pages / 2
            && ours.shared_far_pages <= most
            && theirs.shared_far_pages > pages / 4
    });
    agree(&agent, parent, pages);
    program.goes_on();

    let (_, fewer) = program.holds("written");
    let written = agree(&agent, child, fewer);
    agree(&agent, parent, pages);
    program.goes_on();

    let (_, pages) = program.holds("alone");
    let alone = agree(&agent, parent, pages);
    eventually("nothing is shared any more", || {
        agent.figures(parent).shared_far_pages == 0
    });
    program.goes_on();

    let (_, pages) = program.holds("discarded");
    let discarded = agree(&agent, parent, pages);
    program.goes_on();
    program.end();

    // What would have been resident without far memory is what is resident natively. The page of zeros that all share
    // is not resident, but what was filled with zeros is.
    let ours = [filled, far, inherited, written, alone, discarded];
    for (ours, native) in ours.iter().zip(native) {
        let total = ours.local_pages + ours.far_pages;
        println!("{total} pages in all, natively {native}");
        assert!(total.abs_diff(native) <= kernels_slack() + OURS, "{ours:?}");
    }

    let summary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(summary.path()).unwrap()).unwrap();
    let peaks = |pid: i32| {
        let all = summary["process_peaks"].as_array().unwrap();
        all.iter().find(|one| one["pid"] == pid).unwrap().clone()
    };
    let pages = |pid, key: &str| peaks(pid)[key].as_u64().unwrap();
    assert!(pages(parent, "total_pages") >= ours[0].local_pages + ours[0].far_pages);
    assert!(pages(child, "far_pages") > ours[2].far_pages / 2);
    assert!(
        pages(parent, "local_pages") <= farpage_bench::conformance::allowed_bytes(LOCAL) / 4096,
        "{summary}"
    );
    assert_eq!(peaks(parent)["name"], "accounting");
}
