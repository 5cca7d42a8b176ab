//! Keeps a note of the time for this node's next start, and a leader that has lost count asking.
//!
//! The note is a pair of times from which the present is extrapolated, so it is written anew only
//! when that would be off by a twentieth of a second: after a leap, and now and then where time is
//! slewed. An idle node with a good clock writes nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::clock::{ClusterClock, KeptTime};
use super::leadership::Leadership;
use crate::clock::Clock;
use crate::state::Timestamp;
use crate::storage::timekeeping::TimeNote;

/// How often the note is compared with the time.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How far the note may be off.
const ERROR_MAX: Duration = Duration::from_millis(50);

/// Reads the note of the last run, if the machine has not been rebooted since.
pub(crate) fn recall(path: &Path, clock: &dyn Clock) -> Option<KeptTime> {
    let note = TimeNote::load(path)?;
    (Some(&note.boot_id) == clock.boot_id().as_ref()).then(|| KeptTime {
        time: Timestamp(note.time_millis),
        at: Duration::from_micros(note.monotonic_micros),
    })
}

/// Runs for as long as the node lives.
pub(crate) async fn run(
    path: PathBuf,
    machine: Arc<dyn Clock>,
    clock: Arc<ClusterClock>,
    leadership: Arc<Leadership>,
) {
    let boot_id = machine.boot_id();
    let mut noted: Option<KeptTime> = None;
    let mut has_failed = false;
    loop {
        leadership.find_time();
        if let (Some(boot_id), Some(kept)) = (&boot_id, clock.keep())
            && noted.is_none_or(|noted| error(noted, kept) > ERROR_MAX)
        {
            let note = TimeNote {
                boot_id: boot_id.clone(),
                monotonic_micros: u64::try_from(kept.at.as_micros()).unwrap_or(u64::MAX),
                time_millis: kept.time.0,
            };
            let file = path.clone();
            let saving = tokio::task::spawn_blocking(move || note.save(&file));
            match saving.await.map_err(std::io::Error::other).flatten() {
                Ok(()) => {
                    noted = Some(kept);
                    has_failed = false;
                }
                // Nothing but the next start's knowledge of the time depends on it.
                Err(error) => {
                    if !std::mem::replace(&mut has_failed, true) {
                        tracing::warn!(%error, path = %path.display(), "cannot note the time");
                    }
                }
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// How far the time that follows from `noted` is from what it is.
fn error(noted: KeptTime, is: KeptTime) -> Duration {
    let follows = noted.time.plus(is.at.saturating_sub(noted.at));
    follows.since(is.time).max(is.time.since(follows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_off_by_what_was_slewed_or_leapt() {
        let kept = |time, at| KeptTime { time: Timestamp(time), at: Duration::from_millis(at) };
        assert_eq!(error(kept(1_000, 10), kept(1_500, 510)), Duration::ZERO);
        assert_eq!(error(kept(1_000, 10), kept(1_495, 510)), Duration::from_millis(5));
        assert_eq!(error(kept(1_000, 10), kept(9_500, 510)), Duration::from_secs(8));
    }
}
