//! Granting, using, giving back, expiring.

use std::collections::BTreeMap;

use farpage_fabric::WorkError;
use farpage_proto::FabricKind;
use farpage_proto::v1::{
    AgentReport, CloseLeaseRequest, GrantExtentsRequest, ListGrantsRequest, ProcessReport,
    ReportAgentRequest,
};
use farpage_server::Lock;
use tonic::Code;

use crate::harness::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extent_is_fenced_and_zero_before_its_next_owner() {
    // As root the pool can be locked, and is then zeroed in place where it was at once.
    for lock in [Lock::No, Lock::AsUsed, Lock::AtOnce] {
        fence_and_scrub(lock).await;
    }
}

async fn fence_and_scrub(lock: Lock) {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let mut config = node_config("n1", 2, &url);
    config.lock = lock;
    config.shm = Some(format!("@farpage-test-{}-fence", std::process::id()));
    let (node, ready) = start_node(config).await;
    assert_eq!(ready.data_addresses.len(), 2);
    let mut agent = Agent::new(&url).await;
    let grants = agent.grant(2).await.unwrap();
    for grant in &grants {
        let mut data = Data::connect(&grant.address.to_string());
        assert_eq!(data.read(grant, 0), Ok(vec![0; 4096]));
        data.write(grant, MIB - 4096, 0xab).unwrap();
    }
    assert_eq!(agent.release(&grants[..1]).await, 1);
    assert_eq!(agent.release(&grants[..1]).await, 0, "released once");
    agent
        .until("scrubbed", |status| {
            status.pending_bytes == 0 && status.used_bytes == MIB
        })
        .await;

    let mut shm = Data::connect(&ready.data_addresses[1].to_string());
    assert_eq!(shm.read(&grants[0], 0), Err(WorkError::AccessDenied));
    let mut tcp = Data::connect(&ready.data_addresses[0].to_string());
    assert_eq!(tcp.write(&grants[0], 0, 1), Err(WorkError::AccessDenied));
    assert_eq!(
        tcp.read(&grants[1], MIB - 4096),
        Ok(vec![0xab; 4096]),
        "the other one stays"
    );

    let again = agent.grant_over(1, Some(FabricKind::Shm)).await.unwrap();
    assert_eq!(again[0].extent, grants[0].extent);
    assert!(again[0].epoch > grants[1].epoch);
    assert_ne!(again[0].key, grants[0].key);
    assert_eq!(again[0].address, ready.data_addresses[1]);
    assert_eq!(
        tcp.read(&again[0], MIB - 4096),
        Ok(vec![0; 4096]),
        "nothing of the last owner"
    );
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_cluster_says_so_with_totals() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (node, _) = start_node(node_config("n1", 4, &url)).await;
    let mut agent = Agent::new(&url).await;
    let error = agent.grant(5).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert!(
        error
            .message()
            .contains("5 extents are wanted and 4 are free"),
        "{error:?}"
    );
    assert!(
        error.message().contains("capacity 4 MiB, granted 0 B"),
        "{error:?}"
    );
    assert_eq!(agent.status().await.used_bytes, 0, "all or nothing");

    assert_eq!(agent.grant(4).await.unwrap().len(), 4);
    let error = agent.grant(1).await.unwrap_err();
    assert!(error.message().contains("granted 4 MiB"), "{error:?}");
    let error = agent
        .grant_over(1, Some(FabricKind::Rdma))
        .await
        .unwrap_err();
    assert!(error.message().contains("serve rdma"), "{error:?}");
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extents_are_spread_over_nodes() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (small, _) = start_node(node_config("small", 2, &url)).await;
    let (large, _) = start_node(node_config("large", 6, &url)).await;
    let mut agent = Agent::new(&url).await;
    let mut by_node = BTreeMap::new();
    for grant in agent.grant(6).await.unwrap() {
        *by_node.entry(grant.node.to_string()).or_insert(0) += 1;
    }
    assert_eq!(
        by_node,
        BTreeMap::from([("large".to_owned(), 5), ("small".to_owned(), 1)])
    );
    small.stop().await;
    large.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_expired_or_closed_lease_held_is_free_again() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (node, _) = start_node(node_config("n1", 4, &url)).await;
    let mut silent = Agent::new(&url).await;
    let held = silent.grant(3).await.unwrap();
    let mut data = Data::connect(&held[0].address.to_string());
    data.write(&held[0], 0, 7).unwrap();

    let mut other = Agent::new(&url).await;
    other
        .until("expired", |status| {
            status.agents.len() == 1 && status.used_bytes + status.pending_bytes == 0
        })
        .await;
    assert_eq!(data.read(&held[0], 0), Err(WorkError::AccessDenied));
    let error = silent.renew().await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains("open a new one"), "{error:?}");
    assert_eq!(silent.grant(1).await.unwrap_err().code(), Code::NotFound);

    other.grant(4).await.unwrap();
    for _ in 0..2 {
        other
            .client
            .close_lease(CloseLeaseRequest {
                lease_id: other.lease.get(),
            })
            .await
            .unwrap();
    }
    other
        .until("closed", |status| {
            status.agents.is_empty() && status.used_bytes + status.pending_bytes == 0
        })
        .await;
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_is_not_granted_twice() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (node, _) = start_node(node_config("n1", 4, &url)).await;
    let mut agent = Agent::new(&url).await;
    let message = GrantExtentsRequest {
        lease_id: agent.lease.get(),
        count: 2,
        fabric: 0,
        request_id: 99,
        ..Default::default()
    };
    let first = agent
        .client
        .grant_extents(message.clone())
        .await
        .unwrap()
        .into_inner();
    let again = agent
        .client
        .grant_extents(message)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first, again);
    let list = ListGrantsRequest {
        lease_id: agent.lease.get(),
        fabric: 0,
    };
    assert_eq!(
        agent
            .client
            .list_grants(list)
            .await
            .unwrap()
            .into_inner()
            .grants,
        first.grants
    );
    assert_eq!(agent.status().await.used_bytes, 2 * MIB);
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_agent_reports_is_shown_and_checked() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let mut agent = Agent::new(&url).await;
    let process = ProcessReport {
        pid: 42,
        comm: "so\x1brt".into(),
        far_pages: 10,
        ..Default::default()
    };
    let report = AgentReport {
        processes: vec![process],
        totals: [("faults".to_owned(), 3)].into(),
    };
    let message = ReportAgentRequest {
        lease_id: agent.lease.get(),
        report: Some(report.clone()),
    };
    agent.client.report_agent(message).await.unwrap();
    let shown = agent.status().await.agents.remove(0).report.unwrap();
    assert_eq!(shown.processes[0].comm, "so?rt");
    assert_eq!(
        (shown.processes[0].far_pages, shown.totals["faults"]),
        (10, 3)
    );

    let more_than_all = ProcessReport {
        shared_far_pages: 11,
        ..report.processes[0].clone()
    };
    let message = ReportAgentRequest {
        lease_id: agent.lease.get(),
        report: Some(AgentReport {
            processes: vec![more_than_all],
            ..Default::default()
        }),
    };
    let error = agent.client.report_agent(message).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("shared_far_pages"), "{error:?}");

    let too_many = AgentReport {
        processes: vec![report.processes[0].clone(); 1025],
        ..Default::default()
    };
    let message = ReportAgentRequest {
        lease_id: agent.lease.get(),
        report: Some(too_many),
    };
    let error = agent.client.report_agent(message).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(
        error.message().starts_with("report.processes: "),
        "{error:?}"
    );
    coordinator.stop().await;
}
