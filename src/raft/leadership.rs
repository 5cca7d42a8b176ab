//! Who leads, as this node knows it, and what that means for its clock.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::type_config::alias::WatchReceiverOf;
use tokio::sync::watch;

use super::clock::{Beginning, ClusterClock, Evidence};
use super::types::{LogId, Member, Raft, TypeConfig};
use crate::state::Stamp;

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
    /// Where in the log the membership stands, for messages to others.
    membership: Arc<Mutex<Option<LogId>>>,
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
    pub(crate) fn new(
        raft: Raft,
        clock: Arc<ClusterClock>,
        membership: Arc<Mutex<Option<LogId>>>,
    ) -> Arc<Self> {
        let view = watch::Sender::new(Arc::new(View {
            route: Route::Unknown,
            term: 0,
            voters: Vec::new(),
            peers: Vec::new(),
        }));
        let this = Arc::new(Self { raft, clock, view, membership });
        this.update();
        this
    }

    /// Follows openraft for as long as it lives.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut metrics: WatchReceiverOf<TypeConfig, _> = self.raft.server_metrics();
        loop {
            self.update();
            if metrics.changed().await.is_err() {
                // That openraft is gone is told by whoever knows why.
                return std::future::pending().await;
            }
        }
    }

    fn update(&self) {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched().clone();
        let own = *self.raft.node_id();
        *self.membership.lock().unwrap_or_else(PoisonError::into_inner) =
            *metrics.membership_config.log_id();
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
            self.begin_leading(&view);
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
            let term = metrics.vote.leader_id.term;
            match metrics.current_leader {
                _ if leads => tracing::info!(term, "this node leads"),
                Some(leader) if leader != own => tracing::info!(term, "node {leader} leads"),
                _ => tracing::info!(term, "nobody leads yet: an election is under way"),
            }
        }
    }

    /// Lets a leader that could not find the time when it began try again.
    pub(crate) fn find_time(&self) {
        let view = self.view();
        if view.route == Route::Local && !self.clock.is_synced() {
            self.begin_leading(&view);
        }
    }

    fn begin_leading(&self, view: &View) {
        let beginning = self.clock.begin_leading(view.term, &view.voters);
        let Some(Beginning { leap, evidence }) = beginning else { return };
        let leap = format_args!("{} s", leap.as_secs_f64());
        match evidence {
            Evidence::New => {
                tracing::info!("the cluster's time begins at the voters' median wall clock");
            }
            Evidence::Kept => tracing::info!(%leap, "all were down; time goes on by so much"),
            Evidence::Walls => tracing::info!(
                %leap,
                "all were down; time leaps by so much, to the voters' median wall clock"
            ),
            Evidence::Missing => tracing::warn!(
                "all were down, their machines were rebooted, and the wall clocks of a majority \
                 are not synchronised: time goes on from where it was; see quorate cluster \
                 set-time"
            ),
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
