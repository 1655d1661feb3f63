//! Room on the disk: a file of reserved space that only deletes, bans and evictions may use up, and half of it what keeps
//! identities alive.
//!
//! A threshold alone would not do: whatever else writes to the disk would eat what the threshold was to protect.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::posix_fallocate;
use nix::sys::statvfs::statvfs;

use super::super::{MAX_GROUP_BYTES, StoreError, Urgency};

const MIB: u64 = 1024 * 1024;
/// On a small disk the reserve is this part of it.
const PART_OF_DISK: u64 = 8;
/// Each half is more than the margin, or nothing of it would be left for the writes themselves.
const SMALLEST: u64 = 3 * MIB;
/// What sled may write beside the group itself: whole segments, and nodes that it rewrites.
const MARGIN: u64 = MIB;
const AMPLIFICATION: u64 = 6;
/// How much is kept free beyond the margin before the reserve is made whole again.
const SLACK: u64 = MIB;
const STEP: u64 = MIB / 2;

/// What a group of `bytes` bytes may take.
fn needed(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX).saturating_mul(AMPLIFICATION).saturating_add(MARGIN)
}

/// The free space of a store's disk, and its reserve.
#[derive(Debug)]
pub(super) struct Space {
    directory: PathBuf,
    file: File,
    held: u64,
    wanted: u64,
    /// Whether it was told that room is short.
    short: bool,
}

impl Space {
    /// Opens the reserve, and gives up a part of it if the disk is so full that the store could not be opened.
    pub(super) fn open(directory: &Path, largest: u64) -> io::Result<Self> {
        let file =
            File::options().create(true).read(true).write(true).truncate(false).open(directory.join("reserve"))?;
        let held = file.metadata()?.len();
        let disk = statvfs(directory)?;
        let total = disk.blocks() * disk.fragment_size();
        let wanted = (total / PART_OF_DISK).clamp(SMALLEST, largest.max(SMALLEST));
        let mut space = Self { directory: directory.to_owned(), file, held, wanted, short: false };
        space.give_up_until(MARGIN, 0)?;
        space.refill(MARGIN);
        Ok(space)
    }

    /// Makes room for a group of `bytes` bytes.
    ///
    /// # Errors
    /// [`StoreError::Full`] if there is none for an ordinary group, [`StoreError::Exhausted`] if there is none at all.
    pub(super) fn admit(&mut self, urgency: Urgency, bytes: usize) -> Result<(), StoreError> {
        let needed = needed(bytes);
        let free = self.free();
        self.refill(needed);
        let admitted = match urgency {
            Urgency::Normal if free >= needed && self.held >= self.wanted => Ok(()),
            Urgency::Normal => Err(StoreError::Full { free: self.free() + self.held, reserve: self.wanted }),
            Urgency::Vital if free >= needed || self.give_up_until(needed, self.wanted / 2).unwrap_or(false) => Ok(()),
            Urgency::Vital => {
                let left = self.held.saturating_sub(self.wanted / 2);
                Err(StoreError::Full { free: self.free() + left, reserve: self.wanted / 2 })
            }
            Urgency::Shrinking if free >= needed || self.give_up_until(needed, 0).unwrap_or(false) => Ok(()),
            Urgency::Shrinking => Err(StoreError::Exhausted { free: self.free() }),
        };
        self.tell(urgency, &admitted);
        admitted
    }

    /// Says when room gets short, and when there is room again; not at each group in between.
    fn tell(&mut self, urgency: Urgency, admitted: &Result<(), StoreError>) {
        let directory = self.directory.display();
        match (admitted, urgency) {
            (Err(error), _) if !self.short => {
                tracing::error!(%directory, %error, "The store's disk is full: make room on it");
                self.short = true;
            }
            // Not at the first small group that fits: between it and the next large one, it would be said again and again.
            (Ok(()), Urgency::Normal) if self.short && self.free() >= needed(MAX_GROUP_BYTES) => {
                tracing::info!(%directory, "The store's disk has room again");
                self.short = false;
            }
            (Ok(()) | Err(_), _) => {}
        }
    }

    /// Makes the room that sled may need to read: on its way it completes what writes have left, by writing.
    pub(super) fn make_readable(&mut self) {
        // Without room the read shows whether it was needed.
        let _ = self.give_up_until(MARGIN, 0);
    }

    /// What the file system would still take. If it does not say, writing shows.
    fn free(&self) -> u64 {
        statvfs(&self.directory).map_or(u64::MAX, |disk| disk.blocks_available() * disk.fragment_size())
    }

    /// Shrinks the reserve until `needed` bytes are free, or it is down to `kept`; whether they are.
    fn give_up_until(&mut self, needed: u64, kept: u64) -> io::Result<bool> {
        while self.free() < needed {
            if self.held <= kept {
                return Ok(false);
            }
            let left = self.held.saturating_sub(STEP).max(kept);
            self.file.set_len(left)?;
            self.held = left;
        }
        Ok(true)
    }

    /// Makes the reserve whole again when there is room for it.
    fn refill(&mut self, needed: u64) {
        let missing = self.wanted.saturating_sub(self.held);
        if missing == 0 || self.free() < needed.saturating_add(missing).saturating_add(SLACK) {
            return;
        }
        let allocated = i64::try_from(self.wanted).is_ok_and(|wanted| posix_fallocate(&self.file, 0, wanted).is_ok());
        // A failed allocation may have gone part of the way: the file says how far.
        self.held = self.file.metadata().map_or(0, |file| file.len());
        if allocated {
            tracing::info!(bytes = self.held, "Space on the store's disk is reserved for renewals, deletes and bans");
        }
    }
}
