//! The coordinator and the memory node.
