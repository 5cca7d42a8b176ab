//! The callers of `quorate bench`, and the sessions that they work on.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::bench::Work;
use super::contender::Contender;
use super::failure::Failure;
use super::ledger::{Ledger, Tally};
use crate::client::{Client, Error, Handle, NewSession, ReadOptions, SessionId, Sessions, Update};
use crate::limits::ATTRIBUTE_VALUE_BYTES_MAX;

/// The one attribute of each session.
const ATTRIBUTE: &str = "value";
/// Prepared sessions are kept for the next run.
const PREPARED_IDLE_TIMEOUT: Duration = Duration::from_secs(24 * 3_600);
/// Sessions that the work creates are not.
const CREATED_IDLE_TIMEOUT: Duration = Duration::from_secs(5 * 60);
/// Sessions that are looked for in one request.
const PREPARE_BATCH: usize = 100;
/// Batches that are prepared at once.
const PREPARE_CALLERS: usize = 512;
/// Different values, so that neighbouring writes differ.
const VALUES: usize = 64;
/// How long nobody's request may end, once nobody begins another, before those that are left are
/// taken for such as never end.
const DRAIN_QUIET: Duration = Duration::from_secs(2);

/// The sessions: always the same for one number and size of values.
#[derive(Clone)]
pub(crate) struct Population {
    pub(crate) sessions: usize,
    value_size: usize,
    values: Arc<[Bytes]>,
}

impl Population {
    pub(crate) fn new(sessions: usize, value_size: usize) -> Result<Self, Failure> {
        if value_size > ATTRIBUTE_VALUE_BYTES_MAX {
            let message = format!("--value-size: at most {ATTRIBUTE_VALUE_BYTES_MAX} bytes");
            return Err(Failure::Usage(message));
        }
        let mut random = Random(0x5eed);
        let values = (0..VALUES)
            .map(|_| (0..value_size).map(|_| (random.next() >> 56) as u8).collect())
            .collect();
        Ok(Self { sessions, value_size, values })
    }

    /// The id of the session of that number. It names the size of its value, because a read is
    /// measured by what it reads.
    fn id(&self, index: usize) -> Result<SessionId, Error> {
        SessionId::new(format!("quorate-bench-{}-{index:09}", self.value_size))
    }

    fn value(&self, random: u64) -> Bytes {
        self.values[random as usize % self.values.len()].clone()
    }

    /// Creates the sessions that do not exist, and reports how many more are there.
    pub(crate) async fn prepare(
        &self,
        client: &Client,
        mut report: impl FnMut(u64),
    ) -> Result<(), Failure> {
        let next = Arc::new(AtomicUsize::new(0));
        let mut callers = JoinSet::new();
        let (ready, mut readied) = tokio::sync::mpsc::channel(PREPARE_CALLERS);
        for _ in 0..PREPARE_CALLERS.min(self.sessions.div_ceil(PREPARE_BATCH)) {
            let (population, client) = (self.clone(), client.clone());
            let (next, ready) = (next.clone(), ready.clone());
            callers.spawn(async move {
                loop {
                    let start = next.fetch_add(PREPARE_BATCH, Ordering::Relaxed);
                    if start >= population.sessions {
                        return Ok::<(), Error>(());
                    }
                    let end = population.sessions.min(start + PREPARE_BATCH);
                    population.prepare_batch(&client, start..end).await?;
                    // Whoever shows the progress may have gone.
                    let _ = ready.send((end - start) as u64).await;
                }
            });
        }
        drop(ready);
        while let Some(count) = readied.recv().await {
            report(count);
        }
        while let Some(joined) = callers.join_next().await {
            joined.map_err(|error| Failure::Failed(error.to_string()))??;
        }
        Ok(())
    }

