//! Damaged files: a node either says what is wrong with which file, or comes back as it was.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use quorate::client::{NewSession, Update};

use crate::cluster::{Cluster, eventually};
use crate::random::{Random, size};

/// Updates before the damage, each with a value of this many bytes.
const UPDATES: u64 = 200;
const VALUE_BYTES: usize = 2_000;
/// The log writes in blocks of this many bytes.
const BLOCK_BYTES: u64 = 4_096;

/// A cluster with some history, and the digest of its state.
async fn with_history(name: &'static str) -> (Cluster, (u64, String)) {
    let mut cluster = Cluster::start(name).await;
    let sessions = cluster.client().sessions();
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(sessions.create(NewSession::new()).await.unwrap().id);
    }
    for number in 0..UPDATES {
        let id = cluster.random.choose(&ids).clone();
        let value = vec![b'a' + u8::try_from(number % 26).unwrap(); VALUE_BYTES];
        sessions.update(&id, Update::new().set("v", value)).await.unwrap();
    }
    let digest = cluster.agree().await;
    (cluster, digest)
}

fn files_in(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_in(&path));
        } else if fs::metadata(&path).unwrap().len() > 0 {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Segments of the log that hold more than their header, and where their last byte is.
fn segments(data: &Path) -> Vec<(PathBuf, u64)> {
    let segments = segment_files(data).into_iter().map(|path| {
        let bytes = fs::read(&path).unwrap();
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0) as u64;
        (path, end)
    });
    let used: Vec<_> = segments.filter(|(_, end)| *end >= BLOCK_BYTES).collect();
    assert!(!used.is_empty(), "there is no log in {}", data.display());
    used
}

fn segment_files(data: &Path) -> Vec<PathBuf> {
    let mut files = files_in(&data.join("wal"));
    files.retain(|path| path.extension().is_some_and(|extension| extension == "wal"));
    files
}

/// Where the next batch goes.
fn end_of_log(data: &Path) -> (PathBuf, u64) {
    let (path, last) = segments(data).pop().unwrap();
    let offset = (last / BLOCK_BYTES + 1) * BLOCK_BYTES;
    if offset < fs::metadata(&path).unwrap().len() {
        return (path, offset);
    }
    let next = segment_files(data).into_iter().find(|other| *other > path);
    (next.expect("a segment is ready"), BLOCK_BYTES)
}

/// One byte of a file, changed until it is mended.
#[derive(Debug)]
struct Flip {
    path: PathBuf,
    offset: u64,
    mask: u8,
}

impl Flip {
    fn apply(&self) {
        let file = OpenOptions::new().read(true).write(true).open(&self.path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, self.offset).unwrap();
        file.write_all_at(&[byte[0] ^ self.mask], self.offset).unwrap();
    }

    /// A random bit of the file's first `length` bytes.
    fn random(random: &mut Random, path: &Path, length: u64) -> Self {
        let mask = 1 << random.within(0..8);
        Self { path: path.to_owned(), offset: random.within(0..length), mask }
    }
}

