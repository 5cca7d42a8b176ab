//! Power cuts at every step, against a model.
//!
//! A script of random operations is run to its end once, to count what it does to the disk; then
//! again for each of those operations, with the power going at that one. What a new log finds must
//! be the state after some prefix of what was asked for, no shorter than what was acknowledged.

use std::collections::BTreeMap;

use super::super::writer::Writer;
use super::*;

/// One indivisible change, in the order of the queue.
#[derive(Clone, Debug)]
enum Atom {
    Record { index: u64, number: u64, bytes: usize },
    Vote(u64),
    Committed(u64, u64),
    Truncate(u64),
    Purge(u64, u64),
}

/// What a log should hold.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    vote: Option<u64>,
    committed: Option<(u64, u64)>,
    purged: Option<(u64, u64)>,
    records: BTreeMap<u64, (u64, usize)>,
    next: u64,
}

impl Model {
    fn apply(&mut self, atom: &Atom) {
        match *atom {
            Atom::Record { index, number, bytes } => {
                assert_eq!(index, self.next);
                self.records.insert(index, (number, bytes));
                self.next = index + 1;
            }
            Atom::Vote(number) => self.vote = Some(number),
            Atom::Committed(index, number) => self.committed = Some((index, number)),
            Atom::Truncate(from) => {
                self.records.split_off(&from);
                self.next = self.next.min(from);
            }
            Atom::Purge(index, number) => {
                self.records = self.records.split_off(&(index + 1));
                self.purged = Some((index, number));
                self.next = self.next.max(index + 1);
            }
        }
    }

    /// Records from here on may be truncated.
    fn open_end(&self) -> u64 {
        let final_index =
            self.committed.map(|(index, _)| index).max(self.purged.map(|(index, _)| index));
        final_index.map_or(0, |index| index + 1)
    }

    /// True if the log holds exactly this.
    fn is(&self, wal: &Wal, recovered: &Recovered) -> bool {
        let word = |number: u64| Bytes::copy_from_slice(&number.to_le_bytes());
        let words = recovered.vote == self.vote.map(word)
            && recovered.committed == self.committed.map(|(_, number)| word(number))
            && recovered.purged == self.purged.map(|(index, number)| (index, word(number)));
        let last = self.records.last_key_value().map(|(index, _)| *index);
        if !words || recovered.last_index != last {
            return false;
        }
        let records = read_all(wal);
        let expected = self.records.values().map(|(number, bytes)| numbered(*number, *bytes));
        records.len() == self.records.len() && records.into_iter().eq(expected)
    }
}

/// One life of a log: what was asked of it and what it acknowledged.
struct Life {
    wal: Wal,
    writer: Writer,
    /// What the log held when it was opened.
    start: Model,
    /// What it holds at the end of the queue.
    end: Model,
    atoms: Vec<Atom>,
    /// How many of the atoms are acknowledged.
    acknowledged: Arc<AtomicU64>,
    /// Numbers records and words, so that no two are the same.
    next_number: u64,
    random: Random,
}

impl Life {
    fn open(files: &FaultyFiles, start: Model, random: Random) -> Result<Life, WalError> {
        let files = Arc::new(files.clone());
        let (wal, _, writer) = Wal::open_by_hand(files, directory(), small())?;
        Ok(Life {
            wal,
            writer,
            end: start.clone(),
            start,
            atoms: Vec::new(),
            acknowledged: Arc::default(),
            next_number: 1,
            random,
        })
    }

