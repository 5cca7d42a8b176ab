//! A disk in memory that can lose power, lie about a sync, and rot.
//!
//! It keeps for each file what a reader sees (the page cache) and what is on the platter, and
//! counts every operation that changes something. A test lets it stop at the n-th of them, takes
//! the disk that a power cut would have left, and opens that:
//!
//! - Of what was not synced, each 512-byte sector is there or not: none, all, a random subset, or
//!   those below a random offset. And one block of 4 KiB, the one that was under the head, may
//!   hold neither the old nor the new, be it that both were the same.
//! - Of the creations, renames and removals since the last sync of a directory, a random prefix
//!   happened, as on a file system with a journal, or even a random subset, as POSIX allows.
//!   Syncing a file does not make its name durable, which is harsher than ext4 too. What lies in a
//!   directory whose name is lost is lost as well.
//! - A sync that is told to fail leaves the data visible and forgets that they were not written:
//!   from then on only writing them again can save them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{BLOCK_BYTES, BlockBuffer, File, Files, parent};

/// What a disk writes whole or not at all, in bytes.
const SECTOR_BYTES: usize = 512;

/// A small seeded generator (splitmix64), so that every failure can be replayed.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `bound - 1`; `bound` is at least 1.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0);
        self.next() % bound
    }

    pub(crate) fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    fn choose(&mut self, from: &BTreeSet<usize>) -> Option<usize> {
        let position = self.below(from.len().max(1) as u64) as usize;
        from.iter().nth(position).copied()
    }
}

/// A cheap handle; clones share one disk.
#[derive(Clone)]
pub(crate) struct FaultyFiles {
    disk: Arc<Mutex<Disk>>,
}

#[derive(Clone, Default)]
struct Disk {
    inodes: Vec<Inode>,
    names: Names,
    names_durable: Names,
    /// Changes of names that no directory sync has covered, oldest first.
    names_pending: Vec<NameChange>,
    /// Operations since this disk was made.
    operations: u64,
    syncs: u64,
    /// The operation at which the power goes, counted from 1.
    stop_at: Option<u64>,
    /// The sync that fails, counted from 1.
    fail_sync_at: Option<u64>,
    failed_sync: Option<usize>,
    stopped: bool,
}

/// What is where. The current directory is always there.
#[derive(Clone, Default)]
struct Names {
    files: BTreeMap<PathBuf, usize>,
    directories: BTreeSet<PathBuf>,
}

#[derive(Clone, Default)]
struct Inode {
    visible: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors that differ, or may, and that the kernel still means to write.
    dirty: BTreeSet<usize>,
}

