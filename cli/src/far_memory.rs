//! `farpage far-memory`, hidden: the coordinator and memory node of one `farpage run`, in one process.

use farpage_proto::{ByteCount, FieldError};
use farpage_server::{EmbeddedConfig, EmbeddedError, embedded};

use crate::args::FarMemoryArgs;
use crate::daemon;
use crate::run::READY;

/// The nice value of pagers.
const PRECEDENCE: i32 = -19;

/// Why there is no far memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FarMemoryError {
    #[error("--socket: {0}")]
    Name(#[from] FieldError),
    #[error("--lifeline: {0}")]
    Lifeline(#[from] std::io::Error),
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
}

/// Serves until the lifeline ends it.
pub(crate) fn command(args: &FarMemoryArgs) -> Result<(), FarMemoryError> {
    daemon::start_logging();
    // As the agent's pagers have: many of them would leave this process no time to let them in.
    crate::sys::take_precedence(PRECEDENCE);
    let name = args.socket.trim_start_matches('@');
    let extent = farpage_proto::limits::DEFAULT_EXTENT_BYTES;
    let capacity = args.capacity.bytes().next_multiple_of(extent);
    let mut config = EmbeddedConfig::new(ByteCount(capacity), name);
    config.fabric = args.fabric.kind();
    config.rdma_device.clone_from(&args.rdma.device);
    config.beside = args
        .beside
        .as_ref()
        .map(|socket| socket.trim_start_matches('@').to_owned());
    config.exit_on_eof = args.lifeline.map(crate::sys::take_descriptor).transpose()?;
    Ok(embedded(
        config,
        |_| daemon::say(READY),
        std::future::pending(),
    )?)
}
