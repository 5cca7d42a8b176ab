//! A lock: its claims, and who of them is next.
//!
//! There is one queue for all modes, and nobody is granted while somebody waits before him: a
//! stream of readers does not starve a writer, nor many small takers one who wants more permits.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::claim::{Claim, LockKind, LockMode};
use super::command::Revision;

/// The claims on one lock.
///
/// - It has a claim, or it does not exist; all its claims are of its kind.
/// - `waiters` holds the orders of exactly those that wait, `tokens` the others' by their token.
/// - `taken` is the sum of the shares of those that do not wait, and at most the kind's capacity.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lock {
    kind: LockKind,
    claims: BTreeMap<Revision, Arc<Claim>>,
    waiters: BTreeSet<Revision>,
    tokens: BTreeMap<Revision, Revision>,
    taken: u64,
}

impl Lock {
    pub(super) fn new(kind: LockKind) -> Self {
        Self {
            kind,
            claims: BTreeMap::new(),
            waiters: BTreeSet::new(),
            tokens: BTreeMap::new(),
            taken: 0,
        }
    }

    pub(super) fn kind(&self) -> LockKind {
        self.kind
    }

    pub(super) fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    pub(super) fn claim(&self, order: Revision) -> Option<&Arc<Claim>> {
        self.claims.get(&order)
    }

    /// The claim that has or had this token and takes its share.
    pub(super) fn of_token(&self, token: Revision) -> Option<(Revision, &Arc<Claim>)> {
        let order = *self.tokens.get(&token)?;
        Some((order, self.claims.get(&order)?))
    }

    /// All claims, in the order in which they were made.
    pub(super) fn claims(&self) -> impl Iterator<Item = (Revision, &Arc<Claim>)> {
        self.claims.iter().map(|(order, claim)| (*order, claim))
    }

    /// Those that take their share, held or lost, by token.
    pub(super) fn takers(&self) -> impl Iterator<Item = (Revision, &Arc<Claim>)> {
        self.tokens.values().map(|order| (*order, &self.claims[order]))
    }

    pub(super) fn takers_count(&self) -> usize {
        self.tokens.len()
    }

    /// The queue.
    pub(super) fn waiters(&self) -> impl Iterator<Item = (Revision, &Arc<Claim>)> {
        self.waiters.iter().map(|order| (*order, &self.claims[order]))
    }

    pub(super) fn first_waiter(&self) -> Option<(Revision, &Arc<Claim>)> {
        self.waiters().next()
    }

    pub(super) fn waiters_count(&self) -> usize {
        self.waiters.len()
    }

    /// Place of a waiter in the queue, from 1, counted no further than `most`.
    pub(super) fn position(&self, order: Revision, most: usize) -> usize {
        self.waiters.range(..=order).take(most).count()
    }

    /// How many permits are taken; 0 for a lock without.
    pub(super) fn permits_taken(&self) -> u32 {
        match self.kind {
            LockKind::ReadWrite => 0,
            // At most as many as there are, which fits.
            LockKind::Counted { permits } => u32::try_from(self.taken).unwrap_or(permits),
        }
    }

    /// Whether so much is left.
    pub(super) fn has_room_for(&self, mode: LockMode) -> bool {
        self.taken.saturating_add(mode.share()) <= self.kind.capacity()
    }

    /// Whether the first in the queue could be granted, if it is alive.
    pub(super) fn is_grantable(&self) -> bool {
        self.first_waiter().is_some_and(|(_, claim)| self.has_room_for(claim.mode))
    }

    /// Whether a claim from elsewhere can be added.
    pub(super) fn accepts(&self, order: Revision, claim: &Claim) -> bool {
        let is_new = |token| !self.tokens.contains_key(&token);
        self.kind == claim.mode.kind()
            && !self.claims.contains_key(&order)
            && claim.taken_token().is_none_or(is_new)
    }

    /// Puts a claim in the place of what was there, or removes it. Returns what was there.
    pub(super) fn replace(
        &mut self,
        order: Revision,
        after: Option<Arc<Claim>>,
    ) -> Option<Arc<Claim>> {
        let before = match &after {
            Some(claim) => self.claims.insert(order, claim.clone()),
            None => self.claims.remove(&order),
        };
        if let Some(claim) = &before {
            match claim.taken_token() {
                Some(token) => {
                    assert!(self.tokens.remove(&token).is_some(), "each taker has its token");
                    self.taken -= claim.mode.share();
                }
                None => assert!(self.waiters.remove(&order), "each waiter is in the queue"),
            }
        }
        if let Some(claim) = &after {
            assert_eq!(self.kind, claim.mode.kind(), "a lock keeps its kind");
            match claim.taken_token() {
                Some(token) => {
                    assert!(self.tokens.insert(token, order).is_none(), "tokens are unique");
                    self.taken += claim.mode.share();
                }
                None => assert!(self.waiters.insert(order), "no waiter is in the queue twice"),
            }
        }
        before
    }
}
