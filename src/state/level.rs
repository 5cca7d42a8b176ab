//! Feature levels: how nodes of different builds apply one log and stay alike.
//!
//! Every node has to make the same of an entry, whatever build it runs. So what an entry means
//! depends on nothing but the entries before it: the state has a *feature level*, and a command of
//! the log raises it. A leader proposes that once every member has said that its build knows the
//! higher level (`raft::level`); an older build that meets the entry halts, because the entry says
//! that it takes the level that it raises to.
//!
//! Whoever changes what a command does, adds a command, a field of one or of a record, or changes a
//! limit that `apply` consults, follows these rules:
//!
//! - [`FEATURE_LEVEL`] goes up with the first such change since the last release, and the change
//!   gets a name below, with that level.
//! - `apply` does the new thing where [`State::knows`] the name, and the old one where not.
//! - A command that is of a kind, or has a field, above the base names its level in
//!   `needed_level`; what does not decode for a lack of knowledge is told from what is garbage by
//!   that. Nobody encodes a command above the level in force: `fitted_to` leaves the fields out.
//! - A record has no field above the state's level: an older build may be sent a snapshot of it.

use std::borrow::Cow;

use super::State;
use super::command::{Command, Outcome, Rejection, Reply};

/// The level up to which this build understands entries, checkpoints and snapshots. A node that
/// meets a higher one halts rather than diverge.
pub const FEATURE_LEVEL: u32 = 3;

/// The level of a state in which nothing was raised, and of builds that do not announce theirs.
pub const FEATURE_LEVEL_BASE: u32 = 2;

/// A renewal has a time after which it renews nothing.
pub(super) const RENEWALS_EXPIRE: u32 = 3;
/// The clock of whoever dates a request may be ahead by as much as `REQUEST_SKEW_MAX`, and no more.
pub(super) const SKEW_IS_BOUNDED: u32 = 3;
/// A resend of a Release, Break or Leave that finds nothing, and of which nobody would remember a
/// first sending, is in doubt instead of refused.
pub(super) const RESENDS_ARE_DOUBTED: u32 = 3;

impl State {
    /// The level in force: what entries mean, and what may be proposed.
    pub fn feature_level(&self) -> u32 {
        self.feature_level
    }

    /// Whether what came with this level is in force.
    pub(super) fn knows(&self, level: u32) -> bool {
        self.feature_level >= level
    }

    /// Raises the level; never lowers it.
    pub(super) fn raise_feature_level(&mut self, to: u32) -> Result<Reply, Rejection> {
        // The entry says what level it takes, so a node that does not know this one has halted.
        if to > FEATURE_LEVEL {
            return Err(Rejection::MalformedCommand);
        }
        if to > self.feature_level {
            self.feature_level = to;
            self.revision = self.next_revision();
        }
        Ok(Reply { revision: self.revision, outcome: Outcome::Done })
    }
}

impl Command {
    /// The level that it takes to understand the command; 0 for one that every build does.
    ///
    /// The raise itself is guarded by its entry: it comes before its level is in force.
    pub(super) fn needed_level(&self) -> u32 {
        match self {
            Self::RenewLeases { expires: Some(_), .. } => RENEWALS_EXPIRE,
            _ => 0,
        }
    }

    /// The command without what is above `level`.
    pub(super) fn fitted_to(&self, level: u32) -> Cow<'_, Self> {
        match self {
            Self::RenewLeases { namespace, ids, expires: Some(_) } if level < RENEWALS_EXPIRE => {
                let (namespace, ids) = (namespace.clone(), ids.clone());
                Cow::Owned(Self::RenewLeases { namespace, ids, expires: None })
            }
            other => Cow::Borrowed(other),
        }
    }
}
