//! Answers those who have waited long enough.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// How late a deadline may be noticed.
const SWEEP_INTERVAL: Duration = Duration::from_millis(25);

/// Runs while something is pending, and sleeps otherwise: an idle node does nothing.
#[derive(Default)]
pub(crate) struct Sweeper {
    awake: AtomicBool,
    wanted: Notify,
}

impl Sweeper {
    /// Says that something is pending.
    pub(crate) fn wake(&self) {
        if !self.awake.swap(true, Ordering::AcqRel) {
            self.wanted.notify_one();
        }
    }

    /// Calls `sweep` every `SWEEP_INTERVAL` until it says that nothing is pending, and again when
    /// woken.
    pub(crate) async fn run(&self, sweep: impl Fn() -> bool) {
        loop {
            self.wanted.notified().await;
            loop {
                tokio::time::sleep(SWEEP_INTERVAL).await;
                if sweep() {
                    continue;
                }
                self.awake.store(false, Ordering::Release);
                // What was added after the sweep and before the store has not woken anybody.
                if !sweep() || self.awake.swap(true, Ordering::AcqRel) {
                    break;
                }
            }
        }
    }
}
