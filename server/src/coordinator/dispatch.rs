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
        let mut grants = Vec::<ExtentGrant>::new();
        let (mut avoid, mut sets) = (BTreeSet::new(), 0);
        for round in 0..GRANT_ROUNDS {
            // A set of which some copy was granted is one: its holder asks for the rest of it.
            let granted: BTreeSet<u32> = grants.iter().map(|grant| grant.set).collect();
            let missing = request.count.saturating_sub(granted.len() as u32);
            if missing == 0 {
                break;
            }
            let keys = random::numbers((missing * request.copies) as usize)
                .map_err(|error| Status::internal(error.to_string()))?;
            let rest = GrantRequest {
                count: missing,
                ..request.clone()
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
                    grants.extend(self.ask(orders, &request, sets, &mut avoid).await?);
                    sets += missing;
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
        first_set: u32,
        avoid: &mut BTreeSet<NodeId>,
    ) -> Result<Vec<ExtentGrant>, OwnerGone> {
        // At most MAX_GRANT_COUNT tasks.
        let mut calls = JoinSet::new();
        for (order, place) in orders.into_iter().zip(0..) {
            let (this, set) = (Arc::clone(self), first_set + place / request.copies.max(1));
            calls.spawn(async move {
                let result = this.nodes.send(&order, GRANT_DEADLINE).await;
                (order, set, result)
            });
        }
        let mut answers = Vec::new();
        while let Some(joined) = calls.join_next().await {
            let Ok((order, set, result)) = joined else {
                continue;
            };
            if let Err(status) = &result {
                tracing::warn!(node = %order.node, extent = %order.extent, %status, "the node did not grant");
                avoid.insert(order.node.clone());
            }
            answers.push((order, set, result.is_ok()));
        }
        answers.sort_by_key(|(order, set, _)| (*set, order.extent));
        let fabric = request.fabric;
        let grants = self
            .owner
            .call(move |state, now| {
                let mut grants = Vec::new();
                for (order, set, granted) in answers {
                    if granted {
                        let grant = state.grant_confirmed(order.extent, order.epoch, fabric, set);
                        grants.extend(grant);
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
