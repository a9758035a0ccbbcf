//! Starting and stopping parts of a cluster, and moving bytes through grants.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farpage_fabric::memory::MemoryOptions;
use farpage_fabric::{
    Endpoint, LocalSlice, RegionId, RegisteredMemory, RemoteSlice, WorkError, WorkId,
};
use farpage_proto::address::HostPort;
use farpage_proto::lease::{ExtentGrant, GrantRequest, check_grants};
use farpage_proto::transport::{EndpointUrl, connect};
use farpage_proto::v1::coordinator_client::CoordinatorClient;
use farpage_proto::v1::{
    GetStatusRequest, GetStatusResponse, OpenLeaseRequest, ReleaseExtentsRequest, RenewLeaseRequest,
};
use farpage_proto::{ByteCount, FabricKind, LeaseId, NodeId};
use farpage_server::coordinator::Timing;
use farpage_server::*;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::Channel;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
pub(crate) const TIMING: Timing = Timing {
    lease_ttl: Duration::from_millis(3000),
    node_timeout: Duration::from_millis(1000),
    revoke_retry: Duration::from_millis(300),
};

/// A part that runs as a task.
pub(crate) struct Running<E> {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), E>>,
}

impl<E: std::fmt::Debug + Send + 'static> Running<E> {
    /// In order.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .expect("stops in time")
            .unwrap()
            .unwrap();
    }

    /// As if its process had died: its sockets close, nothing is said to anybody.
    pub(crate) async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }

    /// Waits for it to end by itself.
    pub(crate) async fn ended(self) -> E {
        tokio::time::timeout(DEADLINE, self.task)
            .await
            .expect("ends in time")
            .unwrap()
            .unwrap_err()
    }
}

pub(crate) fn loopback(port: u16) -> EndpointUrl {
    EndpointUrl::Tcp(HostPort {
        host: "127.0.0.1".to_owned(),
        port,
    })
}

pub(crate) async fn start_coordinator(
    store: &str,
    listen: EndpointUrl,
) -> (Running<CoordinatorError>, EndpointUrl) {
    let config = CoordinatorConfig {
        listen,
        store: store.parse().unwrap(),
        timing: TIMING,
    };
    let (stop, stopped) = oneshot::channel::<()>();
    let (told, ready) = oneshot::channel();
    let task = tokio::spawn(run_coordinator(
        config,
        |ready| drop(told.send(ready.url)),
        async {
            let _ = stopped.await;
        },
    ));
    let url = tokio::time::timeout(DEADLINE, ready)
        .await
        .unwrap()
        .unwrap();
    (Running { stop, task }, url)
}

pub(crate) fn node_config(id: &str, extents: u64, coordinator: &EndpointUrl) -> NodeConfig {
    let mut config = NodeConfig::new(
        NodeId::new(id).unwrap(),
        ByteCount(extents * MIB),
        coordinator.clone(),
    );
    config.extent_bytes = ByteCount(MIB);
    config.tcp = Some(TcpListen {
        listen: HostPort {
            host: "127.0.0.1".to_owned(),
            port: 0,
        },
    });
    config
}

/// Starts a node without waiting for it to register.
pub(crate) fn launch_node(
    config: NodeConfig,
) -> (Running<NodeError>, oneshot::Receiver<NodeReady>) {
    let (stop, stopped) = oneshot::channel::<()>();
    let (told, ready) = oneshot::channel();
    let task = tokio::spawn(run_node(config, |ready| drop(told.send(ready)), async {
        let _ = stopped.await;
    }));
    (Running { stop, task }, ready)
}

pub(crate) async fn start_node(config: NodeConfig) -> (Running<NodeError>, NodeReady) {
    let (node, ready) = launch_node(config);
    (
        node,
        tokio::time::timeout(DEADLINE, ready)
            .await
            .unwrap()
            .expect("the node registers"),
    )
}

/// A coordinator's client with one lease.
pub(crate) struct Agent {
    pub(crate) client: CoordinatorClient<Channel>,
    pub(crate) lease: LeaseId,
}

impl Agent {
    pub(crate) async fn new(url: &EndpointUrl) -> Self {
        let mut client = CoordinatorClient::new(connect(url, DEADLINE).await.unwrap());
        let message = OpenLeaseRequest {
            agent_id: "agent".into(),
            host: "host".into(),
            tenant: String::new(),
        };
        let lease = client
            .open_lease(message)
            .await
            .unwrap()
            .into_inner()
            .lease_id;
        Self {
            client,
            lease: LeaseId::new(lease).unwrap(),
        }
    }

