//! How a node that cannot keep its promises stops, and says why.

use std::io::{self, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::watch;

use crate::storage::thread::panic_message;

/// How long a process that aborts waits for its last words to be written.
const LAST_WORDS_GRACE: Duration = Duration::from_millis(100);

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

/// Runs what must be done in whole or not at all. If it panics the process aborts and says in what:
/// a state that was changed by half is nobody's, and must be neither read nor checkpointed.
pub(crate) fn abort_on_panic<T>(what: impl Fn() -> String, work: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let (what, message) = (what(), panic_message(&*panic));
        let line = format!("quorate: {what} panicked: {message}; the process aborts\n");
        // On a thread of its own, as standard error may hang. Where the panic was is told by the
        // log, which has the same time.
        let told = thread::Builder::new().spawn(move || {
            let _ = io::stderr().write_all(line.as_bytes());
        });
        drop(told);
        thread::sleep(LAST_WORDS_GRACE);
        std::process::abort()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_panic_in_what_must_be_whole_aborts_and_says_where() {
        const CHILD: &str = "QUORATE_TEST_ABORT";
        if std::env::var_os(CHILD).is_some() {
            abort_on_panic(|| "applying entry 7 (touch)".to_owned(), || panic!("half done"));
        }
        let name = "raft::halt::tests::a_panic_in_what_must_be_whole_aborts_and_says_where";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        assert_eq!(output.status.signal(), Some(6), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        let expected = "quorate: applying entry 7 (touch) panicked: half done; the process aborts";
        assert!(said.contains(expected), "{said}");
        assert_eq!(abort_on_panic(|| "nothing".to_owned(), || 7), 7);
    }
}
