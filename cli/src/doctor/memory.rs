//! Limits and settings of this machine's memory.

use farpage_agent::cgroup;

use crate::doctor::report::Report;
use crate::doctor::sys;
use crate::size::readable;

/// Less lockable memory than this is too little for registered memory to be worth having.
const ENOUGH_MEMLOCK_BYTES: u64 = 64 << 20;

pub(crate) fn check(report: &mut Report) {
    memlock(report);
    transparent_huge_pages(report);
    huge_pages(report);
    memory_cgroup(report);
}

fn memlock(report: &mut Report) {
    let purpose = "registering memory with an RDMA device, which locks it; shm and tcp need none";
    let remedy = "ulimit -l unlimited, LimitMEMLOCK=infinity in a systemd unit, or a line in \
                  /etc/security/limits.d";
    match sys::memlock_limit() {
        Ok(None) => report.ok("memlock", "no limit", purpose),
        Ok(Some(bytes)) if bytes >= ENOUGH_MEMLOCK_BYTES => {
            report.ok("memlock", readable(bytes), purpose);
        }
        Ok(Some(bytes)) => report.optional(
            "memlock",
            format!("only {}", readable(bytes)),
            purpose,
            remedy,
        ),
        Err(error) => report.optional("memlock", format!("unknown: {error}"), purpose, remedy),
    }
}

fn transparent_huge_pages(report: &mut Report) {
    let purpose = "fast growth of programs below their limit; a huge page is split when a part of it is taken out";
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let mode = text.split(['[', ']']).nth(1).unwrap_or("unknown");
            report.ok("transparent_huge_pages", mode, purpose);
        }
        Err(_) => report.optional(
            "transparent_huge_pages",
            "not in this kernel",
            purpose,
            "nothing: farpage works without",
        ),
    }
}

fn huge_pages(report: &mut Report) {
    let purpose =
        "a memory node's pool with fewer address translations; programs' own huge pages stay local";
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Total:"))
        .map_or("0", str::trim);
    if total == "0" {
        let remedy = "on a memory node, if wanted: sysctl vm.nr_hugepages=N (2 MiB each), and farpage node --huge-pages";
        report.optional("huge_pages", "none reserved", purpose, remedy);
    } else {
        report.ok("huge_pages", format!("{total} reserved"), purpose);
    }
}

fn memory_cgroup(report: &mut Report) {
    let purpose =
        "a limit that the kernel ends programs at: they are kept below it, whatever --local says";
    let own = cgroup::membership(std::process::id().cast_signed()).unwrap_or_default();
    let groups = cgroup::limited_above(&own);
    let found = match groups.iter().min_by_key(|group| group.limit_bytes) {
        None => "no limit here".to_owned(),
        Some(group) => format!(
            "{} by {}/{}",
            readable(group.limit_bytes),
            group.folder.display(),
            group.file
        ),
    };
    report.ok("memory_cgroup", found, purpose);
}
