//! The unsafe rim: raw system calls, the shared block behind a pointer, the helper's birth.

#![allow(unsafe_code)]

pub mod calls;
pub mod clone;
pub mod memory;
pub mod socket;

pub use calls::Errno;
