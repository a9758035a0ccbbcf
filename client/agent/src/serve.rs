//! The agent's life: probe the kernel, take the door's socket, start the keeper and take over what it was handed, join the
//! cluster, serve until told to end.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use farpage_fabric::OwnDevice;
use farpage_proto::FabricKind;
use farpage_proto::transport::EndpointUrl;

use crate::control_plane::{ControlError, ControlPlane};
use crate::door::{Admission, Door};
use crate::far::FarMemory;
use crate::figures::Observer;
use crate::keeper::Keeper;
use crate::kernel::{Kernel, KernelError};
use crate::pager::Shared;
use crate::spaces::Spaces;
use crate::state::State;

/// How long an agent that was killed may seem to live: until the kernel has taken it apart.
const DYING_DEADLINE: Duration = Duration::from_millis(500);
/// How long the socket of an agent that was killed may be open yet.
const DEAD_DOOR_DEADLINE: Duration = Duration::from_secs(5);
/// How often the end is looked for.
const END_POLL: Duration = Duration::from_millis(5);

/// How to run an agent.
#[derive(Debug)]
pub struct AgentConfig {
    /// Where the coordinator is.
    pub coordinator: EndpointUrl,
    /// The socket of the door: a path, or `@name`.
    pub socket: String,
    /// The group whose members may come in.
    pub group: Option<u32>,
    /// Its name in the cluster.
    pub id: String,
    /// The fabric to reach memory by; any that nodes serve when absent.
    pub fabric: Option<FabricKind>,
    /// By which device it is reached over RDMA.
    pub device: OwnDevice,
    /// How long a fault may wait for its page, in jobs that do not say.
    pub fault_deadline: Duration,
    /// How long programs wait for the next agent when this one is killed; nobody takes over where none is given.
    pub takeover_deadline: Option<Duration>,
    /// On how many nodes jobs are likely to want each page: the first extents are asked for so.
    pub replicas: u8,
    /// End when this reports end-of-file and the last program has ended: its other end is the launcher's.
    pub exit_on_eof: Option<OwnedFd>,
}

/// Why an agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The kernel will not do, or we may not.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// No coordinator, or no memory.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Another agent has the socket.
    #[error("another agent listens on {socket}; stop it, or choose another --socket")]
    Taken {
        /// Where.
        socket: String,
    },
    /// The socket cannot be opened.
    #[error("cannot listen on {socket}: {error}; check that its folder exists and may be written")]
    Door {
        /// Where.
        socket: String,
        /// Why.
        error: io::Error,
    },
    /// What an agent that died has left cannot be had.
    #[error(
        "what the agent before this one has left cannot be taken over: {0}; its programs end when its keeper's time is over"
    )]
    TakeOver(io::Error),
    /// No memory or process for what is to outlive the agent.
    #[error(
        "cannot keep what is to outlive this agent: {0}; check the limits on memory and processes"
    )]
    State(io::Error),
    /// Not the RDMA device that was asked for.
    #[error("--device: {0}")]
    Device(String),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}; check the limits on processes")]
    Thread(io::Error),
}

/// Runs an agent in this process until `stop` is set, or its launcher is gone. Calls `ready` once programs may
/// come, with somebody to ask for figures.
///
/// # Errors
/// [`AgentError`] at the start.
pub fn serve(
    config: &AgentConfig,
    stop: &Arc<AtomicBool>,
    ready: impl FnOnce(Observer),
) -> Result<(), AgentError> {
    let (kernel, userfaultfd) = Kernel::probe()?;
    crate::sys::process::raise_session_priority(
        std::process::id().cast_signed(),
        crate::sys::process::FIRST,
    );
    // The door first: a second agent for the same socket must not take a lease.
    let (listener, _socket_file) = open_door(config)?;
    // Never dropped: when this agent fails, its keeper needs what it has for the next one.
    let kept = ManuallyDrop::new(Kept::open(config)?);
    if let Err(missing) = config.device.look() {
        // Its port may be up again before those who wait for their pages have waited for too long.
        if !kept.is_left {
            return Err(AgentError::Device(missing));
        }
        tracing::warn!("--device: {missing}");
    }
    let reached_by = Arc::new(config.device.clone());
    let (far, plane) = join(config, &kept)?;
    let spaces = Arc::new(Spaces::new(Arc::clone(&kept.state), config.replicas));
    let shared = Shared {
        far: Arc::clone(&far),
        spawner: Arc::clone(&spaces),
        kernel,
        device: Arc::clone(&reached_by),
    };
    if kept.is_left {
        crate::recovery::take_over(&shared, &kept.state);
    }
    let door = Arc::new(Door {
        shared,
        device: userfaultfd.into(),
        admission: Admission {
            own_uid: rustix::process::geteuid().as_raw(),
            group: config.group,
        },
        fabric: config.fabric.map_or("any", FabricKind::as_str).to_owned(),
        fault_deadline: config.fault_deadline,
        peers: AtomicUsize::new(0),
    });
    let ended = Arc::clone(stop);
    let sharing = spawn("sharing", {
        let (spaces, ended) = (Arc::clone(&spaces), Arc::clone(&ended));
        move || crate::sharing::run(&spaces, &|| ended.load(Ordering::Acquire))
    })?;
    spawn("sampler", {
        let (spaces, ended) = (Arc::clone(&spaces), Arc::clone(&ended));
        let sharing = sharing.thread().clone();
        move || crate::sampler::run(&spaces, &sharing, &|| ended.load(Ordering::Acquire))
    })?;
    spawn("ceilings", {
        let (spaces, ended) = (Arc::clone(&spaces), Arc::clone(&ended));
        move || crate::ceiling::run(&spaces, &|| ended.load(Ordering::Acquire))
    })?;
    spawn("mover", {
        let (far, ended) = (Arc::clone(&far), Arc::clone(&ended));
        move || crate::mover::run(&far, reached_by, &|| ended.load(Ordering::Acquire))
    })?;
    spawn("door", {
        let ended = Arc::clone(&ended);
        move || door.serve(&listener, &|| ended.load(Ordering::Acquire))
    })?;
    let observer = Observer::new(Arc::clone(&spaces), Arc::clone(&far));
    let control = spawn("control-plane", {
        let (spaces, ended) = (Arc::clone(&spaces), Arc::clone(&ended));
        move || plane.run(&far, &spaces, &|| ended.load(Ordering::Acquire))
    })?;
    let alone_since = &kept.state.header().alone_since_ms;
    alone_since.store(0, Ordering::Release);
    ready(observer);
    wait_for_end(stop, config.exit_on_eof.as_ref(), &spaces);
    let _ = control.join();
    if let Some(keeper) = &kept.keeper {
        keeper.end();
    }
    Ok(())
}

