//! What the callers of `quorate bench` saw: what ended, how, and what has not ended.
//!
//! A closed loop hides an outage: while nobody is answered nobody asks, so all that it costs is a
//! few requests, one a caller, and those are open. So an open request counts with its age, and how
//! long nothing succeeded is measured beside the latencies.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::failure::Failure;
use super::output::{count, length};
use crate::client::Error;

/// Highest latency that is told apart: ten minutes, in nanoseconds.
const LATENCY_MAX: u64 = 600_000_000_000;

/// What was measured in a stretch of time.
pub(crate) struct Tally {
    /// Of what succeeded, and the ages of what had not ended, in nanoseconds.
    pub(crate) latencies: Histogram<u64>,
    /// What succeeded within the stretch.
    pub(crate) operations: u64,
    /// What did not, by kind.
    pub(crate) errors: BTreeMap<&'static str, u64>,
    /// The first of the errors, for who asks what happened.
    pub(crate) first_error: Option<Error>,
    /// Requests that never ended.
    pub(crate) unfinished: u64,
    /// The age of the oldest of those.
    pub(crate) oldest: Duration,
    /// The longest time in which nothing succeeded.
    pub(crate) stall: Duration,
    /// How long the stretch was.
    pub(crate) length: Duration,
}

impl Tally {
    /// One of nothing, for these latencies.
    fn new(latencies: Histogram<u64>) -> Self {
        Self {
            latencies,
            operations: 0,
            errors: BTreeMap::new(),
            first_error: None,
            unfinished: 0,
            oldest: Duration::ZERO,
            stall: Duration::ZERO,
            length: Duration::ZERO,
        }
    }

    fn record(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(LATENCY_MAX);
        self.latencies.saturating_record(nanos);
    }

