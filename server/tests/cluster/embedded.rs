//! Coordinator and node in one process, for one run.

use std::io::Write;
use std::time::{Duration, Instant};

use farpage_proto::{ByteCount, FabricKind};
use farpage_server::{EmbeddedConfig, EmbeddedReady, embedded};

use crate::harness::*;

fn start(
    config: EmbeddedConfig,
    stop: tokio::sync::oneshot::Receiver<()>,
) -> (
    std::thread::JoinHandle<Result<(), farpage_server::EmbeddedError>>,
    EmbeddedReady,
    Duration,
) {
    let (told, ready) = std::sync::mpsc::channel();
    let started = Instant::now();
    let thread = std::thread::spawn(move || {
        embedded(
            config,
            move |ready| told.send((ready, started.elapsed())).unwrap(),
            async {
                let _ = stop.await;
            },
        )
    });
    let (ready, took) = ready.recv_timeout(DEADLINE).unwrap();
    (thread, ready, took)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_are_up_quickly_and_populate_nothing() {
    for (fabric, size) in [(FabricKind::Shm, 64 << 30), (FabricKind::Tcp, 1 << 30)] {
        let mut config = EmbeddedConfig::new(
            ByteCount(size),
            format!("farpage-test-{}-{fabric}", std::process::id()),
        );
        config.fabric = fabric;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (thread, ready, took) = start(config, stopped);
        eprintln!("embedded over {fabric}: ready after {took:?}");
        assert!(
            took < Duration::from_millis(100) || cfg!(debug_assertions),
            "{took:?}"
        );

        let mut agent = Agent::new(&ready.coordinator).await;
        let grants = agent.grant(4).await.unwrap();
        assert_eq!(grants[0].address.fabric(), fabric);
        assert_eq!(grants[0].bytes, ByteCount(16 << 20));
        let mut data = Data::connect(&grants[3].address.to_string());
        data.write(&grants[3], 4096, 3).unwrap();
        assert_eq!(data.read(&grants[3], 4096), Ok(vec![3; 4096]));
        drop(stop);
        tokio::task::spawn_blocking(move || thread.join().unwrap().unwrap())
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_ends_with_its_launcher() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut config = EmbeddedConfig::new(
        ByteCount(64 * MIB),
        format!("farpage-test-{}-eof", std::process::id()),
    );
    config.exit_on_eof = Some(reader.into());
    let (keep, stopped) = tokio::sync::oneshot::channel();
    let (thread, _, _) = start(config, stopped);
    writer.write_all(b"not the end yet").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!thread.is_finished());
    let closed = Instant::now();
    drop(writer);
    tokio::task::spawn_blocking(move || thread.join().unwrap().unwrap())
        .await
        .unwrap();
    assert!(
        closed.elapsed() < Duration::from_secs(1),
        "{:?}",
        closed.elapsed()
    );
    drop(keep);
}

#[test]
fn a_name_in_use_is_an_error() {
    let name = format!("farpage-test-{}-twice", std::process::id());
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let (thread, _, _) = start(
        EmbeddedConfig::new(ByteCount(64 * MIB), name.clone()),
        stopped,
    );
    let again = embedded(
        EmbeddedConfig::new(ByteCount(64 * MIB), name),
        |_| {},
        std::future::pending(),
    );
    assert!(again.unwrap_err().to_string().contains("in use"));
    drop(stop);
    thread.join().unwrap().unwrap();
}
