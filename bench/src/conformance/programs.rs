//! The C programs, which are part of this crate and compiled where they are run.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

/// What programs include.
const HEADERS: &[(&str, &str)] = &[
    ("far.h", include_str!("../../c/far.h")),
    ("states.h", include_str!("../../c/states.h")),
];

/// The programs by name.
const SOURCES: &[(&str, &str)] = &[
    ("accounting", include_str!("../../c/accounting.c")),
    ("anon", include_str!("../../c/anon.c")),
    ("atomics", include_str!("../../c/atomics.c")),
    ("births", include_str!("../../c/births.c")),
    ("fork_tree", include_str!("../../c/fork_tree.c")),
    ("forks", include_str!("../../c/forks.c")),
    ("growth", include_str!("../../c/growth.c")),
    ("hints", include_str!("../../c/hints.c")),
    ("hostile", include_str!("../../c/hostile.c")),
    ("kernel_access", include_str!("../../c/kernel_access.c")),
    ("memory_calls", include_str!("../../c/memory_calls.c")),
    ("outage", include_str!("../../c/outage.c")),
    ("outage_alone", include_str!("../../c/outage_alone.c")),
    ("outage_heir", include_str!("../../c/outage_heir.c")),
    ("parts", include_str!("../../c/parts.c")),
    ("random_calls", include_str!("../../c/random_calls.c")),
    ("soft_dirty", include_str!("../../c/soft_dirty.c")),
    ("stopped", include_str!("../../c/stopped.c")),
    ("threads", include_str!("../../c/threads.c")),
];

/// How much memory the programs work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Size {
    /// What they were written for.
    Whole,
    /// A quarter of that, for machines on which every page costs a millisecond.
    Quarter,
}

impl Size {
    /// What a program is told of it.
    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Whole => &[],
            Self::Quarter => &["-DMIB=(256ul<<10)"],
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Whole => "",
            Self::Quarter => ".quarter",
        }
    }
}

/// Why there is no program to run.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// Nothing to compile with.
    #[error("no C compiler to make its program with (cc: {0}); install gcc and libc6-dev")]
    NoCompiler(io::Error),
    /// It does not compile here.
    #[error("{program}.c does not compile: {stderr}")]
    Source {
        /// Which.
        program: String,
        /// What the compiler said.
        stderr: String,
    },
    /// A file could not be written.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Asked for by a name that none has.
    #[error("there is no program called {0}")]
    Unknown(String),
}

/// Compiles a program in `folder`, which may be shared with others who do the same, and returns where it is.
///
/// # Errors
/// [`CompileError`].
pub fn compile(program: &str, size: Size, folder: &Path) -> Result<PathBuf, CompileError> {
    let found = SOURCES.iter().find(|(name, _)| *name == program);
    let (_, source) = found.ok_or_else(|| CompileError::Unknown(program.to_owned()))?;
    // A folder of its own until it is whole.
    static TURN: AtomicU64 = AtomicU64::new(0);
    let turn = TURN.fetch_add(1, Ordering::Relaxed);
    let fresh = folder.join(format!("{program}.{}.{turn}", std::process::id()));
    let write = |name: &str, text: &str| {
        let path = fresh.join(name);
        std::fs::write(&path, text).map_err(|error| CompileError::File { path, error })
    };
    std::fs::create_dir_all(&fresh).map_err(|error| CompileError::File {
        path: fresh.clone(),
        error,
    })?;
    for (name, text) in HEADERS {
        write(name, text)?;
    }
    write("program.c", source)?;
    let compiled = Command::new("cc")
        .args([
            "-O2",
            "-Wall",
            "-Wextra",
            "-pthread",
            "-o",
            "program",
            "program.c",
        ])
        .args(size.flags())
        .current_dir(&fresh)
        .stdin(Stdio::null())
        .output();
    let out = compiled.map_err(CompileError::NoCompiler)?;
    if !out.status.success() {
        return Err(CompileError::Source {
            program: program.to_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        });
    }
    let path = folder.join(format!("{program}{}", size.suffix()));
    std::fs::rename(fresh.join("program"), &path).map_err(|error| CompileError::File {
        path: path.clone(),
        error,
    })?;
    let _ = std::fs::remove_dir_all(&fresh);
    Ok(path)
}
