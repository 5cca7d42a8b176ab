//! The cluster's feature level: what is in force, and when it may be raised.
//!
//! Nodes of different builds are in one cluster while it is upgraded. What entries mean is decided
//! by the level in the state, which a command of the log raises (`state::level`). The leader
//! proposes that command once every member has said that its build knows a higher level: learners
//! and members that are down count too, because they will have to apply the entry. Nodes say what
//! they know in the headers of their messages and in their answers to heartbeats. Until then
//! nothing above the level is proposed, by whichever node, and behind it nothing below can take
//! part: its messages are refused, and if it gets to the entry it halts.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::leadership::{Leadership, Route};
use super::types::{Member, Pack, Raft};
use crate::state::{
    Command, FEATURE_LEVEL, FEATURE_LEVEL_BASE, Proposal, encode_command, encode_entry,
};

/// Pause after a raise that was not committed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// What a member's build knows, as it said last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Announced {
    /// Of the life in which it said so.
    incarnation: u64,
    level: u32,
}

/// Why the level is not raised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    /// These members have said nothing since this node started.
    Unheard(Vec<u64>),
    /// This member's build knows no more than that.
    Older { node: u64, level: u32 },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unheard(nodes) => {
                let names: Vec<String> = nodes.iter().map(u64::to_string).collect();
                write!(f, "not heard from {}; start it, or remove it", names.join(", "))
            }
            Self::Older { node, level } => {
                write!(f, "node {node} runs a version that knows level {level}; upgrade it")
            }
        }
    }
}

/// The level in force on this node, and what the members have announced.
///
/// - `in_force` is that of the state, and only goes up.
/// - A member that was never heard of is not taken for any level.
pub(crate) struct Levels {
    in_force: AtomicU32,
    announced: watch::Sender<BTreeMap<u64, Announced>>,
}

impl Levels {
    pub(crate) fn new(in_force: u32) -> Arc<Self> {
        Arc::new(Self {
            in_force: AtomicU32::new(in_force),
            announced: watch::Sender::new(BTreeMap::new()),
        })
    }

    /// The level of the state: that of everything which this node proposes.
    pub(crate) fn in_force(&self) -> u32 {
        self.in_force.load(Ordering::Relaxed)
    }

    /// Follows the state.
    pub(crate) fn follow(&self, level: u32) {
        let before = self.in_force.fetch_max(level, Ordering::Relaxed);
        if before < level {
            tracing::info!(from = before, to = level, "the cluster's feature level is raised");
        }
    }

    /// Takes note of what a node said of its build; nothing, if its build does not announce.
    pub(crate) fn hear(&self, node: u64, incarnation: u64, announced: Option<u32>) {
        let level = announced.unwrap_or(FEATURE_LEVEL_BASE);
        let said = Announced { incarnation, level };
        self.announced.send_if_modified(|all| all.insert(node, said) != Some(said));
    }

    /// Refuses a node whose build does not know the level in force.
    pub(crate) fn admit(&self, node: u64, announced: Option<u32>) -> Result<(), String> {
        let (level, in_force) = (announced.unwrap_or(FEATURE_LEVEL_BASE), self.in_force());
        if level >= in_force {
            return Ok(());
        }
        Err(format!(
            "node {node} runs a version that knows feature level {level}, and the cluster is at \
             {in_force}: upgrade that node"
        ))
    }

    /// Refuses commands from a node that has applied a raise which this one has not; it sends them
    /// again.
    pub(crate) fn covers(&self, level: u32) -> bool {
        level <= self.in_force()
    }

    /// The level to raise to, with these other members; `None` if the level in force is as high as
    /// this build knows.
    ///
    /// # Errors
    ///
    /// What is in the way.
    pub(crate) fn next(&self, peers: &[(u64, Member)]) -> Result<Option<u32>, Obstacle> {
        let in_force = self.in_force();
        if in_force >= FEATURE_LEVEL {
            return Ok(None);
        }
        let announced = self.announced.borrow();
        let known = |(node, member): &(u64, Member)| {
            let said = announced.get(node).filter(|it| it.incarnation == member.incarnation);
            said.map(|said| (*node, said.level)).ok_or(*node)
        };
        let (levels, unheard): (Vec<_>, Vec<_>) = peers.iter().map(known).partition(Result::is_ok);
        let unheard: Vec<u64> = unheard.into_iter().filter_map(Result::err).collect();
        if !unheard.is_empty() {
            return Err(Obstacle::Unheard(unheard));
        }
        match levels.into_iter().flatten().min_by_key(|(_, level)| *level) {
            Some((node, level)) if level <= in_force => Err(Obstacle::Older { node, level }),
            Some((_, level)) => Ok(Some(level.min(FEATURE_LEVEL))),
            None => Ok(Some(FEATURE_LEVEL)),
        }
    }
}

