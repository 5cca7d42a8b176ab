//! Which node a request goes to.
//!
//! The pool keeps a fixed number of connections, to the leader where one is known: any node takes
//! any request, but the leader spares a hop. What it knows it learns from the greeting of each
//! connection and from asking again now and then, while there is traffic. A connection is made by
//! one task, however many callers wait for it, and no caller's end interrupts it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::connection::{Connection, DialError};
use super::error::Error;
use super::time::ClusterTime;
use super::{Options, Transport};
use crate::clock::Clock;
use crate::proto::v1::DescribeResponse;

/// How often what a node knows is asked again: cluster time drifts by at most a hundredth.
const REFRESH_INTERVAL: Duration = Duration::from_secs(5);
/// How often while the connection is not known to lead to the leader, as after a failover.
const REFRESH_INTERVAL_ASTRAY: Duration = Duration::from_millis(500);
/// How long a node that could not be reached is asked last.
const UNREACHABLE_FOR: Duration = Duration::from_secs(1);
/// How long a node that could not serve is asked last: elections are short.
const COMPLAINT_FOR: Duration = Duration::from_millis(100);
/// How long a connection is kept even though its node cannot serve.
const CONNECTION_TRIAL: Duration = Duration::from_millis(50);
/// How long it is told that a node could not be reached: it is tried again only if need be.
const FAILURE_TOLD_FOR: Duration = Duration::from_secs(30);
/// Pause after a round through all nodes that found none.
const ROUND_PAUSE: Duration = Duration::from_millis(20);
/// Most addresses that are learnt beside those configured.
const LEARNT_ADDRESSES_MAX: usize = 64;

/// The connections of one client and all its clones.
pub(super) struct Pool {
    slots: Box<[watch::Sender<Slot>]>,
    next: AtomicUsize,
    routes: Mutex<Routes>,
    pub(super) time: ClusterTime,
    transport: Transport,
    connect_timeout: Duration,
    start: Instant,
    /// When to ask again, in milliseconds since `start`.
    refresh_at: AtomicU64,
}

/// Where one connection stands.
#[derive(Clone)]
enum Slot {
    Idle,
    /// A task is at it.
    Connecting,
    Ready(Arc<Connection>),
    /// The last round through all nodes found none.
    Failed(Unreached),
}

/// That no node could be reached.
#[derive(Clone)]
pub(super) struct Unreached {
    pub(super) error: Error,
    /// Whether to ask again is of no use: every address has refused, and none ever did anything
    /// else. Where a node was reached before, it may be back in a moment.
    pub(super) is_final: bool,
}

impl Unreached {
    fn of(error: Error) -> Self {
        Self { error, is_final: false }
    }
}

/// What is known of the nodes.
struct Routes {
    /// The cluster that this client speaks to, once it is known.
    cluster_id: Option<String>,
    configured: Vec<String>,
    learnt: Vec<String>,
    leader: Option<Leader>,
    /// Addresses to be asked last, until then.
    shunned: BTreeMap<String, Instant>,
    /// Why the addresses that could not be reached when they were last tried could not, and when
    /// that was.
    failures: BTreeMap<String, (Instant, DialError)>,
    /// Whether any node was ever reached.
    has_reached: bool,
}

#[derive(Clone)]
struct Leader {
    node_id: u64,
    address: String,
}