    async fn prepare_batch(
        &self,
        client: &Client,
        indexes: std::ops::Range<usize>,
    ) -> Result<(), Error> {
        let ids = indexes.map(|index| self.id(index)).collect::<Result<Vec<_>, Error>>()?;
        let sessions = client.sessions();
        let found = sessions.batch_get(&ids, ReadOptions::new().metadata_only()).await?;
        let present: BTreeSet<Handle> = found.value.into_iter().map(|s| s.handle).collect();
        for (id, number) in ids.into_iter().zip(0..) {
            if present.contains(&id.handle(client.namespace())) {
                continue;
            }
            let session = NewSession::new()
                .id(id)
                .attribute(ATTRIBUTE, self.value(number))
                .idle_timeout(PREPARED_IDLE_TIMEOUT);
            match sessions.create(session).await {
                Ok(_) => {}
                // Another run prepares the same sessions.
                Err(Error::AlreadyExists { reason, .. }) if reason == "SESSION_EXISTS" => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Callers at work.
pub(crate) struct Load {
    shared: Arc<Shared>,
    callers: JoinSet<()>,
}

struct Shared(Mutex<Ledger>);

impl Load {
    /// Sets `callers` to work, with a contender each if there are any; their outcomes count from
    /// [`Load::measure`] on.
    pub(crate) fn start(
        client: &Client,
        work: Work,
        population: Population,
        callers: usize,
        contenders: &[Contender],
    ) -> Result<Self, Failure> {
        let ledger = Ledger::new(callers, Instant::now())?;
        let shared = Arc::new(Shared(Mutex::new(ledger)));
        let mut set = JoinSet::new();
        for number in 0..callers {
            let caller = Caller {
                number,
                sessions: client.sessions(),
                population: population.clone(),
                contender: contenders.get(number).cloned(),
                work,
                random: Random(number as u64 + 1),
                shared: shared.clone(),
            };
            set.spawn(caller.run());
        }
        Ok(Self { shared, callers: set })
    }

    /// From now on what the callers see counts.
    pub(crate) fn measure(&self) {
        self.shared.lock().measure(Instant::now());
    }

    /// How many requests have succeeded and how many have failed so far.
    pub(crate) fn progress(&self) -> (u64, u64) {
        let ledger = self.shared.lock();
        (ledger.tally().operations, ledger.tally().failed())
    }

    /// From now on nobody begins another request, and what ends is no part of the rate.
    pub(crate) fn stop(&self) {
        self.shared.lock().stop(Instant::now());
    }

    /// Stops, waits for the requests that are open for as long as any of them ends, and hands over
    /// what was measured.
    pub(crate) async fn finish(mut self) -> Tally {
        self.stop();
        // Each caller ends with its request; one that has panicked has left it open.
        while let Ok(Some(_)) = tokio::time::timeout(DRAIN_QUIET, self.callers.join_next()).await {}
        let tally = self.shared.lock().close(Instant::now());
        self.callers.shutdown().await;
        tally
    }

    /// Hands over what was measured since the last time.
    pub(crate) fn take(&self) -> Tally {
        self.shared.lock().take(Instant::now())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        // Nothing panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Caller {
    number: usize,
    sessions: Sessions,
    population: Population,
    /// For work on locks.
    contender: Option<Contender>,
    work: Work,
    random: Random,
    shared: Arc<Shared>,
}

impl Caller {
    async fn run(mut self) {
        loop {
            let result = self.operate().await;
            if !self.shared.lock().ended(self.number, Instant::now(), result) {
                return;
            }
        }
    }

    async fn operate(&mut self) -> Result<(), Error> {
        if let Some(contender) = &self.contender {
            return contender.operate().await;
        }
        let random = self.random.next();
        match (self.work, random % 100) {
            (Work::Create, _) => self.create().await,
            (Work::Get, _) | (Work::Mixed, 25..) => {
                let id = self.pick()?;
                self.sessions.get(id).await.map(drop)
            }
            (Work::Update | Work::Expire, _) | (Work::Mixed, 5..) => {
                let id = self.pick()?;
                let update = Update::new().set(ATTRIBUTE, self.population.value(random >> 32));
                self.sessions.update(id, update).await.map(drop)
            }
            (Work::Mixed | Work::Lock | Work::Handover | Work::Renew, _) => {
                let id = self.pick()?;
                self.sessions.touch(id).await.map(drop)
            }
        }
    }

    async fn create(&mut self) -> Result<(), Error> {
        let session = NewSession::new()
            .attribute(ATTRIBUTE, self.population.value(self.random.next()))
            .idle_timeout(CREATED_IDLE_TIMEOUT);
        self.sessions.create(session).await.map(drop)
    }

    /// Any session, each as likely as the others.
    fn pick(&mut self) -> Result<SessionId, Error> {
        let index = (u128::from(self.random.next()) * self.population.sessions as u128) >> 64;
        self.population.id(index as usize)
    }
}

/// SplitMix64: good enough to choose by, and the same for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_population_is_the_same_each_time() {
        let first = Population::new(10, 256).unwrap();
        let second = Population::new(10, 256).unwrap();
        assert_eq!(first.id(3).unwrap(), second.id(3).unwrap());
        assert_ne!(first.id(3).unwrap(), first.id(4).unwrap());
        assert_ne!(first.id(3).unwrap(), Population::new(10, 16).unwrap().id(3).unwrap());
        assert_eq!(first.value(7), second.value(7));
        assert_eq!(first.value(7).len(), 256);
        assert!(Population::new(10, 0).unwrap().value(1).is_empty());
        assert!(Population::new(1, ATTRIBUTE_VALUE_BYTES_MAX + 1).is_err());
    }
}
