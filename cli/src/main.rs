//! The `farpage` command.

fn main() {}