impl Pool {
    pub(super) fn new(options: &Options, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            slots: (0..options.connections).map(|_| watch::Sender::new(Slot::Idle)).collect(),
            next: AtomicUsize::new(0),
            routes: Mutex::new(Routes {
                cluster_id: None,
                configured: options.endpoints.clone(),
                learnt: Vec::new(),
                leader: None,
                shunned: BTreeMap::new(),
                failures: BTreeMap::new(),
                has_reached: false,
            }),
            time: ClusterTime::new(clock),
            transport: options.transport,
            connect_timeout: options.connect_timeout,
            start: Instant::now(),
            refresh_at: AtomicU64::new(0),
        })
    }

    /// The next connection in turn if it is up; else its number, to [`Pool::connect`] it.
    pub(super) fn ready_connection(&self) -> Result<Arc<Connection>, usize> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.slots.len();
        match &*self.slots[index].borrow() {
            Slot::Ready(connection) if !connection.is_closed() => Ok(connection.clone()),
            _ => Err(index),
        }
    }

    /// A connection that is up, made if need be; an error when no node could be reached.
    pub(super) async fn connection(self: &Arc<Self>) -> Result<Arc<Connection>, Error> {
        match self.ready_connection() {
            Ok(connection) => Ok(connection),
            Err(index) => self.connect(index).await.map_err(|unreached| unreached.error),
        }
    }

    /// Connection `index` once it is up; an error when no node could be reached.
    pub(super) async fn connect(
        self: &Arc<Self>,
        index: usize,
    ) -> Result<Arc<Connection>, Unreached> {
        let failed = |message| Err(Unreached::of(Error::unavailable(message)));
        let mut watched = self.slots[index].subscribe();
        self.start_connecting(index);
        loop {
            match &*watched.borrow_and_update() {
                Slot::Ready(connection) if !connection.is_closed() => return Ok(connection.clone()),
                Slot::Failed(unreached) => return Err(unreached.clone()),
                Slot::Connecting => {}
                Slot::Idle | Slot::Ready(_) => {
                    return failed("the connection was lost at once");
                }
            }
            if watched.changed().await.is_err() {
                return failed("the client was closed");
            }
        }
    }

    /// `connection` was lost: its node is asked last for a while. A lost connection is replaced
    /// when somebody needs it.
    pub(super) fn lost(&self, connection: &Connection) {
        let until = Instant::now() + UNREACHABLE_FOR;
        self.routes().shunned.insert(connection.address.clone(), until);
    }

    /// The node behind `connection` said that it cannot serve: the next attempt goes elsewhere.
    /// Not from a connection that was only just made, lest all callers of a cluster without a
    /// leader spend the election on making connections.
    pub(super) fn complain(self: &Arc<Self>, connection: &Arc<Connection>) {
        let now = Instant::now();
        if now < connection.since + CONNECTION_TRIAL {
            return;
        }
        self.routes().shunned.insert(connection.address.clone(), now + COMPLAINT_FOR);
        for (index, slot) in self.slots.iter().enumerate() {
            let dropped = slot.send_if_modified(|slot| match slot {
                Slot::Ready(ready) if Arc::ptr_eq(ready, connection) => {
                    *slot = Slot::Idle;
                    true
                }
                _ => false,
            });
            if dropped {
                self.start_connecting(index);
            }
        }
    }

    /// Asks a node what it knows, if that was long ago; in a task, as nobody needs to wait for it.
    pub(super) fn refresh_if_due(self: &Arc<Self>, connection: &Arc<Connection>, now: Instant) {
        let due = self.refresh_at.load(Ordering::Relaxed);
        if self.since_start(now) < due {
            return;
        }
        let next = self.since_start(now + REFRESH_INTERVAL_ASTRAY);
        let claim =
            self.refresh_at.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed);
        if claim.is_ok() {
            tokio::spawn(refresh(self.clone(), connection.clone()));
        }
    }

    /// Addresses in the order in which to try them.
    pub(super) fn addresses(&self) -> Vec<String> {
        self.routes().candidates(Instant::now())
    }

    /// The addresses that it was configured with.
    pub(super) fn endpoints(&self) -> Vec<String> {
        self.routes().configured.clone()
    }

    fn start_connecting(self: &Arc<Self>, index: usize) {
        let started = self.slots[index].send_if_modified(|slot| {
            let start = match slot {
                Slot::Idle | Slot::Failed(_) => true,
                Slot::Ready(connection) => connection.is_closed(),
                Slot::Connecting => false,
            };
            if start {
                *slot = Slot::Connecting;
            }
            start
        });
        if started {
            let pool = self.clone();
            tokio::spawn(async move {
                let slot = match pool.dial_best().await {
                    Ok(connection) => Slot::Ready(Arc::new(connection)),
                    Err(unreached) => {
                        // However many callers keep asking, the next round waits this long.
                        tokio::time::sleep(ROUND_PAUSE).await;
                        Slot::Failed(unreached)
                    }
                };
                pool.slots[index].send_replace(slot);
            });
        }
    }

    /// The leader if it can be found, else any node that answers.
    async fn dial_best(&self) -> Result<Connection, Unreached> {
        for address in self.addresses() {
            let Ok(connection) = self.dial(&address).await else { continue };
            // The node may know a better one. Its word is taken once: two that each name the
            // other would send us round in circles.
            let Some(leader) = self.leader_to_try(&connection) else { return Ok(connection) };
            return Ok(self.dial(&leader).await.unwrap_or(connection));
        }
        Err(self.routes().unreached(Instant::now()))
    }

    /// Which addresses could not be reached when they were last tried, of late, and why.
    pub(super) fn failures(&self) -> Option<String> {
        self.routes().failures_text(Instant::now())
    }

    /// Whether the client knows that there is a cluster.
    pub(super) fn knows_cluster(&self) -> bool {
        self.routes().cluster_id.is_some()
    }

    /// The leader's address, unless `connection` leads there or it was unreachable just now.
    fn leader_to_try(&self, connection: &Connection) -> Option<String> {
        let routes = self.routes();
        let leader = routes.leader.as_ref()?;
        let other = leader.node_id != connection.node_id && leader.address != connection.address;
        let reachable = !routes.is_shunned(&leader.address, Instant::now());
        (other && reachable).then(|| leader.address.clone())
    }

    async fn dial(&self, address: &str) -> Result<Connection, DialError> {
        match Connection::dial(address, self.transport, self.connect_timeout).await {
            Ok((connection, hello)) => {
                tracing::debug!(address, node = hello.node_id, "connected");
                self.routes().reached(address);
                self.routes().check_cluster(address, &hello)?;
                self.learn(&hello);
                // Sooner than usual if this is not the leader.
                let astray = hello.leader_id != hello.node_id;
                let wait = if astray { REFRESH_INTERVAL_ASTRAY } else { REFRESH_INTERVAL };
                let at = self.since_start(Instant::now() + wait);
                self.refresh_at.store(at, Ordering::Relaxed);
                Ok(connection)
            }
            Err(error) => {
                tracing::debug!(address, error = error.message, "could not connect");
                self.routes().failed(address, error.clone(), Instant::now());
                Err(error)
            }
        }
    }

    fn learn(&self, hello: &DescribeResponse) {
        if let Some(time) = &hello.cluster_time {
            self.time.learn(time);
        }
        self.routes().learn(hello);
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        // Nothing panics while it holds the lock; were it so, the routes are still routes.
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since_start(&self, moment: Instant) -> u64 {
        let elapsed = moment.saturating_duration_since(self.start);
        u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
    }
}

