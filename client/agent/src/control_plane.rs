//! The agent's side of the control plane: a lease, extents granted under it, reports.
//!
//! One thread with a runtime of its own. No pager waits for it: extents are asked for before they are needed,
//! and while the coordinator is away programs run on with what is granted.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use farpage_proto::client::{CallError, Coordinator, OpenedLease};
use farpage_proto::lease::{ExtentGrant, GrantRequest, LeaseRequest};
use farpage_proto::report::AgentReport;
use farpage_proto::transport::{ConnectError, EndpointUrl, connect};
use farpage_proto::{
    AgentId, ExtentId, FabricKind, FieldError, HostName, LeaseId, RequestId, Tenant, limits, v1,
};

use crate::far::{FarMemory, Grant};
use crate::protocol::ProcessFigures;
use crate::spaces::Spaces;
use crate::state::State;

/// How long any one call may take, except a grant.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// How long a grant may take: the coordinator waits three times for 2 s where nodes hang.
const GRANT_DEADLINE: Duration = Duration::from_secs(8);
/// Between two renewals of the lease, reports, and looks for extents to give back. A renewal tells which nodes are
/// silent or have lost what they held, so it comes more often than the lease alone would need.
const TURN_INTERVAL: Duration = Duration::from_secs(1);
/// Longest sleep in between: what an end of the agent waits for.
const TICK: Duration = Duration::from_millis(250);
/// Free slots kept when unused extents are given back, so that a program that breathes does not churn grants.
const SPARE_SLOTS: u64 = 16_384;
/// Extents asked for at once.
const GRANT_COUNT: u32 = 2;
/// The pause after a call that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// The same complaint is logged again after this long.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(30);

