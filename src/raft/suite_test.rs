//! openraft's own suite for log stores and state machines, run on ours.

use std::sync::Arc;

use openraft::testing::log::{StoreBuilder, Suite};

use super::checkpointer::{CheckpointPolicy, Checkpointer, CheckpointerParts};
use super::clock::{ClusterClock, Found};
use super::log::{Durable, LogStore};
use super::machine::{Core, StateMachine};
use super::recovery::{Recovery, StoragePaths, recover};
use super::types::TypeConfig;
use crate::clock::SystemClock;
use crate::storage::thread::ThreadWatch;

struct Stores;

/// Ends the threads before the directory goes.
struct Guard {
    checkpointer: Checkpointer,
    _directory: tempfile::TempDir,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.checkpointer.stop();
    }
}

impl StoreBuilder<TypeConfig, LogStore, StateMachine, Guard> for Stores {
    async fn build(
        &self,
    ) -> Result<(Guard, LogStore, StateMachine), openraft::StorageError<TypeConfig>> {
        let directory = tempfile::tempdir().unwrap();
        let paths = StoragePaths {
            wal: directory.path().join("wal"),
            checkpoint: directory.path().join("sled"),
            snapshots: directory.path().join("snapshots"),
            time: directory.path().join("time"),
        };
        let Recovery { store, wal, recovered, .. } =
            recover(&paths, false, ThreadWatch::default()).unwrap();
        let log = LogStore::new(wal.clone(), &recovered).unwrap();
        let core = Core::new(None, None);
        let checkpointer = Checkpointer::start(CheckpointerParts {
            store,
            core: core.clone(),
            // The suite applies entries that were never appended.
            durable: Durable::of_everything(),
            wal,
            snapshots: paths.snapshots,
            snapshot: None,
            index: None,
            policy: CheckpointPolicy::default(),
            clock: Arc::new(SystemClock),
            threads: ThreadWatch::default(),
            snapshot_due: Box::new(|| {}),
        })
        .unwrap();
        let clock = Arc::new(ClusterClock::new(1, Arc::new(SystemClock), Found::default(), None));
        let machine = StateMachine::new(core, clock, checkpointer.clone());
        let guard = Guard { checkpointer, _directory: directory };
        Ok((guard, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openraft_suite() {
    Suite::<TypeConfig, LogStore, StateMachine, Stores, Guard>::test_all(Stores).await.unwrap();
}
