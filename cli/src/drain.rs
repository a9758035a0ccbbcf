//! `farpage drain`: has what a node holds moved elsewhere, and waits until it holds nothing.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use farpage_proto::client::{CallError, Coordinator};
use farpage_proto::transport::{ConnectError, EndpointUrl};
use farpage_proto::{FieldError, NodeId, v1};

use crate::args::DrainArgs;

/// How long connecting, and each answer, may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often it is looked. Agents do something about it once a second.
const LOOK: Duration = Duration::from_millis(500);

/// Why the node is not drained. Whatever it holds is safe: it goes on lending that.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DrainError {
    #[error("{0}")]
    Field(#[from] FieldError),
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Call(#[from] CallError),
    #[error("cannot start: {0}")]
    Runtime(io::Error),
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
    #[error(
        "{node} still holds {held} extents of {agents} after {seconds} s: {reason}. Nothing is lost and nothing new goes there; \
         drain it again to wait on, or take it back with --undo"
    )]
    Late {
        node: NodeId,
        held: u32,
        agents: String,
        seconds: u64,
        reason: &'static str,
    },
}

/// Drains, and tells how far it has come.
pub(crate) fn command(args: &DrainArgs) -> Result<(), DrainError> {
    let url = EndpointUrl::parse_field("--coordinator", &args.coordinator)?;
    let node = NodeId::new(args.node.clone())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(DrainError::Runtime)?;
    runtime.block_on(async {
        let coordinator = Coordinator::connect(&url, DEADLINE).await?;
        let first = coordinator.drain(node.clone(), args.undo).await?;
        if args.undo {
            writeln!(io::stdout(), "{node} is not drained any more")?;
            return Ok(());
        }
        wait(&coordinator, node, first, args.timeout).await
    })
}

async fn wait(
    coordinator: &Coordinator,
    node: NodeId,
    mut left: v1::DrainNodeResponse,
    seconds: u64,
) -> Result<(), DrainError> {
    let (began, mut told) = (Instant::now(), None);
    while left.held_extents > 0 {
        if told != Some(left.held_extents) {
            writeln!(
                io::stdout(),
                "{node} holds {} extents of {}; {} are free elsewhere",
                left.held_extents,
                left.agents.join(", "),
                left.free_elsewhere
            )?;
            told = Some(left.held_extents);
        }
        if began.elapsed().as_secs() >= seconds {
            return Err(DrainError::Late {
                held: left.held_extents,
                agents: left.agents.join(", "),
                reason: reason(&left),
                node,
                seconds,
            });
        }
        tokio::time::sleep(LOOK).await;
        match coordinator.drain(node.clone(), false).await {
            Ok(now) => left = now,
            // A coordinator that is restarted knows of it still.
            Err(CallError::Unavailable(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    writeln!(io::stdout(), "{node} holds nothing, and can be stopped")?;
    Ok(())
}

fn reason(left: &v1::DrainNodeResponse) -> &'static str {
    match left.free_elsewhere {
        0 => "no other node has room for them; add one, or end programs",
        _ => {
            "their agents have not moved them: see their logs; with --replicas each page needs a node of its own for every copy"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_late_says_why_and_what_to_do() {
        let left = |free_elsewhere| v1::DrainNodeResponse {
            held_extents: 3,
            free_elsewhere,
            agents: vec!["a".to_owned()],
            ..v1::DrainNodeResponse::default()
        };
        assert!(reason(&left(0)).contains("add one"));
        assert!(reason(&left(4)).contains("--replicas"));
    }
}
