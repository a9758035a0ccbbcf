//! Coordinator and nodes against each other over the loopback, with real data under the grants, and real processes where
//! it is about processes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod durability;
mod embedded;
mod grants;
mod harness;
mod hostile;
mod members;
