//! Makes time pass in the log: proposes a Tick when something is due.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::clock::ClusterClock;
use super::lanes::Lane;
use super::leadership::{Leadership, Route};
use super::machine::Core;
use super::proposals::Proposals;
use crate::state::{Command, FEATURE_LEVEL_BASE, encode_command};

/// How often a leader looks for a deadline that has moved closer, or work that a command has left
/// over. Who waits for a lock for a tenth of a second is told that he waited in vain this much
/// late, at most.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Pause after a Tick that was not applied.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Deadline of a Tick as a proposal; the next look proposes another.
const TICK_TIMEOUT: Duration = Duration::from_secs(5);

/// The newest stamp in the log is not older than this: a node that starts anew, with a wall clock
/// that is of no use, knows the time nearly as well by its log.
const STAMP_AGE_MAX: Duration = Duration::from_secs(60);

/// Runs for as long as the node lives; acts while it leads.
pub(crate) async fn run(
    core: Arc<Core>,
    clock: Arc<ClusterClock>,
    leadership: Arc<Leadership>,
    proposals: Arc<Proposals>,
) {
    let mut changes = leadership.changes();
    let mut has_begun = false;
    loop {
        if leadership.route() != Route::Local {
            has_begun = false;
            if changes.changed().await.is_err() {
                return;
            }
            continue;
        }
        let now = clock.now();
        let (due_in, stamped) = core.read(|state| (state.due_in(now), state.clock()));
        let wait = due_in.map_or(LOOK_INTERVAL, |due_in| due_in.min(LOOK_INTERVAL));
        // A new leader's time goes into the log at once, and so does one that has leapt or has not
        // been written for long: others have nothing else but a leader's word for it.
        let is_old = now.time.since(stamped.time) > STAMP_AGE_MAX;
        let wait = if has_begun && !is_old { wait } else { Duration::ZERO };
        // A Tick that is turned away is not tried again at once: that would starve all others.
        let wait = if wait.is_zero() && tick(&clock, &proposals).await {
            has_begun = true;
            continue;
        } else {
            wait.max(RETRY_PAUSE)
        };
        tokio::time::sleep(wait).await;
    }
}

/// Proposes one Tick and waits until it is applied, so that sweeps and writes take turns. False if
/// it was not.
pub(crate) async fn tick(clock: &ClusterClock, proposals: &Proposals) -> bool {
    let (done, answered) = oneshot::channel();
    proposals.propose(
        encode_command(&Command::Tick, FEATURE_LEVEL_BASE),
        false,
        clock.monotonic() + TICK_TIMEOUT,
        Lane::Tick,
        Box::new(move |result| {
            // The ticker goes away with the node.
            let _ = done.send(result.is_ok());
        }),
    );
    answered.await.unwrap_or(false)
}
