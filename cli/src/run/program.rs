//! Finds the program as a shell would, and refuses before the start what cannot carry the preload shim.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::run::elf::{Elf, ElfError};
use crate::sys;

/// Where to look without a PATH, as execvp does.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// How many `#!` interpreters may follow one another; the kernel itself gives up after this many.
const MAX_INTERPRETERS: usize = 5;

/// The kernel reads no more than this of a `#!` line.
const INTERPRETER_LINE_BYTES: usize = 256;

/// Why a program is not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProgramError {
    #[error("{}: command not found", .0.display())]
    NotInPath(PathBuf),
    #[error("{}: No such file or directory", .0.display())]
    NotFound(PathBuf),
    #[error("{}: cannot execute: its interpreter {} does not exist", .0.display(), .1.display())]
    NoInterpreter(PathBuf, PathBuf),
    #[error("{}: Is a directory", .0.display())]
    Directory(PathBuf),
    #[error("{}: {}", .0.display(), .1)]
    NotExecutable(PathBuf, io::Error),
    #[error("{}: cannot execute: too many interpreters, each a script itself", .0.display())]
    Interpreters(PathBuf),
    #[error(
        "{} is {}: the loader ignores the preload shim in such a program, so its memory cannot be managed; \
         run it without farpage, or run a copy without that privilege from an account that needs none",
        .0.display(), .1
    )]
    Privileged(PathBuf, &'static str),
    #[error(
        "{} is statically linked: no shim can be preloaded into it, so its memory cannot be managed; \
         use a dynamically linked build of it, or run it without farpage",
        .0.display()
    )]
    Static(PathBuf),
    #[error(
        "{} is {}, and the preload shim is built for {here}; use a build of the program for {here}, \
         or run it without farpage", .0.display(), .1, here = Elf::HERE
    )]
    Foreign(PathBuf, String),
    #[error(
        "{} is linked against another C library than the preload shim (its loader is {}); \
         use a build for this system's C library, or run it without farpage", .0.display(), .1
    )]
    OtherLibc(PathBuf, String),
    #[error("{}: cannot execute: {}", .0.display(), .1)]
    BadElf(PathBuf, ElfError),
}

impl ProgramError {
    /// The exit status that a shell gives for the same trouble, or 1 where farpage alone refuses.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            Self::NotInPath(_) | Self::NotFound(_) | Self::NoInterpreter(..) => 127,
            Self::Directory(_)
            | Self::NotExecutable(..)
            | Self::Interpreters(_)
            | Self::BadElf(..) => 126,
            Self::Privileged(..) | Self::Static(_) | Self::Foreign(..) | Self::OtherLibc(..) => 1,
        }
    }
}

/// The file that a shell would execute for this name.
pub(crate) fn find(name: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, ProgramError> {
    if name.as_bytes().contains(&b'/') {
        let file = PathBuf::from(name);
        return match executable(&file) {
            Ok(()) => Ok(file),
            Err(error) => Err(unusable(file, error)),
        };
    }
    let mut denied = None;
    let path = path.map_or_else(|| OsString::from(DEFAULT_PATH), OsStr::to_owned);
    for folder in std::env::split_paths(&path) {
        if name.is_empty() {
            break;
        }
        let folder = if folder.as_os_str().is_empty() {
            PathBuf::from(".")
        } else {
            folder
        };
        let file = folder.join(name);
        match executable(&file) {
            Ok(()) => return Ok(file),
            // As a shell does: go on, and complain of the first that was there but could not be used.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && file.exists() => {
                denied.get_or_insert((file, error));
            }
            Err(_) => {}
        }
    }
    match denied {
        Some((file, error)) => Err(unusable(file, error)),
        None => Err(ProgramError::NotInPath(name.into())),
    }
}

fn executable(file: &Path) -> io::Result<()> {
    let kind = std::fs::metadata(file)?;
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !kind.is_file() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    sys::may_execute(file)
}

fn unusable(file: PathBuf, error: io::Error) -> ProgramError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ProgramError::NotFound(file),
        io::ErrorKind::IsADirectory => ProgramError::Directory(file),
        io::ErrorKind::PermissionDenied => {
            ProgramError::NotExecutable(file, io::Error::other("Permission denied"))
        }
        _ => ProgramError::NotExecutable(file, error),
    }
}

/// Checks that the shim can be preloaded into what would run: the file, or the interpreter at the end of its `#!`.
pub(crate) fn check(file: &Path) -> Result<(), ProgramError> {
    let mut current = file.to_owned();
    for _ in 0..MAX_INTERPRETERS {
        // A program that may be executed but not read cannot be looked into; the agent reports it if it is unmanaged.
        let Ok(opened) = File::open(&current) else {
            return Ok(());
        };
        let metadata = opened
            .metadata()
            .map_err(|error| unusable(current.clone(), error))?;
        match interpreter(&opened) {
            Some(next) => {
                executable(&next).map_err(|error| match unusable(next.clone(), error) {
                    ProgramError::NotFound(_) => {
                        ProgramError::NoInterpreter(current.clone(), next.clone())
                    }
                    other => other,
                })?;
                current = next;
            }
            None => return check_binary(&current, &opened, &metadata),
        }
    }
    Err(ProgramError::Interpreters(file.to_owned()))
}