    /// Runs a random script. The script is the same whatever becomes of it.
    fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            match self.random.below(20) {
                0..=7 => self.append(),
                8..=9 => self.vote(),
                10..=11 => self.committed(),
                12..=13 => self.truncate(),
                14 => self.purge(),
                15..=17 => {
                    self.writer.turn();
                }
                _ => {
                    self.writer.idle();
                }
            }
        }
        self.writer.turn();
    }

    fn done(&mut self) -> Completion {
        let position = self.atoms.len() as u64;
        let acknowledged = Arc::clone(&self.acknowledged);
        Box::new(move |outcome| {
            if outcome.is_ok() {
                let before = acknowledged.swap(position, Ordering::SeqCst);
                assert!(before <= position, "completions run in order");
            }
        })
    }

    fn issue(&mut self, atom: Atom) {
        self.end.apply(&atom);
        self.atoms.push(atom);
    }

    fn number(&mut self) -> (u64, Bytes) {
        self.next_number += 1;
        (self.next_number, Bytes::copy_from_slice(&self.next_number.to_le_bytes()))
    }

    fn append(&mut self) {
        let first = self.end.next;
        let mut records = Vec::new();
        for _ in 0..=self.random.below(4) {
            let (number, _) = self.number();
            let bytes = match self.random.below(4) {
                0 => self.random.below(12_000) as usize,
                _ => self.random.below(700) as usize,
            };
            records.push(numbered(number, bytes));
            self.issue(Atom::Record { index: self.end.next, number, bytes });
        }
        let done = self.done();
        self.wal.append(first, records, done);
    }

    fn vote(&mut self) {
        let (number, vote) = self.number();
        self.issue(Atom::Vote(number));
        let done = self.done();
        self.wal.save_vote(vote, done);
    }

    fn committed(&mut self) {
        let (from, next) = (self.end.open_end(), self.end.next);
        if from < next {
            let index = from + self.random.below(next - from);
            let (number, committed) = self.number();
            self.issue(Atom::Committed(index, number));
            self.wal.save_committed(index, committed);
        }
    }

    fn truncate(&mut self) {
        let (from, next) = (self.end.open_end(), self.end.next);
        let from = from + self.random.below(next + 1 - from.min(next));
        if from <= next && from >= self.end.records.keys().next().copied().unwrap_or(next) {
            self.issue(Atom::Truncate(from));
            let done = self.done();
            self.wal.truncate_from(from, done);
        }
    }

    fn purge(&mut self) {
        let from = self.end.purged.map_or(0, |(index, _)| index + 1);
        let ahead = if self.random.one_in(10) { 3 } else { 0 };
        if from < self.end.next + ahead {
            let index = from + self.random.below(self.end.next + ahead - from);
            let (number, marker) = self.number();
            self.issue(Atom::Purge(index, number));
            let done = self.done();
            self.wal.purge_to(index, marker, done);
        }
    }

    /// Opens what is left, checks it, and returns what it holds.
    fn check(&self, files: &FaultyFiles, context: &str) -> Model {
        let mut model = self.start.clone();
        let acknowledged = self.acknowledged.load(Ordering::SeqCst) as usize;
        self.atoms[..acknowledged].iter().for_each(|atom| model.apply(atom));
        let vouched = model.committed.map_or(0, |(index, _)| index);
        let options = WalOptions { must_contain: vouched, ..small() };
        let (wal, recovered, _writer) =
            Wal::open_by_hand(Arc::new(files.clone()), directory(), options)
                .unwrap_or_else(|error| panic!("{context}: {error}"));
        let mut found = model.is(&wal, &recovered).then(|| model.clone());
        for atom in &self.atoms[acknowledged..] {
            model.apply(atom);
            if model.is(&wal, &recovered) {
                found = Some(model.clone());
            }
        }
        found.unwrap_or_else(|| {
            panic!(
                "{context}: {recovered:?} is no prefix of {:#?} from {acknowledged} on",
                self.atoms
            )
        })
    }
}

/// The part of a seed's script that has no faults, to know its length.
fn operations_of(seed: u64, steps: u64) -> u64 {
    let files = FaultyFiles::new();
    let mut life = Life::open(&files, Model::default(), Random(seed)).unwrap();
    life.run(steps);
    assert_eq!(life.acknowledged.load(Ordering::SeqCst), acknowledgeable(&life.atoms));
    files.operations()
}