/// Why there is no far memory at the start.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The coordinator cannot be reached.
    #[error("no coordinator: {0}")]
    Connect(#[from] ConnectError),
    /// It answered with an error, or not at all.
    #[error("the coordinator at {url}: {error}")]
    Call {
        /// Where it is.
        url: EndpointUrl,
        /// What became of the call.
        error: CallError,
    },
    /// Our own name will not do.
    #[error("this agent's name will not do: {0}; choose another with --id")]
    Name(FieldError),
    /// No runtime.
    #[error("cannot start the control plane's thread: {0}")]
    Runtime(#[from] std::io::Error),
}

/// The agent's membership in a cluster.
#[derive(Debug)]
pub struct ControlPlane {
    runtime: tokio::runtime::Runtime,
    url: EndpointUrl,
    request: LeaseRequest,
    fabric: Option<FabricKind>,
    coordinator: Coordinator,
    /// The same connection with the longer deadline.
    grants: Coordinator,
    lease: OpenedLease,
    /// Where the lease is kept, and the number of the grant request under way: the same until what was granted is kept too, so
    /// that neither a lost answer nor the agent's end loses an extent.
    state: Arc<State>,
    complaint: Option<(String, Instant)>,
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
        state: Arc<State>,
    ) -> Result<Self, ControlError> {
        let mut plane = Self::connect(url, agent_id, fabric, state)?;
        plane.state.header().grant_number.store(1, Relaxed);
        plane.open_lease().map_err(|error| ControlError::Call {
            url: plane.url.clone(),
            error,
        })?;
        Ok(plane)
    }

    /// Connects and goes on with the lease of an agent that died, and with what it held. Where the lease has ended meanwhile,
    /// what lay under it is lost.
    ///
    /// # Errors
    /// [`ControlError`], with what to do.
    pub fn resume(
        url: EndpointUrl,
        agent_id: String,
        fabric: Option<FabricKind>,
        state: Arc<State>,
        far: &FarMemory,
    ) -> Result<Self, ControlError> {
        let mut plane = Self::connect(url, agent_id, fabric, state)?;
        let call = |error, url: &EndpointUrl| ControlError::Call {
            url: url.clone(),
            error,
        };
        match plane.renew_lease(far) {
            Ok(()) => {}
            Err(CallError::Gone(_)) => {
                tracing::warn!("the lease has ended, and what lay under it is lost");
                far.lose_all();
                plane
                    .open_lease()
                    .map_err(|error| call(error, &plane.url))?;
            }
            Err(error) => return Err(call(error, &plane.url)),
        }
        let lists = plane.coordinator.list_grants(plane.lease.id, fabric);
        let grants = plane
            .runtime
            .block_on(lists)
            .map_err(|error| call(error, &plane.url))?;
        // Some may have been granted, or given back, without the state saying so yet.
        plane.keep(far, grants);
        Ok(plane)
    }

    fn connect(
        url: EndpointUrl,
        agent_id: String,
        fabric: Option<FabricKind>,
        state: Arc<State>,
    ) -> Result<Self, ControlError> {
        let request = LeaseRequest {
            agent: AgentId::new(agent_id).map_err(ControlError::Name)?,
            host: host_name(),
            tenant: Tenant::new("").map_err(ControlError::Name)?,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let channel = runtime.block_on(connect(&url, CALL_DEADLINE))?;
        let coordinator = Coordinator::over(channel.clone(), CALL_DEADLINE);
        let header = state.header();
        let lease = OpenedLease {
            // None yet reads as one that nobody has.
            id: LeaseId::from_random(header.lease.load(Relaxed)),
            ttl: Duration::from_millis(header.lease_ttl_ms.load(Relaxed)),
        };
        Ok(Self {
            runtime,
            url,
            request,
            fabric,
            coordinator,
            grants: Coordinator::over(channel, GRANT_DEADLINE),
            lease,
            state,
            complaint: None,
        })
    }

    /// Asks for the first extents, so that the first eviction finds slots. A cluster that has none to give now may
    /// have some later; programs that fit do not need any.
    ///
    /// # Errors
    /// [`ControlError::Call`] when the coordinator refuses, or does not answer.
    pub fn first_extents(&mut self, far: &FarMemory) -> Result<(), ControlError> {
        match self.grant(far) {
            Err(error @ CallError::Exhausted(_)) => {
                self.complain("no far memory yet", &error);
                Ok(())
            }
            Err(error) => Err(ControlError::Call {
                url: self.url.clone(),
                error,
            }),
            Ok(()) => Ok(()),
        }
    }

    /// Keeps the lease and the supply of extents until `ended` says so; then gives everything back.
    pub fn run(mut self, far: &Arc<FarMemory>, spaces: &Arc<Spaces>, ended: &dyn Fn() -> bool) {
        let mut turned = Instant::now();
        while !ended() {
            let wanted = spaces.wait_for_want(TICK);
            if (wanted || far.is_low() && far.used() > 0)
                && let Err(error) = self.grant(far)
            {
                self.complain("no further extent of far memory", &error);
                std::thread::sleep(RETRY_PAUSE);
            }
            if turned.elapsed() > TURN_INTERVAL.min(self.lease.ttl / 4) {
                turned = Instant::now();
                self.renew(far);
                far.end_rests();
                self.give_back(far);
                self.report(spaces);
            }
        }
        let _ = self
            .runtime
            .block_on(self.coordinator.close_lease(self.lease.id));
    }

    fn grant(&mut self, far: &FarMemory) -> Result<(), CallError> {
        match self.grant_of(far, GRANT_COUNT) {
            // The last extent of a cluster is as good as any other.
            Err(CallError::Exhausted(_)) => self.grant_of(far, 1),
            result => result,
        }
    }

    fn grant_of(&mut self, far: &FarMemory, count: u32) -> Result<(), CallError> {
        let request = GrantRequest {
            lease: self.lease.id,
            count,
            fabric: self.fabric,
            request: RequestId::new(self.state.header().grant_number.load(Relaxed)).ok(),
        };
        let result = self.runtime.block_on(self.grants.grant_extents(request));
        let answered = !matches!(result, Err(CallError::Unavailable(_)));
        let result = result.map(|grants| self.keep(far, grants));
        if answered {
            self.state.header().grant_number.fetch_add(1, Relaxed);
        }
        result
    }

    /// Takes what was granted into use, unless it is already.
    fn keep(&self, far: &FarMemory, grants: Vec<ExtentGrant>) {
        for grant in grants {
            if far.holds(u64::from(grant.extent.0)) {
                continue;
            }
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
    }

    fn open_lease(&mut self) -> Result<(), CallError> {
        let opening = self.coordinator.open_lease(self.request.clone());
        self.lease = self.runtime.block_on(opening)?;
        self.note_lease();
        Ok(())
    }

    fn note_lease(&self) {
        let header = self.state.header();
        let ttl = u64::try_from(self.lease.ttl.as_millis()).unwrap_or(u64::MAX);
        header.lease_ttl_ms.store(ttl, Relaxed);
        header.lease.store(self.lease.id.get(), Relaxed);
    }

    fn renew_lease(&mut self, far: &FarMemory) -> Result<(), CallError> {
        let renewing = self.coordinator.renew_lease(self.lease.id);
        let renewal = self.runtime.block_on(renewing)?;
        self.lease.ttl = renewal.ttl;
        self.note_lease();
        let ids = |extents: Vec<ExtentId>| -> Vec<u64> {
            extents.into_iter().map(|id| u64::from(id.0)).collect()
        };
        far.heard_of_nodes(&ids(renewal.lost), &ids(renewal.unreachable));
        Ok(())
    }

    fn renew(&mut self, far: &FarMemory) {
        match self.renew_lease(far) {
            Ok(()) => {}
            Err(error @ CallError::Gone(_)) => {
                self.complain("the lease has ended, and what lay under it is lost", &error);
                far.lose_all();
                if let Err(error) = self.open_lease() {
                    self.complain("no new lease", &error);
                }
            }
            Err(error) => self.complain("programs run on with what is granted", &error),
        }
    }

    fn give_back(&mut self, far: &FarMemory) {
        let extents: Vec<ExtentId> = far
            .retire(SPARE_SLOTS)
            .iter()
            .filter_map(|grant| u32::try_from(grant.id).ok().map(ExtentId))
            .collect();
        for batch in extents.chunks(limits::MAX_RELEASE_COUNT) {
            let released = self
                .coordinator
                .release_extents(self.lease.id, batch.to_vec());
            if let Err(error) = self.runtime.block_on(released) {
                self.complain(
                    "extents could not be given back; they go with the lease",
                    &error,
                );
            }
        }
    }

    fn report(&mut self, spaces: &Spaces) {
        let processes = figures(spaces)
            .into_iter()
            // A forked child that has not shown itself yet has no pid to report.
            .filter(|figures| figures.pid > 0)
            .take(limits::MAX_PROCESSES)
            .map(|figures| v1::ProcessReport {
                pid: figures.pid.unsigned_abs(),
                comm: figures.name,
                local_pages: figures.local_pages,
                far_pages: figures.far_pages,
                shared_far_pages: figures.shared_far_pages,
                zero_pages: figures.zero_pages,
                managed_pages: figures.managed_pages,
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
        let taken = match AgentReport::try_from(report) {
            Ok(report) => self
                .runtime
                .block_on(self.coordinator.report(self.lease.id, report)),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = taken {
            tracing::debug!(%error, "a report was not taken");
        }
    }

    /// Logs a failure, and the same one again only after a while.
    fn complain(&mut self, what: &str, error: &CallError) {
        let complaint = format!("{what}: {error}");
        let again = self
            .complaint
            .as_ref()
            .is_some_and(|(last, at)| *last == complaint && at.elapsed() < COMPLAINT_INTERVAL);
        if !again {
            tracing::warn!("{complaint}");
            self.complaint = Some((complaint, Instant::now()));
        }
    }
}

/// This host's name as the cluster may know it; one that it could not is replaced.
fn host_name() -> HostName {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    HostName::new(name.trim())
        .or_else(|_| HostName::new("unnamed"))
        .unwrap_or_else(|_| unreachable!("a plain word is a host name"))
}

/// Figures of every address space, for reports and for `farpage status`. Far pages that are others' too are those of the
/// last count, and asked to be counted anew.
#[must_use]
pub fn figures(spaces: &Spaces) -> Vec<ProcessFigures> {
    let of_job = |job: Arc<crate::job::Job>| {
        let limit = job.local_pages() * 4096;
        job.spaces().into_iter().map(move |handle| {
            let pid = handle.pid().unwrap_or(0);
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let now = &handle.figures;
            handle.ask_to_count_shared();
            let (managed_pages, far_pages) = (now.local.load(Relaxed), now.far.load(Relaxed));
            ProcessFigures {
                pid,
                name: name.trim_end().to_owned(),
                // Before the first sample what the table says is the best there is.
                local_pages: match now.anonymous.load(Relaxed) {
                    0 => managed_pages,
                    sampled => sampled,
                },
                managed_pages,
                far_pages,
                // Counted at another moment than the whole.
                shared_far_pages: now.shared_far.load(Relaxed).min(far_pages),
                zero_pages: now.zero.load(Relaxed).min(far_pages),
                faults: now.faults.load(Relaxed),
                local_limit_bytes: limit,
            }
        })
    };
    spaces.jobs().into_iter().flat_map(of_job).collect()
}
