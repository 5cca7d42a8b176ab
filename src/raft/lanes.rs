//! Commands that wait to be packed, and who is let in when there are many.
//!
//! Two things are told apart. *Admission*: what ends or keeps up something (deletes, releases,
//! renewals) is let in when whatever makes more is refused already, or an overload could not be
//! worked off and would end leases that are well kept. *Order*: what grants and renews leases is
//! packed before all else, so that no backlog of writes makes a lease end. Everything else keeps
//! the order of its arrival, and so do grants and renewals among themselves: a renewal does not
//! overtake the grant of its lease, and a claim on a lock does not come before either.
//!
//! Renewals can be so many that they would fill every entry, so while others wait they get no more
//! than half of one.

use std::collections::VecDeque;
use std::time::Duration;

use super::proposals::Done;
use crate::limits::{ENTRY_BYTES_MAX, PROPOSAL_BYTES_PENDING_MAX, PROPOSALS_PENDING_MAX};
use crate::state::{Command, Proposal};

/// Room in an entry for its own fields and those of each proposal.
pub(super) const PROPOSAL_OVERHEAD_BYTES: usize = 16;
/// Share of an entry that grants and renewals get at most while others wait.
const LEASE_BYTES_MAX: usize = ENTRY_BYTES_MAX / 2;

/// How a command is let in, and which queue it joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Up to the limits, in the order of arrival.
    Ordinary,
    /// Twice as much: what makes room, such as deletes and releases.
    Urgent,
    /// Up to the limits, before all but other leases: grants of leases.
    Grant,
    /// Twice as much, before all but other leases: renewals.
    Renewal,
    /// Always: the ticker's, of which there is one at a time.
    Tick,
}

impl Lane {
    /// Which lane a command takes.
    pub(crate) fn of(command: &Command) -> Self {
        match command {
            Command::DeleteSession { .. }
            | Command::RevokeLease { .. }
            | Command::ReleaseLock { .. }
            | Command::CancelAcquire { .. }
            | Command::BreakLock { .. }
            | Command::LeaveRing { .. } => Self::Urgent,
            Command::GrantLease { .. } => Self::Grant,
            Command::RenewLeases { .. } => Self::Renewal,
            Command::Tick => Self::Tick,
            _ => Self::Ordinary,
        }
    }

    /// Whether another command of so many bytes is let in beside what is pending.
    pub(super) fn admits(self, count: usize, bytes: usize, more: usize) -> bool {
        let times = match self {
            Self::Ordinary | Self::Grant => 1,
            Self::Urgent | Self::Renewal => 2,
            Self::Tick => return true,
        };
        count < times * PROPOSALS_PENDING_MAX
            && bytes.saturating_add(more) <= times * PROPOSAL_BYTES_PENDING_MAX
    }

    fn is_of_leases(self) -> bool {
        matches!(self, Self::Grant | Self::Renewal)
    }
}

/// A command on its way, and who waits for it.
pub(super) struct Waiter {
    /// Counts arrivals, so that those turned away come back in their order.
    pub(super) number: u64,
    pub(super) lane: Lane,
    pub(super) proposal: Proposal,
    /// Local monotonic time.
    pub(super) deadline: Duration,
    pub(super) done: Done,
}

impl Waiter {
    fn packed_bytes(&self) -> usize {
        self.proposal.command.len() + PROPOSAL_OVERHEAD_BYTES
    }
}

/// What waits to be packed; each queue in the order of arrival.
#[derive(Default)]
pub(super) struct Lanes {
    leases: VecDeque<Waiter>,
    others: VecDeque<Waiter>,
}

impl Lanes {
    pub(super) fn is_empty(&self) -> bool {
        self.leases.is_empty() && self.others.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.leases.len() + self.others.len()
    }

    fn queue(&mut self, lane: Lane) -> &mut VecDeque<Waiter> {
        if lane.is_of_leases() { &mut self.leases } else { &mut self.others }
    }

    /// Adds the latest arrival.
    pub(super) fn push(&mut self, waiter: Waiter) {
        self.queue(waiter.lane).push_back(waiter);
    }

    /// Takes what goes into the next pack: as much as fits an entry, and at least one if there is
    /// any.
    pub(super) fn take(&mut self) -> Vec<Waiter> {
        let mut taken = Vec::with_capacity(self.len().min(4096));
        let mut bytes = 0;
        let most = if self.others.is_empty() { ENTRY_BYTES_MAX } else { LEASE_BYTES_MAX };
        fill(&mut taken, &mut bytes, &mut self.leases, most);
        fill(&mut taken, &mut bytes, &mut self.others, ENTRY_BYTES_MAX);
        taken
    }

    /// Puts back what was taken and turned away, in its place.
    pub(super) fn put_back(&mut self, waiters: impl DoubleEndedIterator<Item = Waiter>) {
        for waiter in waiters.rev() {
            self.queue(waiter.lane).push_front(waiter);
        }
        for queue in [&mut self.leases, &mut self.others] {
            // Packs can be turned away in another order than they were taken in.
            if !queue.iter().is_sorted_by_key(|waiter| waiter.number) {
                queue.make_contiguous().sort_by_key(|waiter| waiter.number);
            }
        }
    }