/// Learns anew from one node, and moves connections over if another node leads now.
async fn refresh(pool: Arc<Pool>, connection: Arc<Connection>) {
    let Ok(described) = connection.describe(pool.connect_timeout).await else { return };
    if pool.routes().check_cluster(&connection.address, &described).is_err() {
        return;
    }
    pool.learn(&described);
    let mut astray = described.leader_id == 0;
    for slot in &pool.slots {
        let Slot::Ready(current) = slot.borrow().clone() else { continue };
        let Some(leader) = pool.leader_to_try(&current) else { continue };
        astray = true;
        let Ok(better) = pool.dial(&leader).await else { continue };
        if Some(better.node_id) != pool.routes().leader.as_ref().map(|leader| leader.node_id) {
            continue;
        }
        // Requests under way end on the old connection; whoever holds it last closes it.
        let better = Arc::new(better);
        slot.send_if_modified(|slot| match slot {
            Slot::Ready(ready) if Arc::ptr_eq(ready, &current) => {
                *slot = Slot::Ready(better);
                true
            }
            _ => false,
        });
    }
    let wait = if astray { REFRESH_INTERVAL_ASTRAY } else { REFRESH_INTERVAL };
    pool.refresh_at.store(pool.since_start(Instant::now() + wait), Ordering::Relaxed);
}

