//! What the fabric needs `unsafe` for: mapped memory and socket calls on raw addresses.
//!
//! Everything offered upwards is safe: bounds are checked here, next to the pointer that they guard.

#![allow(unsafe_code)]

pub(crate) mod mapping;
pub(crate) mod stream;
