//! `farpage coordinator`: the control plane.

use crate::args::{CoordinatorArgs, StateStore};

/// Why the control plane is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CoordinatorError {
    #[error("farpage coordinator is not wired up in this build")]
    NotWired,
}

/// Serves until a signal ends it.
pub(crate) fn command(args: &CoordinatorArgs) -> Result<(), CoordinatorError> {
    serve(args)
}

/// STUB: the coordinator of `farpage-server` goes here.
fn serve(args: &CoordinatorArgs) -> Result<(), CoordinatorError> {
    let _listen = args.listen;
    match &args.state {
        StateStore::File(_path) => Err(CoordinatorError::NotWired),
        StateStore::Etcd(_urls) => Err(CoordinatorError::NotWired),
    }
}
