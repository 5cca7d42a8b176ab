//! How a node that cannot keep its promises stops, and says why.

use std::sync::Arc;

use tokio::sync::watch;

/// The first reason to stop; everybody who works for the node watches it.
#[derive(Clone)]
pub(crate) struct Halt(Arc<watch::Sender<Option<String>>>);

impl Halt {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// Stops the node, unless another reason has.
    pub(crate) fn because(&self, reason: &str) {
        self.0.send_if_modified(|current| {
            if current.is_some() {
                return false;
            }
            tracing::error!(reason, "this node halts");
            *current = Some(reason.to_owned());
            true
        });
    }

    pub(crate) fn reason(&self) -> Option<String> {
        self.0.borrow().clone()
    }

    /// Waits for a reason.
    pub(crate) async fn halted(&self) -> String {
        let mut reasons = self.0.subscribe();
        match reasons.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the node is gone".to_owned(),
        }
    }
}