#[derive(Clone)]
enum NameChange {
    Create(PathBuf, usize),
    CreateDirectory(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

struct FaultyFile {
    disk: Arc<Mutex<Disk>>,
    inode: usize,
}

impl FaultyFiles {
    /// An empty disk that works until it is told otherwise.
    pub(crate) fn new() -> FaultyFiles {
        FaultyFiles { disk: Arc::default() }
    }

    /// The power goes at the n-th operation from now (1 is the next): it happens in part or not
    /// at all, returns an error, and so does everything after it.
    pub(crate) fn stop_at(&self, operation: u64) {
        let mut disk = self.lock();
        disk.stop_at = Some(disk.operations + operation);
    }

    /// The n-th sync of a file from now fails, and what it covered is quietly never written.
    pub(crate) fn fail_sync_at(&self, sync: u64) {
        let mut disk = self.lock();
        disk.fail_sync_at = Some(disk.syncs + sync);
    }

    /// Changing operations so far.
    pub(crate) fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Syncs of files so far.
    pub(crate) fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// The file of which a sync failed, by the name that it has now.
    pub(crate) fn failed_sync(&self) -> Option<PathBuf> {
        let disk = self.lock();
        let failed = disk.failed_sync?;
        disk.names.files.iter().find(|(_, inode)| **inode == failed).map(|(path, _)| path.clone())
    }

    /// True once the power has gone.
    pub(crate) fn stopped(&self) -> bool {
        self.lock().stopped
    }

    /// The disk as it may be found after the power was cut now.
    pub(crate) fn power_cut(&self, random: &mut Random) -> FaultyFiles {
        let disk = self.lock();
        let mut names = disk.names_durable.clone();
        let in_order = random.one_in(2);
        let kept = random.below(disk.names_pending.len() as u64 + 1) as usize;
        for (position, change) in disk.names_pending.iter().enumerate() {
            if if in_order { position < kept } else { random.one_in(2) } {
                change.apply(&mut names);
            }
        }
        names.drop_unreachable();
        let inodes = disk.inodes.iter().map(|inode| inode.power_cut(random)).collect();
        let names_durable = names.clone();
        FaultyFiles::from(Disk { inodes, names, names_durable, ..Disk::default() })
    }

    /// The disk as a new process finds it after `kill -9`: all that was written is visible, and
    /// what was not synced still is not.
    pub(crate) fn process_kill(&self) -> FaultyFiles {
        let mut disk = self.lock().clone();
        (disk.stop_at, disk.fail_sync_at, disk.stopped) = (None, None, false);
        FaultyFiles::from(disk)
    }

    /// Bytes of a file as a reader sees them.
    pub(crate) fn content(&self, path: &Path) -> Vec<u8> {
        let disk = self.lock();
        disk.inodes[disk.names.files[path]].visible.clone()
    }

    /// Inverts the bits of `mask` in one byte, on the platter too.
    pub(crate) fn flip(&self, path: &Path, offset: u64, mask: u8) {
        self.damage(path, |content| content[offset as usize] ^= mask);
    }

    /// Cuts a file to `length` bytes, on the platter too.
    pub(crate) fn cut(&self, path: &Path, length: u64) {
        self.damage(path, |content| content.truncate(length as usize));
    }

    /// Overwrites bytes, on the platter too.
    pub(crate) fn overwrite(&self, path: &Path, offset: u64, bytes: &[u8]) {
        self.damage(path, |content| {
            content[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        });
    }

    fn damage(&self, path: &Path, mut change: impl FnMut(&mut Vec<u8>)) {
        let mut disk = self.lock();
        let inode = disk.names.files[path];
        change(&mut disk.inodes[inode].visible);
        change(&mut disk.inodes[inode].durable);
    }

    fn from(disk: Disk) -> FaultyFiles {
        FaultyFiles { disk: Arc::new(Mutex::new(disk)) }
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&self, inode: usize) -> Arc<dyn File> {
        Arc::new(FaultyFile { disk: Arc::clone(&self.disk), inode })
    }

    fn change_names(&self, change: NameChange) -> io::Result<()> {
        let mut disk = self.lock();
        let stopping = disk.count()?;
        change.apply(&mut disk.names);
        disk.names_pending.push(change);
        power(stopping)
    }
}

/// Whether the operation under way is the one at which the power goes.
#[derive(Clone, Copy)]
struct Stopping(bool);

/// The error at the end of the operation at which the power goes.
fn power(stopping: Stopping) -> io::Result<()> {
    if stopping.0 { Err(io::Error::other("the power was cut")) } else { Ok(()) }
}

impl Disk {
    fn count(&mut self) -> io::Result<Stopping> {
        power(Stopping(self.stopped))?;
        self.operations += 1;
        self.stopped = self.stop_at == Some(self.operations);
        Ok(Stopping(self.stopped))
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        power(Stopping(self.stopped))?;
        self.names.files.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Inode {
    fn write(&mut self, bytes: &[u8], offset: usize) {
        let end = offset + bytes.len();
        if self.visible.len() < end {
            self.visible.resize(end, 0);
        }
        self.visible[offset..end].copy_from_slice(bytes);
        if !bytes.is_empty() {
            self.dirty.extend(offset / SECTOR_BYTES..=(end - 1) / SECTOR_BYTES);
        }
    }

    fn sync(&mut self) {
        self.durable.resize(self.visible.len(), 0);
        for sector in std::mem::take(&mut self.dirty) {
            copy_sector(sector, &self.visible, &mut self.durable);
        }
    }

    fn power_cut(&self, random: &mut Random) -> Inode {
        let mut durable = self.durable.clone();
        let length = if random.one_in(2) { self.durable.len() } else { self.visible.len() };
        let mode = random.below(4);
        let below = match self.dirty.last() {
            Some(last) => random.below(*last as u64 + 2) as usize,
            None => 0,
        };
        let mut kept = BTreeSet::new();
        for sector in &self.dirty {
            let keep = match mode {
                0 => false,
                1 => true,
                2 => random.one_in(2),
                _ => *sector < below,
            };
            if keep {
                kept.insert(*sector);
            }
        }
        durable.resize(length, 0);
        for sector in kept {
            copy_sector(sector, &self.visible, &mut durable);
        }
        if random.one_in(2)
            && let Some(sector) = random.choose(&self.dirty)
        {
            let start = sector * SECTOR_BYTES / BLOCK_BYTES * BLOCK_BYTES;
            let end = (start + BLOCK_BYTES).min(durable.len());
            durable[start.min(end)..end].fill_with(|| random.next() as u8);
        }
        Inode { visible: durable.clone(), durable, dirty: BTreeSet::new() }
    }
}

/// Copies what both sides have of one sector.
fn copy_sector(sector: usize, from: &[u8], to: &mut [u8]) {
    let start = sector * SECTOR_BYTES;
    let end = (start + SECTOR_BYTES).min(from.len()).min(to.len());
    if start < end {
        to[start..end].copy_from_slice(&from[start..end]);
    }
}

impl Names {
    fn has_directory(&self, path: &Path) -> bool {
        path == Path::new(".") || self.directories.contains(path)
    }

    fn drop_unreachable(&mut self) {
        // A directory comes before what is in it.
        for directory in std::mem::take(&mut self.directories) {
            if self.has_directory(parent(&directory)) {
                self.directories.insert(directory);
            }
        }
        let files = std::mem::take(&mut self.files);
        self.files =
            files.into_iter().filter(|(path, _)| self.has_directory(parent(path))).collect();
    }
}

impl NameChange {
    fn apply(&self, names: &mut Names) {
        match self {
            NameChange::Create(path, inode) => {
                names.files.insert(path.clone(), *inode);
            }
            NameChange::CreateDirectory(path) => {
                names.directories.insert(path.clone());
            }
            NameChange::Rename(from, to) => {
                if let Some(inode) = names.files.remove(from) {
                    names.files.insert(to.clone(), inode);
                }
            }
            NameChange::Remove(path) => {
                names.files.remove(path);
            }
        }
    }
}

impl Files for FaultyFiles {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let inode = self.lock().find(path)?;
        Ok(self.handle(inode))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let inode = {
            let mut disk = self.lock();
            power(Stopping(disk.stopped))?;
            if !disk.names.has_directory(parent(path)) {
                return Err(io::ErrorKind::NotFound.into());
            }
            disk.inodes.push(Inode::default());
            disk.inodes.len() - 1
        };
        self.change_names(NameChange::Create(path.to_owned(), inode))?;
        Ok(self.handle(inode))
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        let disk = self.lock();
        power(Stopping(disk.stopped))?;
        if !disk.names.has_directory(directory) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let inside = disk.names.files.keys().filter(|path| parent(path) == directory);
        Ok(inside.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let disk = self.lock();
        power(Stopping(disk.stopped))?;
        Ok(disk.names.files.contains_key(path) || disk.names.has_directory(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.lock().find(from)?;
        self.change_names(NameChange::Rename(from.to_owned(), to.to_owned()))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.lock().find(path)?;
        self.change_names(NameChange::Remove(path.to_owned()))
    }

    fn create_dir(&self, directory: &Path) -> io::Result<()> {
        if !self.lock().names.has_directory(parent(directory)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.change_names(NameChange::CreateDirectory(directory.to_owned()))
    }

    fn sync_dir(&self, directory: &Path) -> io::Result<()> {
        let mut disk = self.lock();
        let stopping = disk.count()?;
        power(stopping)?;
        let of_directory = |change: &NameChange| match change {
            NameChange::Create(path, _)
            | NameChange::CreateDirectory(path)
            | NameChange::Remove(path)
            | NameChange::Rename(_, path) => parent(path) == directory,
        };
        let (covered, rest) =
            std::mem::take(&mut disk.names_pending).into_iter().partition(of_directory);
        disk.names_pending = rest;
        let covered: Vec<NameChange> = covered;
        for change in covered {
            change.apply(&mut disk.names_durable);
        }
        Ok(())
    }
}

impl FaultyFile {
    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl File for FaultyFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut disk = self.lock();
        let stopping = disk.count()?;
        disk.inodes[self.inode].write(bytes, offset as usize);
        power(stopping)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let disk = self.lock();
        power(Stopping(disk.stopped))?;
        let visible = &disk.inodes[self.inode].visible;
        let (start, end) = (offset as usize, offset as usize + buffer.len());
        if end > visible.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.copy_from_slice(&visible[start..end]);
        Ok(())
    }

    fn read_from_disk(&self, buffer: &mut BlockBuffer, offset: u64) -> io::Result<()> {
        let disk = self.lock();
        power(Stopping(disk.stopped))?;
        let durable = &disk.inodes[self.inode].durable;
        let (start, end) = (offset as usize, offset as usize + buffer.len());
        if end > durable.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.copy_from_slice(&durable[start..end]);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        let disk = self.lock();
        power(Stopping(disk.stopped))?;
        Ok(disk.inodes[self.inode].visible.len() as u64)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut disk = self.lock();
        let stopping = disk.count()?;
        let inode = &mut disk.inodes[self.inode];
        let (old, new) = (inode.visible.len(), length as usize);
        inode.visible.resize(new, 0);
        if old < new {
            inode.dirty.extend(old / SECTOR_BYTES..new.div_ceil(SECTOR_BYTES));
        }
        power(stopping)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync_all()
    }

    fn sync_all(&self) -> io::Result<()> {
        let mut disk = self.lock();
        let stopping = disk.count()?;
        power(stopping)?;
        disk.syncs += 1;
        if disk.fail_sync_at == Some(disk.syncs) {
            disk.inodes[self.inode].dirty.clear();
            disk.failed_sync = Some(self.inode);
            return Err(io::Error::other("the disk failed to sync"));
        }
        disk.inodes[self.inode].sync();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_synced_bytes_and_names_are_sure_to_survive() {
        let (mut lost_bytes, mut lost_name, mut torn, mut spoilt) = (0, 0, 0, 0);
        for seed in 0..400 {
            let files = FaultyFiles::new();
            let directory = Path::new("d");
            files.create_dir(directory).unwrap();
            files.sync_dir(Path::new(".")).unwrap();
            let (first, second) = (directory.join("first"), directory.join("second"));
            let file = files.create(&first).unwrap();
            file.write_all_at(&[1; 4 * BLOCK_BYTES], 0).unwrap();
            file.sync_data().unwrap();
            files.sync_dir(directory).unwrap();
            let (start, end) = (BLOCK_BYTES + 512, BLOCK_BYTES + 1536);
            file.write_all_at(&[2; 1024], start as u64).unwrap();
            files.create(&second).unwrap().sync_all().unwrap();

            let after = files.power_cut(&mut Random(seed));
            let content = after.content(&first);
            assert_eq!(content.len(), 4 * BLOCK_BYTES);
            let (before, behind) = (&content[..BLOCK_BYTES], &content[2 * BLOCK_BYTES..]);
            assert!(before.iter().chain(behind).all(|byte| *byte == 1), "no other block");
            let beside = content[BLOCK_BYTES..start].iter().chain(&content[end..2 * BLOCK_BYTES]);
            if beside.copied().any(|byte| byte != 1) {
                spoilt += 1;
                continue;
            }
            lost_bytes += u32::from(content[start..end].iter().all(|byte| *byte == 1));
            torn += u32::from(content[start] != content[start + 512]);
            lost_name += u32::from(!after.exists(&second).unwrap());
        }
        assert!(lost_bytes > 20 && torn > 20 && lost_name > 20 && spoilt > 20);
    }

    #[test]
    fn what_lies_in_a_directory_is_as_durable_as_its_name() {
        let mut lost = 0;
        for seed in 0..100 {
            let files = FaultyFiles::new();
            let (outer, inner) = (Path::new("outer"), Path::new("outer/inner"));
            files.create_dir(outer).unwrap();
            files.create_dir(inner).unwrap();
            files.sync_dir(outer).unwrap();
            files.create(&inner.join("file")).unwrap();
            files.sync_dir(inner).unwrap();
            let after = files.power_cut(&mut Random(seed));
            assert_eq!(after.exists(&inner.join("file")).unwrap(), after.exists(outer).unwrap());
            lost += u32::from(!after.exists(outer).unwrap());
        }
        assert!((20..80).contains(&lost), "{lost}");
    }

    #[test]
    fn a_stopped_disk_does_nothing_more() {
        let files = FaultyFiles::new();
        files.create_dir(Path::new("d")).unwrap();
        let file = files.create(Path::new("d/f")).unwrap();
        files.stop_at(2);
        file.write_all_at(b"kept", 0).unwrap();
        file.sync_all().unwrap_err();
        assert!(files.stopped());
        file.write_all_at(b"lost", 0).unwrap_err();
        assert_eq!(files.process_kill().content(Path::new("d/f")), b"kept");
    }

    #[test]
    fn a_failed_sync_forgets_what_it_covered() {
        let files = FaultyFiles::new();
        files.create_dir(Path::new("d")).unwrap();
        let file = files.create(Path::new("d/f")).unwrap();
        files.sync_dir(Path::new(".")).unwrap();
        files.sync_dir(Path::new("d")).unwrap();
        files.fail_sync_at(1);
        file.write_all_at(b"data", 0).unwrap();
        file.sync_all().unwrap_err();
        file.sync_all().unwrap();
        assert_eq!(files.content(Path::new("d/f")), b"data");
        let after = files.power_cut(&mut Random(1));
        assert_eq!(after.content(Path::new("d/f")), [0; 4]);
    }
}
