//! A note of what the time was, for the next start of this node.
//!
//! How long a node was away is told by CLOCK_BOOTTIME for as long as its machine is not rebooted,
//! whatever the wall clocks say. So a node notes its cluster time beside its monotonic time and the
//! name of the boot. The note is worth something only until a reboot, so it is replaced atomically
//! and never synced: what a power cut could take from it is worthless after the power cut. Nothing
//! that was acknowledged depends on it, and one that cannot be read is no note.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::durable::{create_file, partial_path};
use super::envelope::{self, Magic};

const MAGIC: Magic = *b"QRTMNOTE";
const VERSION: u8 = 1;

/// What the time was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeNote {
    /// Names the boot of the machine.
    pub boot_id: String,
    /// Monotonic time since then, in microseconds.
    pub monotonic_micros: u64,
    /// Cluster time at that moment, in milliseconds.
    pub time_millis: u64,
}

impl TimeNote {
    /// Reads a note; `None` if there is none, or nothing that can be understood.
    pub fn load(path: &Path) -> Option<Self> {
        let bytes = fs::read(path).ok()?;
        envelope::unseal(MAGIC, VERSION, &bytes).ok()
    }

    /// Replaces the note.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let bytes = envelope::seal(MAGIC, VERSION, self).map_err(io::Error::other)?;
        let partial = partial_path(path);
        create_file(&partial)?.write_all(&bytes)?;
        fs::rename(&partial, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("time");
        assert_eq!(TimeNote::load(&path), None);
        let note = TimeNote {
            boot_id: "this one".to_owned(),
            monotonic_micros: 17,
            time_millis: 1_700_000_000_000,
        };
        note.save(&path).unwrap();
        assert_eq!(TimeNote::load(&path), Some(note.clone()));
        note.save(&path).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 0x55;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(TimeNote::load(&path), None);
    }
}
