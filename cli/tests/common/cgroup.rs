//! Real memory cgroups, of whichever version this machine has.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{eventually, sys};

/// Where each version's hierarchy is usually mounted, and the file that shows that memory can be limited there.
const PLACES: [(u8, &str, &str); 2] = [
    (1, "/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    (2, "/sys/fs/cgroup", "cgroup.controllers"),
];

/// A group made for one test, and removed after it.
#[derive(Debug)]
pub struct MemoryCgroup {
    version: u8,
    pub folder: PathBuf,
}

impl MemoryCgroup {
    /// A group with this limit.
    ///
    /// # Errors
    /// Why there is none.
    pub fn create(name: &str, limit_bytes: u64) -> Result<Self, String> {
        let mut reasons = Vec::new();
        for (version, place, file) in PLACES {
            let shown = std::fs::read_to_string(Path::new(place).join(file)).unwrap_or_default();
            if shown.is_empty() || version == 2 && !shown.contains("memory") {
                reasons.push(format!("no version {version} memory cgroups at {place}"));
                continue;
            }
            if version == 2 {
                let _ = std::fs::write(Path::new(place).join("cgroup.subtree_control"), "+memory");
            }
            let folder = Path::new(place).join(format!("farpage-{name}-{}", std::process::id()));
            match std::fs::create_dir(&folder) {
                Ok(()) => {
                    let group = Self { version, folder };
                    group.set_limit(limit_bytes);
                    return Ok(group);
                }
                Err(error) => reasons.push(format!("{}: {error}", folder.display())),
            }
        }
        Err(reasons.join("; "))
    }

    pub fn set_limit(&self, bytes: u64) {
        let file = self.of_version("memory.limit_in_bytes", "memory.max");
        std::fs::write(self.folder.join(file), bytes.to_string()).unwrap();
    }

    /// Has who meets the limit wait rather than be ended. Returns false where a group has no such choice (version 2).
    pub fn ends_nobody(&self) -> bool {
        self.version == 1 && std::fs::write(self.folder.join("memory.oom_control"), "1").is_ok()
    }

    /// Whether somebody waits for the limit, where it ends nobody.
    pub fn is_full(&self) -> bool {
        self.field("memory.oom_control", "under_oom ") == 1
    }

    /// Makes a command begin in the group. Whoever it becomes afterwards, it is the test's user who puts it there.
    pub fn contain(&self, command: &mut Command) {
        let procs = std::fs::File::options()
            .write(true)
            .open(self.procs())
            .unwrap();
        sys::before_exec(command, move || (&procs).write_all(b"0"));
    }

    /// The file to which a process writes its number to join.
    pub fn procs(&self) -> PathBuf {
        self.folder.join("cgroup.procs")
    }

    /// How many processes the kernel has ended for the limit.
    pub fn kills(&self) -> u64 {
        self.field(
            self.of_version("memory.oom_control", "memory.events"),
            "oom_kill ",
        )
    }

    /// The most that was charged to it, and how often the limit was met (with file pages to take back it may be).
    pub fn peak(&self) -> (u64, u64) {
        let peak = self.field(
            self.of_version("memory.max_usage_in_bytes", "memory.peak"),
            "",
        );
        let met = match self.version {
            1 => self.field("memory.failcnt", ""),
            _ => self.field("memory.events", "max "),
        };
        (peak, met)
    }

    fn of_version(&self, one: &'static str, two: &'static str) -> &'static str {
        if self.version == 1 { one } else { two }
    }

    fn field(&self, file: &str, name: &str) -> u64 {
        let text = std::fs::read_to_string(self.folder.join(file)).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = std::fs::remove_dir(&self.folder);
        } else {
            eventually("the cgroup empties", || {
                std::fs::remove_dir(&self.folder).is_ok()
            });
        }
    }
}
