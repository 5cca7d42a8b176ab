//! The client library.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use quorate::client::{Client, Error, NewSession, Update};
//!
//! # async fn example() -> Result<(), Error> {
//! let client = Client::builder()
//!     .endpoints(["127.0.0.1:7400", "127.0.0.1:7401", "127.0.0.1:7402"])
//!     .namespace("shop")
//!     .timeout(Duration::from_secs(2))
//!     .connect()
//!     .await?;
//! let sessions = client.sessions();
//!
//! // Somebody logs in. The id goes into the cookie and is not stored anywhere else.
//! let session = NewSession::new().principal("alice").attribute("theme", "dark");
//! let created = sessions.create(session).await?;
//!
//! // Two requests that set different attributes both win; to compare and set, expect a version.
//! sessions.update(&created.id, Update::new().set("cart", "3 apples")).await?;
//! let session = sessions.get(&created.id).await?;
//! let update = Update::new().set("cart", "4 apples").expect_version(session.version);
//! match sessions.update(&created.id, update).await {
//!     Ok(_) => {}
//!     Err(Error::VersionMismatch { .. }) => { /* somebody else was faster: read again */ }
//!     Err(Error::OutcomeUnknown { .. }) => { /* read again to find out */ }
//!     Err(error) => return Err(error),
//! }
//!
//! // Once this has returned, no node gives the session to anybody.
//! sessions.delete(&created.id).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Locks hang from leases, which the client keeps alive in the background:
//!
//! ```no_run
//! # use std::time::Duration;
//! # use quorate::client::{Client, Error, Handle, LeaseOptions, Update};
//! # async fn example(client: Client, session: Handle) -> Result<(), Error> {
//! let lease = client.leases().grant(LeaseOptions::new().owner("worker-7")).await?;
//! let locks = client.locks();
//! let guard = locks.lock("billing").wait(Duration::from_secs(10)).acquire(&lease).await?;
//! // The token proves that nobody else has got the lock before this write.
//! let update = Update::new().set("bill", "17").fence("billing", guard.token());
//! let sessions = client.sessions();
//! tokio::select! {
//!     done = sessions.update(session, update) => drop(done?),
//!     loss = guard.lost() => return Err(Error::LeaseLost { message: loss.describe().into() }),
//! }
//! guard.release().await?;
//! # Ok(())
//! # }
//! ```
//!
//! A request goes to the leader where one is known, and to any node else. A call returns when it
//! has an outcome or its timeout has passed; in between it tries again by itself, safely: what is
//! sent twice happens once. A write of which nobody can tell any more whether it was applied fails
//! with [`Error::OutcomeUnknown`], and with nothing else. A client whose endpoints all refuse its
//! very first call does not wait: nobody listens there, or somebody else.
//!
//! Requests share a few connections, each with one [pipeline](Transport::Pipeline); a client and
//! its clones share those. All of it runs on the tokio runtime that makes the calls.
//!
//! Caveats: there is no TLS yet; and near caches, which would save the reads, are still to come.

mod background;
mod cluster;
mod connection;
#[cfg(test)]
#[cfg(feature = "server")]
mod coordination_test;
mod error;
mod guard;
mod id;
mod keeper;
mod lease;
mod liveness;
mod lock;
mod pipeline;
mod pool;
mod retry;
mod ring;
mod session;
#[cfg(test)]
#[cfg(feature = "server")]
mod tests;
mod time;
mod unary;

use std::fmt;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::clock::{Clock, SystemClock};
use crate::limits::{NAMESPACE_BYTES_MAX, REQUEST_BYTES_MAX, REQUEST_TIMEOUT_DEFAULT};

pub use self::cluster::NewMember;
pub use self::error::Error;
pub use self::guard::Guard;
pub use self::id::{Handle, LeaseId, Selector, SessionId};
pub use self::keeper::Renewals;
pub use self::lease::{Lease, LeaseOptions, LeasePage, LeaseRecord, LeaseTiming, Leases, Renewal};
pub use self::liveness::Loss;
pub use self::lock::{
    Acquire, Grant, LockHolder, LockMode, LockPage, LockRecord, LockWaiter, Locks,
};
pub use self::ring::{
    Joined, Located, NewRingMember, Ring, RingMember, RingReadOptions, RingShares, Rings,
};
pub use self::session::{
    Created, DeleteOptions, Found, ListOptions, NewSession, Page, ReadOptions, Session, Sessions,
    Touched, Update, Updated,
};
pub use self::time::Timeout;

