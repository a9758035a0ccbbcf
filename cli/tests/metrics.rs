//! What the three daemons tell Prometheus, against `/proc`, `farpage status` and each other.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::cluster::{Cluster, Daemon};
use common::held::{Program, kernels_slack, proc};
use common::programs_in_c::{LOCAL, compiled};
use common::{alone, eventually, patience, without_far_memory, without_program};

/// One scrape.
struct Page(String);

impl Page {
    /// What a daemon tells at the address that it has said.
    fn of(daemon: &Daemon) -> Self {
        let said = daemon.said.trim();
        let (_, url) = said.rsplit_once("metrics at http://").expect(said);
        let (at, path) = url.split_once('/').unwrap();
        let mut stream = TcpStream::connect(at).unwrap();
        stream
            .set_read_timeout(Some(patience(Duration::from_secs(60))))
            .unwrap();
        write!(stream, "GET /{path} HTTP/1.1\r\nHost: {at}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        Self(body.to_owned())
    }

    /// The series of a name, labels as they are written.
    fn series(&self, name: &str) -> Vec<(&str, u64)> {
        let lines = self.0.lines().filter(|line| !line.starts_with('#'));
        let told = lines.map(|line| line.rsplit_once(' ').unwrap());
        told.filter_map(|(series, value)| {
            let labels = series.strip_prefix(name)?;
            let labels = labels.is_empty() || labels.starts_with('{');
            labels.then(|| (&series[name.len()..], value.parse().unwrap()))
        })
        .collect()
    }

    fn one(&self, name: &str) -> u64 {
        let series = self.series(name);
        assert_eq!(series.len(), 1, "{name} in\n{}", self.0);
        series[0].1
    }

    /// A process's value.
    fn of_process(&self, name: &str, pid: i32) -> Option<u64> {
        let label = format!("{{pid=\"{pid}\",");
        let series = self.series(&format!("farpage_process_{name}"));
        let mine = series.iter().find(|(labels, _)| labels.starts_with(&label));
        mine.map(|(_, value)| *value)
    }
}

/// A coordinator, a node and an agent that tell metrics.
fn cluster() -> Cluster {
    const METRICS: [&str; 2] = ["--metrics", "127.0.0.1:0"];
    let mut cluster = Cluster::empty();
    let state = format!("file:{}", cluster.path("state.redb").display());
    let words = ["coordinator", "--listen", "127.0.0.1:0", "--state", &state];
    let coordinator = cluster.daemon(&[words.as_slice(), &METRICS].concat());
    let said = coordinator
        .said
        .trim_start_matches("coordinator serves at ");
    cluster.url = said.split_once(',').unwrap().0.to_owned();
    cluster.coordinator = Some(coordinator);
    for (words, is_node) in [
        (cluster.node_arguments("n0", "256M", "tcp"), true),
        (cluster.agent_arguments(), false),
    ] {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let daemon = cluster.daemon(&[words.as_slice(), &METRICS].concat());
        if is_node {
            cluster.nodes.push(daemon);
        } else {
            cluster.agent = Some(daemon);
        }
    }
    cluster
}

/// Waits until a process's metrics are what the kernel, the program and `farpage status` say.
fn agree(cluster: &Cluster, pid: i32, touched: u64) {
    let deadline = Instant::now() + patience(Duration::from_secs(20));
    loop {
        let page = Page::of(cluster.agent.as_ref().unwrap());
        let (kernels, status) = (proc(pid), cluster.status());
        let told = |name: &str| page.of_process(&format!("{name}_bytes"), pid).unwrap_or(0);
        let near = |bytes: u64, pages: u64| (bytes / 4096).abs_diff(pages) <= kernels_slack();
        let processes = status["agents"][0]["processes"].as_array().unwrap();
        let shown = processes.iter().find(|one| one["pid"] == pid);
        let shown = |name: &str| shown.map_or(0, |one| one[name].as_u64().unwrap());
        let sums = told("managed") / 4096 == kernels.managed
            && (told("managed") + told("far")) / 4096 == touched
            && told("total") == told("local") + told("far")
            && near(told("local"), kernels.anonymous);
        let same = ["managed", "far", "zero"]
            .iter()
            .all(|name| told(name) / 4096 == shown(&format!("{name}_pages")))
            && near(told("local"), shown("local_pages"))
            && near(told("total"), shown("total_pages"))
            && told("local_limit") == shown("local_limit_bytes");
        if sums && same {
            println!(
                "{touched} pages touched: {kernels:?}, far {}",
                told("far") / 4096
            );
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{touched} pages were touched by {pid}, but: {kernels:?}\n{status:#}\n{}",
            page.0
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until all three tell the same of what is granted, and `farpage status` too.
fn grants_agree(cluster: &Cluster) {
    let (mut last, mut lent) = (Vec::new(), Vec::new());
    eventually("all parts know the same grants", || {
        let coordinator = Page::of(cluster.coordinator.as_ref().unwrap());
        let node = Page::of(&cluster.nodes[0]);
        let agent = Page::of(cluster.agent.as_ref().unwrap());
        let status = cluster.status();
        let extents = agent.series("farpage_agent_extents");
        let held: u64 = extents.iter().map(|(_, count)| count).sum();
        lent = vec![
            coordinator.one("farpage_coordinator_capacity_bytes"),
            node.one("farpage_node_capacity_bytes"),
        ];
        last = vec![
            coordinator.one("farpage_coordinator_granted_bytes"),
            node.one("farpage_node_granted_bytes"),
            held * (16 << 20),
            status["used_bytes"].as_u64().unwrap(),
            (agent.one("farpage_agent_slots_used") + agent.one("farpage_agent_slots_free")) * 4096,
        ];
        last[0] > 0 && last.iter().all(|bytes| *bytes == last[0])
    });
    println!("granted: {last:?}");
    assert_eq!(lent, [256 << 20, 256 << 20]);
}

fn parent_and_child(cluster: &Cluster) -> Program {
    let path = compiled("accounting");
    let mut command = cluster.farpage();
    command
        .args(["run", "--summary", "none", "--local", &LOCAL.to_string()])
        .arg("--agent")
        .arg(cluster.socket())
        .args(["--", path.to_str().unwrap(), "parent_and_child"]);
    Program::start(command)
}

/// Killed each time that the program holds still.
#[test]
fn the_next_agent_tells_the_same_at_the_same_address() {
    let test = "the_next_agent_tells_the_same_at_the_same_address";
    if without_far_memory(test) || without_program(test, "cc") {
        return;
    }
    let _alone = alone();
    let mut cluster = cluster();
    let said = cluster.agent.as_ref().unwrap().said.trim().to_owned();
    let (_, url) = said.rsplit_once("http://").unwrap();
    let (address, _) = url.split_once('/').unwrap();
    let mut words = cluster.agent_arguments();
    words.extend(["--metrics", address].map(str::to_owned));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut program = parent_and_child(&cluster);
    for who in ["filled", "far", "child", "written", "alone", "discarded"] {
        let (pid, touched) = program.holds(who);
        agree(&cluster, pid, touched);
        let before = Page::of(cluster.agent.as_ref().unwrap());
        cluster.agent.as_mut().unwrap().kill();
        let next = cluster.daemon(&words);
        assert_eq!(next.said.trim(), said);
        cluster.agent = Some(next);
        agree(&cluster, pid, touched);
        let after = Page::of(cluster.agent.as_ref().unwrap());
        for name in ["jobs", "faults_total", "pages_fetched_total"] {
            let name = format!("farpage_agent_{name}");
            assert!(after.one(&name) >= before.one(&name), "{name}\n{}", after.0);
        }
        program.goes_on();
    }
    program.end();
    eventually("no slot is in use", || {
        let page = Page::of(cluster.agent.as_ref().unwrap());
        page.one("farpage_agent_slots_used") == 0
    });
    cluster.stop();
}

#[test]
fn all_three_agree_with_proc_and_status_and_forget_what_is_gone() {
    let test = "all_three_agree_with_proc_and_status_and_forget_what_is_gone";
    if without_far_memory(test) || without_program(test, "cc") {
        return;
    }
    let _alone = alone();
    let cluster = cluster();
    let scrape = || Page::of(cluster.agent.as_ref().unwrap());
    assert!(scrape().series("farpage_process_local_bytes").is_empty());

    let mut program = parent_and_child(&cluster);
    let (mut parent, mut page) = (0, scrape());
    for who in ["filled", "far", "child", "written", "alone", "discarded"] {
        let (pid, touched) = program.holds(who);
        agree(&cluster, pid, touched);
        match who {
            "filled" => parent = pid,
            "far" => grants_agree(&cluster),
            "child" => eventually("what both have far is told of both", || {
                let page = scrape();
                let shared = |pid| page.of_process("shared_far_bytes", pid);
                shared(parent) > Some(0) && shared(pid) > Some(0)
            }),
            "alone" => eventually("the child's series are gone", || {
                scrape().series("farpage_process_total_bytes").len() == 1
            }),
            _ => {}
        }
        page = scrape();
        program.goes_on();
    }
    assert_eq!(page.one("farpage_agent_jobs"), 1);
    let faults = page.one("farpage_agent_faults_total");
    let timed = page.one("farpage_agent_fault_duration_seconds_count");
    assert!(faults > 0 && timed > 0, "{}", page.0);
    assert!(page.one("farpage_agent_pages_fetched_total") > 0);
    program.end();

    eventually("the program's series are gone", || {
        let page = scrape();
        page.one("farpage_agent_jobs") == 0 && !page.0.contains("farpage_process_local_bytes{")
    });
    let page = scrape();
    assert!(!page.0.contains("pid="), "{}", page.0);
    assert_eq!(page.one("farpage_agent_slots_used"), 0);
    // What was counted is not forgotten.
    assert!(page.one("farpage_agent_faults_total") >= faults);
    assert!(page.one("farpage_agent_fault_duration_seconds_count") >= timed);
    cluster.stop();
}