/// How many atoms have a completion at or behind them; `committed` has none.
fn acknowledgeable(atoms: &[Atom]) -> u64 {
    let last = atoms.iter().rposition(|atom| !matches!(atom, Atom::Committed(..)));
    last.map_or(0, |position| position as u64 + 1)
}

/// One run of one script with the power cut at one operation, and a second life after it.
fn cut_at(seed: u64, steps: u64, operation: u64) {
    let context = format!("seed {seed}, {steps} steps, operation {operation}");
    let mut random = Random(seed ^ operation << 32);
    let files = FaultyFiles::new();
    files.stop_at(operation);
    let mut after = FaultyFiles::new();
    let mut start = Model::default();
    if let Ok(mut life) = Life::open(&files, Model::default(), Random(seed)) {
        life.run(steps);
        assert!(files.stopped(), "{context}: the script is not the same");
        after = if random.one_in(4) { files.process_kill() } else { files.power_cut(&mut random) };
        // The power may go again while the log recovers, and then nothing may be lost either.
        after.stop_at(1 + random.below(12));
        let opened = Wal::open_by_hand(Arc::new(after.clone()), directory(), small());
        if let Err(error) = opened {
            assert!(after.stopped(), "{context}: {error}");
        }
        after = after.power_cut(&mut random);
        start = life.check(&after, &context);
        // What was reported once is on disk, and to open it again changes nothing.
        after = after.power_cut(&mut random);
        let again = Wal::open_by_hand(Arc::new(after.clone()), directory(), small());
        let (wal, recovered, _writer) = again.unwrap();
        assert_eq!(recovered.repaired_tail, None, "{context}");
        assert!(start.is(&wal, &recovered), "{context}: {recovered:?} is not {start:?}");
    }
    let mut life = Life::open(&after, start, Random(!seed)).unwrap();
    life.next_number = 1_000_000;
    life.run(10);
    assert_eq!(life.acknowledged.load(Ordering::SeqCst), acknowledgeable(&life.atoms));
    life.wal.close();
    life.writer.turn();
    let end = life.check(&after.power_cut(&mut random), &context);
    assert_eq!(end, life.end, "{context}: a closed log has everything");
}

fn cut_everywhere(seed: u64, steps: u64) -> u64 {
    let operations = operations_of(seed, steps);
    for operation in 1..=operations {
        cut_at(seed, steps, operation);
    }
    operations
}

#[test]
fn nothing_acknowledged_is_lost_wherever_the_power_goes() {
    let cuts: u64 = (0..20).map(|seed| cut_everywhere(seed, 60)).sum();
    assert!(cuts > 1000, "{cuts}");
}

#[test]
#[ignore = "soak: takes a minute or more; QUORATE_SEED chooses where to begin"]
fn nothing_acknowledged_is_lost_with_many_seeds() {
    let seed = std::env::var("QUORATE_SEED").ok().and_then(|seed| seed.parse().ok());
    let begin: u64 = seed.unwrap_or(1000);
    for seed in begin..begin + 300 {
        cut_everywhere(seed, 40 + seed % 160);
    }
}

/// A start must not touch what is on disk: the batch that was acknowledged last is the only copy.
#[test]
fn a_start_that_is_cut_off_spoils_nothing() {
    for seed in 0..40 {
        let files = FaultyFiles::new();
        let (wal, _, mut writer) =
            Wal::open_by_hand(Arc::new(files.clone()), directory(), small()).unwrap();
        wal.append(1, vec![numbered(1, 5000)], promise().0);
        assert!(writer.turn());
        if seed % 2 == 0 {
            assert!(writer.idle());
        }
        let mut random = Random(seed);
        let mut files = files.power_cut(&mut random);
        for operation in 1..=8 {
            files.stop_at(operation);
            let _ = Wal::open_by_hand(Arc::new(files.clone()), directory(), small());
            files = files.power_cut(&mut random);
            let (wal, _) = open(&files).unwrap();
            let found = wal.read(1..2, 0).unwrap();
            assert_eq!(found, [numbered(1, 5000)], "seed {seed}, operation {operation}");
        }
    }
}

