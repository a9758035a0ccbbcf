//! Far memory for Rust programs.