    /// Takes out whoever has waited until the deadline.
    pub(super) fn expire(&mut self, now: Duration) -> Vec<Waiter> {
        let mut expired = Vec::new();
        for queue in [&mut self.leases, &mut self.others] {
            if !queue.iter().any(|waiter| waiter.deadline <= now) {
                continue;
            }
            for waiter in std::mem::take(queue) {
                if waiter.deadline <= now {
                    expired.push(waiter);
                } else {
                    queue.push_back(waiter);
                }
            }
        }
        expired
    }
}

/// Moves waiters from the front of a queue for as long as they fit.
fn fill(taken: &mut Vec<Waiter>, bytes: &mut usize, queue: &mut VecDeque<Waiter>, most: usize) {
    while let Some(next) = queue.front() {
        let sum = *bytes + next.packed_bytes();
        if sum > most && !taken.is_empty() {
            return;
        }
        *bytes = sum;
        taken.extend(queue.pop_front());
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn waiter(number: u64, lane: Lane, bytes: usize) -> Waiter {
        Waiter {
            number,
            lane,
            proposal: Proposal { command: Bytes::from(vec![0; bytes]), resend: false },
            deadline: Duration::from_secs(number),
            done: Box::new(|_| {}),
        }
    }

    fn numbers(waiters: &[Waiter]) -> Vec<u64> {
        waiters.iter().map(|waiter| waiter.number).collect()
    }

    #[test]
    fn leases_go_first_and_keep_their_order() {
        let mut lanes = Lanes::default();
        let arrivals =
            [Lane::Ordinary, Lane::Grant, Lane::Urgent, Lane::Renewal, Lane::Tick, Lane::Grant];
        for (number, lane) in (1..).zip(arrivals) {
            lanes.push(waiter(number, lane, 10));
        }
        assert_eq!(numbers(&lanes.take()), [2, 4, 6, 1, 3, 5]);
        assert!(lanes.is_empty());
    }

    #[test]
    fn a_flood_of_renewals_leaves_room_for_others() {
        let mut lanes = Lanes::default();
        let large = ENTRY_BYTES_MAX / 4 - PROPOSAL_OVERHEAD_BYTES;
        for number in 1..=5 {
            lanes.push(waiter(number, Lane::Renewal, large));
        }
        lanes.push(waiter(6, Lane::Ordinary, large));
        lanes.push(waiter(7, Lane::Ordinary, large));
        assert_eq!(numbers(&lanes.take()), [1, 2, 6, 7]);
        assert_eq!(numbers(&lanes.take()), [3, 4, 5]);
        assert!(lanes.take().is_empty());
    }

    #[test]
    fn one_that_is_larger_than_its_share_still_goes() {
        let mut lanes = Lanes::default();
        lanes.push(waiter(1, Lane::Renewal, ENTRY_BYTES_MAX));
        lanes.push(waiter(2, Lane::Ordinary, ENTRY_BYTES_MAX));
        assert_eq!(numbers(&lanes.take()), [1]);
        assert_eq!(numbers(&lanes.take()), [2]);
    }

    #[test]
    fn what_was_turned_away_comes_back_in_its_place() {
        let mut lanes = Lanes::default();
        for number in 1..=3 {
            lanes.push(waiter(number, Lane::Ordinary, 10));
        }
        let first = lanes.take();
        for number in 4..=6 {
            lanes.push(waiter(number, Lane::Renewal, 10));
        }
        let second = lanes.take();
        lanes.push(waiter(7, Lane::Ordinary, 10));
        lanes.push(waiter(8, Lane::Grant, 10));
        // The later pack is turned away first.
        lanes.put_back(second.into_iter());
        lanes.put_back(first.into_iter());
        assert_eq!(lanes.len(), 8);
        assert_eq!(numbers(&lanes.take()), [4, 5, 6, 8, 1, 2, 3, 7]);
    }

    #[test]
    fn both_lanes_expire() {
        let mut lanes = Lanes::default();
        for number in 1..=6 {
            let lane = if number % 2 == 0 { Lane::Renewal } else { Lane::Ordinary };
            lanes.push(waiter(number, lane, 10));
        }
        assert_eq!(numbers(&lanes.expire(Duration::from_secs(4))), [2, 4, 1, 3]);
        assert_eq!(numbers(&lanes.take()), [6, 5]);
    }

    #[test]
    fn what_works_an_overload_off_is_let_in() {
        let full = PROPOSALS_PENDING_MAX;
        for lane in [Lane::Ordinary, Lane::Grant] {
            assert!(lane.admits(full - 1, 0, 1));
            assert!(!lane.admits(full, 0, 1));
            assert!(!lane.admits(0, PROPOSAL_BYTES_PENDING_MAX, 1));
        }
        for lane in [Lane::Urgent, Lane::Renewal] {
            assert!(lane.admits(full, PROPOSAL_BYTES_PENDING_MAX, 1));
            assert!(!lane.admits(2 * full, 0, 1));
            assert!(!lane.admits(0, 2 * PROPOSAL_BYTES_PENDING_MAX, 1));
        }
        assert!(Lane::Tick.admits(usize::MAX, usize::MAX, 1));
    }
}
