//! What a client goes on doing after whoever began it has gone: it gives back locks whose guards
//! were dropped, cancels Acquires that nobody waits for, and revokes leases without an owner.
//!
//! It is only counted, so that a program can wait for it before it ends. Caveat: what a runtime
//! drops when it is shut down counts as done.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::watch;

/// How many such tasks there are.
pub(super) struct Background(watch::Sender<usize>);

impl Default for Background {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl Background {
    /// Runs `task` on `runtime`; it counts from this moment on.
    pub(super) fn spawn(
        self: &Arc<Self>,
        runtime: &Handle,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.0.send_modify(|count| *count += 1);
        let counted = Counted(self.clone());
        runtime.spawn(async move {
            let _counted = counted;
            task.await;
        });
    }

    /// Returns when there are none.
    pub(super) async fn settled(&self) {
        // The sender cannot go while it is borrowed.
        let _ = self.0.subscribe().wait_for(|count| *count == 0).await;
    }
}

/// Counts for as long as it is there.
struct Counted(Arc<Background>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}