/// A process that dies between making a directory and syncing its name leaves one that the next
/// finds and uses, and a power cut must not take it away then.
#[test]
fn directories_are_durable_however_often_their_creation_was_cut_off() {
    let deep = Path::new("a/b/c/d");
    for operation in 1..=8 {
        for seed in 0..8 {
            let files = FaultyFiles::new();
            files.stop_at(operation);
            let created = create_dir_durably(&files, deep);
            assert_eq!(created.is_err(), files.stopped(), "operation {operation}");
            let files = files.process_kill();
            create_dir_durably(&files, deep).unwrap();
            let after = files.power_cut(&mut Random(seed));
            assert!(after.exists(deep).unwrap(), "operation {operation}, seed {seed}");
        }
    }
}

/// Every sync of a script fails in its turn. If it was a batch's, nothing is acknowledged from
/// then on, and what a restart reports is on disk although the kernel forgot to write it.
#[test]
fn a_failed_sync_stops_the_log_for_good() {
    let (mut stopped, mut survived) = (0, 0);
    for seed in 100..110 {
        let files = FaultyFiles::new();
        let mut life = Life::open(&files, Model::default(), Random(seed)).unwrap();
        let first = files.syncs();
        life.run(60);
        for sync in first + 1..=files.syncs() {
            let context = format!("seed {seed}, sync {sync}");
            let files = FaultyFiles::new();
            files.fail_sync_at(sync);
            let mut life = Life::open(&files, Model::default(), Random(seed)).unwrap();
            life.run(60);
            let acknowledged = life.acknowledged.load(Ordering::SeqCst);
            life.vote();
            life.writer.turn();
            let failed = files.failed_sync();
            let of_a_batch = failed
                .is_some_and(|path| path.extension().is_some_and(|kind| kind == "wal"))
                && life.wal.read(0..1, 1).is_err();
            if of_a_batch {
                stopped += 1;
                assert_eq!(life.acknowledged.load(Ordering::SeqCst), acknowledged, "{context}");
            } else {
                // A segment that could not be prepared ahead of time was prepared again, or a floor
                // was not noted.
                survived += 1;
                let all = life.atoms.len() as u64;
                assert_eq!(life.acknowledged.load(Ordering::SeqCst), all, "{context}");
            }
            let restarted = files.process_kill();
            let found = life.check(&restarted, &context);
            let after = restarted.power_cut(&mut Random(seed));
            let again = Wal::open_by_hand(Arc::new(after), directory(), small());
            let (wal, recovered, _writer) = again.unwrap();
            assert!(found.is(&wal, &recovered), "{context}");
        }
    }
    assert!(stopped > 100 && survived > 10, "{stopped} {survived}");
}

/// A process that dies between naming a segment and syncing the name leaves a segment that the
/// next one finds and uses, and a power cut must not take it away then.
#[test]
fn a_segment_whose_name_was_never_synced_is_made_durable() {
    for operation in 1..=12 {
        for seed in 0..8 {
            let files = FaultyFiles::new();
            files.stop_at(operation);
            let opened = Wal::open_by_hand(Arc::new(files.clone()), directory(), small());
            assert_eq!(opened.is_err(), files.stopped());
            drop(opened);
            let files = files.process_kill();
            let (wal, ..) = open(&files).unwrap();
            append(&wal, 1, vec![numbered(1, 10)]).unwrap();
            let (_, recovered) = open(&files.power_cut(&mut Random(seed))).unwrap();
            let context = format!("operation {operation}, seed {seed}");
            assert_eq!(recovered.last_index, Some(1), "{context}");
        }
    }
}
