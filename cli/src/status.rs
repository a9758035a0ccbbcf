//! `farpage status`: what the coordinator knows, for people or as JSON.

use std::io::{self, Write};
use std::time::Duration;

use farpage_proto::client::{CallError, Coordinator};
use farpage_proto::transport::{ConnectError, EndpointUrl};
use farpage_proto::{FieldError, report, v1};
use serde::Serialize;

use crate::args::StatusArgs;
use crate::size::readable;

/// How long connecting, and then the answer, may take.
const DEADLINE: Duration = Duration::from_secs(5);

const PAGE_BYTES: u64 = 4096;

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    #[error("{0}")]
    Url(#[from] FieldError),
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Call(#[from] CallError),
    #[error("cannot start: {0}")]
    Runtime(io::Error),
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

/// Asks the coordinator and prints what it says.
pub(crate) fn command(args: &StatusArgs) -> Result<(), StatusError> {
    let url = EndpointUrl::parse_field("--coordinator", &args.coordinator)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(StatusError::Runtime)?;
    let answer = runtime.block_on(async {
        let coordinator = Coordinator::connect(&url, DEADLINE).await?;
        Ok::<_, StatusError>(coordinator.status().await?)
    })?;
    let cluster = Cluster::from(answer);
    let mut out = io::stdout().lock();
    if args.json {
        let text = serde_json::to_string_pretty(&cluster).map_err(io::Error::from)?;
        writeln!(out, "{text}")?;
    } else {
        write!(out, "{}", cluster.text())?;
    }
    Ok(())
}

/// Everything; its JSON form is a contract.
#[derive(Debug, Serialize)]
struct Cluster {
    capacity_bytes: u64,
    used_bytes: u64,
    pending_bytes: u64,
    /// On how many memory nodes pages are to be, the most of any agent's jobs.
    replicas: u64,
    /// Extents that have fewer copies than they should, over all agents.
    extents_below_replicas: u64,
    nodes: Vec<Node>,
    agents: Vec<Agent>,
}

#[derive(Debug, Serialize)]
struct Node {
    id: String,
    /// `live` or `unreachable`.
    health: &'static str,
    /// Nothing new is placed there, and what it holds is being moved.
    draining: bool,
    capacity_bytes: u64,
    /// Granted to agents.
    used_bytes: u64,
    /// Being granted, or not yet scrubbed.
    pending_bytes: u64,
    extent_bytes: u64,
    last_heard_ms_ago: u64,
    data_addresses: Vec<String>,
    labels: std::collections::BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct Agent {
    id: String,
    host: String,
    granted_bytes: u64,
    extents: u32,
    lost_extents: u32,
    /// On how many nodes its jobs want each page, the most of them.
    replicas: u64,
    /// Extents that have fewer copies than they should.
    extents_below_replicas: u64,
    lease_expires_in_ms: u64,
    processes: Vec<Process>,
}

#[derive(Debug, Serialize)]
struct Process {
    pid: u32,
    name: String,
    /// Anonymous pages here, managed or not.
    local_pages: u64,
    /// Present in managed memory, the kernel's page of zeros included.
    managed_pages: u64,
    /// Held far or on their way, and zeros held nowhere.
    far_pages: u64,
    /// Of these, in slots that another process's page is in too.
    shared_far_pages: u64,
    /// Of these, zeros held nowhere.
    zero_pages: u64,
    /// Local and far: what would be resident without far memory.
    total_pages: u64,
    faults: u64,
    /// Of its whole job.
    local_limit_bytes: u64,
}

impl From<v1::GetStatusResponse> for Cluster {
    fn from(answer: v1::GetStatusResponse) -> Self {
        let agents: Vec<Agent> = answer.agents.into_iter().map(Agent::from).collect();
        let below = agents.iter().map(|agent| agent.extents_below_replicas);
        Self {
            capacity_bytes: answer.capacity_bytes,
            used_bytes: answer.used_bytes,
            pending_bytes: answer.pending_bytes,
            replicas: agents.iter().map(|agent| agent.replicas).max().unwrap_or(1),
            extents_below_replicas: below.sum(),
            nodes: answer.nodes.into_iter().map(Node::from).collect(),
            agents,
        }
    }
}

impl From<v1::NodeStatus> for Node {
    fn from(node: v1::NodeStatus) -> Self {
        Self {
            health: match node.health() {
                v1::NodeHealth::Live => "live",
                v1::NodeHealth::Unreachable => "unreachable",
                v1::NodeHealth::Unspecified => "unknown",
            },
            draining: node.draining,
            id: node.node_id,
            capacity_bytes: node.capacity_bytes,
            used_bytes: node.used_bytes,
            pending_bytes: node.pending_bytes,
            extent_bytes: node.extent_bytes,
            last_heard_ms_ago: node.last_heard_ms_ago,
            data_addresses: node.data_addresses,
            labels: node.labels.into_iter().collect(),
        }
    }
}

impl From<v1::AgentStatus> for Agent {
    fn from(agent: v1::AgentStatus) -> Self {
        let v1::AgentReport { processes, totals } = agent.report.unwrap_or_default();
        let total = |name: &str| totals.get(name).copied();
        Self {
            replicas: total(report::REPLICAS).unwrap_or(1),
            extents_below_replicas: total(report::EXTENTS_BELOW_REPLICAS).unwrap_or(0),
            id: agent.agent_id,
            host: agent.host,
            granted_bytes: agent.granted_bytes,
            extents: agent.extents,
            lost_extents: agent.lost_extents,
            lease_expires_in_ms: agent.expires_in_ms,
            processes: processes.into_iter().map(Process::from).collect(),
        }
    }
}

impl From<v1::ProcessReport> for Process {
    fn from(process: v1::ProcessReport) -> Self {
        Self {
            pid: process.pid,
            name: process.comm,
            local_pages: process.local_pages,
            managed_pages: process.managed_pages,
            far_pages: process.far_pages,
            shared_far_pages: process.shared_far_pages,
            zero_pages: process.zero_pages,
            total_pages: process.total_pages,
            faults: process.faults,
            local_limit_bytes: process.local_limit_bytes,
        }
    }
}

impl Cluster {
    fn text(&self) -> String {
        let mut nodes = Table::new(&["NODE", "HEALTH", "CAPACITY", "USED", "PENDING", "ADDRESS"]);
        for node in &self.nodes {
            nodes.row([
                node.id.clone(),
                match node.draining {
                    true => format!("{}, draining", node.health),
                    false => node.health.to_owned(),
                },
                readable(node.capacity_bytes),
                readable(node.used_bytes),
                readable(node.pending_bytes),
                node.data_addresses.join(" "),
            ]);
        }
        let mut agents = Table::new(&[
            "AGENT",
            "HOST",
            "GRANTED",
            "EXTENTS",
            "LOST",
            "REPLICAS",
            "BELOW",
            "PROCESSES",
        ]);
        let mut processes = Table::new(&[
            "PROCESS",
            "NAME",
            "LOCAL",
            "FAR",
            "SHARED FAR",
            "TOTAL",
            "LIMIT",
            "FAULTS",
            "AGENT",
        ]);
        for agent in &self.agents {
            agents.row([
                agent.id.clone(),
                agent.host.clone(),
                readable(agent.granted_bytes),
                agent.extents.to_string(),
                agent.lost_extents.to_string(),
                agent.replicas.to_string(),
                agent.extents_below_replicas.to_string(),
                agent.processes.len().to_string(),
            ]);
            for process in &agent.processes {
                let pages = |pages: u64| readable(pages.saturating_mul(PAGE_BYTES));
                processes.row([
                    process.pid.to_string(),
                    process.name.clone(),
                    pages(process.local_pages),
                    pages(process.far_pages),
                    pages(process.shared_far_pages),
                    pages(process.total_pages),
                    readable(process.local_limit_bytes),
                    process.faults.to_string(),
                    agent.id.clone(),
                ]);
            }
        }
        let total = format!(
            "{} lent by {}, {} granted, {} pending\n",
            readable(self.capacity_bytes),
            counted(self.nodes.len(), "node"),
            readable(self.used_bytes),
            readable(self.pending_bytes)
        );
        [total, nodes.text(), agents.text(), processes.text()]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("\n")
    }
}

fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Columns as wide as their widest cell; nothing at all without a row.
struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(heads: &[&str]) -> Self {
        Self {
            rows: vec![heads.iter().map(|head| (*head).to_owned()).collect()],
        }
    }

    fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    fn text(&self) -> String {
        if self.rows.len() < 2 {
            return String::new();
        }
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths);
            let line: Vec<String> = cells
                .map(|(cell, width)| format!("{cell:width$}"))
                .collect();
            text.push_str(line.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_cluster_is_one_line() {
        let cluster = Cluster::from(v1::GetStatusResponse::default());
        assert_eq!(cluster.text().lines().count(), 1, "{}", cluster.text());
    }

    #[test]
    fn columns_line_up() {
        let node = |id: &str| v1::NodeStatus {
            node_id: id.to_owned(),
            health: v1::NodeHealth::Live.into(),
            capacity_bytes: 1 << 30,
            ..v1::NodeStatus::default()
        };
        let cluster = Cluster::from(v1::GetStatusResponse {
            nodes: vec![node("a"), node("a-longer-name")],
            ..v1::GetStatusResponse::default()
        });
        let text = cluster.text();
        let places: Vec<_> = text
            .lines()
            .filter_map(|line| line.find("live").or_else(|| line.find("HEALTH")))
            .collect();
        assert_eq!(places, [15, 15, 15], "{text}");
    }
}
