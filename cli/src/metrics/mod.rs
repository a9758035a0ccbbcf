//! `--metrics`: what a daemon tells Prometheus. A page is made when it is asked for, from figures that are counted anyway.

mod agent;
mod coordinator;
mod endpoint;
mod node;
mod page;

pub(crate) use endpoint::{Endpoint, MetricsError};
