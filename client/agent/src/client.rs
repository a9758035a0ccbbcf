//! The launcher's side of the job protocol: what `farpage run` holds on to while its program runs.

pub use farpage_attach::message::{JOB_VARIABLE, SOCKET_VARIABLE};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use farpage_attach::message::{Packet, kind, tag};
use rustix::io::retry_on_intr;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::protocol::{Account, JobReply, JobRequest, Lowered, MAX_PACKET, ProcessFigures};

/// How long the agent may take to answer. An account waits for the last address spaces.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// How long the next agent is waited for: longer than an agent's own default of how long it may take.
const NEXT_AGENT_DEADLINE: Duration = Duration::from_secs(20);
const NEXT_AGENT_POLL: Duration = Duration::from_millis(50);

/// How a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No agent there, or it went away.
    #[error("the agent does not answer: {0}")]
    Unreachable(#[from] io::Error),
    /// The socket's permissions keep us out.
    #[error(
        "the agent at {0} does not serve this user; ask for membership in the group of that socket (ls -l {0}), and \
         log in anew"
    )]
    NotAdmitted(String),
    /// The agent said no.
    #[error("the agent refused: {0}")]
    Refused(String),
    /// The agent said something else.
    #[error("the agent's answer is not understood; are farpage and the agent of the same version?")]
    Malformed,
}

/// What a job is opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Resident anonymous memory of the whole tree, bytes.
    pub local_bytes: u64,
    /// Far memory, bytes.
    pub far_bytes: u64,
    /// Copies of each page.
    pub replicas: u32,
    /// How long a fault may wait for its page; the agent's own choice where none is given.
    pub fault_deadline: Option<Duration>,
}

/// An open job. Dropping it without [`JobClient::finish`] ends the job's programs.
#[derive(Debug)]
pub struct JobClient {
    /// Made anew with the next agent.
    socket: Mutex<OwnedFd>,
    path: String,
    token: String,
    lowered: Option<Lowered>,
    patience: Duration,
}

impl JobClient {
    /// Opens a job at the agent that listens on `path` (or `@name`).
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn open(path: &str, terms: &Terms) -> Result<Self, ClientError> {
        let socket = hello(path, kind::JOB)?;
        match ask(
            &socket,
            &JobRequest::Open {
                local_bytes: terms.local_bytes,
                far_bytes: terms.far_bytes,
                replicas: terms.replicas,
                fault_deadline_s: terms.fault_deadline.map(|time| time.as_secs()),
            },
        )? {
            JobReply::Opened { token, lowered } => Ok(Self {
                socket: Mutex::new(socket),
                path: path.to_owned(),
                token,
                lowered,
                patience: Duration::ZERO,
            }),
            JobReply::Refused { reason } => Err(ClientError::Refused(reason)),
            _ => Err(ClientError::Malformed),
        }
    }

    /// From now on an agent that does not answer was killed, and the next one is waited for.
    pub fn waits_for_the_next_agent(&mut self) {
        self.patience = NEXT_AGENT_DEADLINE;
    }

    /// Asks, and asks again of the next agent if this one was killed. No request does anything else when it is made twice.
    fn ask(&self, request: &JobRequest) -> Result<JobReply, ClientError> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        let mut reply = ask(&socket, request);
        while matches!(reply, Err(ClientError::Unreachable(_))) && began.elapsed() < self.patience {
            std::thread::sleep(NEXT_AGENT_POLL);
            reply = self.resume().and_then(|next| {
                *socket = next;
                ask(&socket, request)
            });
        }
        reply
    }

    /// Comes back to the job at the next agent.
    fn resume(&self) -> Result<OwnedFd, ClientError> {
        let socket = hello(&self.path, kind::JOB)?;
        let token = self.token.clone();
        match ask(&socket, &JobRequest::Resume { token })? {
            JobReply::Opened { .. } => Ok(socket),
            JobReply::Refused { reason } => Err(ClientError::Refused(reason)),
            _ => Err(ClientError::Malformed),
        }
    }

    /// The job's token, for the program's environment.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Why the program may have less here than was asked for, if it may.
    #[must_use]
    pub fn lowered(&self) -> Option<&Lowered> {
        self.lowered.as_ref()
    }

    /// Tells which process is the job's first program.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn started(&self, pid: i32) -> Result<(), ClientError> {
        self.ask(&JobRequest::Started { pid }).map(drop)
    }

    /// The first program has ended: asks for the account.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn finish(self) -> Result<Account, ClientError> {
        match self.ask(&JobRequest::Finish)? {
            JobReply::Account(account) => Ok(*account),
            JobReply::Refused { reason } => Err(ClientError::Refused(reason)),
            _ => Err(ClientError::Malformed),
        }
    }
}

/// Figures of every process that the agent at `path` serves.
///
/// # Errors
/// [`ClientError`].
pub fn status(path: &str) -> Result<Vec<ProcessFigures>, ClientError> {
    let socket = hello(path, kind::STATUS)?;
    receive(&socket)
}

fn hello(path: &str, kind: u32) -> Result<OwnedFd, ClientError> {
    let error = |errno: farpage_attach::sys::Errno| io::Error::from_raw_os_error(errno.0 as i32);
    let fd = farpage_attach::sys::socket::connect(path.as_bytes()).map_err(|errno| {
        let error = error(errno);
        match error.kind() {
            io::ErrorKind::PermissionDenied => ClientError::NotAdmitted(path.to_owned()),
            _ => ClientError::Unreachable(error),
        }
    })?;
    let socket = crate::sys::socket::owned(fd);
    crate::sys::socket::set_deadline(std::os::fd::AsFd::as_fd(&socket), ANSWER_DEADLINE)?;
    let mut packet = Packet::new(tag::HELLO);
    packet.kind = kind;
    farpage_attach::sys::socket::send(socket.as_raw_fd(), &packet, &[]).map_err(error)?;
    Ok(socket)
}

fn ask(socket: &OwnedFd, request: &JobRequest) -> Result<JobReply, ClientError> {
    let bytes = serde_json::to_vec(request).map_err(|_| ClientError::Malformed)?;
    send(socket, &bytes, SendFlags::NOSIGNAL).map_err(io::Error::from)?;
    receive(socket)
}

fn receive<T: serde::de::DeserializeOwned>(socket: &OwnedFd) -> Result<T, ClientError> {
    let mut bytes = vec![0u8; MAX_PACKET];
    let got = retry_on_intr(|| recv(socket, &mut bytes, RecvFlags::empty()));
    let (got, _) = got.map_err(io::Error::from)?;
    let bytes = &bytes[..got];
    if got == 0 {
        return Err(ClientError::Unreachable(
            io::ErrorKind::UnexpectedEof.into(),
        ));
    }
    if let Some(packet) = Packet::from_bytes(bytes) {
        let reason = bytes
            .get(farpage_attach::message::PACKET_BYTES..)
            .unwrap_or_default();
        return match packet.tag {
            tag::REFUSAL => Err(ClientError::Refused(
                String::from_utf8_lossy(reason).into_owned(),
            )),
            _ => Err(ClientError::Malformed),
        };
    }
    serde_json::from_slice(bytes).map_err(|_| ClientError::Malformed)
}
