//! What checkpoints cost: CPU a change, wall time, memory and disk over a life of one store.
//!
//! `cargo bench --bench checkpoint -- [records] [changes a checkpoint]`; a million records of 330
//! bytes and 200,000 changes unless said. Needs some 4 GB in the temporary directory.
#![allow(clippy::disallowed_methods, clippy::print_stdout, clippy::unwrap_used)]

use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use quorate::storage::checkpoint::{CheckpointOptions, CheckpointStore};
use quorate::storage::snapshot::{SnapshotReader, SnapshotWriter};

const KEY_BYTES: usize = 24;
const VALUE_BYTES: usize = 306;

/// Seconds of CPU that the process has used.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4 / 1024
}

/// Runs `work` and prints what it took.
fn measured<T>(name: &str, changes: u64, path: &Path, work: impl FnOnce() -> T) -> T {
    let (wall, before) = (Instant::now(), cpu());
    let result = work();
    let (wall, used) = (wall.elapsed(), cpu() - before);
    let (disk, rss) = (disk_mib(path), resident_mib());
    let each = used * 1e6 / changes as f64;
    println!(
        "{name:<28} {wall:>9.2?}  cpu {used:>5.2} s ({each:>6.2} us each)  rss {rss:>4} MiB  \
         disk {disk:>5} MiB"
    );
    result
}

fn disk_mib(path: &Path) -> u64 {
    let mut bytes = 0;
    for entry in std::fs::read_dir(path).unwrap().flatten() {
        if let Ok(metadata) = entry.metadata() {
            bytes += if metadata.is_dir() { disk_mib(&entry.path()) << 20 } else { metadata.len() };
        }
    }
    bytes >> 20
}

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let mixed = (*seed ^ (*seed >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

fn change(number: u64, seed: &mut u64) -> (Bytes, Option<Bytes>) {
    let mut key = vec![b's'; KEY_BYTES];
    let mut digest = number.wrapping_add(99);
    key[8..16].copy_from_slice(&random(&mut digest).to_be_bytes());
    key[16..].copy_from_slice(&number.to_be_bytes());
    let mut value = vec![0; VALUE_BYTES];
    for chunk in value.chunks_mut(8) {
        chunk.copy_from_slice(&random(seed).to_be_bytes()[..chunk.len()]);
    }
    (key.into(), Some(value.into()))
}

fn main() {
    // Cargo passes flags such as --bench.
    let numbers: Vec<u64> = std::env::args().filter_map(|text| text.parse().ok()).collect();
    let records = numbers.first().copied().unwrap_or(1_000_000);
    let changes = numbers.get(1).copied().unwrap_or(200_000);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sled");
    let seed = &mut 1;
    let options = CheckpointOptions::default;
    let (mut checkpoints, _) = CheckpointStore::open(&path, options()).unwrap();
    let mut index = 0;
    let mut write = |checkpoints: &mut CheckpointStore, name: &str, batch: Vec<_>| {
        index += 1;
        let count = batch.len() as u64;
        let statistics = measured(name, count, &path, || {
            checkpoints.write(&mut batch.into_iter(), index, Bytes::new()).unwrap().1
        });
        println!(
            "{:<28} {} runs of {} MiB, folded {} MiB",
            "",
            statistics.runs,
            statistics.run_bytes >> 20,
            statistics.folded_bytes >> 20
        );
    };
    let numbers: Vec<u64> = (0..records).collect();
    for part in numbers.chunks(100_000) {
        let batch = part.iter().map(|number| change(*number, seed)).collect();
        write(&mut checkpoints, "load", batch);
    }
    for (name, rounds, count) in [("random updates", 20, changes), ("few updates", 10, 1_000)] {
        let total = (cpu(), Instant::now());
        for _ in 0..rounds {
            let batch = (0..count).map(|_| change(random(seed) % records, seed)).collect();
            write(&mut checkpoints, name, batch);
        }
        let each = (cpu() - total.0) * 1e6 / (rounds * count) as f64;
        println!(
            "{name}: {each:.2} us of CPU each, making them included; {:.2?}",
            total.1.elapsed()
        );
    }
    let frozen = checkpoints.freeze().unwrap();
    let mut writer = SnapshotWriter::create(directory.path(), 1, b"").unwrap();
    let file = measured("snapshot", records, directory.path(), || {
        frozen
            .records(&mut |key, value| writer.write(key, value).map_err(|error| error.into()))
            .unwrap();
        writer.finish().unwrap()
    });
    drop(frozen);
    drop(checkpoints);
    let opened = measured("open", 1, &path, || CheckpointStore::open(&path, options()).unwrap());
    let mut checkpoints = opened.0;
    measured("load all records", records, &path, || {
        let (mut count, mut bytes) = (0u64, 0);
        checkpoints
            .load(&mut |key, value| {
                count += 1;
                bytes += key.len() + value.len();
                Ok(())
            })
            .unwrap();
        assert_eq!((count, bytes), (records, records as usize * (KEY_BYTES + VALUE_BYTES)));
    });
    measured("install the snapshot", records, &path, || {
        let mut all = SnapshotReader::open(&file.path).unwrap().records();
        checkpoints.replace(&mut all, 1, Bytes::new()).unwrap();
    });
}