    pub(crate) async fn grant(&mut self, count: u32) -> Result<Vec<ExtentGrant>, Status> {
        self.grant_over(count, None).await
    }

    pub(crate) async fn grant_over(
        &mut self,
        count: u32,
        fabric: Option<FabricKind>,
    ) -> Result<Vec<ExtentGrant>, Status> {
        let request = GrantRequest {
            lease: self.lease,
            count,
            copies: 1,
            extent_bytes: None,
            avoid: Vec::new(),
            fabric,
            request: None,
        };
        let message = farpage_proto::v1::GrantExtentsRequest::from(request);
        Ok(check_grants(
            self.client
                .grant_extents(message)
                .await?
                .into_inner()
                .grants,
        )
        .unwrap())
    }

    pub(crate) async fn release(&mut self, grants: &[ExtentGrant]) -> u32 {
        let extent_ids = grants.iter().map(|grant| grant.extent.0).collect();
        let message = ReleaseExtentsRequest {
            lease_id: self.lease.get(),
            extent_ids,
        };
        self.client
            .release_extents(message)
            .await
            .unwrap()
            .into_inner()
            .released
    }

    pub(crate) async fn renew(&mut self) -> Result<farpage_proto::v1::RenewLeaseResponse, Status> {
        Ok(self
            .client
            .renew_lease(RenewLeaseRequest {
                lease_id: self.lease.get(),
            })
            .await?
            .into_inner())
    }

    pub(crate) async fn status(&mut self) -> GetStatusResponse {
        self.client
            .get_status(GetStatusRequest {})
            .await
            .unwrap()
            .into_inner()
    }

    /// Renews, and looks at the status, until it is as wanted.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&GetStatusResponse) -> bool,
    ) {
        let started = Instant::now();
        loop {
            // A lease that has ended is what some wait for.
            let _ = self.renew().await;
            let status = self.status().await;
            if wanted(&status) {
                return;
            }
            assert!(started.elapsed() < DEADLINE, "{what}: {status:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// One connection to a node's data path, with a page of local memory.
pub(crate) struct Data {
    endpoint: Box<dyn Endpoint>,
    memory: Arc<RegisteredMemory>,
    region: RegionId,
}

impl Data {
    pub(crate) fn connect(address: &str) -> Self {
        let deadline = Instant::now() + DEADLINE;
        let mut endpoint = farpage_fabric::connect(&address.parse().unwrap(), 8, deadline).unwrap();
        let (memory, _) = RegisteredMemory::create("test", 4096, MemoryOptions::default()).unwrap();
        let memory = Arc::new(memory);
        let region = endpoint.register(Arc::clone(&memory));
        Self {
            endpoint,
            memory,
            region,
        }
    }

    pub(crate) fn read(&mut self, grant: &ExtentGrant, offset: u64) -> Result<Vec<u8>, WorkError> {
        let (local, remote) = self.slices(grant, offset);
        self.endpoint.post_read(WorkId(1), local, remote).unwrap();
        self.wait()?;
        let mut bytes = vec![0; 4096];
        self.memory.read(0, &mut bytes).unwrap();
        Ok(bytes)
    }

    pub(crate) fn write(
        &mut self,
        grant: &ExtentGrant,
        offset: u64,
        byte: u8,
    ) -> Result<(), WorkError> {
        self.memory.write(0, &[byte; 4096]).unwrap();
        let (local, remote) = self.slices(grant, offset);
        self.endpoint.post_write(WorkId(1), local, remote).unwrap();
        self.wait()
    }

    fn slices(&self, grant: &ExtentGrant, offset: u64) -> (LocalSlice, RemoteSlice) {
        let local = LocalSlice {
            region: self.region,
            offset: 0,
            len: 4096,
        };
        (
            local,
            RemoteSlice {
                extent: grant.index,
                key: grant.key.get(),
                offset,
            },
        )
    }

    fn wait(&mut self) -> Result<(), WorkError> {
        self.endpoint.flush();
        let started = Instant::now();
        let mut done = Vec::new();
        while self.endpoint.poll(&mut done) == 0 {
            assert!(started.elapsed() < DEADLINE, "no completion");
            std::thread::yield_now();
        }
        done[0].result
    }
}
