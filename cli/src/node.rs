//! `farpage node`: lends this machine's memory.

use crate::args::{Label, NodeArgs};

/// A node's parameters, judged and with their defaults filled in.
#[derive(Debug)]
pub(crate) struct NodeOptions<'a> {
    pub(crate) args: &'a NodeArgs,
    pub(crate) id: String,
    pub(crate) labels: &'a [Label],
}

/// Why no memory is lent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    #[error("this machine's host name cannot be read; name the node with --id")]
    NoName,
    #[error("farpage node is not wired up in this build")]
    NotWired,
}

/// Lends memory until a signal ends it.
pub(crate) fn command(args: &NodeArgs) -> Result<(), NodeError> {
    let id = match &args.id {
        Some(id) => id.clone(),
        None => {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
                .map_err(|_| NodeError::NoName)?;
            Some(name.trim().to_owned())
                .filter(|name| !name.is_empty())
                .ok_or(NodeError::NoName)?
        }
    };
    serve(&NodeOptions {
        args,
        id,
        labels: &args.labels,
    })
}

/// STUB: the memory node of `farpage-server` goes here.
fn serve(options: &NodeOptions<'_>) -> Result<(), NodeError> {
    let NodeArgs {
        capacity: _,
        coordinator: _,
        fabric: _,
        listen: _,
        ..
    } = options.args;
    let _wanted = (
        &options.id,
        options
            .labels
            .first()
            .map(|label| (&label.key, &label.value)),
    );
    Err(NodeError::NotWired)
}