/// Largest answer that is taken: a few times what a server should send, because one that is
/// refused costs the connection.
const RESPONSE_BYTES_MAX: usize = 4 * REQUEST_BYTES_MAX;
/// Time for one attempt, if the call's timeout leaves so much: then another node is asked.
const ATTEMPT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(3);
/// Time to reach one node and be greeted.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(1);
/// Most connections of one client: each carries thousands of requests at once.
const CONNECTIONS_MAX: usize = 64;

/// How requests travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// All requests of a connection on one stream, at a fraction of the cost of a call each.
    #[default]
    Pipeline,
    /// One gRPC call each, as clients without this library make them.
    Unary,
}

/// A cluster, as its users reach it. Clones share the connections.
#[derive(Clone)]
pub struct Client {
    pool: Arc<pool::Pool>,
    keeper: Arc<keeper::Keeper>,
    background: Arc<background::Background>,
    request_ids: Arc<id::RequestIds>,
    namespace: Arc<str>,
    timeout: Duration,
    attempt_timeout: Duration,
    connect_timeout: Duration,
}

impl Client {
    /// A client to be configured.
    pub fn builder() -> ClientBuilder {
        ClientBuilder { options: Options::default(), clock: Arc::new(SystemClock) }
    }

    /// The calls on sessions, in this client's namespace.
    pub fn sessions(&self) -> Sessions {
        Sessions::new(self.clone())
    }

    /// The calls on leases, in this client's namespace.
    pub fn leases(&self) -> Leases {
        Leases::new(self.clone())
    }

    /// The calls on locks, in this client's namespace.
    pub fn locks(&self) -> Locks {
        Locks::new(self.clone())
    }

    /// The calls on rings, in this client's namespace.
    pub fn rings(&self) -> Rings {
        Rings::new(self.clone())
    }

    /// The namespace that calls go to.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The same client for another namespace.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] when `namespace` is not a namespace's name.
    pub fn with_namespace(&self, namespace: &str) -> Result<Self, Error> {
        check_namespace(namespace)?;
        Ok(Self { namespace: namespace.into(), ..self.clone() })
    }

    /// The same client with another timeout for its calls.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }

    /// Where this client looks for the cluster first: its endpoints, as `host:port`.
    pub fn endpoints(&self) -> Vec<String> {
        self.pool.endpoints()
    }

    /// What time it is in the cluster, which judges expiries and ages: as a node has told, and as
    /// this machine's monotonic clock has gone on since. `None` while no node has told anything.
    pub fn cluster_time(&self) -> Option<SystemTime> {
        let millis = u64::try_from(self.pool.time.now()?).ok()?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(millis))
    }

    /// Returns when nothing is under way any more that this client and its clones do in the
    /// background because something was dropped: a guard's lock is given back, an Acquire
    /// cancelled, a lease revoked. A short-lived program waits for it before it ends, as its end
    /// would cut that off; where the cluster does not answer it takes until the leases are lost, so
    /// it is best bounded. The renewal of leases is not waited for.
    pub async fn settled(&self) {
        self.background.settled().await;
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("namespace", &self.namespace)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Configures a [`Client`].
#[derive(Clone)]
pub struct ClientBuilder {
    options: Options,
    clock: Arc<dyn Clock>,
}

#[derive(Clone)]
struct Options {
    endpoints: Vec<String>,
    namespace: String,
    transport: Transport,
    connections: usize,
    timeout: Duration,
    attempt_timeout: Duration,
    connect_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            endpoints: vec!["127.0.0.1:7400".to_owned()],
            namespace: "default".to_owned(),
            transport: Transport::default(),
            connections: 1,
            timeout: REQUEST_TIMEOUT_DEFAULT,
            attempt_timeout: ATTEMPT_TIMEOUT_DEFAULT,
            connect_timeout: CONNECT_TIMEOUT_DEFAULT,
        }
    }
}

impl ClientBuilder {
    /// Where to find the cluster: `host:port` of one node or, better, several; several may also
    /// come as one text, with commas between them. The other nodes are learnt from those. Default:
    /// `127.0.0.1:7400`.
    pub fn endpoints(mut self, endpoints: impl IntoIterator<Item: Into<String>>) -> Self {
        self.options.endpoints = endpoints.into_iter().map(Into::into).collect();
        self
    }

