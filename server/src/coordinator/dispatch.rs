//! Carries orders to nodes: grants while their requester waits, revocations in the background until each is confirmed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use farpage_proto::NodeId;
use farpage_proto::lease::{ExtentGrant, GrantRequest};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tonic::Status;

use super::error::GrantError;
use super::grant::Plan;
use super::node_client::NodeClients;
use super::owner::{Owner, OwnerGone};
use super::state::NodeOrder;
use crate::random;

/// How long a node has to grant: a word in memory. Three rounds fit a client's patience.
pub(crate) const GRANT_DEADLINE: Duration = Duration::from_secs(2);
/// How long a node has to fence and scrub an extent: at most 256 MiB to give back to its kernel.
pub(crate) const REVOKE_DEADLINE: Duration = Duration::from_secs(5);
/// How often other nodes are tried in place of those that failed.
const GRANT_ROUNDS: usize = 3;
/// Revocations in flight at a time, over all nodes.
const MAX_REVOKES: usize = 64;
/// How often expiries and overdue revocations are looked for.
const TICK: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug)]
pub(crate) struct Dispatch {
    pub(crate) owner: Owner,
    pub(crate) nodes: NodeClients,
    /// There may be something to revoke.
    pub(crate) revoke: Notify,
}

impl Dispatch {
    pub(crate) fn new(owner: Owner) -> Self {
        Self {
            owner,
            nodes: NodeClients::default(),
            revoke: Notify::new(),
        }
    }

    /// Grants, asking other nodes in place of those that fail. At least one grant, or an error.
    pub(crate) async fn grant(
        self: &Arc<Self>,
        request: GrantRequest,
    ) -> Result<Vec<ExtentGrant>, Status> {
        let mut grants = Vec::new();
        let mut avoid = BTreeSet::new();
        for round in 0..GRANT_ROUNDS {
            let missing = request.count.saturating_sub(grants.len() as u32);
            if missing == 0 {
                break;
            }
            let keys = random::numbers(missing as usize)
                .map_err(|error| Status::internal(error.to_string()))?;
            let rest = GrantRequest {
                count: missing,
                ..request
            };
            let skip = avoid.clone();
            let first = round == 0;
            let planned = self
                .owner
                .call(move |state, _| state.plan_grant(&rest, first, &keys, &skip))
                .await?;
            match planned {
                Ok(Plan::Repeat(grants)) => return Ok(grants),
                Ok(Plan::Ask(orders)) => {
                    grants.extend(self.ask(orders, &request, &mut avoid).await?);
                }
                // The rest cannot be had; what was granted is the answer.
                Err(error) if grants.is_empty() && first => return Err(error.into()),
                Err(_) => break,
            }
        }
        if grants.is_empty() {
            Err(GrantError::NodesFailed.into())
        } else {
            Ok(grants)
        }
    }

    async fn ask(
        self: &Arc<Self>,
        orders: Vec<NodeOrder>,
        request: &GrantRequest,
        avoid: &mut BTreeSet<NodeId>,
    ) -> Result<Vec<ExtentGrant>, OwnerGone> {
        // At most MAX_GRANT_COUNT tasks.
        let mut calls = JoinSet::new();
        for order in orders {
            let this = Arc::clone(self);
            calls.spawn(async move {
                let result = this.nodes.send(&order, GRANT_DEADLINE).await;
                (order, result)
            });
        }
        let mut answers = Vec::new();
        while let Some(joined) = calls.join_next().await {
            let Ok((order, result)) = joined else {
                continue;
            };
            if let Err(status) = &result {
                tracing::warn!(node = %order.node, extent = %order.extent, %status, "the node did not grant");
                avoid.insert(order.node.clone());
            }
            answers.push((order, result.is_ok()));
        }
        answers.sort_by_key(|(order, _)| order.extent);
        let fabric = request.fabric;
        let grants = self
            .owner
            .call(move |state, now| {
                let mut grants = Vec::new();
                for (order, granted) in answers {
                    if granted {
                        grants.extend(state.grant_confirmed(order.extent, order.epoch, fabric));
                    } else {
                        state.grant_failed(now, order.extent, order.epoch);
                    }
                }
                grants
            })
            .await?;
        self.revoke.notify_one();
        Ok(grants)
    }

    /// Lets time pass, and sends revocations until each is confirmed. Ends with the owner.
    pub(crate) async fn run(self: Arc<Self>) -> OwnerGone {
        let places = Arc::new(Semaphore::new(MAX_REVOKES));
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.revoke.notified() => {}
            }
            let free = places.available_permits();
            let due = self.owner.call(move |state, now| {
                state.tick(now);
                state.revokes_due(now, free)
            });
            let orders = match due.await {
                Ok(orders) => orders,
                Err(gone) => return gone,
            };
            for order in orders {
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                    break;
                };
                let this = Arc::clone(&self);
                tokio::spawn(async move {
                    this.revoke_one(&order).await;
                    drop(place);
                    this.revoke.notify_one();
                });
            }
        }
    }

    async fn revoke_one(&self, order: &NodeOrder) {
        match self.nodes.send(order, REVOKE_DEADLINE).await {
            Ok(()) => {
                let (extent, epoch) = (order.extent, order.epoch);
                // Without an owner there is no coordinator; the next one asks again.
                let _ = self
                    .owner
                    .call(move |state, _| state.revoke_confirmed(extent, epoch))
                    .await;
            }
            Err(status) => {
                tracing::warn!(node = %order.node, extent = %order.extent, %status, "not revoked yet, will be tried again");
            }
        }
    }
}
