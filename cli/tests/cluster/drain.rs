//! A node is released in an orderly way: what it holds is moved while programs run, and then nobody misses it.

use super::common::alone;
use super::common::cluster::{Cluster, PATIENCE, Program};
use super::replicas::{changing, ends_well, expected};
use super::{cannot_run, granted};

/// Has a node drained: whether that succeeded, and what was said.
fn drain(cluster: &Cluster, words: &[&str]) -> (bool, String) {
    let mut command = cluster.farpage();
    command.arg("drain").args(words);
    let out = command
        .args(["--coordinator", &cluster.url])
        .output()
        .unwrap();
    let said = [out.stdout, out.stderr].concat();
    (out.status.success(), String::from_utf8(said).unwrap())
}

/// Drains `n0` under a program of so many copies, kills the node, and sees the program through.
fn is_not_missed(fabric: &str, capacities: &[&str], replicas: &str) {
    let mut cluster = Cluster::start(fabric, capacities);
    let native = expected(&cluster);
    let mut program: Program = changing(&cluster, replicas, "summary");
    program.built();
    assert_eq!(program.check(), native[0]);
    assert!(granted(&cluster, 0) > 0);
    // It changes its data and forks meanwhile.
    program.ask();
    let (done, said) = drain(&cluster, &["n0", "--timeout", "60"]);
    assert!(done, "{said}");
    assert!(said.contains("can be stopped"), "{said}");
    assert_eq!(granted(&cluster, 0), 0);
    assert_eq!(cluster.status()["nodes"][0]["draining"], true);
    assert!(cluster.status_text().contains("draining"));
    assert_eq!(program.line_within(PATIENCE).as_ref(), Some(&native[1]));
    cluster.nodes[0].kill();
    for turn in &native[2..] {
        assert_eq!(&program.check(), turn);
    }
    ends_well(&cluster, program, "summary");
    cluster.nodes.remove(0);
    cluster.stop();
}

#[test]
fn a_drained_node_is_not_missed() {
    if cannot_run("a_drained_node_is_not_missed") {
        return;
    }
    let _alone = alone();
    is_not_missed("tcp", &["128M", "128M"], "1");
}

#[test]
fn a_drained_node_is_not_missed_where_pages_have_two_copies() {
    if cannot_run("a_drained_node_is_not_missed_where_pages_have_two_copies") {
        return;
    }
    let _alone = alone();
    is_not_missed("shm", &["128M", "128M", "128M"], "2");
}

#[test]
fn a_node_that_nobody_can_stand_in_for_keeps_what_it_has_and_says_so() {
    if cannot_run("a_node_that_nobody_can_stand_in_for_keeps_what_it_has_and_says_so") {
        return;
    }
    let _alone = alone();
    let cluster = Cluster::start("tcp", &["128M"]);
    let native = expected(&cluster);
    let mut program = changing(&cluster, "1", "summary");
    program.built();
    assert_eq!(program.check(), native[0]);
    let (done, said) = drain(&cluster, &["n0", "--timeout", "3"]);
    assert!(!done && said.contains("no other node has room"), "{said}");
    assert_eq!(program.check(), native[1]);
    let (done, said) = drain(&cluster, &["n0", "--undo"]);
    assert!(done, "{said}");
    assert_eq!(cluster.status()["nodes"][0]["draining"], false);
    for turn in &native[2..] {
        assert_eq!(&program.check(), turn);
    }
    ends_well(&cluster, program, "summary");
    let (done, said) = drain(&cluster, &["n9"]);
    assert!(!done && said.contains("no node `n9`"), "{said}");
    cluster.stop();
}
