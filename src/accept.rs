//! Connections that are accepted: how many at once, and how long they may be silent at first.
//!
//! Files are for the log, checkpoints and snapshots first: a process that has none left for these
//! halts. So a port accepts up to a limit, and beyond it takes a connection off the system's hands
//! only to close it. A connection has to begin to speak HTTP/2 in a few seconds; from then on
//! HTTP/2's own keep-alive looks after it.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

/// How long a connection may take for its first bytes.
const OPENING_TIMEOUT: Duration = Duration::from_secs(5);
/// What has come by then: HTTP/2's preface, and the head of the settings that follow it.
const OPENING_BYTES: usize = 24 + 9;
/// How often it is said that connections are refused.
const TELL_INTERVAL: Duration = Duration::from_secs(10);
/// Pause after the system would not accept, so that what it lacks can come back.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How a port accepts.
#[derive(Clone, Copy, Debug)]
pub struct AcceptPolicy {
    /// Its name in the log: "client" or "peer".
    pub port: &'static str,
    /// Most connections at once.
    pub most: usize,
    /// Beyond that, the one from which nothing was heard for the longest time makes room, if it is
    /// that long; `None` to refuse whoever comes.
    pub replace_silent: Option<Duration>,
}

/// What became of those who came to a port.
#[derive(Debug, Default)]
pub struct AcceptCounts {
    open: Mutex<BTreeMap<u64, Arc<Line>>>,
    refused: AtomicU64,
    replaced: AtomicU64,
}

impl AcceptCounts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Line>>> {
        // Nothing panics while it holds the lock.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connections that are open.
    pub fn open(&self) -> usize {
        self.lock().len()
    }

    /// Connections that were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Closes the connection from which nothing was heard for the longest time, if that is
    /// `silent_for` or more.
    fn replace_silent(&self, silent_for: Duration, now: Instant) -> bool {
        let mut open = self.lock();
        let Some((id, silent)) = open.iter().min_by_key(|(_, line)| line.heard()) else {
            return false;
        };
        if now.saturating_duration_since(silent.heard()) < silent_for {
            return false;
        }
        silent.close();
        let id = *id;
        open.remove(&id);
        self.replaced.fetch_add(1, Ordering::Relaxed);
        true
    }
}

/// A handle on a connection, to close it from outside.
#[derive(Debug)]
pub struct Line {
    closed: AtomicBool,
    reader: AtomicWaker,
    began: Instant,
    /// Milliseconds from then to when something was heard last.
    heard: AtomicU64,
}

impl Line {
    fn new(now: Instant) -> Self {
        Self {
            closed: AtomicBool::new(false),
            reader: AtomicWaker::new(),
            began: now,
            heard: AtomicU64::new(0),
        }
    }

    /// Ends the connection.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.reader.wake();
    }

    fn heard(&self) -> Instant {
        self.began + Duration::from_millis(self.heard.load(Ordering::Relaxed))
    }

    fn hear(&self, now: Instant) {
        let since = now.saturating_duration_since(self.began).as_millis();
        self.heard.store(u64::try_from(since).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn check(&self) -> io::Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "closed by the node"));
        }
        Ok(())
    }
}

/// A connection that was accepted.
pub struct Accepted<T> {
    stream: TcpStream,
    line: Arc<Line>,
    tag: T,
    /// Until enough was heard.
    opening: Option<Opening>,
    _place: Place,
}

struct Opening {
    heard: usize,
    deadline: Pin<Box<Sleep>>,
}

/// A connection's place among those that are open.
struct Place {
    id: u64,
    counts: Arc<AcceptCounts>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.counts.lock().remove(&self.id);
    }
}

impl<T: Clone + Send + Sync + 'static> Connected for Accepted<T> {
    type ConnectInfo = T;

    fn connect_info(&self) -> T {
        self.tag.clone()
    }
}

impl<T: Unpin> AsyncRead for Accepted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.line.reader.register(context.waker());
        self.line.check()?;
        let before = buffer.filled().len();
        if let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(context, buffer) {
            self.line.hear(Instant::now());
            if let Some(opening) = &mut self.opening {
                opening.heard += buffer.filled().len() - before;
                if opening.heard >= OPENING_BYTES {
                    self.opening = None;
                }
            }
            return Poll::Ready(read);
        }
        let Some(opening) = &mut self.opening else { return Poll::Pending };
        ready!(opening.deadline.as_mut().poll(context));
        let message = "nothing that begins HTTP/2 has come in time";
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

impl<T: Unpin> AsyncWrite for Accepted<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.line.check()?;
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.line.check()?;
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// What a port does with those who come.
struct Door {
    policy: AcceptPolicy,
    counts: Arc<AcceptCounts>,
    last_id: u64,
    told: Option<Instant>,
}

