//! The preload shim: attaches an unmodified program to the agent before its `main`.
//!
//! A shared object that the dynamic loader brings into a program by `LD_PRELOAD`, and again after every
//! `execve`. It attaches in its constructor and in every forked child, tells the agent of new mappings when
//! they use up what may be mapped without a look (of each, once memory is managed), and makes allocations wait while eviction catches up. It leaves no descriptor open in the
//! program and allocates nothing. `std` is linked for its panic handler alone; nothing here can panic.

#![no_std]

extern crate std;

mod allocations;
mod lifecycle;
mod mappings;
mod sys;
