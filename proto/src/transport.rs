//! How control-plane clients and servers reach each other: URLs, [`connect`], [`listen`].
//!
//! Every wait has a deadline and every message a bound; the numbers are in [`crate::limits`].

mod connect;
mod connection;
mod listen;
mod url;

pub use connect::{ConnectError, connect, connect_lazy};
pub use connection::{Connection, Peer};
pub use listen::{Incoming, ListenError, Listener, listen, server_builder};
pub use url::EndpointUrl;
