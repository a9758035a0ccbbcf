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

use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::programs_in_c::{LOCAL, compiled};
use common::{eventually, farpage, without_far_memory, without_program};
use farpage_agent::{AgentConfig, serve};
use farpage_proto::transport::EndpointUrl;

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

/// Faults per request for memory. Requests are made as address spaces come and go, when a page table grows, and to look at the
/// program's threads 50 times in a second; none for a page.
const FAULTS_PER_REQUEST: u64 = 20;

#[test]
fn a_fault_asks_the_allocator_for_nothing() {
    const TEST: &str = "a_fault_asks_the_allocator_for_nothing";
    if without_far_memory(TEST) || without_program(TEST, "cc") {
        return;
    }
    let socket = format!("@farpage-allocations-{}", std::process::id());
    let far_memory = format!("{socket}-far");
    let mut node = Command::new(farpage())
        .args(["far-memory", "--capacity", "256M", "--socket", &far_memory])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
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
                fault_deadline: Duration::from_secs(60),
                exit_on_eof: None,
            };
            serve(config, &stop, || ready.store(true, Ordering::Release)).unwrap();
        }
    });
    eventually("the agent is ready", || ready.load(Ordering::Acquire));

    let summary = tempfile::NamedTempFile::new().unwrap();
    let mut program = Command::new(farpage())
        .args(["run", "--agent", &socket, "--local", &LOCAL.to_string()])
        .args(["--far", "256M", "--summary", "json", "--summary-file"])
        .arg(summary.path())
        .arg("--")
        .arg(compiled("anon"))
        .arg("round_trips")
        .spawn()
        .unwrap();
    let mut pagers = HashSet::new();
    let status = loop {
        pagers.extend(threads_named("pager-"));
        if let Some(status) = program.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    stop.store(true, Ordering::Release);
    agent.join().unwrap();
    node.kill().unwrap();
    node.wait().unwrap();

    assert!(status.success(), "{status}");
    let text = std::fs::read_to_string(summary.path()).unwrap();
    let summary: serde_json::Value = serde_json::from_str(&text).unwrap();
    let figure = |name: &str| summary[name].as_u64().unwrap();
    let asked: u64 = pagers.iter().map(|thread| sys::asked(*thread)).sum();
    println!(
        "{TEST}: {asked} requests, {} faults, {} pages fetched, {} taken out",
        figure("faults"),
        figure("pages_fetched"),
        figure("pages_evicted"),
    );
    assert!(!pagers.is_empty() && asked > 0, "no pager was seen");
    assert!(
        figure("faults") > FAULTS_PER_REQUEST * asked,
        "{asked} requests: {summary}"
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