impl Door {
    /// Whether one more may come in. If so, it has a place.
    fn admit(&mut self, now: Instant) -> Option<(Arc<Line>, Place)> {
        let is_full = self.counts.open() >= self.policy.most;
        let replace = |silent_for| self.counts.replace_silent(silent_for, now);
        if is_full && !self.policy.replace_silent.is_some_and(replace) {
            self.counts.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        self.last_id += 1;
        let line = Arc::new(Line::new(now));
        self.counts.lock().insert(self.last_id, line.clone());
        Some((line, Place { id: self.last_id, counts: self.counts.clone() }))
    }

    /// Whether something may be said again of what goes wrong here.
    fn may_tell(&mut self, now: Instant) -> bool {
        if self.told.is_some_and(|told| now.saturating_duration_since(told) < TELL_INTERVAL) {
            return false;
        }
        self.told = Some(now);
        true
    }

    async fn accept<T>(
        &mut self,
        listener: &TcpListener,
        tag: &mut impl FnMut(&Arc<Line>) -> T,
    ) -> Accepted<T> {
        loop {
            let accepted = listener.accept().await;
            let now = Instant::now();
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) if is_of_one_connection(&error) => continue,
                Err(error) => {
                    if self.may_tell(now) {
                        let port = self.policy.port;
                        tracing::warn!(port, %error, "cannot accept connections");
                    }
                    tokio::time::sleep(RETRY_PAUSE).await;
                    continue;
                }
            };
            let Some((line, place)) = self.admit(now) else {
                if self.may_tell(now) {
                    tracing::warn!(
                        port = self.policy.port,
                        limit = self.policy.most,
                        refused = self.counts.refused(),
                        "connections are refused: as many are open as may be; close some, or \
                         raise the limit of open files (ulimit -n)"
                    );
                }
                continue;
            };
            // Answers are written whole, so there is nothing to wait for.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(port = self.policy.port, %error, "TCP_NODELAY");
            }
            let deadline = Box::pin(tokio::time::sleep_until(now + OPENING_TIMEOUT));
            let opening = Some(Opening { heard: 0, deadline });
            return Accepted { stream, tag: tag(&line), line, opening, _place: place };
        }
    }
}

/// Whether it says nothing of the next connection.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// The connections that come to a port, each with a tag of its own; and their counts.
pub fn accept<T>(
    listener: TcpListener,
    policy: AcceptPolicy,
    tag: impl FnMut(&Arc<Line>) -> T,
) -> (impl Stream<Item = io::Result<Accepted<T>>>, Arc<AcceptCounts>) {
    let counts = Arc::new(AcceptCounts::default());
    let door = Door { policy, counts: counts.clone(), last_id: 0, told: None };
    let connections = futures_util::stream::unfold(
        (listener, door, tag),
        async |(listener, mut door, mut tag)| {
            let accepted = door.accept(&listener, &mut tag).await;
            Some((Ok(accepted), (listener, door, tag)))
        },
    );
    (connections, counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door(most: usize, replace_silent: Option<Duration>) -> Door {
        let policy = AcceptPolicy { port: "test", most, replace_silent };
        Door { policy, counts: Arc::default(), last_id: 0, told: None }
    }

    #[tokio::test]
    async fn beyond_the_limit_nobody_comes_in_until_somebody_leaves() {
        let mut door = door(2, None);
        let now = Instant::now();
        let first = door.admit(now).unwrap();
        let _second = door.admit(now).unwrap();
        let hour = Duration::from_secs(3_600);
        assert!(door.admit(now + hour).is_none());
        assert_eq!((door.counts.open(), door.counts.refused()), (2, 1));
        drop(first);
        assert!(door.admit(now).is_some());
    }

    #[tokio::test]
    async fn a_silent_one_makes_room_where_that_is_the_policy() {
        let mut door = door(2, Some(Duration::from_secs(1)));
        let now = Instant::now();
        let (speaks, _speaks_place) = door.admit(now).unwrap();
        let (silent, silent_place) = door.admit(now).unwrap();
        let later = now + Duration::from_secs(2);
        speaks.hear(later);
        let (_, _third) = door.admit(later).unwrap();
        assert!(silent.check().is_err());
        assert!(speaks.check().is_ok());
        // All that are there have just been heard.
        assert!(door.admit(later).is_none());
        drop(silent_place);
        assert_eq!((door.counts.open(), door.counts.refused()), (2, 1));
    }

    #[tokio::test]
    async fn what_goes_wrong_often_is_told_seldom() {
        let mut door = door(1, None);
        let now = Instant::now();
        assert!(door.may_tell(now));
        assert!(!door.may_tell(now + TELL_INTERVAL / 2));
        assert!(door.may_tell(now + TELL_INTERVAL));
    }
}
