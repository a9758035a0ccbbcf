//! The memory that is touched: pages of a plain allocation, and whether each is present.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

pub(crate) const PAGE: usize = 4096;

/// Whole pages within one large allocation.
pub(crate) struct Region {
    bytes: Vec<u8>,
    first: usize,
    pages: usize,
    pagemap: File,
}

impl Region {
    /// Pages that nobody has touched yet: an allocation of this size is a mapping of its own.
    pub(crate) fn new(pages: usize) -> io::Result<Self> {
        let bytes = vec![0u8; (pages + 1) * PAGE];
        Ok(Self {
            first: bytes.as_ptr().align_offset(PAGE),
            bytes,
            pages,
            pagemap: File::open("/proc/self/pagemap")?,
        })
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn addresses(&self) -> Range<u64> {
        let start = (self.bytes.as_ptr().addr() + self.first) as u64;
        start..start + (self.pages * PAGE) as u64
    }

    /// Writes something of its own to every page, in order.
    pub(crate) fn fill(&mut self) {
        for page in 0..self.pages {
            let at = self.first + page * PAGE;
            let mark = (page as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            self.bytes[at..at + 8].copy_from_slice(&mark.to_ne_bytes());
        }
        black_box(&self.bytes);
    }

    #[inline]
    pub(crate) fn read(&self, page: usize) {
        black_box(self.bytes[self.first + page * PAGE]);
    }

    #[inline]
    pub(crate) fn write(&mut self, page: usize) {
        self.bytes[self.first + page * PAGE + 16] = 1;
        black_box(&self.bytes);
    }

    /// Whether touching the page faults. Asking does not touch it.
    pub(crate) fn is_absent(&self, page: usize) -> io::Result<bool> {
        const PRESENT: u64 = 1 << 63;
        let number = self.addresses().start / PAGE as u64 + page as u64;
        let mut word = [0u8; 8];
        self.pagemap.read_exact_at(&mut word, number * 8)?;
        Ok(u64::from_ne_bytes(word) & PRESENT == 0)
    }
}

/// All pages in an order without neighbours to read ahead.
pub(crate) fn shuffled(pages: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pages).collect();
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    for i in (1..pages).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        order.swap(i, (state % (i as u64 + 1)) as usize);
    }
    order
}
