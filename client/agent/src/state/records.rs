//! What the state consists of. Every field is an atomic and zero is a value of each, so that a record is whole after every
//! store and fresh memory is an unused one.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

use farpage_attach::control::{BATCH_PAGES, STAGING_AREAS};
use farpage_proto::limits;

use crate::entry::PAGE_IN_EXTENT_BITS;
use crate::far::{Grant, MAX_COPIES};
use crate::job::Counters;
use crate::latency::Latencies;

/// Events of one address space that may be noted and not followed yet.
pub const JOURNAL_SLOTS: usize = 64;
/// Words for a node's name.
const NODE_WORDS: usize = limits::MAX_NAME.div_ceil(8);
/// Words for a node's address.
const ADDRESS_WORDS: usize = limits::MAX_ADDRESS.div_ceil(8);

/// What there is one of.
#[repr(C)]
#[derive(Debug)]
pub struct Header {
    /// Says that this is a state, and of which layout.
    pub magic: AtomicU64,
    /// The keeper that holds it once the agent has died: one store hands everything from one to the next.
    pub keeper: AtomicI32,
    /// Since when (milliseconds since boot) no agent has served; 0 while one does.
    pub alone_since_ms: AtomicU64,
    /// The lease, and how long it lives without a renewal.
    pub lease: AtomicU64,
    /// See [`Self::lease`].
    pub lease_ttl_ms: AtomicU64,
    /// The number of the grant request under way.
    pub grant_number: AtomicU64,
    /// The slots that the mover is writing to: the first, in the words of [`super::slot_word`], and how many.
    pub transfer: AtomicU64,
    /// See [`Self::transfer`].
    pub transfer_len: AtomicU64,
    /// The last address space's number.
    pub last_space: AtomicU64,
    /// How many records of each kind were ever in use.
    pub jobs: AtomicU32,
    /// See [`Self::jobs`].
    pub spaces: AtomicU32,
    /// See [`Self::jobs`].
    pub extents: AtomicU32,
    /// See [`Self::jobs`].
    pub chunks: AtomicU32,
}

/// A job.
#[repr(C)]
#[derive(Debug)]
pub struct JobRecord {
    /// Whether it is in use.
    pub live: AtomicBool,
    /// As in [`crate::job::Job`].
    pub armed: AtomicBool,
    /// As in [`crate::job::Job`].
    pub regions_only: AtomicBool,
    /// Whether its launcher has asked for the account.
    pub finished: AtomicBool,
    /// Its user.
    pub uid: AtomicU32,
    /// Its token.
    pub token: AtomicU64,
    /// Its limits.
    pub local_pages: AtomicU64,
    /// See [`Self::local_pages`].
    pub far_pages: AtomicU64,
    /// See [`Self::local_pages`].
    pub fault_deadline_ms: AtomicU64,
    /// See [`Self::local_pages`].
    pub copies: AtomicU32,
    /// Who opened it, and when that process began.
    pub launcher: AtomicI32,
    /// Its first program.
    pub root: AtomicI32,
    /// See [`Self::launcher`].
    pub launcher_start: AtomicU64,
    /// Peaks, as in [`crate::job::Job`].
    pub far_peak: AtomicU64,
    /// See [`Self::far_peak`].
    pub local_peak: AtomicU64,
    /// See [`Self::far_peak`].
    pub unmanaged_peak: AtomicU64,
    /// What was counted.
    pub counters: Counters,
    /// How long faults took.
    pub latencies: Latencies,
}

/// A staging area: which page lies where.
#[repr(C)]
#[derive(Debug)]
pub struct AreaRecord {
    /// One bit for each page whose bytes are here, or with the helper, and decide what it is.
    pub live: AtomicU64,
    /// The pages.
    pub pages: [AtomicU64; BATCH_PAGES],
    /// The slots that they are being written to: extent and page, and a bit that says so; 0 for none.
    pub slots: [AtomicU64; BATCH_PAGES],
}

/// An event as the kernel wrote it: `struct uffd_msg`.
pub type JournalSlot = [AtomicU64; 4];

/// The state of an address space's record.
pub mod space {
    /// Not in use.
    pub const FREE: u32 = 0;
    /// In use: its table and descriptors are whole.
    pub const LIVE: u32 = 1;
}

/// Why an address space cannot be taken over.
pub mod undecided {
    /// What of the events that were read has been followed is not in the state, or what a page holds that one of them put there.
    pub const EVENTS: u32 = 1;
    /// A part of the table is not.
    pub const TABLE: u32 = 2;
}

