//! Which pages of another process are present, from `/proc/PID/pagemap`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A page of a file, or shared: not anonymous memory of this process.
const FILE: u64 = 1 << 61;
const PROTECTED: u64 = 1 << 57;
/// Words read at once: the map of 2 MiB of address space.
const WINDOW: usize = 512;

/// An open pagemap.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens a process's pagemap.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn open(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// The file for the process itself, which may have become another user and then may not open it. It does not show where
    /// in physical memory pages are: that is for who opened it with `CAP_SYS_ADMIN` to see, not for a program.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn for_its_process(pid: i32) -> io::Result<File> {
        let own = capabilities(None)?;
        let without = CapabilitySets {
            effective: own.effective - CapabilitySet::SYS_ADMIN,
            ..own
        };
        // Of this thread alone.
        set_capabilities(None, without)?;
        let opened = File::open(format!("/proc/{pid}/pagemap"));
        set_capabilities(None, own)?;
        opened
    }

    /// Whether any page of `range` is write-protected by a uffd.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn any_protected(&self, range: Range<u64>) -> io::Result<bool> {
        let mut any = false;
        self.words(range, |_, word| any |= word & PROTECTED != 0)?;
        Ok(any)
    }

    /// Calls `found` with the number of every page in `range` (addresses) that is present or in kernel swap, and
    /// anonymous.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn present(&self, range: Range<u64>, mut found: impl FnMut(u64)) -> io::Result<()> {
        self.words(range, |page, word| {
            if word & (PRESENT | SWAPPED) != 0 && word & FILE == 0 {
                found(page);
            }
        })
    }

    /// Calls `with` with the number of every page in `range` and what the map says of it.
    fn words(&self, range: Range<u64>, mut with: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut buffer = [0u8; WINDOW * 8];
        let mut page = range.start >> 12;
        let end = range.end >> 12;
        while page < end {
            let want = ((end - page) as usize).min(WINDOW) * 8;
            let got = self.0.read_at(&mut buffer[..want], page * 8)?;
            if got < 8 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for word in buffer[..got].chunks_exact(8) {
                with(
                    page,
                    u64::from_ne_bytes(word.try_into().unwrap_or_default()),
                );
                page += 1;
            }
        }
        Ok(())
    }

    /// How many anonymous pages of `range` are present.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn count_present(&self, range: Range<u64>) -> io::Result<u64> {
        let mut count = 0;
        self.present(range, |_| count += 1)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_process_sees_no_frames() {
        const FRAME: u64 = (1 << 55) - 1;
        let here = Box::new([1u8; 4096]);
        let word = |file: &File| {
            let mut word = [0u8; 8];
            let at = here.as_ptr().addr() as u64 / 4096 * 8;
            file.read_exact_at(&mut word, at).unwrap();
            u64::from_le_bytes(word)
        };
        let own = std::process::id().cast_signed();
        let given = word(&Pagemap::for_its_process(own).unwrap());
        assert_eq!((given & PRESENT, given & FRAME), (PRESENT, 0));
        // Not for good: this thread sees them if it may.
        let may = capabilities(None)
            .unwrap()
            .effective
            .contains(CapabilitySet::SYS_ADMIN);
        assert_eq!(word(&Pagemap::open(own).unwrap().0) & FRAME != 0, may);
    }
}