    /// How many requests failed.
    pub(crate) fn failed(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Successes a second.
    pub(crate) fn rate(&self) -> f64 {
        self.operations as f64 / self.length.as_secs_f64().max(f64::EPSILON)
    }

    /// What never ended, for people.
    pub(crate) fn unfinished_text(&self) -> String {
        match self.unfinished {
            0 => "none".to_owned(),
            number => format!("{}, the oldest for {}", count(number), length(self.oldest)),
        }
    }

    /// A failure unless every request succeeded, and any did.
    pub(crate) fn verdict(&self) -> Result<(), Failure> {
        let mut complaints = Vec::new();
        if self.operations == 0 {
            complaints.push("no operation succeeded".to_owned());
        }
        if let Some(error) = &self.first_error {
            complaints.push(format!("{} requests failed, first: {error}", count(self.failed())));
        }
        if self.unfinished > 0 {
            complaints.push(format!("requests that never ended: {}", self.unfinished_text()));
        }
        if complaints.is_empty() {
            return Ok(());
        }
        let complaint = complaints.join("; ");
        let refused = self.first_error.clone().map(|error| Failure::from(error).code());
        // What was answered with something else than "not now" will not go away by itself.
        Err(match refused {
            Some(code) if code != 75 => Failure::Failed(complaint),
            _ => Failure::Unavailable(complaint),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    WarmUp,
    Measure,
    Stop,
}

/// The requests of all callers, of which each has one open at any time until it has stopped.
pub(crate) struct Ledger {
    phase: Phase,
    /// By caller: when the request began that is open; `None` once the caller has stopped.
    open: Vec<Option<Instant>>,
    /// When the stretch began.
    start: Instant,
    /// When a request succeeded last, or the stretch began.
    success: Instant,
    tally: Tally,
}

impl Ledger {
    /// The callers begin now; nothing counts yet.
    pub(crate) fn new(callers: usize, now: Instant) -> Result<Self, Failure> {
        let latencies = Histogram::new_with_bounds(1, LATENCY_MAX, 3)
            .map_err(|error| Failure::Failed(error.to_string()))?;
        let (phase, open) = (Phase::WarmUp, vec![Some(now); callers]);
        Ok(Self { phase, open, start: now, success: now, tally: Tally::new(latencies) })
    }

    /// What was measured so far, less what is open.
    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// From now on outcomes count.
    pub(crate) fn measure(&mut self, now: Instant) {
        self.phase = Phase::Measure;
        self.start = now;
        self.success = now;
    }

    /// The open request of `caller` has ended. Returns whether it is to begin another, at once.
    pub(crate) fn ended(&mut self, caller: usize, now: Instant, result: Result<(), Error>) -> bool {
        let goes_on = self.phase != Phase::Stop;
        let Some(open) = self.open.get_mut(caller) else { return false };
        let began = std::mem::replace(open, goes_on.then_some(now));
        if self.phase == Phase::WarmUp {
            return goes_on;
        }
        match result {
            Ok(()) => {
                self.tally.record(now - began.unwrap_or(now));
                if goes_on {
                    self.tally.operations += 1;
                    self.note_stall(now);
                    self.success = now;
                }
            }
            Err(error) => {
                *self.tally.errors.entry(error.kind()).or_default() += 1;
                self.tally.first_error.get_or_insert(error);
            }
        }
        goes_on
    }

    /// The end of what is measured: whoever's request ends begins no other.
    pub(crate) fn stop(&mut self, now: Instant) {
        if self.phase == Phase::Measure {
            self.note_stall(now);
            self.tally.length = now - self.start;
        }
        self.phase = Phase::Stop;
    }

    /// What is open now counts with its age as never ended. Hands over the tally.
    pub(crate) fn close(&mut self, now: Instant) -> Tally {
        for began in self.open.iter_mut().filter_map(Option::take) {
            let age = now - began;
            self.tally.record(age);
            self.tally.unfinished += 1;
            self.tally.oldest = self.tally.oldest.max(age);
        }
        self.hand_over()
    }

    /// Ends a stretch, hands over its tally and begins the next. What is open counts with its age,
    /// and once it has ended in that next stretch too.
    pub(crate) fn take(&mut self, now: Instant) -> Tally {
        self.note_stall(now);
        for began in self.open.iter().flatten() {
            self.tally.record(now - *began);
        }
        self.tally.length = now - self.start;
        self.start = now;
        self.success = now;
        self.hand_over()
    }

    fn note_stall(&mut self, now: Instant) {
        self.tally.stall = self.tally.stall.max(now - self.success);
    }

    fn hand_over(&mut self) -> Tally {
        let next = Tally::new(Histogram::new_from(&self.tally.latencies));
        std::mem::replace(&mut self.tally, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn unavailable() -> Result<(), Error> {
        Err(Error::Unavailable { reason: String::new(), message: "nobody answers".to_owned() })
    }

    /// Two callers that are measured from 0 ms on.
    fn measuring() -> (Ledger, Instant) {
        let start = Instant::now();
        let mut ledger = Ledger::new(2, start).unwrap();
        ledger.measure(start);
        (ledger, start)
    }

    fn at_least(tally: &Tally, milliseconds: u64) -> u64 {
        let nanos = u64::try_from((MS * u32::try_from(milliseconds).unwrap()).as_nanos()).unwrap();
        tally.latencies.count_between(nanos, LATENCY_MAX)
    }

    #[test]
    fn an_outage_until_the_end_is_seen() {
        let (mut ledger, start) = measuring();
        for millisecond in 1..=100 {
            for caller in 0..2 {
                assert!(ledger.ended(caller, start + MS * millisecond, Ok(())));
            }
        }
        // Then nobody is answered any more.
        ledger.stop(start + MS * 5_000);
        let tally = ledger.close(start + MS * 6_000);
        assert_eq!((tally.operations, tally.failed(), tally.unfinished), (200, 0, 2));
        assert_eq!((tally.oldest, tally.stall), (MS * 5_900, MS * 4_900));
        assert_eq!((at_least(&tally, 5_800), tally.latencies.len()), (2, 202));
        assert_eq!(tally.rate() as u64, 40);
        let failure = tally.verdict().unwrap_err();
        assert_eq!(failure.code(), 75);
        assert_eq!(failure.to_string(), "requests that never ended: 2, the oldest for 5s");
    }

    #[test]
    fn an_outage_in_the_middle_is_seen() {
        let (mut ledger, start) = measuring();
        ledger.ended(0, start + MS, Ok(()));
        ledger.ended(0, start + MS * 801, Ok(()));
        ledger.ended(1, start + MS * 802, Ok(()));
        ledger.stop(start + MS * 803);
        // What ends after the end is no part of the rate, and is waited for.
        assert!(!ledger.ended(0, start + MS * 900, Ok(())));
        assert!(!ledger.ended(1, start + MS * 901, Ok(())));
        let tally = ledger.close(start + MS * 902);
        assert_eq!((tally.operations, tally.latencies.len(), tally.unfinished), (3, 5, 0));
        assert_eq!((tally.stall, tally.length), (MS * 800, MS * 803));
        assert_eq!(at_least(&tally, 790), 2);
        assert!(tally.verdict().is_ok());
    }

    #[test]
    fn errors_do_not_end_a_stall_and_are_a_failure() {
        let (mut ledger, start) = measuring();
        ledger.ended(0, start + MS, Ok(()));
        ledger.ended(1, start + MS * 50, unavailable());
        ledger.stop(start + MS * 100);
        // Also one that comes late.
        ledger.ended(0, start + MS * 150, unavailable());
        ledger.ended(1, start + MS * 150, Ok(()));
        let tally = ledger.close(start + MS * 150);
        assert_eq!((tally.stall, tally.failed()), (MS * 99, 2));
        let failure = tally.verdict().unwrap_err();
        assert_eq!(failure.code(), 75);
        assert_eq!(failure.to_string(), "2 requests failed, first: nobody answers");

        let (mut ledger, start) = measuring();
        ledger.ended(0, start + MS, Ok(()));
        let refused = Error::Refused { reason: String::new(), message: "no".to_owned() };
        ledger.ended(0, start + MS, Err(refused));
        assert_eq!(ledger.take(start + MS).verdict().unwrap_err().code(), 1);
    }

    #[test]
    fn a_stretch_knows_what_was_open_at_its_end() {
        let (mut ledger, start) = measuring();
        ledger.ended(0, start + MS * 10, Ok(()));
        let first = ledger.take(start + MS * 100);
        assert_eq!((first.operations, first.unfinished, first.length), (1, 0, MS * 100));
        assert_eq!((at_least(&first, 99), at_least(&first, 89)), (1, 2));
        assert!(ledger.ended(1, start + MS * 150, Ok(())));
        let second = ledger.take(start + MS * 200);
        assert_eq!((second.operations, second.stall, second.length), (1, MS * 50, MS * 100));
        assert_eq!(at_least(&second, 149), 2);
    }

    #[test]
    fn what_ends_while_warming_up_does_not_count() {
        let start = Instant::now();
        let mut ledger = Ledger::new(1, start).unwrap();
        assert!(ledger.ended(0, start + MS, unavailable()));
        ledger.measure(start + MS * 500);
        // It began before, and is what a caller waited for all the same.
        ledger.ended(0, start + MS * 700, Ok(()));
        let tally = ledger.take(start + MS * 700);
        assert_eq!((tally.operations, tally.failed(), tally.stall), (1, 0, MS * 200));
        assert_eq!(at_least(&tally, 690), 1);
        assert_eq!(ledger.take(start + MS * 800).verdict().unwrap_err().code(), 75);
    }
}
