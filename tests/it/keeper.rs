//! Keeping sessions alive, and telling one that ended too early from one that was kept too late.
//!
//! A test may be so slow that a session rightly ends between two touches. So the judge is the
//! cluster's own time: the node that says that a session is gone must, asked afterwards, believe
//! it to be past the last deadline that was promised.

use quorate::client::SessionId;
use quorate::proto::v1;
use tokio::sync::watch;
use tonic::Code;

use crate::cluster::Patience;
use crate::direct::{Direct, is_transient, millis, select};
use crate::random::Random;

/// A session and the last deadline that was promised for it, in milliseconds.
#[derive(Clone, Debug)]
pub(crate) struct Promise {
    pub(crate) id: SessionId,
    pub(crate) handle: String,
    pub(crate) expires: i64,
}

/// What became of a session that was to be kept alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It lives.
    Alive,
    /// It ended after its deadline, because nobody touched it in time.
    Lapsed,
}

impl Promise {
    /// A new session that ends when it has not been used for `idle_millis`.
    pub(crate) async fn make(direct: &Direct, idle_millis: u64) -> Self {
        let after = prost_types::Duration {
            seconds: i64::try_from(idle_millis / 1_000).unwrap(),
            nanos: i32::try_from(idle_millis % 1_000).unwrap() * 1_000_000,
        };
        let timeout = v1::Timeout { timeout: Some(v1::timeout::Timeout::After(after)) };
        let patience = Patience::new();
        loop {
            let id = SessionId::mint().unwrap();
            let request = v1::CreateSessionRequest {
                id: id.reveal().to_owned(),
                idle_timeout: Some(timeout),
                ..v1::CreateSessionRequest::default()
            };
            match direct.create(request).await {
                Ok(created) => {
                    let expires = millis(created.expire_time.unwrap());
                    return Self { id, handle: created.handle, expires };
                }
                Err(status) => {
                    assert!(is_transient(&status), "{status:?}");
                    patience.pause("a session is created", &status.to_string()).await;
                }
            }
        }
    }

    /// Sees that a node that calls the session gone is past its deadline.
    async fn check_end(&self, direct: &Direct) {
        let patience = Patience::new();
        loop {
            match direct.describe().await {
                Ok(described) => {
                    let now = described.cluster_time.map_or(0, millis);
                    assert!(
                        now >= self.expires,
                        "session {} is gone at {now}, {} ms before its deadline",
                        self.handle,
                        self.expires - now
                    );
                    return;
                }
                Err(status) => {
                    // Killed since: what it believed cannot be known any more.
                    if status.code() == Code::Unavailable {
                        return;
                    }
                    patience.pause("the node tells the time", &status.to_string()).await;
                }
            }
        }
    }

    /// Touches the session through any node until told to stop.
    pub(crate) async fn keep(
        mut self,
        directs: Vec<Direct>,
        mut random: Random,
        stop: watch::Receiver<bool>,
    ) -> (Self, Kept) {
        let patience = Patience::new();
        while !*stop.borrow() {
            let direct = random.choose(&directs);
            let request = v1::TouchSessionRequest {
                session: Some(select(&self.id)),
                ..v1::TouchSessionRequest::default()
            };
            match direct.touch(request).await {
                Ok(touched) => {
                    self.expires = self.expires.max(millis(touched.expire_time.unwrap()));
                }
                Err(status) if status.code() == Code::NotFound => {
                    self.check_end(direct).await;
                    return (self, Kept::Lapsed);
                }
                Err(status) => assert!(is_transient(&status), "{status:?}"),
            }
            patience.pause("the test comes to its end", "it goes on").await;
        }
        (self, Kept::Alive)
    }

    /// Reads the session, through any node, until it is gone, which must not be too early.
    pub(crate) async fn watch(self, directs: Vec<Direct>, mut random: Random) -> Self {
        let patience = Patience::new();
        loop {
            let direct = random.choose(&directs);
            match direct.get(&self.id).await {
                Ok(_) => {}
                Err(status) if status.code() == Code::NotFound => {
                    self.check_end(direct).await;
                    return self;
                }
                Err(status) => assert!(is_transient(&status), "{status:?}"),
            }
            patience.pause("the session expires", &self.handle).await;
        }
    }
}