/// Starts a node and waits for what it makes of its files. `None` if it serves.
async fn refusal(cluster: &mut Cluster, id: u64) -> Option<String> {
    cluster.spawn(id);
    let status = cluster.serving_or_ended(id).await?;
    let trace = cluster.trace(id);
    let message = trace.lines().last().unwrap_or_default().to_owned();
    assert_eq!(status.code(), Some(1), "{message}");
    assert!(message.starts_with("quorate: "), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    Some(message)
}

async fn end(cluster: &mut Cluster, id: u64, gently: bool) {
    if gently {
        assert_eq!(cluster.stop(id).await.code(), Some(0));
    } else {
        cluster.kill(id);
    }
}

#[tokio::test]
async fn damage_in_the_middle_of_the_log_is_refused_by_file_and_offset() {
    let (mut cluster, digest) = with_history("log damaged").await;
    for gently in [true, false] {
        let id = cluster.random.within(1..4);
        end(&mut cluster, id, gently).await;
        let (path, last) = segments(cluster.data(id)).remove(0);
        let bytes = fs::read(&path).unwrap();
        // Well before the last batch, whatever its size, and behind the segment's header. What is
        // zero may be between two batches, where damage does no harm.
        let mut offset = cluster.random.within(BLOCK_BYTES..last / 2);
        offset += bytes[usize::try_from(offset).unwrap()..].iter().take_while(|b| **b == 0).count()
            as u64;
        let flip = Flip { path, offset, mask: 0x40 };
        flip.apply();
        let refusal = refusal(&mut cluster, id).await;
        let message = refusal.unwrap_or_else(|| panic!("{flip:?} went unnoticed"));
        let name = flip.path.file_name().unwrap().to_str().unwrap();
        assert!(message.contains(name) && message.contains("offset"), "{message}");
        flip.apply();
        cluster.spawn(id);
        cluster.serving(id).await;
        assert_eq!(cluster.agree().await, digest);
    }
}

#[tokio::test]
async fn a_torn_tail_is_cut_off() {
    let (mut cluster, digest) = with_history("torn tail").await;
    for gently in [true, false] {
        let id = cluster.random.within(1..4);
        end(&mut cluster, id, gently).await;
        let (path, offset) = end_of_log(cluster.data(id));
        // What a power cut leaves of a batch that was being written.
        let torn: Vec<u8> = (0..700).map(|_| cluster.random.within(1..256) as u8).collect();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&torn, offset).unwrap();
        assert_eq!(refusal(&mut cluster, id).await, None);
        assert!(cluster.trace(id).contains("cut off"));
        assert_eq!(cluster.agree().await, digest);
    }
}

/// Sequence of the last batch in the log, and of the last one that was noted beside it.
fn sequences(data: &Path) -> (u64, u64) {
    let number =
        |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let (path, _) = segments(data).pop().unwrap();
    let bytes = fs::read(path).unwrap();
    let blocks = bytes.chunks_exact(BLOCK_BYTES as usize);
    let mut batches = blocks.filter(|block| block.starts_with(b"qrwb"));
    let last = batches.next_back().map_or(0, |header| number(header, 8));
    let notes = fs::read(data.join("wal/floor")).unwrap_or_default();
    let noted = notes.chunks_exact(BLOCK_BYTES as usize).map(|note| number(note, 16)).max();
    (last, noted.unwrap_or(0))
}

#[tokio::test]
async fn a_log_whose_newest_half_reads_as_zeros_is_refused() {
    let (mut cluster, digest) = with_history("newest half").await;
    let id = cluster.random.within(1..4);
    // Nothing comes any more, so the log is sealed, and all before the seal is noted.
    eventually("the end of the log is noted", async || match sequences(cluster.data(id)) {
        (last, noted) if last > 0 && noted + 1 >= last => Ok(()),
        found => Err(format!("{found:?}")),
    })
    .await;
    end(&mut cluster, id, false).await;
    let (path, last) = segments(cluster.data(id)).pop().unwrap();
    let whole = fs::read(&path).unwrap();
    let mut half = whole.clone();
    half[(last / 2 / BLOCK_BYTES * BLOCK_BYTES) as usize..].fill(0);
    fs::write(&path, &half).unwrap();
    let message = refusal(&mut cluster, id).await.expect("the loss goes unnoticed");
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(message.contains("was once on disk") && message.contains(name), "{message}");
    fs::write(&path, &whole).unwrap();
    cluster.spawn(id);
    cluster.serving(id).await;
    assert_eq!(cluster.agree().await, digest);
}

/// Whatever a node is short of files for: it is no reason to distrust what is stored.
#[tokio::test]
async fn a_start_that_is_short_of_files_moves_nothing_aside() {
    let (mut cluster, digest) = with_history("short of files").await;
    let id = cluster.random.within(1..4);
    end(&mut cluster, id, true).await;
    let mut refused = 0;
    for files in 10..200 {
        cluster.spawn_with_files(id, files);
        let Some(status) = cluster.answering_or_ended(id).await else {
            end(&mut cluster, id, false).await;
            break;
        };
        assert_ne!(status.code(), Some(0), "with {files} files");
        let trace = cluster.trace(id);
        let last = trace.lines().last().unwrap_or_default();
        refused += u32::from(last.contains("allow this process more open files"));
    }
    assert!(refused > 3, "only {refused} starts were refused for want of files");
    let data = cluster.data(id);
    let aside = fs::read_dir(data).unwrap().map(|entry| entry.unwrap().file_name());
    let aside: Vec<_> = aside.filter(|name| name.to_string_lossy().contains("broken")).collect();
    assert!(aside.is_empty(), "{aside:?}");
    cluster.spawn(id);
    cluster.serving(id).await;
    assert_eq!(cluster.agree().await, digest);
}

