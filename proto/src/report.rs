//! An agent's report of itself, checked. The figures are the agent's word; nothing is decided by them.

use crate::field::{self, FieldError};
use crate::{limits, v1};

/// The total that says on how many nodes the agent's jobs want each page, the most of them.
pub const REPLICAS: &str = "replicas";
/// The total that says how many extents have fewer copies than they should.
pub const EXTENTS_BELOW_REPLICAS: &str = "extents_below_replicas";

/// A checked `AgentReport`: bounded lists, names without control characters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AgentReport(v1::AgentReport);

impl AgentReport {
    /// The message.
    pub fn message(&self) -> &v1::AgentReport {
        &self.0
    }
}

impl TryFrom<v1::AgentReport> for AgentReport {
    type Error = FieldError;

    fn try_from(mut message: v1::AgentReport) -> Result<Self, FieldError> {
        field::bounded(
            "report.processes",
            message.processes.len(),
            limits::MAX_PROCESSES,
        )?;
        field::bounded("report.totals", message.totals.len(), limits::MAX_TOTALS)?;
        for name in message.totals.keys() {
            field::key("report.totals", name)?;
        }
        for process in &mut message.processes {
            field::within(
                "report.processes.pid",
                process.pid.into(),
                1,
                i32::MAX as u64,
            )?;
            field::bounded(
                "report.processes.comm",
                process.comm.len(),
                limits::MAX_COMM,
            )?;
            parts_of_the_whole(process)?;
            // A program chooses its own name: what a terminal would obey is replaced, not refused.
            process.comm = process
                .comm
                .chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect();
        }
        Ok(Self(message))
    }
}

/// A process's counts of pages: none beyond an address space, and no part above its whole.
fn parts_of_the_whole(process: &v1::ProcessReport) -> Result<(), FieldError> {
    let (local, far) = (process.local_pages, process.far_pages);
    for (field, pages, most) in [
        ("report.processes.local_pages", local, limits::MAX_PAGES),
        ("report.processes.far_pages", far, limits::MAX_PAGES),
        (
            "report.processes.total_pages",
            process.total_pages,
            2 * limits::MAX_PAGES,
        ),
        (
            "report.processes.managed_pages",
            process.managed_pages,
            limits::MAX_PAGES,
        ),
        (
            "report.processes.shared_far_pages",
            process.shared_far_pages,
            far,
        ),
        ("report.processes.zero_pages", process.zero_pages, far),
    ] {
        field::within(field, pages, 0, most)?;
    }
    Ok(())
}

impl From<AgentReport> for v1::AgentReport {
    fn from(report: AgentReport) -> Self {
        report.0
    }
}
