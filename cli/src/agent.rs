//! `farpage agent`: the per-host pager.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use farpage_agent::{AddressError, AgentConfig, serve};
use farpage_proto::transport::EndpointUrl;

use crate::args::{AgentArgs, Fabric};
use crate::daemon;
use crate::metrics::{Endpoint, MetricsError};
use crate::run::{Helper, HelperError, READY};

/// Why programs are not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("programs cannot be given far memory: {0}")]
    Userfaultfd(#[from] crate::doctor::UserfaultfdError),
    #[error("--coordinator: {0}")]
    Url(#[from] farpage_proto::FieldError),
    #[error("--group {0}: there is no such group; create it (groupadd {0}), or name another")]
    NoGroup(String),
    #[error("--socket: the path is not valid UTF-8; choose another")]
    Socket,
    #[error("--fabric rdma: this build has no rdma transport; use tcp or shm")]
    NoRdma,
    #[error("--device: {0}")]
    Device(#[from] AddressError),
    #[error("--device is for --fabric rdma; add that, or leave it out")]
    DeviceWithoutRdma,
    #[error(transparent)]
    Helper(#[from] HelperError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Agent(#[from] farpage_agent::AgentError),
    #[error("cannot wait for signals: {0}")]
    Signals(#[from] std::io::Error),
}

/// Serves until a signal, or the end of the lifeline, ends it.
pub(crate) fn command(args: &AgentArgs) -> Result<(), AgentError> {
    crate::doctor::userfaultfd_is_usable()?;
    daemon::start_logging();
    if args.fabric == Some(Fabric::Rdma) && !cfg!(feature = "verbs") {
        return Err(AgentError::NoRdma);
    }
    let device = args.rdma.device.parse()?;
    if !args.rdma.device.is_empty() && args.fabric.is_some_and(|fabric| fabric != Fabric::Rdma) {
        return Err(AgentError::DeviceWithoutRdma);
    }
    let socket = args.socket.to_str().ok_or(AgentError::Socket)?.to_owned();
    let metrics = Endpoint::start_again(args.metrics.metrics)?;
    // Held until the agent has ended: the memory goes after those who use it.
    let (_own_far_memory, coordinator) = match args.own_far_memory {
        Some(capacity) => {
            let (helpers, url) = bring_up(&socket, capacity, args)?;
            (helpers, url)
        }
        None => (Vec::new(), args.coordinator.clone().unwrap_or_default()),
    };
    let config = AgentConfig {
        coordinator: EndpointUrl::parse_field("the URL", &coordinator)?,
        socket,
        group: group(args)?,
        id: args.id.clone().unwrap_or_else(daemon::default_id),
        fabric: args.fabric.map(Fabric::kind),
        device,
        fault_deadline: Duration::from_secs(args.fault_deadline),
        // An agent of one run's own has no successor: the run ends with it.
        takeover_deadline: args
            .own_far_memory
            .is_none()
            .then(|| Duration::from_secs(args.takeover_deadline)),
        replicas: args.own_replicas,
        exit_on_eof: args.lifeline.map(crate::sys::take_descriptor).transpose()?,
    };
    let stop = Arc::new(AtomicBool::new(false));
    daemon::stop_on_signals(&stop)?;
    let ready = |observer| match metrics {
        Some(metrics) => daemon::say(&format!("ready, {}\n", metrics.open(observer))),
        None => daemon::say(READY),
    };
    Ok(serve(&config, &stop, ready)?)
}

/// The group that may come in: none where the agent is one run's own. A missing default group is no error, since
/// the agent's own user and root may come in without it.
fn group(args: &AgentArgs) -> Result<Option<u32>, AgentError> {
    if args.own_far_memory.is_some() {
        return Ok(None);
    }
    match crate::sys::group_id(&args.group) {
        Some(id) => Ok(Some(id)),
        None if args.group == "farpage" => {
            tracing::warn!(
                "there is no group farpage: only this user and root may connect; create it (groupadd farpage)"
            );
            Ok(None)
        }
        None => Err(AgentError::NoGroup(args.group.clone())),
    }
}

/// Starts the coordinator and memory node of one run, in one process beside this one, and a process for each further node. The
/// last of them, which has the coordinator, is the last to be ended.
fn bring_up(
    socket: &str,
    capacity: crate::size::Size,
    args: &AgentArgs,
) -> Result<(Vec<Helper>, String), HelperError> {
    let name = format!("{socket}-far");
    let fabric = args.fabric.unwrap_or(Fabric::Shm).name();
    let capacity = capacity.to_string();
    let mut helpers = Vec::new();
    for number in 1..=args.own_replicas {
        let socket = match number {
            1 => name.clone(),
            _ => format!("{name}{number}"),
        };
        let mut words = vec!["far-memory", "--socket", &socket];
        words.extend(["--capacity", &capacity, "--fabric", fabric]);
        words.extend(["--device", &args.rdma.device]);
        if number > 1 {
            words.extend(["--beside", &name]);
        }
        let words: Vec<_> = words.into_iter().map(Into::into).collect();
        let mut helper = Helper::start("the memory node", &words)?;
        helper.wait_ready()?;
        helpers.insert(0, helper);
    }
    Ok((helpers, format!("unix:{name}")))
}
