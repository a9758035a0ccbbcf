//! bindgen 0.69 under the version that rdma-sys asks for; see `Cargo.toml`.

pub use today::*;
