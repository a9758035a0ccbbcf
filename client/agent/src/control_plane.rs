//! The agent's side of the control plane: a lease, extents granted under it, reports.
//!
//! One thread with a runtime of its own. No pager waits for it: extents are asked for before they are needed,
//! and while the coordinator is away programs run on with what is granted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farpage_proto::lease::check_grants;
use farpage_proto::transport::{ConnectError, EndpointUrl, connect};
use farpage_proto::v1::coordinator_client::CoordinatorClient;
use farpage_proto::{FabricKind, FieldError, v1};
use tonic::transport::Channel;

use crate::far::{FarMemory, Grant};
use crate::protocol::ProcessFigures;
use crate::spaces::Spaces;

/// How long any one call may take.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// Between two reports, and between two looks for extents to give back.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Free slots kept when unused extents are given back, so that a program that breathes does not churn grants.
const SPARE_SLOTS: u64 = 16_384;
/// Extents asked for at once.
const GRANT_COUNT: u32 = 2;
/// The pause after a call that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no far memory at the start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The coordinator cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It answered with an error.
    #[error("the coordinator at {url} refused: {status}")]
    Refused {
        /// Where it is.
        url: EndpointUrl,
        /// What it said.
        status: Box<tonic::Status>,
    },
    /// It answered nonsense.
    #[error("the coordinator's answer is malformed: {0}; are both of the same version?")]
    Malformed(#[from] FieldError),
    /// No runtime.
    #[error("cannot start the control plane's thread: {0}")]
    Runtime(#[from] std::io::Error),
}

/// The agent's membership in a cluster.
#[derive(Debug)]
pub struct ControlPlane {
    runtime: tokio::runtime::Runtime,
    url: EndpointUrl,
    agent_id: String,
    fabric: Option<FabricKind>,
    client: CoordinatorClient<Channel>,
    lease: u64,
    ttl: Duration,
    renewed: Instant,
}

impl ControlPlane {
    /// Connects and opens a lease.
    ///
    /// # Errors
    /// [`ControlError`], with what to do.
    pub fn join(
        url: EndpointUrl,
        agent_id: String,
        fabric: Option<FabricKind>,
    ) -> Result<Self, ControlError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let channel = runtime.block_on(connect(&url, CALL_DEADLINE))?;
        let mut client = CoordinatorClient::new(channel);
        let (lease, ttl) = runtime
            .block_on(open_lease(&mut client, &agent_id))
            .map_err(|status| ControlError::Refused {
                url: url.clone(),
                status: Box::new(status),
            })?;
        Ok(Self {
            runtime,
            url,
            agent_id,
            fabric,
            client,
            lease,
            ttl,
            renewed: Instant::now(),
        })
    }

    /// Asks for the first extents, so that the first eviction finds slots.
    ///
    /// # Errors
    /// [`ControlError::Refused`] when the cluster is full.
    pub fn first_extents(&mut self, far: &FarMemory) -> Result<(), ControlError> {
        match self.grant(far) {
            Ok(()) => Ok(()),
            Err(status) => Err(ControlError::Refused {
                url: self.url.clone(),
                status: Box::new(status),
            }),
        }
    }

    /// Keeps the lease and the supply of extents until `ended` says so; then gives everything back.
    pub fn run(mut self, far: &Arc<FarMemory>, spaces: &Arc<Spaces>, ended: &dyn Fn() -> bool) {
        let mut reported = Instant::now();
        while !ended() {
            let wanted = spaces.wait_for_want(self.ttl.min(REPORT_INTERVAL) / 4);
            if (wanted || far.is_low() && far.used() > 0)
                && let Err(status) = self.grant(far)
            {
                tracing::warn!(%status, "no further extent of far memory");
                std::thread::sleep(RETRY_PAUSE);
            }
            if self.renewed.elapsed() > self.ttl / 4 {
                self.renew(far);
            }
            if reported.elapsed() > REPORT_INTERVAL {
                reported = Instant::now();
                self.give_back(far);
                self.report(spaces);
            }
        }
        let request = v1::CloseLeaseRequest {
            lease_id: self.lease,
        };
        let _ = self.runtime.block_on(async {
            tokio::time::timeout(CALL_DEADLINE, self.client.close_lease(request)).await
        });
    }

    fn grant(&mut self, far: &FarMemory) -> Result<(), tonic::Status> {
        let request = v1::GrantExtentsRequest {
            lease_id: self.lease,
            count: GRANT_COUNT,
            fabric: FabricKind::to_wire(self.fabric),
            request_id: 0,
        };
        let client = &mut self.client;
        let reply = self
            .runtime
            .block_on(async { with_deadline(client.grant_extents(request)).await })?;
        let grants = check_grants(reply.grants)
            .map_err(|error| tonic::Status::internal(error.to_string()))?;
        for grant in grants {
            let grant = Grant {
                id: u64::from(grant.extent.0),
                address: grant.address.to_string(),
                index: grant.index,
                key: grant.key.get(),
                bytes: grant.bytes.0,
            };
            if far.add(grant.clone()).is_none() {
                tracing::error!(
                    ?grant,
                    "an extent of a size or number that this agent cannot address"
                );
            }
        }
        Ok(())
    }

    fn renew(&mut self, far: &FarMemory) {
        let (client, lease) = (&mut self.client, self.lease);
        let request = v1::RenewLeaseRequest { lease_id: lease };
        match self
            .runtime
            .block_on(async { with_deadline(client.renew_lease(request)).await })
        {
            Ok(reply) => {
                self.renewed = Instant::now();
                let lost: Vec<u64> = reply.lost_extents.iter().map(|id| u64::from(*id)).collect();
                if !lost.is_empty() {
                    far.lose(&lost);
                }
            }
            Err(status) if status.code() == tonic::Code::NotFound => {
                tracing::error!("the lease has ended: what it held is revoked");
                far.lose_all();
                let client = &mut self.client;
                if let Ok((lease, ttl)) = self.runtime.block_on(open_lease(client, &self.agent_id))
                {
                    (self.lease, self.ttl, self.renewed) = (lease, ttl, Instant::now());
                }
            }
            Err(status) => {
                tracing::warn!(%status, "the coordinator does not answer; programs run on with what is granted");
                std::thread::sleep(RETRY_PAUSE);
            }
        }
    }

    fn give_back(&mut self, far: &FarMemory) {
        let retired = far.retire(SPARE_SLOTS);
        if retired.is_empty() {
            return;
        }
        let extent_ids = retired
            .iter()
            .filter_map(|grant| u32::try_from(grant.id).ok())
            .collect();
        let request = v1::ReleaseExtentsRequest {
            lease_id: self.lease,
            extent_ids,
        };
        let client = &mut self.client;
        if let Err(status) = self
            .runtime
            .block_on(async { with_deadline(client.release_extents(request)).await })
        {
            tracing::warn!(%status, "extents could not be given back; they go with the lease");
        }
    }

    fn report(&mut self, spaces: &Spaces) {
        let processes = figures(spaces)
            .into_iter()
            .take(farpage_proto::limits::MAX_PROCESSES)
            .map(|figures| v1::ProcessReport {
                pid: figures.pid.unsigned_abs(),
                comm: figures.name,
                local_pages: figures.local_pages,
                far_pages: figures.far_pages,
                total_pages: figures.local_pages + figures.far_pages,
                faults: figures.faults,
                evicted_pages: 0,
                poisoned_pages: 0,
                local_limit_bytes: figures.local_limit_bytes,
            })
            .collect();
        let report = v1::AgentReport {
            processes,
            totals: std::collections::HashMap::new(),
        };
        let request = v1::ReportAgentRequest {
            lease_id: self.lease,
            report: Some(report),
        };
        let client = &mut self.client;
        if let Err(status) = self
            .runtime
            .block_on(async { with_deadline(client.report_agent(request)).await })
        {
            tracing::debug!(%status, "a report was not taken");
        }
    }
}

