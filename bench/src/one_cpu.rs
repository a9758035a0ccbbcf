//! Everything on one CPU: no thread is woken on another, which on virtual machines costs more than all else that happens in
//! a fault, and which a scheduler does or does not do for reasons of its own.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::BenchError;

/// While it lives, this thread and the processes it starts run on one CPU.
#[derive(Debug)]
pub(crate) struct OneCpu {
    all: CpuSet,
}

impl OneCpu {
    /// Binds this thread to the first CPU it may use.
    pub(crate) fn keep() -> Result<Self, BenchError> {
        let failed = BenchError::system("keeping to one CPU");
        Self::bind().map_err(failed)
    }

    fn bind() -> io::Result<Self> {
        let all = sched_getaffinity(None)?;
        let mut one = CpuSet::new();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu));
        one.set(first.ok_or(io::ErrorKind::NotFound)?);
        sched_setaffinity(None, &one)?;
        Ok(Self { all })
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        let _ = sched_setaffinity(None, &self.all);
    }
}
