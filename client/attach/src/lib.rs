//! What an application process shares with the agent.
//!
//! Everything here runs inside somebody else's program, before its `main` or beside it, so it is built of
//! raw system calls alone: no libc, no allocation, no thread-local storage, no unwinding. The agent uses the
//! same definitions of the wire ([`message`]) and of the shared memory ([`control`]) from its side.
//!
//! The order of an attachment is the order of the modules: [`attach`] speaks the handshake of [`message`],
//! maps the [`control`] block and starts the [`helper`], which from then on takes pages out for the agent. What may keep it
//! waiting for the agent it has another do, the [`unsharer`].

#![no_std]

pub mod attach;
pub mod control;
pub mod helper;
pub mod hints;
pub mod landing;
pub mod message;
pub mod sys;
pub mod unsharer;

/// Bytes of a page. The whole project manages base pages; huge ones are split by the kernel as they are
/// taken out.
pub const PAGE_BYTES: usize = 4096;
