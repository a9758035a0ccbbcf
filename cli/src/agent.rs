//! `farpage agent`: the per-host pager.

use crate::args::AgentArgs;

/// Why programs are not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("programs cannot be given far memory: {0}")]
    Userfaultfd(#[from] crate::doctor::UserfaultfdError),
    #[error("farpage agent is not wired up in this build")]
    NotWired,
}

/// Serves until a signal, or the end of the lifeline, ends it.
pub(crate) fn command(args: &AgentArgs) -> Result<(), AgentError> {
    crate::doctor::userfaultfd_is_usable()?;
    serve(args)
}

/// STUB: the pager of `farpage-agent` goes here. It writes `run::helper::READY` when it serves.
fn serve(args: &AgentArgs) -> Result<(), AgentError> {
    let AgentArgs {
        coordinator: _,
        socket: _,
        group: _,
        lifeline: _,
    } = args;
    Err(AgentError::NotWired)
}