/// Proposes the raise while this node leads and nothing is in the way; runs for as long as the node
/// lives.
pub(crate) async fn run(levels: Arc<Levels>, leadership: Arc<Leadership>, raft: Raft) {
    let mut changes = leadership.changes();
    let mut announced = levels.announced.subscribe();
    loop {
        // What comes from here on is not missed by the wait below.
        announced.mark_unchanged();
        let view = changes.borrow_and_update().clone();
        let next = if view.route == Route::Local { levels.next(&view.peers) } else { Ok(None) };
        let pause = match next {
            Ok(Some(to)) if !raise(&leadership, &raft, to).await => RETRY_PAUSE,
            Ok(_) | Err(_) => Duration::MAX,
        };
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                return;
            },
            changed = announced.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Proposes one raise and waits until it is applied. False if it was not.
async fn raise(leadership: &Leadership, raft: &Raft, to: u32) -> bool {
    let command = encode_command(&Command::RaiseFeatureLevel { to }, to);
    let proposal = Proposal { command, resend: false };
    // The entry takes the level that it raises to, so whoever does not know that halts.
    let entry = encode_entry(leadership.stamp(), to, &[proposal]);
    raft.client_write(Pack(entry)).await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(incarnation: u64) -> Member {
        Member { incarnation, ..Member::default() }
    }

    fn peers() -> Vec<(u64, Member)> {
        vec![(2, member(22)), (3, member(33))]
    }

    #[test]
    fn a_level_is_raised_once_every_member_knows_it() {
        let levels = Levels::new(FEATURE_LEVEL_BASE);
        assert_eq!(levels.next(&peers()), Err(Obstacle::Unheard(vec![2, 3])));
        levels.hear(2, 22, Some(FEATURE_LEVEL));
        assert_eq!(levels.next(&peers()), Err(Obstacle::Unheard(vec![3])));
        // One that announces nothing.
        levels.hear(3, 33, None);
        let older = Obstacle::Older { node: 3, level: FEATURE_LEVEL_BASE };
        assert_eq!(levels.next(&peers()), Err(older.clone()));
        // Upgraded; and one that knows more than this build does not make it know more.
        levels.hear(3, 33, Some(FEATURE_LEVEL + 1));
        assert_eq!(levels.next(&peers()), Ok(Some(FEATURE_LEVEL)));
        // Downgraded before the raise: its latest word counts.
        levels.hear(3, 33, None);
        assert_eq!(levels.next(&peers()), Err(older));
        levels.follow(FEATURE_LEVEL);
        assert_eq!(levels.next(&peers()), Ok(None));
        levels.follow(FEATURE_LEVEL_BASE);
        assert_eq!(levels.in_force(), FEATURE_LEVEL);
    }

    #[test]
    fn another_life_of_a_member_says_nothing_of_this_one() {
        let levels = Levels::new(FEATURE_LEVEL_BASE);
        levels.hear(2, 22, Some(FEATURE_LEVEL));
        levels.hear(3, 34, Some(FEATURE_LEVEL));
        assert_eq!(levels.next(&peers()), Err(Obstacle::Unheard(vec![3])));
        // Nor does a node that is no member.
        levels.hear(4, 44, None);
        levels.hear(3, 33, Some(FEATURE_LEVEL));
        assert_eq!(levels.next(&peers()), Ok(Some(FEATURE_LEVEL)));
    }

    #[test]
    fn a_node_alone_need_not_ask() {
        assert_eq!(Levels::new(FEATURE_LEVEL_BASE).next(&[]), Ok(Some(FEATURE_LEVEL)));
    }

    #[test]
    fn who_does_not_know_the_level_in_force_is_refused() {
        let levels = Levels::new(FEATURE_LEVEL_BASE);
        assert_eq!(levels.admit(3, None), Ok(()));
        assert!(levels.covers(FEATURE_LEVEL_BASE) && !levels.covers(FEATURE_LEVEL));
        levels.follow(FEATURE_LEVEL);
        assert_eq!(levels.admit(3, Some(FEATURE_LEVEL)), Ok(()));
        assert!(levels.covers(FEATURE_LEVEL_BASE) && levels.covers(FEATURE_LEVEL));
        let refusal = levels.admit(3, None).unwrap_err();
        assert!(refusal.contains("node 3") && refusal.contains("upgrade"), "{refusal}");
    }

    #[test]
    fn only_news_wakes_the_leader() {
        let levels = Levels::new(FEATURE_LEVEL_BASE);
        let mut announced = levels.announced.subscribe();
        levels.hear(2, 22, None);
        assert!(announced.has_changed().unwrap());
        announced.mark_unchanged();
        levels.hear(2, 22, None);
        assert!(!announced.has_changed().unwrap());
        levels.hear(2, 22, Some(FEATURE_LEVEL));
        assert!(announced.has_changed().unwrap());
    }
}
