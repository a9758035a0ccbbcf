//! What comes over the wire and is no request.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use farpage_proto::LeaseId;
use farpage_proto::client::{CallError, Coordinator};
use farpage_proto::transport::{EndpointUrl, connect};
use farpage_proto::v1::{NodeHealth, OpenLeaseRequest, ReleaseExtentsRequest};
use tokio_stream::StreamExt;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::harness::*;

fn raw(url: &EndpointUrl) -> TcpStream {
    let EndpointUrl::Tcp(at) = url else { panic!() };
    let stream = TcpStream::connect((at.host.as_str(), at.port)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_overlong_messages_leave_the_servers_running() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (node, ready) = start_node(node_config("n1", 2, &url)).await;
    for target in [&url, &ready.control_url] {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        let frame =
            |length: u32, kind: u8| [&length.to_be_bytes()[1..], &[kind, 0, 0, 0, 0, 1]].concat();
        let mut noise: Vec<Vec<u8>> = (0..40u32).map(|seed| pseudo_random(seed, 3000)).collect();
        noise.push(b"GET / HTTP/1.1\r\n\r\n".to_vec());
        noise.push([preface.clone(), frame(0xff_ffff, 0)].concat());
        noise.extend((0..20u32).map(|seed| [preface.clone(), pseudo_random(seed, 2000)].concat()));
        noise.extend(
            (0..12u8).map(|kind| [preface.clone(), frame(9, kind), vec![0xff; 9]].concat()),
        );
        for bytes in noise {
            let mut stream = raw(target);
            // The server may hang up in the middle.
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read(&mut [0; 256]);
        }
    }

    let mut agent = Agent::new(&url).await;
    let extent_ids = vec![u32::MAX; 2 << 20];
    let error = agent
        .client
        .release_extents(ReleaseExtentsRequest {
            lease_id: 1,
            extent_ids,
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange, "{error:?}");
    let long = OpenLeaseRequest {
        agent_id: "a".repeat(100_000),
        host: "h".into(),
        tenant: String::new(),
    };
    let error = agent.client.open_lease(long).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().starts_with("agent_id: "), "{error:?}");
    // On a busy machine encoding the long message outlasts a lease.
    let mut agent = Agent::new(&url).await;
    agent
        .until("the node is heard of", |status| {
            status.nodes[0].health() == NodeHealth::Live
        })
        .await;
    assert_eq!(agent.grant(2).await.unwrap().len(), 2, "all is well");
    node.stop().await;
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_says_nothing_is_closed() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let mut stream = raw(&url);
    let waited = std::time::Instant::now();
    let mut end = [0; 64];
    let closed = tokio::task::spawn_blocking(move || {
        loop {
            match stream.read(&mut end) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    });
    assert!(closed.await.unwrap());
    assert!(waited.elapsed() < farpage_proto::limits::PREFACE_DEADLINE + Duration::from_secs(2));
    coordinator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_reflection_answer_on_both() {
    let (coordinator, url) = start_coordinator("memory:", loopback(0)).await;
    let (node, ready) = start_node(node_config("n1", 2, &url)).await;
    for (target, service) in [
        (&url, "farpage.v1.Coordinator"),
        (&ready.control_url, "farpage.v1.MemoryNode"),
    ] {
        let channel = connect(target, DEADLINE).await.unwrap();
        for name in ["", service] {
            let request = HealthCheckRequest {
                service: name.to_owned(),
            };
            let health = HealthClient::new(channel.clone())
                .check(request)
                .await
                .unwrap();
            assert_eq!(health.into_inner().status(), ServingStatus::Serving);
        }
        let list = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut reflection = ServerReflectionClient::new(channel);
        let answers = reflection
            .server_reflection_info(tokio_stream::once(list))
            .await
            .unwrap();
        let answer = answers
            .into_inner()
            .next()
            .await
            .unwrap()
            .unwrap()
            .message_response;
        let Some(MessageResponse::ListServicesResponse(services)) = answer else {
            panic!("{answer:?}")
        };
        assert!(
            services.service.iter().any(|s| s.name == service),
            "{services:?}"
        );
    }
    node.stop().await;
    coordinator.stop().await;
}

fn pseudo_random(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

const TARGET: &str = "FARPAGE_TEST_TARGET";

/// Not a test of its own: what another user's process does in the next test.
#[tokio::test]
async fn stranger_process() {
    let Ok(url) = std::env::var(TARGET) else {
        return;
    };
    let client = Coordinator::connect(&url.parse().unwrap(), Duration::from_secs(2)).await;
    let served = match client {
        Ok(client) => client.status().await.is_ok(),
        Err(_) => false,
    };
    println!("\nserved={served}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_a_unix_socket_other_users_are_not_served() {
    use std::os::unix::process::CommandExt;
    if !rustix::process::geteuid().is_root() {
        println!(
            "SKIPPED: over_a_unix_socket_other_users_are_not_served: only root can start a process as another user"
        );
        return;
    }
    // Where another user can run this program.
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let program = dir.path().join("stranger");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let url = EndpointUrl::UnixAbstract(format!("farpage-test-{}-uid", std::process::id()));
    let (coordinator, url) = start_coordinator("memory:", url).await;
    for (uid, served) in [(0, true), (65534, false)] {
        let mut command = std::process::Command::new(&program);
        command
            .args(["hostile::stranger_process", "--exact", "--nocapture"])
            .env(TARGET, url.to_string())
            .uid(uid);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap())
            .await
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            text.contains(&format!("served={served}")),
            "uid {uid}: {text}"
        );
    }
    let client = Coordinator::connect(&url, DEADLINE).await.unwrap();
    assert_eq!(client.status().await.unwrap().capacity_bytes, 0);
    let gone = client
        .renew_lease(LeaseId::new(1).unwrap())
        .await
        .unwrap_err();
    assert!(matches!(gone, CallError::Gone(_)), "{gone}");
    coordinator.stop().await;
}
