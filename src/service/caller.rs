//! Who asks, and whether it is still there.

use std::sync::{Arc, Weak};

/// Who asks. Today everybody who can connect may do everything; authorisation has its place here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caller;

/// Kept by whoever waits for answers, and dropped when it goes.
#[derive(Debug, Default)]
pub struct Present(Arc<()>);

/// Says whether somebody still waits for an answer.
#[derive(Clone, Debug)]
pub struct Presence(Weak<()>);

impl Present {
    /// Of somebody who has come.
    pub fn new() -> Self {
        Self(Arc::new(()))
    }

    /// For what works for this one.
    pub fn presence(&self) -> Presence {
        Presence(Arc::downgrade(&self.0))
    }
}

impl Presence {
    /// Nobody waits any more.
    pub fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}
