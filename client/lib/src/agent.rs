//! The agent as a program sees it.

use std::io;

use farpage_attach::attach::AttachError;

use crate::region::Region;

/// Why there is no far memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers at the agent's socket.
    #[error(
        "no agent answers at {socket}: {error}; start one (farpage agent --socket {socket}), or run this \
         program by farpage run"
    )]
    NoAgent {
        /// Where.
        socket: String,
        /// Why.
        error: io::Error,
    },
    /// Neither run by `farpage run` nor told where an agent is.
    #[error(
        "no agent is named; set FARPAGE_AGENT to its socket, or run this program by farpage run"
    )]
    NotNamed,
    /// The agent said no, and why.
    #[error("the agent refused: {0}")]
    Refused(String),
    /// The agent said something else.
    #[error(
        "the agent's answer is not understood; are this program's farpage and the agent of one version?"
    )]
    Malformed,
    /// A range that is not within the region.
    #[error("the range is not within the region")]
    OutOfRange,
    /// A system call failed.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

impl Error {
    pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::System(what, error)
    }

    pub(crate) fn attach(error: &AttachError, socket: &str) -> Self {
        let errno = |errno: &farpage_attach::sys::Errno| {
            io::Error::from_raw_os_error(i32::try_from(errno.0).unwrap_or(0))
        };
        match error {
            AttachError::Unreachable(error) => Self::NoAgent {
                socket: socket.to_owned(),
                error: errno(error),
            },
            AttachError::Refused(text, len) => {
                let text = text.get(..*len).unwrap_or_default();
                Self::Refused(String::from_utf8_lossy(text).into_owned())
            }
            AttachError::Handshake(error) => Self::System("talking to the agent", errno(error)),
            AttachError::System(what, error) => Self::System(what, errno(error)),
        }
    }
}

/// Where far memory comes from.
#[derive(Clone, Debug)]
pub struct Agent {
    /// None under `farpage run`: there all memory is managed already.
    socket: Option<String>,
}

impl Agent {
    /// The agent that listens at `socket`: a path, or `@name` in the abstract namespace.
    ///
    /// # Errors
    /// [`Error::NoAgent`] where nobody does.
    pub fn connect(socket: &str) -> Result<Self, Error> {
        let connected = farpage_attach::sys::socket::connect(socket.as_bytes())
            .map_err(|errno| Error::attach(&AttachError::Unreachable(errno), socket))?;
        // Each region has a connection of its own; this one was to see that somebody answers.
        drop(crate::sys::owned(connected));
        Ok(Self {
            socket: Some(socket.to_owned()),
        })
    }

    /// The agent that the environment names: that of `farpage run` which runs this program, else the one whose
    /// socket is in `FARPAGE_AGENT`.
    ///
    /// # Errors
    /// [`Error::NotNamed`], or [`Error::NoAgent`] where nobody answers at `FARPAGE_AGENT`.
    pub fn from_environment() -> Result<Self, Error> {
        if std::env::var_os(farpage_attach::message::JOB_VARIABLE).is_some() {
            return Ok(Self { socket: None });
        }
        let socket = std::env::var("FARPAGE_AGENT").map_err(|_| Error::NotNamed)?;
        Self::connect(&socket)
    }

    /// Maps `bytes` of zeros, rounded up to whole pages, of which at most `local_bytes` (4 MiB or more) lie in
    /// local memory. Under `farpage run` the run's limit holds instead.
    ///
    /// # Errors
    /// [`Error`]; nothing stays mapped.
    pub fn map(&self, bytes: usize, local_bytes: usize) -> Result<Region, Error> {
        Region::map(self.socket.as_deref(), bytes, local_bytes)
    }
}
