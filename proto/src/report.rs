//! An agent's report of itself, checked. The figures are the agent's word; nothing is decided by them.

use crate::field::{self, FieldError};
use crate::{limits, v1};

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

impl From<AgentReport> for v1::AgentReport {
    fn from(report: AgentReport) -> Self {
        report.0
    }
}
