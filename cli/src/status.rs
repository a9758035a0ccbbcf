//! `farpage status`: what the coordinator knows.

use crate::args::StatusArgs;

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    #[error("farpage status is not wired up in this build")]
    NotWired,
}

/// Asks the coordinator and prints what it says.
pub(crate) fn command(args: &StatusArgs) -> Result<(), StatusError> {
    ask(args)
}

/// STUB: the question to the coordinator over `farpage-proto` goes here.
fn ask(args: &StatusArgs) -> Result<(), StatusError> {
    let StatusArgs {
        coordinator: _,
        json: _,
    } = args;
    Err(StatusError::NotWired)
}
