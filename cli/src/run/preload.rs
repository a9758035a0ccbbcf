//! Finds the preload shim and puts it into the program's environment.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The shim's file name.
const SHIM: &str = "libfarpage_preload.so";

/// Why the shim cannot be preloaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PreloadError {
    #[error(
        "the preload shim {SHIM} is neither beside the farpage executable nor in ../lib/farpage; install it there, \
         or name it in FARPAGE_PRELOAD"
    )]
    Missing,
    #[error("FARPAGE_PRELOAD names {}, which is not a file; correct it, or unset it", .0.display())]
    Misnamed(PathBuf),
    #[error(
        "the preload shim lies at {}, and LD_PRELOAD takes no path with a space or a colon; install it elsewhere",
        .0.display()
    )]
    Unnameable(PathBuf),
}

/// The shim's path: what FARPAGE_PRELOAD says, or beside this executable, or in `../lib/farpage`.
pub(crate) fn find() -> Result<PathBuf, PreloadError> {
    let shim = match std::env::var_os("FARPAGE_PRELOAD").filter(|value| !value.is_empty()) {
        Some(named) => {
            let named = PathBuf::from(named);
            named
                .canonicalize()
                .ok()
                .filter(|path| path.is_file())
                .ok_or(PreloadError::Misnamed(named))?
        }
        None => {
            let executable = std::env::current_exe().map_err(|_| PreloadError::Missing)?;
            let folder = executable.parent().ok_or(PreloadError::Missing)?;
            [folder.join(SHIM), folder.join("../lib/farpage").join(SHIM)]
                .into_iter()
                .find_map(|path| path.canonicalize().ok().filter(|path| path.is_file()))
                .ok_or(PreloadError::Missing)?
        }
    };
    if shim
        .as_os_str()
        .as_bytes()
        .iter()
        .any(|byte| matches!(byte, b' ' | b':'))
    {
        return Err(PreloadError::Unnameable(shim));
    }
    Ok(shim)
}

/// The value of LD_PRELOAD with the shim first, so that its functions come before those of other shims.
pub(crate) fn prepended(shim: &OsStr, existing: Option<&OsStr>) -> OsString {
    let mut value = shim.to_owned();
    if let Some(existing) = existing.filter(|existing| !existing.is_empty()) {
        value.push(":");
        value.push(existing);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_comes_first() {
        let with =
            |existing: Option<&str>| prepended(OsStr::new("/s.so"), existing.map(OsStr::new));
        assert_eq!(with(None), "/s.so");
        assert_eq!(with(Some("")), "/s.so");
        assert_eq!(with(Some("/a.so /b.so")), "/s.so:/a.so /b.so");
    }
}
