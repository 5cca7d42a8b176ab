//! Sees to it that half a node never lives.
//!
//! Whatever works for a node for as long as the node lives is spawned here, under a name. Should
//! one of these tasks or threads panic, or end before the node does, the whole node halts and gives
//! that as its reason: the others cannot do its work, and would only look as if they did.

use std::future::Future;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use openraft::AsyncRuntime;
use openraft::OptionalSend;
use tokio::task::JoinSet;

use super::halt::Halt;
use crate::storage::thread::{ThreadWatch, panic_message};

tokio::task_local! {
    /// For the tasks of openraft, which spawns them by itself.
    static HALT_OF_RAFT: Halt;
}

/// Spawns what a node cannot live without; clones share it.
#[derive(Clone)]
pub(crate) struct Supervisor {
    overseer: Overseer,
    tasks: Arc<Mutex<Tasks>>,
}

struct Tasks {
    set: JoinSet<()>,
    stopping: Arc<AtomicBool>,
    #[cfg(test)]
    by_name: std::collections::BTreeMap<&'static str, tokio::task::AbortHandle>,
}

impl Drop for Tasks {
    /// The tasks of a node that is dropped end with it.
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
    }
}

/// What each task needs of it.
#[derive(Clone)]
struct Overseer {
    halt: Halt,
    /// Whether the node is about to stop, so that tasks may end.
    stopping: Arc<AtomicBool>,
}

impl Supervisor {
    pub(crate) fn new(halt: Halt) -> Self {
        let stopping = Arc::<AtomicBool>::default();
        let tasks = Tasks {
            set: JoinSet::new(),
            stopping: stopping.clone(),
            #[cfg(test)]
            by_name: Default::default(),
        };
        Self { overseer: Overseer { halt, stopping }, tasks: Arc::new(Mutex::new(tasks)) }
    }

    fn lock(&self) -> MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Spawns what runs for as long as the node.
    pub(crate) fn spawn(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.spawn_watched(name, task, false);
    }

    /// Spawns what may come to an end, but not by a panic.
    pub(crate) fn spawn_finite(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.spawn_watched(name, task, true);
    }

    fn spawn_watched(
        &self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
        may_end: bool,
    ) {
        // Made here, as a task may be ended before it runs for the first time.
        let mut absence = Absence { name, overseer: self.overseer.clone(), excused: false };
        let mut tasks = self.lock();
        // Those that may end would otherwise be kept for as long as the node.
        while tasks.set.try_join_next().is_some() {}
        let handle = tasks.set.spawn(async move {
            match AssertUnwindSafe(task).catch_unwind().await {
                Ok(()) => absence.ended(may_end),
                Err(panic) => absence.panicked(panic_message(&*panic)),
            }
        });
        #[cfg(test)]
        tasks.by_name.insert(name, handle);
        #[cfg(not(test))]
        drop(handle);
    }

    /// For threads: halts the node when one of them ends that was not told to.
    pub(crate) fn thread_watch(&self) -> ThreadWatch {
        let halt = self.overseer.halt.clone();
        ThreadWatch::new(move |reason| halt.because(reason))
    }

    /// Runs what starts openraft, so that a panic of any task of openraft halts the node.
    pub(crate) async fn supervise_raft<T>(&self, starting: impl Future<Output = T>) -> T {
        HALT_OF_RAFT.scope(self.overseer.halt.clone(), starting).await
    }

    /// What a task halts the node with that has a reason of its own.
    pub(crate) fn halt(&self) -> Halt {
        self.overseer.halt.clone()
    }

    /// From now on tasks may end.
    pub(crate) fn begin_stop(&self) {
        self.overseer.stopping.store(true, Ordering::Release);
    }

    /// Ends all tasks, and waits until they have.
    pub(crate) async fn stop(&self) {
        self.begin_stop();
        let mut tasks = std::mem::take(&mut self.lock().set);
        tasks.shutdown().await;
    }

    /// Names of all tasks that were spawned.
    #[cfg(test)]
    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.lock().by_name.keys().copied().collect()
    }

    /// Ends a task.
    #[cfg(test)]
    pub(crate) fn kill(&self, name: &str) {
        self.lock().by_name[name].abort();
    }
}

/// Goes with a task, however that does.
struct Absence {
    name: &'static str,
    overseer: Overseer,
    excused: bool,
}

impl Absence {
    fn ended(&mut self, may_end: bool) {
        self.excused = may_end;
    }

