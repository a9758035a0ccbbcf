//! Far memory for one run: what is brought up before the program starts and taken down after it.

use std::ffi::OsString;
use std::path::PathBuf;

use farpage_agent::client::{ClientError, JOB_VARIABLE, JobClient, SOCKET_VARIABLE, Terms};

use crate::args::Fabric;
use crate::run::helper::{Helper, HelperError};
use crate::run::options::RunOptions;
use crate::run::preload::{self, PreloadError};
use crate::run::signals::Ended;
use crate::run::summary::Summary;
use crate::size::{Size, readable};

/// Why there is no far memory, or no account of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(
        "no agent at {}: {source}; start one (farpage agent --socket {}), or leave out --agent to have \
         everything brought up for this run",
        .socket.display(), .socket.display()
    )]
    NoAgent {
        socket: PathBuf,
        source: ClientError,
    },
    #[error("{0}")]
    Agent(#[from] ClientError),
    #[error("the program was ended: {0}")]
    Ended(String),
    #[error("--agent: the path is not valid UTF-8; use another")]
    Socket,
    #[error("no far memory for this program: {0}")]
    Preload(#[from] PreloadError),
    #[error("no far memory for this program: {0}")]
    Userfaultfd(#[from] crate::doctor::UserfaultfdError),
    #[error("no far memory for this program: {0}")]
    Helper(#[from] HelperError),
    #[error("--fabric rdma: this build has no rdma transport; use --fabric tcp or shm")]
    NoRdma,
}

impl SessionError {
    /// Whether the program's end is our doing, so that its status says nothing.
    pub(crate) fn ended_the_program(&self) -> bool {
        matches!(self, Self::Ended(_))
    }
}

/// Far memory, up for one program. Dropping it takes everything down that it brought up.
#[derive(Debug)]
pub(crate) struct Session {
    fabric: &'static str,
    environment: Vec<(OsString, OsString)>,
    job: JobClient,
    /// The agent of this run alone; it holds the memory node.
    agent: Option<Helper>,
}

impl Session {
    /// Brings far memory up, or connects to the agent that has it.
    pub(crate) fn open(options: &RunOptions) -> Result<Self, SessionError> {
        let shim = preload::find()?;
        if options.fabric == Fabric::Rdma && !cfg!(feature = "verbs") {
            return Err(SessionError::NoRdma);
        }
        let (agent, socket) = match &options.agent {
            Some(socket) => (
                None,
                socket.to_str().ok_or(SessionError::Socket)?.to_owned(),
            ),
            None => {
                crate::doctor::userfaultfd_is_usable()?;
                let (agent, socket) = bring_up(options)?;
                (Some(agent), socket)
            }
        };
        let terms = Terms {
            local_bytes: options.local.bytes(),
            far_bytes: options.far.bytes(),
            replicas: u32::from(options.replicas),
            fault_deadline: options.fault_deadline,
        };
        let mut job =
            JobClient::open(&socket, &terms).map_err(|source| match (&options.agent, source) {
                (Some(socket), source @ ClientError::Unreachable(_)) => SessionError::NoAgent {
                    socket: socket.clone(),
                    source,
                },
                (_, source) => SessionError::Agent(source),
            })?;
        if agent.is_none() {
            job.waits_for_the_next_agent();
        }
        let existing = std::env::var_os("LD_PRELOAD");
        let environment = vec![
            (
                "LD_PRELOAD".into(),
                preload::prepended(shim.as_os_str(), existing.as_deref()),
            ),
            (SOCKET_VARIABLE.into(), socket.into()),
            (JOB_VARIABLE.into(), job.token().into()),
        ];
        Ok(Self {
            fabric: options.fabric.name(),
            environment,
            job,
            agent,
        })
    }

    /// What the user must know before the program starts: that a memory cgroup leaves it less than `--local`.
    pub(crate) fn notice(&self, asked: Size) -> Option<String> {
        let lowered = self.job.lowered()?;
        Some(format!(
            "--local {asked} is lowered to {}: the memory cgroup {} is limited to {}, and others in it and a reserve are left \
             room; give it more ({}) for the program to have --local",
            readable(lowered.local_bytes),
            lowered.group,
            readable(lowered.limit_bytes),
            lowered.file,
        ))
    }

    /// What the program's environment must have in addition.
    pub(crate) fn environment(&self) -> Vec<(OsString, OsString)> {
        self.environment.clone()
    }

    /// Tells which process is the program, as soon as it has been started.
    pub(crate) fn started(&self, pid: u32) {
        // An agent that is gone by now shows itself at the end.
        let _ = self.job.started(pid.cast_signed());
    }

    /// Takes everything down after the program has ended, and returns the account. An agent of our own stays as long
    /// as processes do that the program has left behind, and not longer.
    pub(crate) fn finish(self, ended: Ended) -> Result<Summary, SessionError> {
        let account = self.job.finish()?;
        if let Some(reason) = account.failure {
            return Err(SessionError::Ended(reason));
        }
        if let Some(agent) = self.agent
            && account.processes_left > 0
        {
            agent.leave_to_itself();
        }
        Ok(Summary {
            faults: account.faults,
            fault_p50_us: account.fault_p50_us,
            fault_p99_us: account.fault_p99_us,
            pages_fetched: account.pages_fetched,
            pages_prefetched: account.pages_prefetched,
            prefetch_hits: account.prefetch_hits,
            pages_evicted: account.pages_evicted,
            pages_written_back: account.pages_written_back,
            pages_poisoned: account.pages_poisoned,
            loss: account.loss,
            local_limit_bytes: account.local_limit_bytes,
            local_peak_bytes: account.local_peak_bytes,
            far_peak_bytes: account.far_peak_bytes,
            far_slots_in_use_at_exit: account.far_slots_in_use_at_exit,
            processes_left: account.processes_left,
            fabric: if account.fabric == "any" {
                self.fabric.to_owned()
            } else {
                account.fabric
            },
            processes: account.processes,
            processes_unmanaged: account.processes_unmanaged,
            unmanaged_bytes: account.unmanaged_bytes,
            process_peaks: account.process_peaks,
            replicas: account.replicas,
            extents_below_replicas: account.extents_below_replicas,
            exit_status: ended.status(),
        })
    }
}

/// Starts an agent for this run alone, with a memory node of its own. Their abstract sockets leave no file behind.
fn bring_up(options: &RunOptions) -> Result<(Helper, String), HelperError> {
    let socket = format!("@farpage-{}", std::process::id());
    let (far, replicas) = (options.far.to_string(), options.replicas.to_string());
    let words = [
        "agent",
        "--own-far-memory",
        &far,
        "--socket",
        &socket,
        "--fabric",
        options.fabric.name(),
        "--device",
        &options.device,
        "--own-replicas",
        &replicas,
    ];
    let mut agent = Helper::start("the agent", &words.map(OsString::from))?;
    agent.wait_ready()?;
    Ok((agent, socket))
}