async fn open_lease(
    client: &mut CoordinatorClient<Channel>,
    agent_id: &str,
) -> Result<(u64, Duration), tonic::Status> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .unwrap_or_default()
        .trim()
        .to_owned();
    let request = v1::OpenLeaseRequest {
        agent_id: agent_id.to_owned(),
        host,
        tenant: String::new(),
    };
    let reply = with_deadline(client.open_lease(request)).await?;
    Ok((
        reply.lease_id,
        Duration::from_millis(u64::from(reply.ttl_ms)),
    ))
}

async fn with_deadline<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, tonic::Status> {
    match tokio::time::timeout(CALL_DEADLINE, call).await {
        Ok(reply) => reply.map(tonic::Response::into_inner),
        Err(_) => Err(tonic::Status::deadline_exceeded("no answer in time")),
    }
}

/// Figures of every address space, for reports and for `farpage status`.
#[must_use]
pub fn figures(spaces: &Spaces) -> Vec<ProcessFigures> {
    use std::sync::atomic::Ordering::Relaxed;
    let of_job = |job: Arc<crate::job::Job>| {
        let limit = job.limits.local_pages * 4096;
        job.spaces().into_iter().map(move |handle| {
            let pid = handle.pid().unwrap_or(0);
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            ProcessFigures {
                pid,
                name: name.trim_end().to_owned(),
                local_pages: handle.figures.local.load(Relaxed),
                far_pages: handle.figures.far.load(Relaxed),
                faults: handle.figures.faults.load(Relaxed),
                local_limit_bytes: limit,
            }
        })
    };
    spaces.jobs().into_iter().flat_map(of_job).collect()
}
