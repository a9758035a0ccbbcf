//! What this kernel offers, probed once at the start, never assumed from a version.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;

use crate::sys::uffd::{Uffd, feature};

/// Where programs have their uffds from, handed on to them.
const DEVICE: &str = "/dev/userfaultfd";

/// An override for tests: run as on a kernel without `UFFDIO_MOVE`.
const NO_MOVE_VARIABLE: &str = "FARPAGE_WITHOUT_MOVE";

/// Features found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// `UFFDIO_MOVE` (6.8): pages are taken out by moving them.
    pub has_move: bool,
    /// `UFFDIO_POISON` (6.6): a lost page raises SIGBUS by a marker.
    pub has_poison: bool,
}

/// Why this kernel will not do.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The device cannot be opened.
    #[error(
        "cannot open {DEVICE}: {0}; run the agent as root, or give its user access (a udev rule for the device) \
         and CAP_SYS_PTRACE; in a container, pass the device in; farpage doctor tells more"
    )]
    Device(io::Error),
    /// The features that every kernel since 5.11 has are refused.
    #[error(
        "the kernel refuses userfaultfd's fork and unmap events: {0}; the agent needs CAP_SYS_PTRACE"
    )]
    Events(io::Error),
}

impl Kernel {
    /// Opens the device and probes.
    ///
    /// # Errors
    /// [`KernelError`], with the remedy.
    pub fn probe() -> Result<(Self, File), KernelError> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open(DEVICE)
            .map_err(KernelError::Device)?;
        let offered = crate::sys::uffd::new_from_device(device.as_fd())
            .and_then(|uffd| uffd.enable(0))
            .map_err(KernelError::Device)?;
        let hidden = std::env::var_os(NO_MOVE_VARIABLE).is_some();
        let kernel = Self {
            has_move: offered & feature::MOVE != 0 && !hidden,
            has_poison: offered & feature::POISON != 0,
        };
        crate::sys::uffd::new_from_device(device.as_fd())
            .and_then(|uffd| kernel.enable(&uffd))
            .map_err(KernelError::Events)?;
        Ok((kernel, device))
    }

    /// Enables on a program's uffd what is used there.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn enable(self, uffd: &Uffd) -> io::Result<()> {
        let moving = if self.has_move { feature::MOVE } else { 0 };
        let poison = if self.has_poison { feature::POISON } else { 0 };
        uffd.enable(feature::EVENTS | feature::THREAD_ID | feature::WRITE_PROTECT | moving | poison)
            .map(drop)
    }

    /// Enables on a drain range's uffd what is used there: no events.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn enable_drain(self, uffd: &Uffd) -> io::Result<()> {
        uffd.enable(if self.has_move { feature::MOVE } else { 0 })
            .map(drop)
    }
}