/// The interpreter of a script. A text without `#!` is run by /bin/sh, as shells and execvp do.
fn interpreter(file: &File) -> Option<PathBuf> {
    let mut line = [0; INTERPRETER_LINE_BYTES];
    let length = file.read_at(&mut line, 0).ok()?;
    let line = line.get(..length)?;
    if let Some(rest) = line.strip_prefix(b"#!") {
        let rest = rest.split(|byte| *byte == b'\n').next()?.trim_ascii();
        let name = rest.split(|byte| matches!(byte, b' ' | b'\t' | 0)).next()?;
        return (!name.is_empty()).then(|| OsString::from_vec(name.to_vec()).into());
    }
    (!line.starts_with(b"\x7fELF")).then(|| PathBuf::from("/bin/sh"))
}

fn check_binary(path: &Path, file: &File, metadata: &Metadata) -> Result<(), ProgramError> {
    let mode = metadata.permissions().mode();
    if mode & libc::S_ISUID != 0 {
        return Err(ProgramError::Privileged(path.to_owned(), "setuid"));
    }
    // Without the group's execute bit, setgid once meant mandatory locking and has no effect at exec.
    if mode & libc::S_ISGID != 0 && mode & libc::S_IXGRP != 0 {
        return Err(ProgramError::Privileged(path.to_owned(), "setgid"));
    }
    // Root has the capabilities anyway, and then the loader does not distrust the environment.
    if sys::effective_user() != 0 && sys::has_file_capabilities(path) {
        return Err(ProgramError::Privileged(
            path.to_owned(),
            "given capabilities (setcap)",
        ));
    }
    match Elf::read(file) {
        Err(ElfError::Foreign(what)) => Err(ProgramError::Foreign(path.to_owned(), what)),
        Err(error) => Err(ProgramError::BadElf(path.to_owned(), error)),
        Ok(Elf { loader: None }) => Err(ProgramError::Static(path.to_owned())),
        Ok(Elf {
            loader: Some(loader),
        }) if loader.contains("musl") => Err(ProgramError::OtherLibc(path.to_owned(), loader)),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn script(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.as_file()
            .set_permissions(std::fs::Permissions::from_mode(0o755))
            .unwrap();
        file
    }

    #[test]
    fn finds_as_a_shell_does() {
        let find = |name: &str, path: &str| find(OsStr::new(name), Some(OsStr::new(path)));
        assert_eq!(
            find("sh", "/nonexistent:/bin").unwrap(),
            Path::new("/bin/sh")
        );
        assert_eq!(find("sh", "/nonexistent").unwrap_err().exit_status(), 127);
        assert_eq!(find("", "/bin").unwrap_err().exit_status(), 127);
        assert_eq!(find("/bin", "").unwrap_err().exit_status(), 126);
        assert_eq!(find("/etc/passwd", "").unwrap_err().exit_status(), 126);
        assert_eq!(find("/etc/passwd/x", "").unwrap_err().exit_status(), 127);
        assert_eq!(find("passwd", "/etc").unwrap_err().exit_status(), 126);
    }

    #[test]
    fn follows_interpreters() {
        assert!(check(Path::new("/bin/sh")).is_ok());
        assert!(check(script("#!/bin/sh -e\n").path()).is_ok());
        assert!(check(script("#! /bin/sh").path()).is_ok());
        assert!(check(script("echo no interpreter named\n").path()).is_ok());
        let error = check(script("#!/nonexistent/sh\n").path()).unwrap_err();
        assert_eq!(error.exit_status(), 127, "{error}");
        let mut inner = script("#!/bin/sh\n");
        for _ in 0..MAX_INTERPRETERS {
            let outer = script(&format!("#!{}\n", inner.path().display()));
            // Kept, as the next one names it.
            std::mem::replace(&mut inner, outer)
                .into_temp_path()
                .keep()
                .unwrap();
        }
        let error = check(inner.path()).unwrap_err();
        assert!(matches!(error, ProgramError::Interpreters(_)), "{error}");
    }

    #[test]
    fn refuses_set_ids() {
        let copy = tempfile::NamedTempFile::new().unwrap();
        std::fs::copy("/bin/true", copy.path()).unwrap();
        for (mode, refused) in [
            (0o755, false),
            (0o4755, true),
            (0o2755, true),
            (0o2745, false),
        ] {
            copy.as_file()
                .set_permissions(std::fs::Permissions::from_mode(mode))
                .unwrap();
            assert_eq!(check(copy.path()).is_err(), refused, "{mode:o}");
        }
    }
}