    /// The namespace that calls go to. Default: `default`.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.options.namespace = namespace.into();
        self
    }

    /// How requests travel. Default: [`Transport::Pipeline`].
    pub fn transport(mut self, transport: Transport) -> Self {
        self.options.transport = transport;
        self
    }

    /// How many connections to keep, 1 to 64. Default: 1.
    pub fn connections(mut self, connections: usize) -> Self {
        self.options.connections = connections;
        self
    }

    /// How long a call may take, with all its attempts. Default: 10 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.options.timeout = timeout;
        self
    }

    /// How long one attempt may take before another node is asked. Default: 3 s.
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.options.attempt_timeout = timeout;
        self
    }

    /// How long it may take to reach one node. Default: 1 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.options.connect_timeout = timeout;
        self
    }

    /// The clock that requests are dated by; for simulations.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// The client, without a connection: the first call makes it.
    ///
    /// # Errors
    ///
    /// [`Error::Configuration`] and [`Error::InvalidArgument`] when an option cannot work.
    pub fn build(mut self) -> Result<Client, Error> {
        let configuration = |message: String| Err(Error::Configuration { message });
        let endpoints = self.options.endpoints.iter().flat_map(|endpoint| endpoint.split(','));
        let endpoints = endpoints.map(str::trim).filter(|endpoint| !endpoint.is_empty());
        self.options.endpoints = endpoints.map(check_endpoint).collect::<Result<_, Error>>()?;
        if self.options.endpoints.is_empty() {
            return configuration("at least one endpoint is needed, as host:port".into());
        }
        if !(1..=CONNECTIONS_MAX).contains(&self.options.connections) {
            return configuration(format!("connections must be 1 to {CONNECTIONS_MAX}"));
        }
        let options = self.options;
        let timeouts = [options.timeout, options.attempt_timeout, options.connect_timeout];
        // A year is more than anybody waits, and keeps sums of moments within their range.
        if timeouts.iter().any(|t| t.is_zero() || *t > Duration::from_secs(366 * 24 * 3_600)) {
            return configuration("timeouts must be above zero and at most a year".into());
        }
        check_namespace(&options.namespace)?;
        Ok(Client {
            pool: pool::Pool::new(&options, self.clock),
            keeper: Arc::default(),
            background: Arc::default(),
            request_ids: Arc::new(id::RequestIds::new()?),
            namespace: options.namespace.into(),
            timeout: options.timeout,
            attempt_timeout: options.attempt_timeout,
            connect_timeout: options.connect_timeout,
        })
    }

    /// The client, once a node has greeted it.
    ///
    /// # Errors
    ///
    /// As [`ClientBuilder::build`], and [`Error::Unavailable`] when no node can be reached: then
    /// its message names each endpoint, and why.
    pub async fn connect(self) -> Result<Client, Error> {
        let client = self.build()?;
        client.pool.connection().await?;
        Ok(client)
    }
}

/// `host:port`, which a scheme may precede.
fn check_endpoint(endpoint: &str) -> Result<String, Error> {
    let configuration = |message: String| Err(Error::Configuration { message });
    if endpoint.starts_with("https://") {
        return configuration(format!("{endpoint}: there is no TLS yet, use http://"));
    }
    let address = endpoint.strip_prefix("http://").unwrap_or(endpoint).trim_end_matches('/');
    match check_address(address) {
        Ok(()) => Ok(address.to_owned()),
        Err(message) => configuration(format!("endpoint {message}")),
    }
}

/// Whether `text` is `host:port`, of a name, an IPv4 address, or an IPv6 address in brackets; else
/// what is wrong with it.
pub(crate) fn check_address(text: &str) -> Result<(), String> {
    let right = "write it as host:port, like 127.0.0.1:7400 or [::1]:7400";
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(format!("{text:?} has no port; {right}"));
    };
    if !port.parse::<u16>().is_ok_and(|port| port != 0) {
        return Err(format!("{text:?} has no port between 1 and 65535; {right}"));
    }
    let is_name = |host: &str| {
        !host.is_empty() && host.bytes().all(|c| c.is_ascii_alphanumeric() || b".-_".contains(&c))
    };
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    match bracketed {
        Some(address) if address.parse::<Ipv6Addr>().is_ok() => Ok(()),
        None if is_name(host) => Ok(()),
        None if host.parse::<Ipv6Addr>().is_ok() => {
            Err(format!("{text:?} is not clear: an IPv6 address has brackets, [{host}]:{port}"))
        }
        _ => Err(format!("{text:?} is no address; {right}")),
    }
}

fn check_namespace(namespace: &str) -> Result<(), Error> {
    let valid = (1..=NAMESPACE_BYTES_MAX).contains(&namespace.len())
        && namespace.bytes().all(|c| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'));
    if valid {
        return Ok(());
    }
    Err(Error::invalid(
        "namespace",
        "INVALID_NAMESPACE",
        format!(
            "{namespace:?} is no namespace: 1 to {NAMESPACE_BYTES_MAX} characters of a-z 0-9 . _ -"
        ),
    ))
}
