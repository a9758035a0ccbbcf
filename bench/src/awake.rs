//! CPUs kept from idling: on many virtual machines leaving the idle state costs more than everything else that
//! happens in a fault, so what is measured with and without it are two different things.
//!
//! A spinner must give way at once to whatever wakes up. The kernel's idle scheduling class does that only among
//! tasks of one scheduling group, and where autogroups are on, every session is a group of its own: a spinner of
//! ours would then take turns with the agent's session as an equal. So the spinners go into a control group
//! marked idle, which gives way as a whole.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Child;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::far::spawn_child;
use crate::{BenchError, Options};

/// Where the processor controller may be mounted: of its own, or unified.
const CONTROLLERS: [&str; 2] = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup"];

/// While it lives, one process of the idle class spins on every CPU that we may use.
#[derive(Debug)]
pub(crate) struct Awake {
    spinners: Vec<Child>,
    group: Option<PathBuf>,
}

impl Awake {
    pub(crate) fn keep(options: &Options) -> Result<Self, BenchError> {
        let failed = BenchError::system("keeping the CPUs awake");
        let allowed = sched_getaffinity(None).map_err(|error| failed(error.into()))?;
        let mut awake = Self {
            spinners: Vec::new(),
            group: idle_group(),
        };
        for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
            let child = spawn_child(options, &["spin", &cpu.to_string()], &[])?;
            let joined = awake
                .group
                .as_ref()
                .map(|group| fs::write(group.join("cgroup.procs"), child.id().to_string()));
            awake.spinners.push(child);
            if joined.is_some_and(|joined| joined.is_err())
                && let Some(group) = awake.group.take()
            {
                let _ = fs::remove_dir(group);
            }
        }
        Ok(awake)
    }

    /// What to say of the regime where the spinners do not give way as they should.
    pub(crate) fn caveat(&self) -> Option<String> {
        let autogroups = fs::read_to_string("/proc/sys/kernel/sched_autogroup_enabled");
        let on = autogroups.is_ok_and(|text| text.trim() == "1");
        (on && self.group.is_none()).then(|| {
            "no control group could be marked idle, and autogroups are on: what kept the CPUs awake took time \
             from the agent, but not from the baseline; set kernel.sched_autogroup_enabled to 0, or run as root"
                .into()
        })
    }
}

fn idle_group() -> Option<PathBuf> {
    let name = format!("farpage-bench-{}", std::process::id());
    CONTROLLERS.iter().find_map(|controller| {
        let group = PathBuf::from(controller).join(&name);
        fs::create_dir(&group).ok()?;
        if fs::write(group.join("cpu.idle"), "1").is_ok() {
            return Some(group);
        }
        let _ = fs::remove_dir(&group);
        None
    })
}

impl Drop for Awake {
    fn drop(&mut self) {
        for spinner in &mut self.spinners {
            let _ = spinner.kill();
            let _ = spinner.wait();
        }
        if let Some(group) = &self.group {
            let _ = fs::remove_dir(group);
        }
    }
}

/// The spinner's side: never returns unless it cannot be what it should.
pub(crate) fn spin(cpu: usize) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let mut here = CpuSet::new();
    if cpu >= CpuSet::MAX_CPU {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    here.set(cpu);
    sched_setaffinity(None, &here)?;
    crate::sys::run_when_idle()?;
    loop {
        std::hint::spin_loop();
    }
}
