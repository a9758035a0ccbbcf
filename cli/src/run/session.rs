//! Far memory for one run: what is brought up before the program starts and taken down after it.
//!
//! STUB: this is the one place where `run` meets the agent and the memory node. While `WIRED` is false nothing is
//! brought up: the program runs with all of its memory here and the summary's counts are zero. To fill in: what is
//! said to the agent over its socket in `open`, `attached` and `finish`.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::args::Fabric;
use crate::run::helper::{Helper, HelperError};
use crate::run::options::RunOptions;
use crate::run::preload::{self, PreloadError};
use crate::run::signals::Ended;
use crate::run::summary::Summary;

/// STUB: true once `far-memory` and `agent` serve.
const WIRED: bool = false;

/// Why there is no far memory, or no account of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(
        "no agent answers at {}: {source}; start one (farpage agent --socket {}), or leave out --agent to have \
         everything brought up for this run",
        .socket.display(), .socket.display()
    )]
    NoAgent {
        socket: PathBuf,
        source: std::io::Error,
    },
    #[error("no far memory for this program: {0}")]
    Preload(#[from] PreloadError),
    #[error("no far memory for this program: {0}")]
    Userfaultfd(#[from] crate::doctor::UserfaultfdError),
    #[error("no far memory for this program: {0}")]
    Helper(#[from] HelperError),
    #[error(
        "--fabric rdma: this machine has no RDMA device; use --fabric tcp or shm, or see farpage doctor for how to \
         get one"
    )]
    NoRdma,
}

/// Far memory, up for one program. Dropping it takes everything down that it brought up.
#[derive(Debug)]
pub(crate) struct Session {
    local_limit_bytes: u64,
    fabric: &'static str,
    environment: Vec<(OsString, OsString)>,
    /// The agent before the memory node, as they end in this order: the agent still gives its slots back.
    helpers: Vec<Helper>,
}

impl Session {
    /// Brings far memory up, or connects to the agent that has it.
    pub(crate) fn open(options: &RunOptions) -> Result<Self, SessionError> {
        if let Some(socket) = &options.agent {
            std::os::unix::net::UnixStream::connect(socket).map_err(|source| {
                SessionError::NoAgent {
                    socket: socket.clone(),
                    source,
                }
            })?;
        } else {
            crate::doctor::userfaultfd_is_usable()?;
            if options.fabric == Fabric::Rdma && !crate::doctor::has_rdma_device() {
                return Err(SessionError::NoRdma);
            }
        }
        let helpers = if WIRED && options.agent.is_none() {
            bring_up(options)?
        } else {
            Vec::new()
        };
        // STUB: to become `preload::find()?` once the shim is built; a missing one is an error then.
        let environment = match preload::find() {
            Ok(shim) => {
                let existing = std::env::var_os("LD_PRELOAD");
                vec![(
                    "LD_PRELOAD".into(),
                    preload::prepended(shim.as_os_str(), existing.as_deref()),
                )]
            }
            Err(PreloadError::Missing) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            local_limit_bytes: options.local.bytes(),
            fabric: options.fabric.name(),
            environment,
            helpers,
        })
    }

    /// What the program's environment must have in addition.
    pub(crate) fn environment(&self) -> Vec<(OsString, OsString)> {
        self.environment.clone()
    }

    /// Tells which process is the program, as soon as it has been started.
    pub(crate) fn attached(&self, _pid: u32) {
        let _agent = self.helpers.first().map(Helper::pid);
    }

    /// Takes everything down after the program has ended, and returns the account.
    pub(crate) fn finish(self, ended: Ended) -> Result<Summary, SessionError> {
        Ok(Summary {
            local_limit_bytes: self.local_limit_bytes,
            fabric: self.fabric.to_owned(),
            exit_status: ended.status(),
            ..Summary::default()
        })
    }
}

/// Starts a memory node and an agent for this run alone. Their abstract sockets leave no file behind.
fn bring_up(options: &RunOptions) -> Result<Vec<Helper>, HelperError> {
    let run = std::process::id();
    let (node_socket, agent_socket) = (
        format!("@farpage-node-{run}"),
        format!("@farpage-agent-{run}"),
    );
    let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let capacity = options.far.to_string();
    let node = [
        "far-memory",
        "--socket",
        &node_socket,
        "--capacity",
        &capacity,
    ];
    let mut node = Helper::start("the memory node", &words(&node))?;
    node.wait_ready()?;
    // STUB: the agent is also to be told these, over its socket or by hidden flags.
    let _untold = (options.local, options.fabric, options.replicas);
    let agent = [
        "agent",
        "--coordinator",
        &node_socket,
        "--socket",
        &agent_socket,
    ];
    let mut agent = Helper::start("the agent", &words(&agent))?;
    agent.wait_ready()?;
    Ok(vec![agent, node])
}
