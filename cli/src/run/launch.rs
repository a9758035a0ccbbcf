//! Starts the program as our child, in our process group, with what we ourselves were started with.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::options::RunOptions;
use crate::sys;

/// Why the program could not be started, although it was found.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot execute: {source}", .path.display())]
pub(crate) struct LaunchError {
    path: PathBuf,
    source: io::Error,
}

impl LaunchError {
    /// The status that a shell gives: 127 if something was not there, else 126.
    pub(crate) fn exit_status(&self) -> u8 {
        if self.source.kind() == io::ErrorKind::NotFound {
            127
        } else {
            126
        }
    }
}

/// Starts the program and returns its pid. It is ours to reap.
///
/// It stays in our process group, so that the terminal's signals and the shell's job control reach it as if it had
/// been started without us.
pub(crate) fn launch(
    path: &Path,
    options: &RunOptions,
    environment: Vec<(OsString, OsString)>,
) -> Result<u32, LaunchError> {
    let mut command = Command::new(exact(path));
    command
        .arg0(&options.program)
        .args(&options.arguments)
        .envs(environment);
    sys::inherit_exactly(&mut command);
    match command.spawn() {
        Ok(child) => Ok(child.id()),
        Err(source) => Err(LaunchError {
            path: path.to_owned(),
            source,
        }),
    }
}

/// A name without a slash would be looked up once more, and might be found elsewhere.
fn exact(path: &Path) -> PathBuf {
    if path.components().count() > 1 || path.is_absolute() {
        path.to_owned()
    } else {
        Path::new(".").join(path)
    }
}
