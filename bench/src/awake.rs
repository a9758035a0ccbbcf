//! CPUs kept from idling: on many virtual machines leaving the idle state costs more than everything else that
//! happens in a fault, so what is measured with and without it are two different things.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// While it lives, one thread of the idle class spins on every CPU that we may use.
pub(crate) struct Awake {
    end: Arc<AtomicBool>,
    spinners: Vec<JoinHandle<()>>,
}

impl Awake {
    pub(crate) fn keep() -> std::io::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let end = Arc::new(AtomicBool::new(false));
        let mut awake = Self {
            end: Arc::clone(&end),
            spinners: Vec::new(),
        };
        for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
            let end = Arc::clone(&end);
            let spin = move || {
                let mut here = CpuSet::new();
                here.set(cpu);
                // A spinner of the ordinary class would take time from what is measured.
                if sched_setaffinity(None, &here).is_err() || crate::sys::run_when_idle().is_err() {
                    return;
                }
                while !end.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            };
            let named = std::thread::Builder::new().name(format!("awake-{cpu}"));
            awake.spinners.push(named.spawn(spin)?);
        }
        Ok(awake)
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        for spinner in self.spinners.drain(..) {
            let _ = spinner.join();
        }
    }
}