#[tokio::test]
async fn a_checkpoint_store_that_is_damaged_is_moved_aside_and_rebuilt() {
    let (mut cluster, digest) = with_history("sled damaged").await;
    let id = cluster.random.within(1..4);
    end(&mut cluster, id, true).await;
    let sled = cluster.data(id).join("sled");
    assert!(!files_in(&sled).is_empty(), "a node that was stopped has left no checkpoint");
    for path in files_in(&sled) {
        let length = fs::metadata(&path).unwrap().len();
        let garbage: Vec<u8> = (0..length).map(|_| cluster.random.next() as u8).collect();
        fs::write(&path, garbage).unwrap();
    }
    assert_eq!(refusal(&mut cluster, id).await, None);
    assert!(cluster.trace(id).contains("moved aside"), "the damage went unnoticed");
    assert_eq!(cluster.agree().await, digest);
    // The rebuilt one carries the node through the next start.
    end(&mut cluster, id, true).await;
    assert_eq!(refusal(&mut cluster, id).await, None);
    assert_eq!(cluster.agree().await, digest);
    // And so does none.
    end(&mut cluster, id, false).await;
    fs::remove_dir_all(&sled).unwrap();
    assert_eq!(refusal(&mut cluster, id).await, None);
    assert_eq!(cluster.agree().await, digest);
}

#[tokio::test]
async fn a_bit_that_flipped_anywhere_is_found_or_does_no_harm() {
    flips(size("QUORATE_TEST_FLIPS", 6)).await;
}

#[tokio::test]
#[ignore = "soak: a hundred damaged starts take minutes"]
async fn many_bits_that_flipped_anywhere_are_found_or_do_no_harm() {
    flips(size("QUORATE_TEST_FLIPS", 100)).await;
}

async fn flips(count: u64) {
    let (mut cluster, digest) = with_history("flips").await;
    let mut refused = 0;
    for round in 0..count {
        let id = cluster.random.within(1..4);
        let gently = cluster.random.within(0..2) == 0;
        end(&mut cluster, id, gently).await;
        let flip = choose_flip(&mut cluster, id, round);
        flip.apply();
        println!("node {id}, stopped gently: {gently}, {flip:?}");
        if let Some(message) = refusal(&mut cluster, id).await {
            println!("{message}");
            let name = flip.path.file_name().unwrap().to_str().unwrap();
            assert!(message.contains(name), "the damaged file {name} is not named: {message}");
            refused += 1;
            flip.apply();
            cluster.spawn(id);
            cluster.serving(id).await;
        }
        assert_eq!(cluster.agree().await, digest, "{flip:?} did harm");
    }
    println!("{refused} of {count} were refused");
}

/// By turns: the newest record, anywhere in the log, the checkpoint store, the identity.
fn choose_flip(cluster: &mut Cluster, id: u64, round: u64) -> Flip {
    let data = cluster.data(id).to_owned();
    let random = &mut cluster.random;
    match round % 4 {
        0 => {
            let (path, last) = segments(&data).pop().unwrap();
            let back = random.within(0..VALUE_BYTES as u64);
            Flip { path, offset: last.saturating_sub(back).max(BLOCK_BYTES), mask: 1 }
        }
        1 => {
            let segments = segments(&data);
            let (path, last) = random.choose(&segments).clone();
            Flip::random(random, &path, last + 1)
        }
        2 => {
            let files = files_in(&data.join("sled"));
            let path = random.choose(&files).clone();
            let length = fs::metadata(&path).unwrap().len();
            Flip::random(random, &path, length)
        }
        _ => {
            let path = data.join("identity");
            let length = fs::metadata(&path).unwrap().len();
            Flip::random(random, &path, length)
        }
    }
}
