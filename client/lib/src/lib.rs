//! Far memory for Rust programs.
//!
//! A [`Region`] is memory of which only a bounded part lies in this machine's DRAM; the rest is on memory nodes,
//! and comes home page by page as it is touched. It reads and writes like any `[u8]`.
//!
//! ```no_run
//! # fn main() -> Result<(), farpage::Error> {
//! let agent = farpage::Agent::connect("/run/farpage/agent.sock")?;
//! // A gigabyte, of which 64 MiB may lie here at any time.
//! let mut region = agent.map(1 << 30, 64 << 20)?;
//! region[123_456_789] = 42;
//! assert_eq!(region[123_456_789], 42);
//! region.advise(0..512 << 20, farpage::Advice::DontNeed)?; // reads as zeros again
//! # Ok(())
//! # }
//! ```
//!
//! It needs a running agent (`farpage agent`), or to be run by `farpage run`, where the run's own limit holds for
//! all memory and a region is ordinary memory. The example `region` does the former:
//!
//! ```text
//! $ farpage agent --own-far-memory 1G --socket @lib-example &
//! $ cargo run --release -p farpage --example region -- @lib-example
//! 128 MiB mapped, 16 MiB of them may lie here
//! written: 16 MiB here
//! verified: 16 MiB here, every page as it was written
//! ```
//!
//! # What was written
//!
//! [`Region::clear_soft_dirty`] and [`Region::soft_dirty`] tell which pages were written in between, wherever they are, so that
//! a checkpoint copies only what changed. Neither brings a page home.
//!
//! ```no_run
//! # fn main() -> Result<(), farpage::Error> {
//! # let mut region = farpage::Agent::from_environment()?.map(1 << 30, 64 << 20)?;
//! # let save = |offset: usize, bytes: &[u8]| ();
//! loop {
//!     for written in region.clear_soft_dirty(0..region.len())? {
//!         save(written.start, &region[written]);
//!     }
//!     region[123_456_789] += 1; // work until the next checkpoint
//! #   break;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What to know
//!
//! - A page whose memory node is lost raises `SIGBUS` at once; one whose node does not answer, after a minute.
//! - If the agent dies and none takes over in time, the program is ended: nobody could bring its pages any more.
//! - A forked child does not inherit regions.
//! - Each region has a thread in the agent and a small helper process that shares this program's memory.

mod agent;
mod job;
mod region;
mod soft_dirty;
mod sys;

pub use agent::{Agent, Error};
pub use region::{Advice, Region};
