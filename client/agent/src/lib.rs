//! The per-host pager.