/// An address space.
#[repr(C)]
#[derive(Debug)]
pub struct SpaceRecord {
    /// One of [`space`].
    pub state: AtomicU32,
    /// Its pid, 0 while it is not known.
    pub pid: AtomicI32,
    /// When that process began.
    pub pid_start: AtomicU64,
    /// Its helper, 0 while it has not reported itself.
    pub helper: AtomicI32,
    /// A descriptor's number, 0 where there is none; the same for those below.
    pub uffd: AtomicI32,
    /// When the helper's process began.
    pub helper_start: AtomicU64,
    /// See [`Self::uffd`].
    pub drain_uffd: AtomicI32,
    /// See [`Self::uffd`].
    pub control: AtomicI32,
    /// See [`Self::uffd`].
    pub event: AtomicI32,
    /// See [`Self::uffd`].
    pub lifeline: AtomicI32,
    /// Its number.
    pub id: AtomicU64,
    /// Its job's token.
    pub job: AtomicU64,
    /// Whose fork it is, 0 for nobody's.
    pub parent: AtomicU64,
    /// The parent's pid.
    pub parent_pid: AtomicI32,
    /// Whether nothing is known of what it did not inherit.
    pub inheritance_unknown: AtomicBool,
    /// Whether only named regions are managed.
    pub regions_only: AtomicBool,
    /// Whether soft-dirty bits were ever cleared.
    pub soft_dirty: AtomicBool,
    /// Why it cannot be taken over now, of [`undecided`]: if the agent dies, the program is ended.
    pub undecided: AtomicU32,
    /// Where its helper's ranges are.
    pub holding: AtomicU64,
    /// See [`Self::holding`].
    pub drain: AtomicU64,
    /// The batch with the helper: whether there is one, and which.
    pub batch: AtomicBool,
    /// See [`Self::batch`].
    pub command: AtomicU32,
    /// See [`Self::batch`].
    pub method: AtomicU32,
    /// See [`Self::batch`].
    pub area: AtomicU32,
    /// How many pages it has.
    pub batch_pages: AtomicU32,
    /// The oldest event that may not have been followed.
    pub journal_head: AtomicU32,
    /// Events read and not followed yet; a ring.
    pub journal: [JournalSlot; JOURNAL_SLOTS],
    /// Where pages on their way out are.
    pub areas: [AreaRecord; STAGING_AREAS],
}

/// The state of an extent's record.
pub mod extent {
    /// Not held.
    pub const FREE: u32 = 0;
    /// Held.
    pub const HELD: u32 = 1;
}

/// The state of a copy's record.
pub mod copy {
    /// Not held.
    pub const FREE: u32 = 0;
    /// Held.
    pub const HELD: u32 = 1;
    /// Its node came back empty.
    pub const LOST: u32 = 2;
    /// Its lease has ended; entries may name its extent yet.
    pub const REVOKED: u32 = 3;
}

/// An extent.
#[repr(C)]
#[derive(Debug)]
pub struct ExtentRecord {
    /// One of [`extent`].
    pub state: AtomicU32,
    /// As in [`crate::far::Extent`].
    pub goal: AtomicU32,
    /// As in [`crate::far::Extent`].
    pub bytes: AtomicU64,
    /// Its copies. Which slots each holds is in a [`BitsRecord`].
    pub copies: [CopyRecord; MAX_COPIES],
}

/// A copy of an extent.
#[repr(C)]
#[derive(Debug)]
pub struct CopyRecord {
    /// One of [`copy`].
    pub state: AtomicU32,
    /// As in [`Grant`].
    pub index: AtomicU32,
    /// As in [`Grant`].
    pub id: AtomicU64,
    /// As in [`Grant`].
    pub key: AtomicU64,
    /// As in [`Grant`].
    pub node: Text<NODE_WORDS>,
    /// As in [`Grant`].
    pub address: Text<ADDRESS_WORDS>,
}

impl CopyRecord {
    /// Whether all that a grant says can be noted.
    #[must_use]
    pub fn fits(grant: &Grant) -> bool {
        grant.node.len() <= 8 * NODE_WORDS && grant.address.len() <= 8 * ADDRESS_WORDS
    }

    /// Notes a grant that fits. What it says counts from when the state does.
    pub fn note(&self, grant: &Grant) {
        self.index.store(grant.index, Ordering::Relaxed);
        self.id.store(grant.id, Ordering::Relaxed);
        self.key.store(grant.key, Ordering::Relaxed);
        self.node.set(&grant.node);
        self.address.set(&grant.address);
    }

    /// The grant noted, of an extent of this size.
    #[must_use]
    pub fn grant(&self, bytes: u64) -> Grant {
        Grant {
            id: self.id.load(Ordering::Relaxed),
            node: self.node.get(),
            address: self.address.get(),
            index: self.index.load(Ordering::Relaxed),
            key: self.key.load(Ordering::Relaxed),
            bytes,
        }
    }
}

/// A short text.
#[repr(C)]
#[derive(Debug)]
pub struct Text<const WORDS: usize> {
    len: AtomicU64,
    words: [AtomicU64; WORDS],
}

impl<const WORDS: usize> Text<WORDS> {
    /// Notes a text, or what of it there is room for.
    fn set(&self, text: &str) {
        let bytes = text.as_bytes();
        for (word, chunk) in self.words.iter().zip(bytes.chunks(8)) {
            let mut eight = [0; 8];
            eight[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_ne_bytes(eight), Ordering::Relaxed);
        }
        self.len.store(bytes.len() as u64, Ordering::Relaxed);
    }

    /// The text noted.
    fn get(&self) -> String {
        let words = self.words.iter();
        let bytes: Vec<u8> = words
            .flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes())
            .take(self.len.load(Ordering::Relaxed) as usize)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// What an extent has bits for, one for each slot: which slots each copy holds, and which rest.
pub const BITS_PER_EXTENT: usize = MAX_COPIES + 1;
/// Which of an extent's bits say what rests ([`crate::far::FarMemory::lay_to_rest`]).
pub const RESTING: usize = MAX_COPIES;

/// Bits for an extent's slots, those of the same slots side by side: an extent of 16 MiB has all of its bits in one page.
pub type BitsRecord = [[AtomicU64; BITS_PER_EXTENT]; (1 << PAGE_IN_EXTENT_BITS) / 64];

/// Whose a chunk of a page table is.
#[repr(C)]
#[derive(Debug)]
pub struct ChunkRecord {
    /// The address space's number, 0 for nobody's.
    pub owner: AtomicU64,
    /// Which part of its address space.
    pub number: AtomicU64,
}

/// What a slot holds: its hash, low half first.
pub type HashRecord = [AtomicU64; 2];