impl Routes {
    /// The first node that belongs to a cluster says which one this client speaks to, for good. A
    /// node of another one is at the wrong address, and what is written there is lost to the
    /// others.
    fn check_cluster(&mut self, address: &str, hello: &DescribeResponse) -> Result<(), DialError> {
        if hello.cluster_id.is_empty() {
            return Ok(());
        }
        let pinned = self.cluster_id.get_or_insert_with(|| hello.cluster_id.clone());
        if *pinned == hello.cluster_id {
            return Ok(());
        }
        let message = format!(
            "it belongs to cluster {}, and the other endpoints to {pinned}",
            hello.cluster_id
        );
        let error = DialError { message, is_refusal: false };
        self.failed(address, error.clone(), Instant::now());
        Err(error)
    }

    fn reached(&mut self, address: &str) {
        self.has_reached = true;
        self.failures.remove(address);
    }

    fn failed(&mut self, address: &str, error: DialError, now: Instant) {
        self.shunned.insert(address.to_owned(), now + UNREACHABLE_FOR);
        self.failures.insert(address.to_owned(), (now, error));
    }

    /// That no address could be reached.
    fn unreached(&self, now: Instant) -> Unreached {
        let addresses = || self.configured.iter().chain(&self.learnt);
        let refused = |address| self.failures.get(address).is_some_and(|(_, it)| it.is_refusal);
        let message = self.failures_text(now).unwrap_or_else(|| "no node was reached".to_owned());
        Unreached {
            error: Error::unavailable(message),
            is_final: !self.has_reached && addresses().all(refused),
        }
    }

    /// The failures, those together that are alike.
    fn failures_text(&self, now: Instant) -> Option<String> {
        let mut alike: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let recent = self.failures.iter().filter(|(_, (at, _))| now < *at + FAILURE_TOLD_FOR);
        for (address, (_, error)) in recent {
            alike.entry(&error.message).or_default().push(address);
        }
        let texts = alike.into_iter().map(|(why, who)| format!("{}: {why}", who.join(", ")));
        Some(texts.collect::<Vec<_>>().join("; ")).filter(|text| !text.is_empty())
    }

    fn learn(&mut self, hello: &DescribeResponse) {
        let leader = Leader { node_id: hello.leader_id, address: hello.leader_address.clone() };
        let known = leader.node_id != 0 && !leader.address.is_empty();
        self.leader = known.then_some(leader);
        if !hello.members.is_empty() {
            let members = hello.members.iter().map(|member| &member.client_address);
            self.learnt = members
                .filter(|address| !address.is_empty() && !self.configured.contains(address))
                .take(LEARNT_ADDRESSES_MAX)
                .cloned()
                .collect();
        }
    }

    /// The leader, then the others, then those that were of no use lately.
    fn candidates(&mut self, now: Instant) -> Vec<String> {
        self.shunned.retain(|_, until| *until > now);
        let leader = self.leader.iter().map(|leader| &leader.address);
        let others = self.configured.iter().chain(&self.learnt);
        let mut candidates: Vec<String> = Vec::new();
        for address in leader.chain(others) {
            if !candidates.contains(address) {
                candidates.push(address.clone());
            }
        }
        // Stable: within each part the order stays.
        candidates.sort_by_key(|address| self.shunned.get(address).copied());
        candidates
    }

