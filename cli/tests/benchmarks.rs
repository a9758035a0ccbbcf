//! `farpage bench`: the form and the names of what it writes, which are a contract. Of figures, only that there are some.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::process::Command;

#[test]
fn fabric_measures_every_size_over_every_number_of_queue_pairs() {
    let json = tempfile::NamedTempFile::new().unwrap();
    let out = Command::new(common::farpage())
        .args(["bench", "fabric", "--fabric", "tcp", "--turns", "1"])
        .args(["--sizes", "4K,1M", "--queues", "1,2", "--json"])
        .arg(json.path())
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(json.path()).unwrap()).unwrap();
    let measurements = report["measurements"].as_array().unwrap();
    let mut names: Vec<&str> = Vec::new();
    for one in measurements {
        names.push(one["name"].as_str().unwrap());
        assert!(one["ours"].as_f64().unwrap() > 0.0, "{one}");
        assert_eq!(one["fabric"], "tcp");
    }
    let expected = ["4k", "1m"].map(|size| {
        let streams = ["", ".q2"].map(|queues| {
            ["read", "write"]
                .map(|way| ["bandwidth", "messages"].map(|of| format!("{way}{size}.{of}{queues}")))
        });
        let mut names = vec![format!("read{size}.latency.p50")];
        names.extend(streams.into_iter().flatten().flatten());
        names
    });
    assert_eq!(names, expected.concat());
    // One page at a time is compared with a bare round trip.
    assert!(measurements[0]["ratio"].is_number(), "{report}");
}
