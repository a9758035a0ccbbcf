//! `farpage coordinator`: the gRPC control plane.

use std::time::Duration;

use farpage_proto::FieldError;
use farpage_proto::transport::EndpointUrl;
use farpage_server::coordinator::{StoreUrl, Timing};
use farpage_server::{CoordinatorConfig, run_coordinator};

use crate::args::{CoordinatorArgs, StateStore};
use crate::daemon;
use crate::metrics::{Endpoint, MetricsError};

/// Why the control plane is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CoordinatorError {
    #[error("--listen: {0}")]
    Listen(#[from] FieldError),
    #[error("--state etcd is not supported by this build yet; use file:PATH")]
    NoEtcd,
    #[error("cannot start: {0}")]
    Runtime(#[from] std::io::Error),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Coordinator(#[from] farpage_server::CoordinatorError),
}

/// Serves until a signal ends it.
pub(crate) fn command(args: &CoordinatorArgs) -> Result<(), CoordinatorError> {
    daemon::start_logging();
    let StateStore::File(path) = &args.state else {
        return Err(CoordinatorError::NoEtcd);
    };
    let config = CoordinatorConfig {
        listen: EndpointUrl::parse_field("the address", &args.listen.to_string())?,
        store: StoreUrl::File(path.clone()),
        timing: Timing {
            lease_ttl: Duration::from_secs(args.lease_time),
            ..Timing::default()
        },
    };
    let metrics = Endpoint::start(args.metrics.metrics)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let ready = |ready: farpage_server::CoordinatorReady| {
        let metrics = metrics.map(|metrics| metrics.open(ready.observer));
        let metrics = metrics.map_or_else(String::new, |metrics| format!(", {metrics}"));
        daemon::say(&format!("coordinator serves at {}{metrics}\n", ready.url));
    };
    Ok(runtime.block_on(run_coordinator(config, ready, daemon::told_to_stop()))?)
}
