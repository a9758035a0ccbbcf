//! The leases: who borrows, until when, and what they hold.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farpage_proto::report::AgentReport;
use farpage_proto::{ExtentId, LeaseId};

use super::clock::Millis;
use super::record::LeaseRecord;

/// A lease that has not ended.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) record: LeaseRecord,
    pub(crate) deadline: Millis,
    /// Everything granted, being granted, or lost under it. Derived from the extents' records.
    pub(crate) extents: BTreeSet<ExtentId>,
    pub(crate) report: Option<AgentReport>,
}

impl Lease {
    pub(crate) fn new(record: LeaseRecord, deadline: Millis) -> Self {
        Self {
            record,
            deadline,
            extents: BTreeSet::new(),
            report: None,
        }
    }
}

/// All leases by id.
#[derive(Clone, Debug, Default)]
pub(crate) struct Leases(pub(crate) BTreeMap<LeaseId, Lease>);

impl Leases {
    /// Those whose time is over.
    pub(crate) fn expired(&self, now: Millis) -> Vec<LeaseId> {
        self.0
            .iter()
            .filter(|(_, lease)| lease.deadline <= now)
            .map(|(id, _)| *id)
            .collect()
    }

    /// Gives everybody at least this much from now on.
    pub(crate) fn grace(&mut self, now: Millis, ttl: Duration) {
        for lease in self.0.values_mut() {
            lease.deadline = lease.deadline.max(now.after(ttl));
        }
    }
}
