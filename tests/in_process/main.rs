//! Three nodes in one process: the shortest way through every layer.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod answers;
mod clocks;
mod levels;
mod locks;
mod nodes;
mod rings;
mod sessions;
