//! The agent's side of the control plane: a lease, extents granted under it, reports.
//!
//! One thread with a runtime of its own. No pager waits for it: extents are asked for before they are needed,
//! and while the coordinator is away programs run on with what is granted.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use farpage_proto::client::{CallError, Coordinator, OpenedLease};
use farpage_proto::lease::{ExtentGrant, GrantRequest, LeaseRequest};
use farpage_proto::report::{self, AgentReport};
use farpage_proto::transport::{ConnectError, EndpointUrl, connect};
use farpage_proto::{
    AgentId, ByteCount, ExtentId, FabricKind, FieldError, HostName, LeaseId, NodeId, RequestId,
    Tenant, limits, v1,
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
/// Extents that are given a further copy at one turn: more would be copied no sooner.
const WANTED_AT_ONCE: usize = 8;
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
    /// The request for a further copy of an extent, of this number, that no answer has come to.
    unanswered: Option<(GrantRequest, u32)>,
    /// The last complaint of each kind.
    complaints: HashMap<&'static str, (String, Instant)>,
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
        // What was granted without the state saying so yet, or not given back yet though no extent needs it.
        let is_strange = |grant: &&ExtentGrant| !far.knows(u64::from(grant.extent.0));
        far.needs_not(grants.iter().filter(is_strange).map(as_grant));
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
            unanswered: None,
            complaints: HashMap::new(),
        })
    }

    /// Asks for the first extents, so that the first eviction finds slots. A cluster that has none to give now may
    /// have some later; programs that fit do not need any.
    ///
    /// # Errors
    /// [`ControlError::Call`] when the coordinator refuses, or does not answer.
    pub fn first_extents(&mut self, far: &FarMemory, copies: u8) -> Result<(), ControlError> {
        match self.grant(far, copies) {
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
            for copies in spaces.copies() {
                if far.is_low(copies)
                    && (wanted || far.used_of(copies) > 0)
                    && let Err(error) = self.grant(far, copies)
                {
                    self.complain("no further extent of far memory", &error);
                    std::thread::sleep(RETRY_PAUSE);
                }
            }
            if turned.elapsed() > TURN_INTERVAL.min(self.lease.ttl / 4) {
                turned = Instant::now();
                self.renew(far);
                far.end_rests();
                self.further_copies(far);
                self.give_back(far, &spaces.copies());
                self.report(far, spaces);
            }
        }
        let _ = self
            .runtime
            .block_on(self.coordinator.close_lease(self.lease.id));
    }

    fn grant(&mut self, far: &FarMemory, copies: u8) -> Result<(), CallError> {
        self.ask_again(far)?;
        match self.grant_of(far, GRANT_COUNT, copies, copies) {
            // The last extent of a cluster is as good as any other.
            Err(CallError::Exhausted(_)) => self.grant_last(far, copies),
            result => result,
        }
    }

    /// There is room for one extent at most. Where there is none for all of its copies, and a program would have to end for want
    /// of it, fewer are better than none: the others are made when they can be.
    fn grant_last(&mut self, far: &FarMemory, goal: u8) -> Result<(), CallError> {
        let mut result = self.grant_of(far, 1, goal, goal);
        for copies in (1..goal).rev() {
            if !matches!(result, Err(CallError::Exhausted(_))) || far.has_room(goal) {
                break;
            }
            result = self.grant_of(far, 1, goal, copies);
        }
        result
    }

    fn grant_of(
        &mut self,
        far: &FarMemory,
        count: u32,
        goal: u8,
        copies: u8,
    ) -> Result<(), CallError> {
        let request = GrantRequest {
            lease: self.lease.id,
            count,
            copies: copies.into(),
            extent_bytes: None,
            avoid: Vec::new(),
            fabric: self.fabric,
            request: self.grant_number(),
        };
        self.ask_for(far, request, |_, grants| {
            for set in grants.chunk_by(|one, next| one.set == next.set) {
                let set: Vec<Grant> = set.iter().map(as_grant).collect();
                if far.add(goal, set.clone()).is_none() {
                    tracing::error!(
                        ?set,
                        "an extent of a size or number that this agent cannot address"
                    );
                }
            }
        })
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
        far.heard_of_nodes(
            &ids(renewal.lost),
            &ids(renewal.unreachable),
            &ids(renewal.draining),
        );
        Ok(())
    }

    /// Asks for extents and has those kept that are not yet. The number of a request stays until it is answered and what it
    /// granted is kept, so that it must be the same one then: another has another. After a restart it may be the answer to what
    /// the agent before asked.
    fn ask_for(
        &mut self,
        far: &FarMemory,
        request: GrantRequest,
        keep: impl FnOnce(&mut Self, Vec<ExtentGrant>),
    ) -> Result<(), CallError> {
        let result = self.runtime.block_on(self.grants.grant_extents(request));
        let answered = !matches!(result, Err(CallError::Unavailable(_)));
        let result = result.map(|mut grants| {
            grants.retain(|grant| !far.knows(u64::from(grant.extent.0)));
            keep(self, grants);
        });
        if answered {
            self.state.header().grant_number.fetch_add(1, Relaxed);
        }
        result
    }

    fn grant_number(&self) -> Option<RequestId> {
        RequestId::new(self.state.header().grant_number.load(Relaxed)).ok()
    }

    /// Asks for further copies of extents that have too few. What cannot be had now is asked for again at the next turn.
    fn further_copies(&mut self, far: &FarMemory) {
        if let Err(error) = self.ask_again(far) {
            return self.complain("no further copy of an extent", &error);
        }
        for wanted in far.wanted_copies(WANTED_AT_ONCE) {
            let avoid = wanted.nodes.iter();
            let request = GrantRequest {
                lease: self.lease.id,
                count: 1,
                copies: 1,
                extent_bytes: Some(ByteCount(wanted.bytes)),
                avoid: avoid
                    .filter_map(|node| NodeId::new(node.clone()).ok())
                    .collect(),
                fabric: self.fabric,
                request: self.grant_number(),
            };
            self.unanswered = Some((request, wanted.number));
            if let Err(error) = self.ask_again(far) {
                return self.complain("no further copy of an extent", &error);
            }
        }
    }

    /// Asks for the copy that was asked for last, if no answer has come: the answer may have been lost, and what it granted
    /// with it.
    fn ask_again(&mut self, far: &FarMemory) -> Result<(), CallError> {
        let Some((request, number)) = self.unanswered.take() else {
            return Ok(());
        };
        let result = self.ask_for(far, request.clone(), |plane, grants| {
            for grant in grants {
                if !far.add_copy(number, as_grant(&grant)) {
                    plane.release(vec![grant.extent]);
                }
            }
        });
        if matches!(result, Err(CallError::Unavailable(_))) {
            self.unanswered = Some((request, number));
        }
        result
    }

    fn renew(&mut self, far: &FarMemory) {
        match self.renew_lease(far) {
            Ok(()) => {}
            Err(error @ CallError::Gone(_)) => {
                self.complain("the lease has ended, and what lay under it is lost", &error);
                far.lose_all();
                self.unanswered = None;
                if let Err(error) = self.open_lease() {
                    self.complain("no new lease", &error);
                }
            }
            Err(error) => self.complain("programs run on with what is granted", &error),
        }
    }

    fn give_back(&mut self, far: &FarMemory, in_use: &BTreeSet<u8>) {
        far.let_go();
        let spare = |copies: u8| match in_use.contains(&copies) {
            true => SPARE_SLOTS,
            false => 0,
        };
        let extents: Vec<ExtentId> = far
            .retire(spare)
            .iter()
            .filter_map(|grant| u32::try_from(grant.id).ok().map(ExtentId))
            .collect();
        for batch in extents.chunks(limits::MAX_RELEASE_COUNT) {
            self.release(batch.to_vec());
        }
    }

    fn release(&mut self, extents: Vec<ExtentId>) {
        let released = self.coordinator.release_extents(self.lease.id, extents);
        if let Err(error) = self.runtime.block_on(released) {
            self.complain(
                "extents could not be given back; they go with the lease",
                &error,
            );
        }
    }

    fn report(&mut self, far: &FarMemory, spaces: &Spaces) {
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
                local_limit_bytes: figures.local_limit_bytes,
            })
            .collect();
        let copies = spaces.copies();
        let below: u32 = copies.iter().map(|copies| far.below_goal(*copies)).sum();
        let most = copies.last().copied().unwrap_or(1);
        let totals = [
            (report::REPLICAS, u64::from(most)),
            (report::EXTENTS_BELOW_REPLICAS, u64::from(below)),
        ];
        let report = v1::AgentReport {
            processes,
            totals: totals.map(|(name, total)| (name.to_owned(), total)).into(),
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
    fn complain(&mut self, what: &'static str, error: &CallError) {
        let error = error.to_string();
        let last = self.complaints.get(what);
        let again =
            last.is_some_and(|(last, at)| *last == error && at.elapsed() < COMPLAINT_INTERVAL);
        if !again {
            tracing::warn!("{what}: {error}");
            self.complaints.insert(what, (error, Instant::now()));
        }
    }
}

fn as_grant(grant: &ExtentGrant) -> Grant {
    Grant {
        id: u64::from(grant.extent.0),
        node: grant.node.to_string(),
        address: grant.address.to_string(),
        index: grant.index,
        key: grant.key.get(),
        bytes: grant.bytes.0,
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
            handle.ask_to_count_shared();
            ProcessFigures::of(&handle, limit)
        })
    };
    spaces.jobs().into_iter().flat_map(of_job).collect()
}
