//! Reads of rings. A member whose lease is over is not there, whether it was swept or not.
//!
//! Caveat: such a member is gone for readers a moment before the sweep removes it, and only that
//! raises the ring's revision. So for that moment a ring can be read without a member at a revision
//! at which it was read with it.

use std::sync::Arc;

use super::State;
use super::command::Revision;
use super::ring::{Member, RingKey};

/// A member as it is read.
#[derive(Clone, Debug)]
pub struct MemberView {
    /// Its name.
    pub name: Arc<str>,
    /// The record, shared with the state.
    pub member: Arc<Member>,
}

/// A ring as it is read.
#[derive(Clone, Debug)]
pub struct RingView {
    /// Revision of the last change of its members.
    pub revision: Revision,
    /// Its members, by name; at least one.
    pub members: Vec<MemberView>,
    /// Whether these are all that are stored: none has gone that was not swept yet.
    pub is_settled: bool,
}

impl State {
    /// One ring, with all its members.
    pub fn ring(&self, key: &RingKey) -> Option<RingView> {
        let coordination = self.records.coordination(&key.namespace)?;
        let place = coordination.ring(&key.name)?;
        let revision = place.record.as_ref()?.revision();
        let steady = self.clock.steady;
        let all_live = coordination.is_settled(steady);
        let is_live = |member: &Member| {
            let lease = || coordination.lease(member.lease());
            all_live || lease().is_some_and(|lease| !lease.is_due(steady))
        };
        let live = place.members.iter().filter(|(_, member)| is_live(member));
        let view = |(name, member): (&Arc<str>, &Arc<Member>)| MemberView {
            name: name.clone(),
            member: member.clone(),
        };
        let members: Vec<_> = live.map(view).collect();
        let is_settled = members.len() == place.members.len();
        (!members.is_empty()).then_some(RingView { revision, members, is_settled })
    }

    /// The revision of a ring, if all members that are stored are alive: whoever has read it at
    /// that revision need not do so again. Quicker than reading it; `None` does not say that there
    /// is no such ring.
    pub fn settled_ring_revision(&self, key: &RingKey) -> Option<Revision> {
        let coordination = self.records.coordination(&key.namespace)?;
        let is_settled = coordination.is_settled(self.clock.steady);
        let record = coordination.ring(&key.name)?.record.as_ref().filter(|_| is_settled);
        record.map(|record| record.revision())
    }
}
