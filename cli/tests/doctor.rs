//! `farpage doctor` says what is short, and what to do about it.

#![allow(missing_docs)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::io::ErrorKind;
use std::process::Command;

use common::{farpage, skip, sys};

const MIB: u64 = 1 << 20;

/// What is said of lockable memory where so much may be locked; none where this account may not have that.
fn memlock(bytes: u64) -> Option<serde_json::Value> {
    let mut command = Command::new(farpage());
    command.args(["doctor", "--json"]);
    sys::before_exec(&mut command, move || sys::limit_locked_memory(bytes));
    let out = match command.output() {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return None,
        out => out.unwrap(),
    };
    assert_eq!(out.status.code(), Some(0));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["id"] == "memlock");
    Some(check.unwrap().clone())
}

#[test]
fn too_little_lockable_memory_is_told_with_the_remedy() {
    let Some(little) = memlock(MIB) else {
        return skip(
            "too_little_lockable_memory_is_told_with_the_remedy",
            "this account may lock less than 1 MiB",
        );
    };
    assert_eq!(little["level"], "optional", "{little}");
    assert_eq!(little["found"], "only 1.0 MiB", "{little}");
    let remedy = little["remedy"].as_str().unwrap();
    assert!(remedy.contains("ulimit -l unlimited") && remedy.contains("LimitMEMLOCK"));
}

#[test]
fn nobody_is_sent_to_raise_a_limit_that_is_enough() {
    let Some(enough) = memlock(64 * MIB) else {
        return skip(
            "nobody_is_sent_to_raise_a_limit_that_is_enough",
            "this account may not raise its limit of locked memory to 64 MiB",
        );
    };
    assert_eq!(enough["level"], "ok", "{enough}");
    assert_eq!(enough["remedy"], serde_json::Value::Null, "{enough}");
}
