//! What outlives the agent: its state, in memory that the next agent can be handed.
//!
//! Page tables, what slots hold, extents, jobs and address spaces lie there and nowhere else, each written where it changes.
//! So it is right after every instruction, whenever the agent is killed; what is counted from it (references, free slots,
//! resident pages) is counted anew by the next agent. [`crate::keeper`] holds it meanwhile, [`crate::recovery`] reads it.

pub mod records;
mod staging;

use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farpage_core::table::{Cells, ChunkMemory, Heap};

use crate::entry::Slot;
use crate::sys::state::{MAX_JOBS, MAX_SPACES, Ref, StateMemory};
use records::{
    BitsRecord, ExtentRecord, HashRecord, Header, JobRecord, SpaceRecord, space, undecided,
};
pub use staging::{slot_of, slot_word};

/// "farpageS" and the layout's number.
const MAGIC: u64 = u64::from_le_bytes(*b"farpgS03");

/// Which of a kind of record are in use.
#[derive(Debug, Default)]
struct Places {
    free: Vec<u32>,
}

impl Places {
    fn take(&mut self, ever: &AtomicU32, most: usize) -> Option<u32> {
        if let Some(number) = self.free.pop() {
            return Some(number);
        }
        let number = ever.load(Ordering::Relaxed);
        if number as usize >= most {
            return None;
        }
        ever.store(number + 1, Ordering::Release);
        Some(number)
    }
}

/// The state.
#[derive(Debug)]
pub struct State {
    memory: Arc<StateMemory>,
    header: Ref<Header>,
    jobs: Mutex<Places>,
    spaces: Mutex<Places>,
    chunks: Mutex<Places>,
}

impl State {
    /// Of an agent that begins.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn create() -> io::Result<Arc<Self>> {
        let state = Self::over(StateMemory::create()?);
        state.header.magic.store(MAGIC, Ordering::Release);
        Ok(Arc::new(state))
    }

    /// Of an agent that died. Nothing is changed.
    ///
    /// # Errors
    /// The kernel's errno; `InvalidData` where it is not a state of this version's.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let state = Self::over(StateMemory::map(fd)?);
        if state.header.magic.load(Ordering::Acquire) == MAGIC {
            Ok(state)
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }

    fn over(memory: StateMemory) -> Self {
        let memory = Arc::new(memory);
        Self {
            header: memory.header(),
            memory,
            jobs: Mutex::default(),
            spaces: Mutex::default(),
            chunks: Mutex::default(),
        }
    }

    /// What there is one of.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<StateMemory> {
        &self.memory
    }

    /// A record for a job; none where there are as many as there can be.
    #[must_use]
    pub fn new_job(self: &Arc<Self>) -> Option<JobPlace> {
        let number = lock(&self.jobs).take(&self.header.jobs, MAX_JOBS)?;
        Some(self.job_place(number))
    }

    /// A record for an address space.
    #[must_use]
    pub fn new_space(self: &Arc<Self>) -> Option<SpacePlace> {
        let number = lock(&self.spaces).take(&self.header.spaces, MAX_SPACES)?;
        Some(self.space_place(number))
    }

    /// An extent's record.
    #[must_use]
    pub fn extent(&self, number: u32) -> Option<Ref<ExtentRecord>> {
        let record = self.memory.extent(number)?;
        self.header.extents.fetch_max(number + 1, Ordering::AcqRel);
        Some(record)
    }

    /// Bits for an extent's slots.
    #[must_use]
    pub fn bits(&self, extent: u32) -> Option<Ref<BitsRecord>> {
        self.memory.bits(extent)
    }

    /// What a slot holds.
    #[must_use]
    pub fn hash(&self, slot: Slot) -> Option<&HashRecord> {
        self.memory.hash(slot)
    }

    /// What is in use of what an agent left; the rest is free from now on.
    #[must_use]
    pub fn left(self: &Arc<Self>) -> Left {
        let mut left = Left::default();
        let ever = |count: &AtomicU32, most: usize| {
            let most = u32::try_from(most).unwrap_or(u32::MAX);
            0..count.load(Ordering::Acquire).min(most)
        };
        for number in ever(&self.header.jobs, MAX_JOBS) {
            let place = self.job_place(number);
            if place.live.load(Ordering::Acquire) {
                left.jobs.push(place);
            }
        }
        for number in ever(&self.header.spaces, MAX_SPACES) {
            let place = self.space_place(number);
            if place.state.load(Ordering::Acquire) == space::LIVE {
                left.spaces.push(place);
            }
        }
        for number in ever(&self.header.chunks, self.memory.chunks()) {
            let chunk = self.chunk_place(number);
            left.chunks.push(chunk);
        }
        left
    }

    fn job_place(self: &Arc<Self>, number: u32) -> JobPlace {
        JobPlace {
            record: self.memory.job(number),
            whole: Arc::clone(self),
            number,
        }
    }

    fn space_place(self: &Arc<Self>, number: u32) -> SpacePlace {
        SpacePlace {
            record: self.memory.space(number),
            whole: Arc::clone(self),
            number,
        }
    }

    fn chunk_place(self: &Arc<Self>, number: u32) -> Chunk {
        Chunk::Kept(KeptChunk {
            cells: self.memory.chunk(number),
            state: Arc::clone(self),
            number,
        })
    }
}

