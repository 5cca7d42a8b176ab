//! The end of a node, as its streams learn of it.

use tokio::sync::watch;

/// Says whether the node drains, to whoever asks before it begins or after.
#[derive(Clone)]
pub(super) struct Draining(watch::Receiver<bool>);

/// Begins it, once.
pub(super) struct Drain(watch::Sender<bool>);

pub(super) fn draining() -> (Drain, Draining) {
    let (begin, begun) = watch::channel(false);
    (Drain(begin), Draining(begun))
}

impl Drain {
    pub(super) fn begin(&self) {
        self.0.send_replace(true);
    }
}

impl Draining {
    /// Returns once the node drains, or is gone.
    pub(super) async fn begun(&mut self) {
        let _ = self.0.wait_for(|begun| *begun).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_comes_late_learns_of_it_as_well() {
        let (drain, mut early) = draining();
        let mut late = early.clone();
        drain.begin();
        tokio::time::timeout(std::time::Duration::from_secs(60), async {
            early.begun().await;
            late.begun().await;
        })
        .await
        .unwrap();
    }
}
