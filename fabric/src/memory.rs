//! Memory registered with the fabric.

/// A mapping that the fabric may read and write on behalf of work requests.
#[derive(Debug)]
pub struct RegisteredMemory {}
