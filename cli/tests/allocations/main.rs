//! No fault and no eviction waits for the agent's allocator: the agent runs in this process, and its pagers' requests for
//! memory are counted while a program's pages go and come.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

#[path = "../common/mod.rs"]
mod common;
mod sys;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::programs_in_c::{LOCAL, compiled};
use common::{Part, eventually, farpage, without_far_memory, without_program};
use farpage_agent::{AgentConfig, OwnDevice, client, serve};
use farpage_proto::transport::EndpointUrl;

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

/// Faults that are counted.
const FAULTS: u64 = 20_000;
const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn a_fault_asks_the_allocator_for_nothing() {
    const TEST: &str = "a_fault_asks_the_allocator_for_nothing";
    if without_far_memory(TEST) || without_program(TEST, "cc") {
        return;
    }
    let socket = format!("@farpage-allocations-{}", std::process::id());
    let far_memory = format!("{socket}-far");
    // A coordinator and a memory node in one process.
    let _far_memory = Part::start(&["far-memory", "--capacity", "256M", "--socket", &far_memory]);
    let coordinator = format!("unix:{far_memory}");
    let stop = Arc::new(AtomicBool::new(false));
    let ready = Arc::new(AtomicBool::new(false));
    let agent = std::thread::spawn({
        let (stop, ready, socket) = (Arc::clone(&stop), Arc::clone(&ready), socket.clone());
        move || {
            let config = AgentConfig {
                coordinator: EndpointUrl::parse_field("the URL", &coordinator).unwrap(),
                socket,
                group: None,
                id: "allocations".into(),
                fabric: None,
                device: OwnDevice::default(),
                fault_deadline: Duration::from_secs(60),
                takeover_deadline: None,
                replicas: 1,
                exit_on_eof: None,
            };
            serve(&config, &stop, |_| ready.store(true, Ordering::Release)).unwrap();
        }
    });
    eventually("the agent is ready", || ready.load(Ordering::Acquire));

    let folder = tempfile::tempdir().unwrap();
    let ready = folder.path().join("long_work.ready");
    let mut program = Command::new(farpage())
        .args(["run", "--agent", &socket, "--local", &LOCAL.to_string()])
        .args(["--far", "256M", "--summary", "none", "--"])
        .arg(compiled("hostile"))
        .arg("long_work")
        .current_dir(folder.path())
        .spawn()
        .unwrap();
    eventually("the long work begins", || ready.exists());
    let pagers: Vec<u32> = threads_named("pager-").collect();
    let requests = || -> u64 { pagers.iter().map(|thread| sys::asked(*thread)).sum() };
    let faults = || client::status(&socket).unwrap()[0].faults;
    let before = (faults(), requests());
    let began = Instant::now();
    let mut now = before;
    while now.0 < before.0 + FAULTS {
        assert!(
            began.elapsed() < common::patience(DEADLINE),
            "too few faults"
        );
        // Not often, since the answer is counted for by a pager.
        std::thread::sleep(Duration::from_millis(250));
        now = (faults(), requests());
    }
    let milliseconds = began.elapsed().as_millis() as u64;
    std::fs::remove_file(ready).unwrap();
    let status = program.wait().unwrap();
    stop.store(true, Ordering::Release);
    agent.join().unwrap();

    assert!(status.success(), "{status}");
    let (faults, requests) = (now.0 - before.0, now.1 - before.1);
    println!("{TEST}: {requests} requests for memory during {faults} faults in {milliseconds} ms");
    assert_eq!(pagers.len(), 1);
    assert!(before.1 > 0, "nothing is counted");
    // One for each fault would be more than all together. 50 times in a second the program's threads are looked at, for 8
    // requests; now and then its mappings, for one each.
    assert!(
        requests < 2 * milliseconds + faults / 20,
        "{requests} requests during {faults} faults in {milliseconds} ms"
    );
}

/// The threads of this process whose names begin like this.
fn threads_named(beginning: &str) -> impl Iterator<Item = u32> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks.flatten().filter_map(move |task| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let thread = task.file_name().to_str()?.parse().ok()?;
        name.starts_with(beginning).then_some(thread)
    })
}
