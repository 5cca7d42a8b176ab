//! Checkpoints against a model, with the power cut at every call, and over real sled.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::faulty::{Disk, FaultyStore, Random};
use super::*;

/// What a checkpoint should hold.
#[derive(Debug, Clone, PartialEq, Default)]
struct Model {
    index: u64,
    header: Bytes,
    records: BTreeMap<Bytes, Bytes>,
}

type Change = (Bytes, Option<Bytes>);

/// One thing that is done to the store, with its outcome.
#[derive(Clone)]
enum Step {
    Write(Vec<Change>, Model),
    Replace(Model),
}

impl Step {
    fn outcome(&self) -> &Model {
        match self {
            Self::Write(_, outcome) | Self::Replace(outcome) => outcome,
        }
    }

    fn run(&self, checkpoints: &mut CheckpointStore) -> Result<CheckpointRoot, CheckpointError> {
        let Model { index, header, records } = self.outcome();
        match self {
            Self::Write(changes, _) => checkpoints
                .write(&mut changes.iter().cloned(), *index, header.clone())
                .map(|(root, _)| root),
            Self::Replace(_) => {
                let records = records.iter();
                let mut records = records.map(|(key, value)| Ok((key.clone(), value.clone())));
                checkpoints.replace(&mut records, *index, header.clone())
            }
        }
    }
}

/// Blocks so small that a record spans several and a run has many.
fn small() -> CheckpointOptions {
    CheckpointOptions { block_bytes: 48, ..CheckpointOptions::default() }
}

fn open(store: &Arc<FaultyStore>) -> Result<CheckpointStore, CheckpointError> {
    CheckpointStore::over(store.clone(), small()).map(|(checkpoints, _)| checkpoints)
}

