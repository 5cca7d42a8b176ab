//! Who leads, as this node knows it, and what that means for its clock.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::type_config::alias::WatchReceiverOf;
use tokio::sync::watch;

use super::clock::ClusterClock;
use super::types::{Member, Raft, TypeConfig};
use crate::state::Stamp;

/// A leap this long is the first one: from no time to ours.
const FIRST_LEAP_MIN: Duration = Duration::from_secs(20 * 365 * 24 * 3600);

/// Where commands go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// This node leads.
    Local,
    /// That node leads.
    Remote(u64, Member),
    /// An election is under way, or there is no cluster yet.
    Unknown,
}

/// The node's view of the leadership.
pub(crate) struct Leadership {
    raft: Raft,
    clock: Arc<ClusterClock>,
    view: watch::Sender<Arc<View>>,
}

/// Everything that reads and writes need to know of the membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) route: Route,
    /// The term in which this node leads, if it does.
    pub(crate) term: u64,
    /// Voter sets; two while a membership change is under way.
    pub(crate) voters: Vec<BTreeSet<u64>>,
    /// The other members.
    pub(crate) peers: Vec<(u64, Member)>,
}

impl Leadership {
    pub(crate) fn new(raft: Raft, clock: Arc<ClusterClock>) -> Arc<Self> {
        let view = watch::Sender::new(Arc::new(View {
            route: Route::Unknown,
            term: 0,
            voters: Vec::new(),
            peers: Vec::new(),
        }));
        let this = Arc::new(Self { raft, clock, view });
        this.update();
        this
    }

    /// Follows openraft for as long as it lives.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut metrics: WatchReceiverOf<TypeConfig, _> = self.raft.server_metrics();
        loop {
            self.update();
            if metrics.changed().await.is_err() {
                return;
            }
        }
    }

    fn update(&self) {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched().clone();
        let own = *self.raft.node_id();
        let membership = metrics.membership_config.membership();
        let leads = metrics.state == ServerState::Leader
            && metrics.vote.committed
            && metrics.current_leader == Some(own);
        let route = match metrics.current_leader {
            _ if leads => Route::Local,
            Some(leader) if leader != own => membership
                .get_node(&leader)
                .map_or(Route::Unknown, |member| Route::Remote(leader, member.clone())),
            _ => Route::Unknown,
        };
        let view = View {
            route,
            term: if leads { metrics.vote.leader_id.term } else { 0 },
            voters: membership.get_joint_config().clone(),
            peers: membership
                .nodes()
                .filter(|(node, _)| **node != own)
                .map(|(node, member)| (*node, member.clone()))
                .collect(),
        };
        if leads {
            let voters = membership.voter_ids().count();
            if let Some(leap) = self.clock.begin_leading(voters) {
                if leap > FIRST_LEAP_MIN {
                    tracing::info!("the cluster's time begins at the voters' median wall clock");
                } else {
                    tracing::info!(?leap, "all were down: time leaps to the voters' median");
                }
            }
        } else {
            self.clock.end_leading();
        }
        let changed = self.view.send_if_modified(|current| {
            let changed = **current != view;
            if changed {
                *current = Arc::new(view);
            }
            changed
        });
        if changed {
            let leader = metrics.current_leader;
            tracing::info!(?leader, term = metrics.vote.leader_id.term, "leadership");
        }
    }

    pub(crate) fn route(&self) -> Route {
        self.view.borrow().route.clone()
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// The time for the next entry, on a node that leads.
    pub(crate) fn stamp(&self) -> Stamp {
        self.clock.now()
    }
}
