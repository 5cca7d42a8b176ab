//! The core.

mod command;
mod time;

pub use command::*;
pub use time::*;