/// What an agent left.
#[derive(Debug, Default)]
pub struct Left {
    /// Its jobs.
    pub jobs: Vec<JobPlace>,
    /// Its address spaces.
    pub spaces: Vec<SpacePlace>,
    /// Every chunk that was ever in use. Those that nobody takes are given back.
    pub chunks: Vec<Chunk>,
}

/// A job's place in the state, given back when it is dropped.
#[derive(Debug)]
pub struct JobPlace {
    record: Ref<JobRecord>,
    whole: Arc<State>,
    number: u32,
}

impl JobPlace {
    /// The record.
    #[must_use]
    pub fn record(&self) -> &Ref<JobRecord> {
        &self.record
    }
}

impl Deref for JobPlace {
    type Target = JobRecord;

    fn deref(&self) -> &JobRecord {
        &self.record
    }
}

impl Drop for JobPlace {
    fn drop(&mut self) {
        self.record.live.store(false, Ordering::Release);
        self.whole.memory.clear_job(self.number);
        lock(&self.whole.jobs).free.push(self.number);
    }
}

/// An address space's place in the state, given back when it is dropped.
#[derive(Debug)]
pub struct SpacePlace {
    record: Ref<SpaceRecord>,
    whole: Arc<State>,
    number: u32,
}

impl SpacePlace {
    /// The record.
    #[must_use]
    pub fn record(&self) -> &Ref<SpaceRecord> {
        &self.record
    }

    /// Where its table's chunks lie.
    #[must_use]
    pub fn chunks(&self) -> SpaceChunks {
        SpaceChunks {
            state: Arc::clone(&self.whole),
            record: self.record.clone(),
        }
    }
}

impl Deref for SpacePlace {
    type Target = SpaceRecord;

    fn deref(&self) -> &SpaceRecord {
        &self.record
    }
}

impl Drop for SpacePlace {
    fn drop(&mut self) {
        self.record.state.store(space::FREE, Ordering::Release);
        self.whole.memory.clear_space(self.number);
        lock(&self.whole.spaces).free.push(self.number);
    }
}

/// Where the chunks of one address space lie.
#[derive(Debug)]
pub struct SpaceChunks {
    state: Arc<State>,
    record: Ref<SpaceRecord>,
}

impl ChunkMemory for SpaceChunks {
    type Chunk = Chunk;

    fn chunk(&self, number: u64) -> Chunk {
        let state = &self.state;
        let taken = lock(&state.chunks).take(&state.header.chunks, state.memory.chunks());
        let Some(place) = taken else {
            // It can be served, but not handed on.
            self.record
                .undecided
                .fetch_or(undecided::TABLE, Ordering::AcqRel);
            return Chunk::Own(Heap.chunk(number));
        };
        let record = state.memory.chunk_record(place);
        record.number.store(number, Ordering::Relaxed);
        let owner = self.record.id.load(Ordering::Relaxed);
        record.owner.store(owner, Ordering::Release);
        state.chunk_place(place)
    }
}

/// A chunk of a page table.
#[derive(Debug)]
pub enum Chunk {
    /// In the state.
    Kept(KeptChunk),
    /// On the heap, where the state is full.
    Own(Box<Cells>),
}

/// A chunk in the state.
#[derive(Debug)]
pub struct KeptChunk {
    cells: Ref<Cells>,
    state: Arc<State>,
    number: u32,
}

impl Chunk {
    /// Whose it is, and which part of that address space; none where it is nobody's.
    #[must_use]
    pub fn owner(&self) -> Option<(u64, u64)> {
        let Self::Kept(chunk) = self else { return None };
        let record = chunk.state.memory.chunk_record(chunk.number);
        let owner = record.owner.load(Ordering::Acquire);
        (owner != 0).then(|| (owner, record.number.load(Ordering::Relaxed)))
    }
}

impl Deref for Chunk {
    type Target = Cells;

    fn deref(&self) -> &Cells {
        match self {
            Self::Kept(chunk) => &chunk.cells,
            Self::Own(cells) => cells,
        }
    }
}

impl Drop for KeptChunk {
    fn drop(&mut self) {
        let memory = &self.state.memory;
        // In this order: a chunk that is nobody's is empty.
        memory.clear_chunk(self.number);
        memory
            .chunk_record(self.number)
            .owner
            .store(0, Ordering::Release);
        lock(&self.state.chunks).free.push(self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