    fn is_shunned(&self, address: &str, now: Instant) -> bool {
        self.shunned.get(address).is_some_and(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::Member;

    fn routes() -> Routes {
        Routes {
            cluster_id: None,
            configured: vec!["a:1".into(), "b:1".into()],
            learnt: Vec::new(),
            leader: None,
            shunned: BTreeMap::new(),
            failures: BTreeMap::new(),
            has_reached: false,
        }
    }

    fn hello(leader_id: u64, leader: &str, members: &[&str]) -> DescribeResponse {
        DescribeResponse {
            leader_id,
            leader_address: leader.to_owned(),
            members: members
                .iter()
                .map(|address| Member {
                    client_address: (*address).to_owned(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }
    }

    #[test]
    fn the_leader_comes_first_and_who_failed_comes_last() {
        let now = Instant::now();
        let mut routes = routes();
        assert_eq!(routes.candidates(now), ["a:1", "b:1"]);
        routes.learn(&hello(3, "c:1", &["a:1", "b:1", "c:1", ""]));
        assert_eq!(routes.candidates(now), ["c:1", "a:1", "b:1"]);
        routes.shunned.insert("c:1".into(), now + Duration::from_secs(2));
        routes.shunned.insert("a:1".into(), now + Duration::from_secs(1));
        assert_eq!(routes.candidates(now), ["b:1", "a:1", "c:1"]);
        assert_eq!(routes.candidates(now + Duration::from_secs(3)), ["c:1", "a:1", "b:1"]);
    }

    #[test]
    fn a_node_of_another_cluster_is_not_used() {
        let of = |cluster: &str| DescribeResponse {
            cluster_id: cluster.to_owned(),
            ..DescribeResponse::default()
        };
        let mut routes = routes();
        // One that has not joined yet says nothing about the others.
        assert!(routes.check_cluster("a:1", &of("")).is_ok());
        assert!(routes.check_cluster("a:1", &of("c")).is_ok());
        assert!(routes.check_cluster("b:1", &of("c")).is_ok());
        let error = routes.check_cluster("b:1", &of("d")).unwrap_err();
        assert!(error.message.contains("cluster d"), "{error:?}");
        assert_eq!(routes.candidates(Instant::now()), ["a:1", "b:1"]);
        assert!(routes.is_shunned("b:1", Instant::now()));
    }

    #[test]
    fn that_all_refuse_is_final_unless_one_was_reached() {
        let now = Instant::now();
        let refusal = || DialError { message: "refused".to_owned(), is_refusal: true };
        let mut routes = routes();
        routes.failed("b:1", refusal(), now);
        assert!(!routes.unreached(now).is_final, "one has not been tried");
        routes.failed("a:1", refusal(), now);
        let unreached = routes.unreached(now);
        assert!(unreached.is_final);
        assert_eq!(unreached.error.to_string(), "a:1, b:1: refused");
        let late = DialError { message: "no answer".to_owned(), is_refusal: false };
        routes.failed("b:1", late, now);
        let unreached = routes.unreached(now);
        assert!(!unreached.is_final, "one may answer yet");
        assert_eq!(unreached.error.to_string(), "b:1: no answer; a:1: refused");
        routes.reached("b:1");
        assert_eq!(routes.failures_text(now).as_deref(), Some("a:1: refused"));
        assert_eq!(routes.failures_text(now + FAILURE_TOLD_FOR), None);
        routes.failed("b:1", refusal(), now);
        assert!(!routes.unreached(now).is_final, "it was there, and may be back");
    }

    #[test]
    fn a_leader_is_forgotten_when_there_is_none() {
        let mut routes = routes();
        routes.learn(&hello(3, "c:1", &["c:1"]));
        routes.learn(&hello(0, "", &[]));
        assert!(routes.leader.is_none());
        assert_eq!(routes.candidates(Instant::now()), ["a:1", "b:1", "c:1"]);
    }
}
