//! As much of an ELF file as tells whether a shared object can be preloaded into it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The program header that names the loader.
const PT_INTERP: u32 = 3;
/// More program headers than this are not looked at; real programs have about a dozen.
const MAX_HEADERS: u16 = 512;
/// A loader's path may be as long as any path.
const MAX_LOADER_BYTES: u64 = 4096;

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

/// What was read of an ELF file of this machine.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Elf {
    /// The dynamic loader it asks for; a static program, also a position-independent one, asks for none.
    pub(crate) loader: Option<String>,
}

/// Why a file is no program for this machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ElfError {
    #[error("cannot read it: {0}")]
    Io(#[from] io::Error),
    #[error("it is a damaged ELF file")]
    Damaged,
    #[error("{0}")]
    Foreign(String),
}

impl Elf {
    /// This machine's programs, in words.
    pub(crate) const HERE: &'static str = concat_arch();

    /// Reads the headers.
    pub(crate) fn read(file: &File) -> Result<Self, ElfError> {
        let mut head = [0; 64];
        let length = read_up_to(file, &mut head)?;
        if length < 20 {
            return Err(ElfError::Damaged);
        }
        let (class, order) = (head[4], head[5]);
        if class == 1 {
            return Err(ElfError::Foreign("a 32-bit program".to_owned()));
        }
        if class != 2 || !matches!(order, 1 | 2) {
            return Err(ElfError::Damaged);
        }
        if order == 2 {
            return Err(ElfError::Foreign(
                "a big-endian program of another machine".to_owned(),
            ));
        }
        let machine = u16_at(&head, 18)?;
        if machine != MACHINE {
            return Err(ElfError::Foreign(format!(
                "a program for {}",
                machine_name(machine)
            )));
        }
        if length < head.len() {
            return Err(ElfError::Damaged);
        }
        let table = u64_at(&head, 32)?;
        let (entry_bytes, entries) = (u16_at(&head, 54)?, u16_at(&head, 56)?);
        if entry_bytes != 56 || entries > MAX_HEADERS {
            return Err(ElfError::Damaged);
        }
        for index in 0..u64::from(entries) {
            let mut entry = [0; 56];
            let at = index
                .checked_mul(56)
                .and_then(|skip| table.checked_add(skip))
                .ok_or(ElfError::Damaged)?;
            if read_at(file, &mut entry, at)? < entry.len() {
                return Err(ElfError::Damaged);
            }
            if u32_at(&entry, 0)? == PT_INTERP {
                return Ok(Self {
                    loader: Some(loader(file, u64_at(&entry, 8)?, u64_at(&entry, 32)?)?),
                });
            }
        }
        Ok(Self { loader: None })
    }
}

const fn concat_arch() -> &'static str {
    if cfg!(target_arch = "x86_64") {
        "64-bit x86-64"
    } else {
        "64-bit ARM"
    }
}

fn loader(file: &File, offset: u64, length: u64) -> Result<String, ElfError> {
    if length > MAX_LOADER_BYTES {
        return Err(ElfError::Damaged);
    }
    let mut path = vec![0; length as usize];
    let read = read_at(file, &mut path, offset)?;
    let path = path
        .get(..read)
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    Ok(String::from_utf8_lossy(path).into_owned())
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "32-bit x86".to_owned(),
        40 => "32-bit ARM".to_owned(),
        62 => "x86-64".to_owned(),
        183 => "64-bit ARM".to_owned(),
        243 => "RISC-V".to_owned(),
        other => format!("machine type {other}"),
    }
}

fn read_up_to(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    read_at(file, buffer, 0)
}

/// Fills as much of the buffer as the file has there.
fn read_at(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = buffer.get_mut(done..).unwrap_or_default();
        match file.read_at(rest, at.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn bytes_at<const N: usize>(buffer: &[u8], at: usize) -> Result<[u8; N], ElfError> {
    buffer
        .get(at..at + N)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(ElfError::Damaged)
}

fn u16_at(buffer: &[u8], at: usize) -> Result<u16, ElfError> {
    bytes_at(buffer, at).map(u16::from_le_bytes)
}

fn u32_at(buffer: &[u8], at: usize) -> Result<u32, ElfError> {
    bytes_at(buffer, at).map(u32::from_le_bytes)
}

fn u64_at(buffer: &[u8], at: usize) -> Result<u64, ElfError> {
    bytes_at(buffer, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn read(bytes: &[u8]) -> Result<Elf, ElfError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Elf::read(&file)
    }

    #[test]
    fn this_test_is_dynamic() {
        let elf = Elf::read(&File::open(std::env::current_exe().unwrap()).unwrap()).unwrap();
        assert!(elf.loader.unwrap().contains("ld-"));
    }

    #[test]
    fn foreign_programs_are_named() {
        let mut head = std::fs::read("/bin/true").unwrap();
        head[18] = 243;
        assert!(matches!(read(&head), Err(ElfError::Foreign(what)) if what.contains("RISC-V")));
        head[4] = 1;
        assert!(matches!(read(&head), Err(ElfError::Foreign(what)) if what.contains("32-bit")));
    }

    proptest! {
        #[test]
        fn damaged_headers_are_answered(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, MACHINE as u8, 0];
            bytes.extend(noise);
            let _ = read(&bytes);
        }
    }
}
