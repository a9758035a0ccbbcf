//! Nodes that come, go, and stand in each other's way.

use std::time::Duration;

use farpage_proto::transport::{EndpointUrl, connect};
use farpage_proto::v1::memory_node_client::MemoryNodeClient;
use farpage_proto::v1::{GrantExtentRequest, NodeHealth, RevokeExtentRequest};
use farpage_server::{NodeError, TcpListen};
use tokio::net::TcpListener;
use tonic::Code;

use crate::harness::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_taken_id_and_a_taken_address_are_refused_by_name() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (node, ready) = start_node(node_config("n1", 2, &url)).await;
    let (twin, _) = launch_node(node_config("n1", 2, &url));
    let error = twin.ended().await;
    assert!(matches!(error, NodeError::Membership(_)), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("node `n1`") && text.contains(&ready.control_url.to_string()),
        "{text}"
    );
    assert!(text.contains("give this one another id"), "{text}");

    // A name that only this network namespace knows can be registered from elsewhere: refused by the coordinator.
    let mut agent = Agent::new(&url).await;
    let registration = farpage_proto::v1::RegisterNodeRequest {
        node_id: "n2".into(),
        incarnation: 5,
        capacity_bytes: MIB,
        extent_bytes: MIB,
        data_addresses: vec![ready.data_addresses[0].to_string()],
        control_url: "unix:@nowhere".into(),
        control_token: vec![0; 16],
        ..Default::default()
    };
    let error = agent
        .client
        .register_node(registration.clone())
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists);
    assert!(
        error
            .message()
            .contains(&ready.data_addresses[0].to_string()),
        "{error:?}"
    );
    assert!(error.message().contains("node `n1`"), "{error:?}");
    let bad = farpage_proto::v1::RegisterNodeRequest {
        extent_bytes: MIB + 1,
        ..registration
    };
    let error = agent.client.register_node(bad).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("extent_bytes: "), "{error:?}");
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_comes_back_empty_and_its_extents_are_lost_by_name() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (node, _) = start_node(node_config("n1", 2, &url)).await;
    let mut agent = Agent::new(&url).await;
    let grants = agent.grant(2).await.unwrap();
    node.kill().await;
    agent
        .until("unreachable", |status| {
            status.nodes[0].health() == NodeHealth::Unreachable
        })
        .await;
    let renewal = agent.renew().await.unwrap();
    assert_eq!(
        (
            renewal.lost_extents.len(),
            renewal.unreachable_extents.len()
        ),
        (0, 2)
    );
    let error = agent.grant(1).await.unwrap_err();
    assert!(
        error.message().contains("on unreachable nodes 2 MiB"),
        "{error:?}"
    );

    let (node, _) = start_node(node_config("n1", 2, &url)).await;
    let lost: Vec<u32> = grants.iter().map(|grant| grant.extent.0).collect();
    assert_eq!(agent.renew().await.unwrap().lost_extents, lost);
    assert_eq!(agent.release(&grants).await, 2);
    assert!(agent.renew().await.unwrap().lost_extents.is_empty());
    assert!(
        agent
            .grant(2)
            .await
            .unwrap()
            .iter()
            .all(|grant| !lost.contains(&grant.extent.0))
    );
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_restarts_at_once_need_not_wait_for_its_own_timeout() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let mut config = node_config("n1", 2, &url);
    let (node, ready) = start_node(config.clone()).await;
    // The same addresses again, as with fixed ports.
    config.control = ready.control_url.clone();
    let text = ready.data_addresses[0].to_string();
    let EndpointUrl::Tcp(at) = text.strip_prefix("tcp:").unwrap().parse().unwrap() else {
        panic!()
    };
    config.tcp = Some(TcpListen { listen: at });
    node.stop().await;
    let (node, _) = start_node(config).await;
    let mut agent = Agent::new(&url).await;
    assert_eq!(agent.status().await.nodes.len(), 1);
    agent.grant(2).await.unwrap();
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_waits_for_its_coordinator_and_finds_one_that_forgot_it() {
    // A port that nobody listens on yet.
    let (first, url) = start_coordinator("memory:", loopback(0)).await;
    first.stop().await;
    let (node, ready) = launch_node(node_config("n1", 2, &url));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (coordinator, url) = start_coordinator("memory:", url).await;
    tokio::time::timeout(DEADLINE, ready)
        .await
        .unwrap()
        .unwrap();
    let mut agent = Agent::new(&url).await;
    let grants = agent.grant(2).await.unwrap();
    let mut data = Data::connect(&grants[0].address.to_string());
    data.write(&grants[0], 0, 9).unwrap();

    // The next one knows nothing: it must not grant what the node still has open for somebody.
    coordinator.kill().await;
    let (coordinator, url) = start_coordinator("memory:", url).await;
    let mut agent = Agent::new(&url).await;
    agent
        .until("registered and scrubbed", |s| {
            s.capacity_bytes == 2 * MIB && s.pending_bytes == 0
        })
        .await;
    assert!(data.read(&grants[0], 0).is_err());
    let again = agent.grant(2).await.unwrap();
    assert!(again[0].epoch > grants[1].epoch);
    assert_eq!(data.read(&again[0], 0), Ok(vec![0; 4096]));
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_coordinator_may_grant_and_revoke() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (node, ready) = start_node(node_config("n1", 2, &url)).await;
    let mut client = MemoryNodeClient::new(connect(&ready.control_url, DEADLINE).await.unwrap());
    let error = client
        .grant_extent(GrantExtentRequest {
            index: 0,
            epoch: 1,
            key: 1,
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    let error = client
        .revoke_extent(RevokeExtentRequest { index: 0, epoch: 1 })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    let info = client
        .node_info(farpage_proto::v1::NodeInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (
            info.node_id.as_str(),
            info.capacity_bytes,
            info.granted_extents
        ),
        ("n1", 2 * MIB, 0)
    );
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_node_stands_in_for_one_that_hangs() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (node, _) = start_node(node_config("works", 4, &url)).await;
    let mut agent = Agent::new(&url).await;
    // Takes connections, says nothing; its heartbeats go on, as with a node whose disk or pool is stuck. It is the
    // emptiest, and so asked first.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let registration = farpage_proto::v1::RegisterNodeRequest {
        node_id: "hangs".into(),
        incarnation: 5,
        capacity_bytes: 32 * MIB,
        extent_bytes: MIB,
        data_addresses: vec!["tcp:127.0.0.1:1".into()],
        control_url: format!("http://{}", silent.local_addr().unwrap()),
        control_token: vec![0; 16],
        ..Default::default()
    };
    agent.client.register_node(registration).await.unwrap();
    let mut beats = agent.client.clone();
    let (mut renewals, lease) = (agent.client.clone(), agent.lease.get());
    let beating = tokio::spawn(async move {
        loop {
            let beat = farpage_proto::v1::NodeHeartbeatRequest {
                node_id: "hangs".into(),
                incarnation: 5,
            };
            beats.node_heartbeat(beat).await.unwrap();
            renewals
                .renew_lease(farpage_proto::v1::RenewLeaseRequest { lease_id: lease })
                .await
                .unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let grants = agent.grant(3).await.unwrap();
    assert_eq!(grants.len(), 3);
    assert!(
        grants.iter().all(|grant| grant.node.as_str() == "works"),
        "{grants:?}"
    );
    // Whether the other one granted is not known: those extents wait for its confirmation.
    assert_eq!(agent.status().await.pending_bytes, 3 * MIB);
    beating.abort();
    node.stop().await;
    coordinator.stop().await;
}
