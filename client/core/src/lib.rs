//! The pager's pure parts: plain code over plain data, without threads, sockets or a kernel.
//!
//! [`entry`] (where a page is, in one word), [`page_cell`] and [`table`] (entries where the next agent finds
//! them), [`gate`] (what excludes what), [`residents`] (who goes), [`prefetch`] (who comes along).
//!
//! A crate of its own, because its models replace the atomics underneath (`--cfg loom`), which the agent's
//! asynchronous dependencies cannot be built with:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release -p farpage-core --lib loom
//! ```

pub mod entry;
pub mod gate;
pub mod page_cell;
pub mod prefetch;
pub mod residents;
pub mod table;

#[cfg(all(test, loom))]
mod loom_models;
