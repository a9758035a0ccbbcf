//! Faults injected into the connections to memory nodes: for tests of what a page's way does about them.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use farpage_fabric::Endpoint;
use farpage_fabric::faulty::{FaultPlan, FaultyEndpoint};

/// What is injected, as [`FaultPlan`] parses it. Unset, as it is for everybody but tests, nothing is.
const VARIABLE: &str = "FARPAGE_FAULTS";

/// The connection as it is, or one that misbehaves as asked for. No two misbehave alike.
///
/// # Errors
/// When the kernel has no descriptor left for the latter.
pub(crate) fn inject(endpoint: Box<dyn Endpoint>) -> io::Result<Box<dyn Endpoint>> {
    static PLAN: OnceLock<Option<FaultPlan>> = OnceLock::new();
    static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
    let Some(mut plan) = *PLAN.get_or_init(plan) else {
        return Ok(endpoint);
    };
    plan.seed = plan
        .seed
        .wrapping_add(CONNECTIONS.fetch_add(1, Ordering::Relaxed));
    Ok(Box::new(FaultyEndpoint::new(endpoint, plan)?))
}

fn plan() -> Option<FaultPlan> {
    let text = std::env::var(VARIABLE).ok()?;
    let plan: FaultPlan = text
        .parse()
        .inspect_err(
            |error| tracing::error!(%error, "{VARIABLE} is not understood: nothing is injected"),
        )
        .ok()?;
    tracing::warn!(
        ?plan,
        "faults are injected into connections to memory nodes"
    );
    Some(plan)
}
