//! The signals that ask a command to end, and the little that it still does then.
//!
//! What a command has at its end, a lock, a lease, a place in a line, it gives back in a time that
//! is bounded: whoever ends it may do so because the cluster is gone. A second signal ends it at
//! once. Caveat: where `nohup` has SIGHUP ignored it stays ignored; SIGINT and SIGQUIT are listened
//! for even where a shell has them ignored, as shells do for what a script runs with `&`.

use std::future::poll_fn;
use std::process::ExitCode;
use std::task::Poll;
use std::time::Duration;

use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind, signal};

use super::failure::Failure;

/// The longest that a command tarries at its end.
const PARTING_MAX: Duration = Duration::from_secs(2);

/// SIGINT, SIGTERM, SIGHUP and SIGQUIT, as they come.
pub(super) struct Signals {
    listening: Vec<(Signal, unix::Signal)>,
    /// How many have come.
    seen: u32,
}

impl Signals {
    pub(super) fn new() -> Result<Self, Failure> {
        let mut listening = vec![
            (Signal::INT, signal(SignalKind::interrupt())?),
            (Signal::TERM, signal(SignalKind::terminate())?),
            (Signal::QUIT, signal(SignalKind::quit())?),
        ];
        if !is_ignored(Signal::HUP) {
            listening.push((Signal::HUP, signal(SignalKind::hangup())?));
        }
        Ok(Self { listening, seen: 0 })
    }

    /// The next of them.
    pub(super) async fn next(&mut self) -> Signal {
        let listening = &mut self.listening;
        let signal = poll_fn(|context| {
            for (signal, stream) in &mut *listening {
                if let Poll::Ready(Some(())) = stream.poll_recv(context) {
                    return Poll::Ready(*signal);
                }
            }
            Poll::Pending
        });
        let signal = signal.await;
        self.seen += 1;
        signal
    }

    /// Does the last things, within `patience` and at most two seconds. `None` when they were not
    /// done in that time, or when a signal came that was not the first.
    pub(super) async fn part<T>(
        &mut self,
        patience: Duration,
        last: impl Future<Output = T>,
    ) -> Option<T> {
        let last = tokio::time::timeout(patience.min(PARTING_MAX), last);
        let impatient = async {
            loop {
                self.next().await;
                if self.seen > 1 {
                    return;
                }
            }
        };
        tokio::select! {
            done = last => done.ok(),
            () = impatient => None,
        }
    }
}

/// As a shell says that a signal ended a command.
pub(super) fn ended_by(signal: Signal) -> ExitCode {
    ExitCode::from(u8::try_from(128 + signal.as_raw()).unwrap_or(1))
}

/// Whether whoever started this process has it ignore the signal.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal.as_raw() - 1) & 1 == 1
}