/// What outlives this agent, and who holds it then.
struct Kept {
    state: Arc<State>,
    /// Whether an agent that died has left it.
    is_left: bool,
    keeper: Option<Keeper>,
}

impl Kept {
    fn open(config: &AgentConfig) -> Result<Self, AgentError> {
        let Some(deadline) = config.takeover_deadline else {
            let state = State::create().map_err(AgentError::State)?;
            return Ok(Self {
                state,
                is_left: false,
                keeper: None,
            });
        };
        crate::sys::descriptors::raise_limit();
        let mut keeper = Keeper::start(&config.socket, deadline).map_err(AgentError::State)?;
        let left = keeper.take_over().map_err(AgentError::TakeOver)?;
        let is_left = left.is_some();
        let state = match left {
            Some(state) => state,
            None => {
                let state = State::create().map_err(AgentError::State)?;
                keeper.hold(&state);
                state
            }
        };
        Ok(Self {
            state,
            is_left,
            keeper: Some(keeper),
        })
    }
}

/// Joins the cluster, anew or with the lease and the extents of an agent that died.
fn join(config: &AgentConfig, kept: &Kept) -> Result<(Arc<FarMemory>, ControlPlane), AgentError> {
    let state = Arc::clone(&kept.state);
    let (url, id) = (config.coordinator.clone(), config.id.clone());
    if kept.is_left {
        let far = FarMemory::left(Arc::clone(&state));
        let plane = ControlPlane::resume(url, id, config.fabric, state, &far)?;
        return Ok((Arc::new(far), plane));
    }
    let far = FarMemory::new(Arc::clone(&state));
    let mut plane = ControlPlane::join(url, id, config.fabric, state)?;
    plane.first_extents(&far, config.replicas)?;
    Ok((Arc::new(far), plane))
}

/// The socket's place in the file system, given up with the agent. An abstract name needs no giving up.
struct SocketFile(String);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.0.starts_with('@') {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

fn open_door(config: &AgentConfig) -> Result<(OwnedFd, SocketFile), AgentError> {
    let socket = config.socket.clone();
    let began = Instant::now();
    let mut opened = crate::door::open(&socket, config.group);
    while opened
        .as_ref()
        .is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
    {
        // One that was killed just now: its keeper closes what is not needed any more.
        let deadline = match crate::keeper::is_of_a_living_agent(&socket) {
            true => DYING_DEADLINE,
            false => DEAD_DOOR_DEADLINE,
        };
        if began.elapsed() > deadline {
            break;
        }
        std::thread::sleep(END_POLL);
        opened = crate::door::open(&socket, config.group);
    }
    match opened {
        Ok(listener) => Ok((listener, SocketFile(socket))),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(AgentError::Taken { socket }),
        Err(error) => Err(AgentError::Door { socket, error }),
    }
}

/// Waits for `stop`; or for the launcher to be gone and the last program with it.
fn wait_for_end(stop: &AtomicBool, launcher: Option<&OwnedFd>, spaces: &Spaces) {
    while !stop.load(Ordering::Acquire) {
        std::thread::sleep(END_POLL);
        if launcher.is_some_and(is_closed) && spaces.jobs().is_empty() {
            stop.store(true, Ordering::Release);
        }
    }
    spaces.wake_control_plane();
    // Programs whose pages nobody would bring any more must not be left waiting for them.
    for job in spaces.jobs() {
        crate::tree::end(&job);
    }
}

fn is_closed(fd: &OwnedFd) -> bool {
    let mut poll = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
    let now = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut poll, Some(&now)).unwrap_or(0) > 0
}

fn spawn(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> Result<std::thread::JoinHandle<()>, AgentError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(AgentError::Thread)
}