fn loaded(checkpoints: &CheckpointStore) -> Result<Model, CheckpointError> {
    let mut records = BTreeMap::new();
    let mut last: Option<Vec<u8>> = None;
    let root = checkpoints.load(&mut |key, value| {
        assert!(last.as_deref() < Some(key), "the records come in order");
        last = Some(key.to_vec());
        records.insert(Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        Ok(())
    })?;
    let Some(root) = root else { return Ok(Model::default()) };
    assert_eq!(Some(&root), checkpoints.root());
    Ok(Model { index: root.index, header: root.header, records })
}

fn random_value(random: &mut Random, largest: u64) -> Bytes {
    let length = random.below(random.0 % largest + 1);
    let byte = random.next() as u8;
    Bytes::from(vec![byte; length as usize])
}

/// A script of writes and now and then a replacement, over a small space of keys.
fn script(random: &mut Random, steps: usize, keys: u64) -> Vec<Step> {
    let mut model = Model::default();
    let mut script = Vec::new();
    for step in 0..steps {
        model.index += 1 + random.below(100);
        model.header = Bytes::from(format!("header {step}"));
        let key = |random: &mut Random| Bytes::from(format!("key {:03}", random.below(keys)));
        if random.below(8) == 0 {
            model.records.clear();
            for _ in 0..random.below(keys) {
                model.records.insert(key(random), random_value(random, 90));
            }
            script.push(Step::Replace(model.clone()));
            continue;
        }
        let mut changes: Vec<Change> = Vec::new();
        for _ in 0..random.below(keys) {
            let value = (random.below(3) > 0).then(|| random_value(random, 90));
            changes.push((key(random), value));
        }
        for (key, value) in &changes {
            match value {
                Some(value) => model.records.insert(key.clone(), value.clone()),
                None => model.records.remove(key),
            };
        }
        script.push(Step::Write(changes, model.clone()));
    }
    script
}

/// Runs the script from `disk` until it ends or the power is cut; returns what is on disk then,
/// how many steps were acknowledged and how many calls were made.
fn run(script: &[Step], disk: Disk, cut: Option<u64>, random: &mut Random) -> (Disk, usize, u64) {
    let store = Arc::new(FaultyStore::new(disk, cut));
    let mut done = 0;
    if let Ok(mut checkpoints) = open(&store) {
        while let Some(step) = script.get(done) {
            if step.run(&mut checkpoints).is_err() {
                let again = step.run(&mut checkpoints);
                assert!(matches!(again, Err(CheckpointError::Poisoned)), "no second try");
                break;
            }
            done += 1;
        }
    }
    (store.after_power_cut(random), done, store.calls())
}

/// The seed of a test's randomness: given, or fixed, and always printed.
fn seed(default: u64) -> u64 {
    let seed = std::env::var("QUORATE_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or(default);
    println!("replay with QUORATE_TEST_SEED={seed}");
    seed
}

fn power_cut_at_every_call(seed: u64, steps: usize) {
    let mut random = Random(seed);
    let script = script(&mut random, steps, 24);
    let (_, all, calls) = run(&script, Disk::new(), None, &mut random);
    assert_eq!(all, script.len());
    for cut in 1..=calls {
        let context = format!("seed {seed}, cut {cut} of {calls}");
        let (disk, done, _) = run(&script, Disk::new(), Some(cut), &mut random);
        // The restart is cut off as well, at any of its calls, before one succeeds.
        let again = Some(1 + random.below(40));
        let (disk, more, _) = run(&script[done..], disk, again, &mut random);
        let store = Arc::new(FaultyStore::new(disk, None));
        let mut checkpoints = open(&store).expect(&context);
        let found = loaded(&checkpoints).expect(&context);
        let acknowledged = done + more;
        let before = acknowledged.checked_sub(1).map(|step| script[step].outcome().clone());
        let before = before.unwrap_or_default();
        let under_way = script.get(acknowledged).map(Step::outcome);
        let never_older = found == before || Some(&found) == under_way;
        assert!(never_older, "{context}: a mixture, or older than acknowledged: {found:?}");
        // And the node goes on from there.
        for step in &script[acknowledged..] {
            step.run(&mut checkpoints).expect(&context);
        }
        let end = script.last().map(Step::outcome).cloned().unwrap_or_default();
        assert_eq!(loaded(&checkpoints).expect(&context), end, "{context}");
    }
}

#[test]
fn a_power_cut_at_any_call_leaves_a_whole_checkpoint() {
    let seed = seed(1);
    for seed in seed..seed + 6 {
        power_cut_at_every_call(seed, 14);
    }
}

#[test]
#[ignore = "soak: many more scripts of power cuts"]
fn soak_power_cuts() {
    let seed = seed(1000);
    for seed in seed..seed + 200 {
        power_cut_at_every_call(seed, 30);
    }
}

#[test]
fn a_long_life_matches_the_model() {
    let mut random = Random(seed(7));
    let script = script(&mut random, 400, 200);
    let store = Arc::new(FaultyStore::default());
    let mut checkpoints = open(&store).unwrap();
    let (mut runs, mut folded) = (0, 0);
    for (generation, step) in (1..).zip(&script) {
        let root = step.run(&mut checkpoints).unwrap();
        assert_eq!((root.generation, root.index), (generation, step.outcome().index));
        assert_eq!(loaded(&checkpoints).unwrap(), *step.outcome());
        runs = runs.max(checkpoints.runs.len());
        folded += usize::from(checkpoints.runs.len() == 1);
        if random.below(10) == 0 {
            checkpoints = open(&store).unwrap();
        }
    }
    assert!((2..=2 * 8).contains(&runs), "{runs} runs at most");
    assert!(folded > 10, "folded into one {folded} times");
    // Once the last garbage has been removed, the disk holds the root, the note of its
    // generation and what it names, and no more.
    while !checkpoints.garbage.is_empty() {
        let last = script.last().unwrap().outcome();
        checkpoints.write(&mut std::iter::empty(), last.index, last.header.clone()).unwrap();
    }
    let blocks: u32 = checkpoints.runs.iter().map(|run| run.blocks).sum();
    assert_eq!(store.current().len(), blocks as usize + 2);
}

/// Folding goes on over several checkpoints when there is much to fold, also across removals,
/// reopening and replacement.
#[test]
fn folds_that_take_several_checkpoints() {
    let store = Arc::new(FaultyStore::default());
    let options = CheckpointOptions::default();
    let mut checkpoints = CheckpointStore::over(store.clone(), options).unwrap().0;
    let mut random = Random(seed(3));
    let mut model = Model::default();
    let mut under_way = 0;
    for round in 0..40u64 {
        // 12 MB at first, then a tenth of that; folds read some 4 MiB at a time.
        let count = if round == 0 { 12_000 } else { 1_200 };
        let mut changes = Vec::new();
        for _ in 0..count {
            let number = if round == 0 { changes.len() as u64 } else { random.below(12_000) };
            let key = Bytes::from(number.to_be_bytes().to_vec());
            let value = (random.below(4) > 0 || round == 0)
                .then(|| Bytes::from(vec![random.next() as u8; 1000]));
            match &value {
                Some(value) => model.records.insert(key.clone(), value.clone()),
                None => model.records.remove(&key),
            };
            changes.push((key, value));
        }
        model.index = round;
        checkpoints.write(&mut changes.into_iter(), round, Bytes::new()).unwrap();
        under_way += usize::from(checkpoints.fold.is_some());
        if round % 13 == 12 {
            checkpoints =
                CheckpointStore::over(store.clone(), CheckpointOptions::default()).unwrap().0;
        }
        if round % 5 == 0 {
            assert_eq!(loaded(&checkpoints).unwrap(), model, "round {round}");
        }
        assert!(store.disk_bytes() < 60_000_000, "{} bytes", store.disk_bytes());
    }
    assert!(under_way > 1, "{under_way} checkpoints left a fold unfinished");
}

#[test]
fn a_frozen_checkpoint_stays_as_it_was() {
    let mut random = Random(seed(11));
    let script = script(&mut random, 120, 60);
    let store = Arc::new(FaultyStore::default());
    let mut checkpoints = open(&store).unwrap();
    assert!(checkpoints.freeze().is_none(), "nothing to freeze yet");
    let mut frozen: Vec<(FrozenCheckpoint, Model)> = Vec::new();
    for step in &script {
        step.run(&mut checkpoints).unwrap();
        if random.below(4) == 0 {
            frozen.push((checkpoints.freeze().unwrap(), step.outcome().clone()));
        }
        if frozen.len() > 3 {
            frozen.remove(random.below(3) as usize);
        }
        for (frozen, model) in &frozen {
            let mut records = BTreeMap::new();
            frozen
                .records(&mut |key, value| {
                    records.insert(Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
                    Ok(())
                })
                .unwrap();
            assert_eq!((frozen.root().index, &records), (model.index, &model.records));
        }
    }
    frozen.clear();
    let last = script.last().unwrap().outcome();
    while !checkpoints.garbage.is_empty() {
        checkpoints.write(&mut std::iter::empty(), last.index, last.header.clone()).unwrap();
    }
    assert_eq!(loaded(&checkpoints).unwrap(), *last);
}

/// A reader on another thread while checkpoints are written.
#[test]
fn a_frozen_checkpoint_is_read_while_others_are_written() {
    let directory = tempfile::tempdir().unwrap();
    let options = CheckpointOptions::default();
    let (mut checkpoints, _) = CheckpointStore::open(directory.path(), options).unwrap();
    let change = |round: u64, number: u64| {
        (Bytes::from(number.to_be_bytes().to_vec()), Some(Bytes::from(vec![round as u8; 300])))
    };
    let mut changes = (0..5_000).map(|number| change(0, number));
    checkpoints.write(&mut changes, 1, Bytes::new()).unwrap();
    let frozen = checkpoints.freeze().unwrap();
    let reader = std::thread::spawn(move || {
        for _ in 0..5 {
            let mut count = 0;
            frozen
                .records(&mut |_, value| {
                    count += 1;
                    assert_eq!(value, [0; 300]);
                    Ok(())
                })
                .unwrap();
            assert_eq!(count, 5_000);
        }
    });
    for round in 1..12 {
        let mut changes = (0..5_000).map(|number| change(round, number));
        checkpoints.write(&mut changes, 1 + round, Bytes::new()).unwrap();
    }
    reader.join().unwrap();
    let found = loaded(&checkpoints).unwrap();
    assert!(found.records.len() == 5_000 && found.records.values().all(|value| value[0] == 11));
}

#[test]
fn records_of_any_size() {
    let directory = tempfile::tempdir().unwrap();
    let mut model = Model { index: 5, ..Model::default() };
    let sizes = [0, 1, 2, 7_000, 7_159, 7_160, 7_161, 100_000, 1024 * 1024, VALUE_BYTES_MAX];
    for (number, size) in sizes.into_iter().enumerate() {
        let key = Bytes::from(vec![number as u8; 1 + number * number * 50]);
        model.records.insert(key, Bytes::from(vec![number as u8; size]));
    }
    model.records.insert(Bytes::new(), Bytes::from_static(b"of the empty key"));
    let step = |model: &Model| {
        let changes = model.records.iter();
        let changes = changes.map(|(key, value)| (key.clone(), Some(value.clone())));
        Step::Write(changes.collect(), model.clone())
    };
    let options = CheckpointOptions::default;
    let (mut checkpoints, _) = CheckpointStore::open(directory.path(), options()).unwrap();
    step(&model).run(&mut checkpoints).unwrap();
    assert_eq!(loaded(&checkpoints).unwrap(), model);
    drop(checkpoints);
    let (mut checkpoints, root) = CheckpointStore::open(directory.path(), options()).unwrap();
    assert_eq!(root.unwrap().index, 5);
    assert_eq!(loaded(&checkpoints).unwrap(), model);
    let blobs = std::fs::read_dir(directory.path().join("blobs")).unwrap().count();
    assert_eq!(blobs, 0, "no value is large enough for a file of its own");
    let large = Bytes::from(vec![0; VALUE_BYTES_MAX + 1]);
    let mut changes = [(Bytes::from_static(b"k"), Some(large))].into_iter();
    let refused = checkpoints.write(&mut changes, 6, Bytes::new());
    assert!(matches!(refused, Err(CheckpointError::RecordTooLarge { .. })));
}

#[test]
fn what_cannot_be_installed_is_refused() {
    let record = |key: &'static str| Ok((Bytes::from_static(key.as_bytes()), Bytes::new()));
    for keys in [["a", "a"], ["b", "a"]] {
        let store = Arc::new(FaultyStore::default());
        let mut checkpoints = open(&store).unwrap();
        let refused = checkpoints.replace(&mut keys.into_iter().map(record), 1, Bytes::new());
        assert!(matches!(refused, Err(CheckpointError::Unordered)));
        assert_eq!(loaded(&open(&store).unwrap()).unwrap(), Model::default());
    }
    let store = Arc::new(FaultyStore::default());
    let mut checkpoints = open(&store).unwrap();
    let mut broken = [record("a"), Err(SnapshotError::Unordered)].into_iter();
    let refused = checkpoints.replace(&mut broken, 1, Bytes::new());
    assert!(matches!(refused, Err(CheckpointError::Snapshot(_))));
}

/// Any damage to a value, and any value that is missing, is an error and no other state.
#[test]
fn damage_is_noticed() {
    let mut random = Random(seed(21));
    let script = script(&mut random, 12, 40);
    let (disk, ..) = run(&script, Disk::new(), None, &mut random);
    let (mut errors, mut unchanged) = (0, 0);
    let mut check = |disk: Disk, what: &str| {
        let store = Arc::new(FaultyStore::new(disk, None));
        match open(&store).and_then(|checkpoints| loaded(&checkpoints)) {
            Err(CheckpointError::Corrupt { .. }) => errors += 1,
            Err(other) => panic!("{what}: {other}"),
            Ok(found) => {
                assert_eq!(found, *script.last().unwrap().outcome(), "{what}");
                unchanged += 1;
            }
        }
    };
    let keys: Vec<Vec<u8>> = disk.keys().cloned().collect();
    for (position, key) in keys.iter().enumerate() {
        let mut damaged = disk.clone();
        let value = damaged.get_mut(key).unwrap();
        let bit = random.below(value.len() as u64 * 8) as usize;
        value[bit / 8] ^= 1 << (bit % 8);
        check(damaged, "a flipped bit");
        if key[0] == b'b' {
            let mut damaged = disk.clone();
            damaged.remove(key);
            check(damaged, "a missing block");
            let mut damaged = disk.clone();
            let other = keys[(position + 1) % keys.len()].clone();
            damaged.insert(key.clone(), disk[&other].clone());
            check(damaged, "a block in another's place");
        }
    }
    assert!(errors > keys.len(), "{errors} errors");
    println!("{errors} errors, {unchanged} times garbage was hit");
}

/// A block of an attempt that was cut off has a valid checksum; the run's does not match then.
#[test]
fn a_block_of_another_attempt_is_noticed() {
    let attempt = |byte: u8| {
        let store = Arc::new(FaultyStore::default());
        let mut checkpoints = open(&store).unwrap();
        let change = (Bytes::from_static(b"key"), Some(Bytes::from(vec![byte; 200])));
        checkpoints.write(&mut [change].into_iter(), 1, Bytes::new()).unwrap();
        store.current()
    };
    let (mut disk, other) = (attempt(1), attempt(2));
    let key = block_key(0, 2).to_vec();
    assert_ne!(disk[&key], other[&key]);
    disk.insert(key.clone(), other[&key].clone());
    let checkpoints = open(&Arc::new(FaultyStore::new(disk, None))).unwrap();
    assert!(matches!(loaded(&checkpoints), Err(CheckpointError::Corrupt { .. })));
}

fn copy_directory(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_directory(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Copies taken of the files of a running store are what a kill leaves.
#[test]
fn real_sled_survives_a_kill_between_steps() {
    let directory = tempfile::tempdir().unwrap();
    let live = directory.path().join("sled");
    let mut random = Random(seed(31));
    let script = script(&mut random, 40, 60);
    let options = CheckpointOptions::default;
    let (mut checkpoints, root) = CheckpointStore::open(&live, options()).unwrap();
    assert!(root.is_none());
    for (position, step) in script.iter().enumerate() {
        step.run(&mut checkpoints).unwrap();
        if position % 4 != 3 {
            continue;
        }
        let copy = directory.path().join("copy");
        copy_directory(&live, &copy);
        // What a kill during an earlier opening would have left.
        std::fs::write(copy.join("snap.FFFFFFFFFFFFFFFF.generating"), b"half").unwrap();
        let (mut killed, root) = CheckpointStore::open(&copy, options()).unwrap();
        assert_eq!(root.as_ref().map(|root| root.index), Some(step.outcome().index));
        assert_eq!(loaded(&killed).unwrap(), *step.outcome());
        if let Some(next) = script.get(position + 1) {
            next.run(&mut killed).unwrap();
            assert_eq!(loaded(&killed).unwrap(), *next.outcome());
        }
        drop(killed);
        std::fs::remove_dir_all(&copy).unwrap();
    }
}

/// Flips bytes anywhere in sled's files: the state is unchanged, or not to be had.
fn flip_bytes(seed: u64, flips: u64) {
    let directory = tempfile::tempdir().unwrap();
    let live = directory.path().join("sled");
    let mut random = Random(seed);
    let script = script(&mut random, 12, 300);
    let (mut checkpoints, _) = CheckpointStore::open(&live, CheckpointOptions::default()).unwrap();
    for step in &script {
        step.run(&mut checkpoints).unwrap();
    }
    drop(checkpoints);
    let last = script.last().unwrap().outcome();
    let (mut refused, mut unchanged) = (0, 0);
    for flip in 0..flips {
        let copy = directory.path().join(format!("copy-{flip}"));
        copy_directory(&live, &copy);
        let mut data = std::fs::read(copy.join("db")).unwrap();
        // Most of the file is empty space; aim at what is used.
        let used = data.iter().rposition(|byte| *byte != 0).unwrap_or_default() as u64;
        let place = random.below(used + 1) as usize;
        data[place] ^= 1 << random.below(8);
        std::fs::write(copy.join("db"), data).unwrap();
        let context = format!("seed {seed}, flip {flip} at {place}");
        let opened = CheckpointStore::open(&copy, CheckpointOptions::default());
        match opened.map(|(checkpoints, _)| loaded(&checkpoints)) {
            Err(OpenError::Unusable { .. }) => refused += 1,
            Err(other) => panic!("{context}: {other}"),
            Ok(Err(CheckpointError::Corrupt { .. } | CheckpointError::Store(_))) => refused += 1,
            Ok(Err(other)) => panic!("{context}: {other}"),
            Ok(Ok(found)) => {
                assert_eq!(found, *last, "{context}");
                unchanged += 1;
            }
        }
        std::fs::remove_dir_all(&copy).unwrap();
    }
    println!("{refused} refused, {unchanged} unchanged");
    assert!(refused > 0, "no flip had any effect");
}

#[test]
fn flipped_bytes_in_real_sled_never_make_another_state() {
    flip_bytes(seed(41), 40);
}

#[test]
#[ignore = "soak: many flipped bytes"]
fn soak_flipped_bytes() {
    let seed = seed(4100);
    for seed in seed..seed + 20 {
        flip_bytes(seed, 200);
    }
}

#[test]
fn an_unusable_store_is_set_aside() {
    let directory = tempfile::tempdir().unwrap();
    let live = directory.path().join("sled");
    for round in 1..=4 {
        let (mut checkpoints, root) =
            CheckpointStore::open(&live, CheckpointOptions::default()).unwrap();
        assert!(root.is_none(), "a new store");
        checkpoints.write(&mut std::iter::empty(), 1, Bytes::new()).unwrap();
        drop(checkpoints);
        // sled believes a configuration whose checksum is wrong, but not this.
        std::fs::write(live.join("conf"), b"this is not what sled has written").unwrap();
        let opened = CheckpointStore::open(&live, CheckpointOptions::default());
        assert!(matches!(opened, Err(OpenError::Unusable { .. })));
        let place = set_aside(&live).unwrap();
        assert_eq!(place, directory.path().join(format!("sled.broken-{round}")));
    }
    let left = std::fs::read_dir(directory.path()).unwrap().count();
    assert_eq!(left, SET_ASIDE_MAX, "only the newest are kept");
}