    fn panicked(&mut self, message: &str) {
        self.excused = true;
        self.overseer.halt.because(&format!("task {} panicked: {message}", self.name));
    }
}

impl Drop for Absence {
    fn drop(&mut self) {
        if !self.excused && !self.overseer.stopping.load(Ordering::Acquire) {
            self.overseer.halt.because(&format!("task {} ended", self.name));
        }
    }
}

type Tokio = openraft::impls::TokioRuntime;

/// Tokio for openraft, with an eye on its tasks.
#[derive(Debug)]
pub(crate) struct SupervisedRuntime(Tokio);

impl AsyncRuntime for SupervisedRuntime {
    type JoinError = <Tokio as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <Tokio as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <Tokio as AsyncRuntime>::Sleep;
    type Instant = <Tokio as AsyncRuntime>::Instant;
    type TimeoutError = <Tokio as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = <Tokio as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = <Tokio as AsyncRuntime>::ThreadLocalRng;
    type Mpsc = <Tokio as AsyncRuntime>::Mpsc;
    type Watch = <Tokio as AsyncRuntime>::Watch;
    type Oneshot = <Tokio as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <Tokio as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        let Ok(halt) = HALT_OF_RAFT.try_with(Halt::clone) else { return Tokio::spawn(future) };
        Tokio::spawn(HALT_OF_RAFT.scope(halt.clone(), async move {
            AssertUnwindSafe(future).catch_unwind().await.unwrap_or_else(|panic| {
                halt.because(&format!("a task of raft panicked: {}", panic_message(&*panic)));
                resume_unwind(panic)
            })
        }))
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        Tokio::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        Tokio::sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(
        duration: Duration,
        future: F,
    ) -> Self::Timeout<R, F> {
        Tokio::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        Tokio::timeout_at(deadline, future)
    }

    fn is_panic(error: &Self::JoinError) -> bool {
        Tokio::is_panic(error)
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        Tokio::thread_rng()
    }

    fn new(threads: usize) -> Self {
        Self(Tokio::new(threads))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    async fn reason(halt: &Halt) -> String {
        tokio::time::timeout(PATIENCE, halt.halted()).await.unwrap()
    }

    #[tokio::test]
    async fn a_task_that_panics_ends_or_is_ended_halts_the_node() {
        let halt = Halt::new();
        let supervisor = Supervisor::new(halt.clone());
        supervisor.spawn("teller", async { panic!("no more {}", "money") });
        assert_eq!(reason(&halt).await, "task teller panicked: no more money");

        let halt = Halt::new();
        let supervisor = Supervisor::new(halt.clone());
        supervisor.spawn("teller", async {});
        assert_eq!(reason(&halt).await, "task teller ended");

        let halt = Halt::new();
        let supervisor = Supervisor::new(halt.clone());
        supervisor.spawn("teller", std::future::pending());
        supervisor.kill("teller");
        assert_eq!(reason(&halt).await, "task teller ended");

        let halt = Halt::new();
        let supervisor = Supervisor::new(halt.clone());
        supervisor.spawn_finite("teller", async { panic!("gone") });
        assert_eq!(reason(&halt).await, "task teller panicked: gone");
    }

    #[tokio::test]
    async fn what_may_end_and_what_is_stopped_halts_nothing() {
        let halt = Halt::new();
        let supervisor = Supervisor::new(halt.clone());
        let (ended, end) = tokio::sync::oneshot::channel();
        supervisor.spawn_finite("errand", async { ended.send(()).unwrap() });
        end.await.unwrap();
        supervisor.spawn("teller", std::future::pending());
        supervisor.stop().await;
        assert_eq!(halt.reason(), None);

        let supervisor = Supervisor::new(halt.clone());
        supervisor.spawn("teller", std::future::pending());
        drop(supervisor);
        assert_eq!(halt.reason(), None);
    }

    #[tokio::test]
    async fn tasks_of_raft_halt_the_node_when_they_panic_however_deep_they_were_spawned() {
        let halt = Halt::new();
        let supervisor = Supervisor::new(halt.clone());
        let starting = async {
            let outer = SupervisedRuntime::spawn(async {
                SupervisedRuntime::spawn(async { panic!("deep") }).await
            });
            outer.await.unwrap()
        };
        let inner: Result<(), _> = supervisor.supervise_raft(starting).await;
        assert!(inner.unwrap_err().is_panic());
        assert_eq!(halt.reason().as_deref(), Some("a task of raft panicked: deep"));
    }
}
