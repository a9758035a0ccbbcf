//! `farpage far-memory`, hidden: the coordinator and memory node of one `farpage run`, in one process.

use crate::args::FarMemoryArgs;

/// Why there is no far memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FarMemoryError {
    #[error("farpage far-memory is not wired up in this build")]
    NotWired,
}

/// Serves until the lifeline ends it.
pub(crate) fn command(args: &FarMemoryArgs) -> Result<(), FarMemoryError> {
    serve(args)
}

/// STUB: the embedded mode of `farpage-server` goes here. It writes `run::helper::READY` when it serves.
fn serve(args: &FarMemoryArgs) -> Result<(), FarMemoryError> {
    let FarMemoryArgs {
        socket: _,
        capacity: _,
        lifeline: _,
    } = args;
    Err(FarMemoryError::NotWired)
}
