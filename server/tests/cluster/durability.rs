//! What survives the coordinator.

use farpage_proto::lease::ExtentGrant;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use farpage_proto::transport::EndpointUrl;
use farpage_server::{CoordinatorConfig, run_coordinator};
use tonic::Code;

use crate::harness::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_and_grants_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = format!("file:{}", dir.path().join("state").display());
    let (coordinator, url) = start_coordinator(&store, loopback(0)).await;
    let (node, _) = start_node(node_config("n1", 4, &url)).await;
    let mut agent = Agent::new(&url).await;
    let grants = agent.grant(2).await.unwrap();
    let mut data = Data::connect(&grants[0].address.to_string());
    data.write(&grants[0], 0, 5).unwrap();
    coordinator.stop().await;

    assert_eq!(
        data.read(&grants[0], 0),
        Ok(vec![5; 4096]),
        "programs run on"
    );
    // Longer than a lease lives: nobody could renew meanwhile.
    tokio::time::sleep(TIMING.lease_ttl + Duration::from_millis(200)).await;
    let (coordinator, _) = start_coordinator(&store, url.clone()).await;
    assert!(agent.renew().await.unwrap().lost_extents.is_empty());
    assert_eq!(data.read(&grants[0], 0), Ok(vec![5; 4096]));
    agent
        .until("the node is known", |status| {
            status.used_bytes == 2 * MIB && status.pending_bytes == 0
        })
        .await;
    let more = agent.grant(2).await.unwrap();
    assert!(more[0].epoch > grants[1].epoch);
    assert!(
        more.iter()
            .all(|grant| grants.iter().all(|old| old.extent != grant.extent)),
        "never two owners"
    );
    assert_eq!(
        agent.grant(1).await.unwrap_err().code(),
        Code::ResourceExhausted
    );

    // The state is for its owner's eyes.
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(dir.path().join("state"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_coordinator_on_the_same_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = format!("file:{}", dir.path().join("state").display());
    let (coordinator, _) = start_coordinator(&store, loopback(0)).await;
    let config = CoordinatorConfig {
        listen: loopback(0),
        store: store.parse().unwrap(),
        timing: TIMING,
    };
    let error = run_coordinator(config, |_| {}, std::future::pending())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("in use by another coordinator"),
        "{error}"
    );
    coordinator.stop().await;
}

const STATE: &str = "FARPAGE_TEST_STATE";
const LISTEN: &str = "FARPAGE_TEST_LISTEN";

/// Not a test of its own: the process that the next test kills.
#[tokio::test]
async fn coordinator_process() {
    let (Ok(store), Ok(listen)) = (std::env::var(STATE), std::env::var(LISTEN)) else {
        return;
    };
    let (coordinator, url) = start_coordinator(&store, listen.parse().unwrap()).await;
    println!("\nserving={url}");
    std::future::pending::<()>().await;
    coordinator.stop().await;
}

fn spawn_coordinator(store: &str, listen: &EndpointUrl) -> (Child, EndpointUrl) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["durability::coordinator_process", "--exact", "--nocapture"])
        .env(STATE, store)
        .env(LISTEN, listen.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let url = lines
        .map_while(Result::ok)
        .find_map(|line| Some(line.strip_prefix("serving=")?.parse().unwrap()));
    (child, url.expect("the coordinator serves"))
}

/// Kills (SIGKILL) the coordinator's process again and again while agents borrow and give back. Whatever it answered
/// must hold afterwards, and in the end everything is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_was_answered_survives_sigkill() {
    const ROUNDS: u64 = 6;
    let dir = tempfile::tempdir().unwrap();
    let store = format!("file:{}", dir.path().join("state").display());
    let (mut process, url) = spawn_coordinator(&store, &loopback(0));
    let (node, _) = start_node(node_config("n1", 64, &url)).await;
    let mut agent = Agent::new(&url).await;
    let mut held = Vec::new();
    for round in 0..ROUNDS {
        held.extend(agent.grant(3).await.unwrap());
        // Keep it busy until it dies in the middle of something.
        let pid = rustix::process::Pid::from_child(&process);
        let killer = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(20 + 13 * round)).await;
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        });
        while let Ok(grants) = agent.grant(3).await {
            held.extend(grants);
            let give = held.split_off(held.len() - 1);
            let extent_ids = give.iter().map(|grant| grant.extent.0).collect();
            let message = farpage_proto::v1::ReleaseExtentsRequest {
                lease_id: agent.lease.get(),
                extent_ids,
            };
            if agent.client.release_extents(message).await.is_err() {
                break;
            }
        }
        killer.await.unwrap();
        process.wait().unwrap();
        (process, _) = spawn_coordinator(&store, &url);
        let list = farpage_proto::v1::ListGrantsRequest {
            lease_id: agent.lease.get(),
            fabric: 0,
        };
        let listed = agent
            .client
            .list_grants(list)
            .await
            .unwrap()
            .into_inner()
            .grants;
        let listed = farpage_proto::lease::check_grants(listed).unwrap();
        for grant in &held {
            // Which grants are copies of one extent is said when they are granted, and not again.
            let is_it = |one: &ExtentGrant| {
                let set = grant.set;
                ExtentGrant { set, ..one.clone() } == *grant
            };
            assert!(
                listed.iter().any(is_it),
                "round {round}: {grant:?} was granted and is forgotten"
            );
            let mut data = Data::connect(&grant.address.to_string());
            assert!(
                data.read(grant, 0).is_ok(),
                "round {round}: the node still honours {grant:?}"
            );
        }
        // What was granted and not heard of is given back, as an agent would.
        agent.release(&listed).await;
        held.clear();
        agent
            .until("all is free", |status| {
                status.capacity_bytes == 64 * MIB && status.used_bytes + status.pending_bytes == 0
            })
            .await;
    }
    process.kill().unwrap();
    process.wait().unwrap();
    node.stop().await;
}
