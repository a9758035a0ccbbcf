//! What this account may do, and whether the shim is in its place.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::doctor::report::Report;
use crate::run::find_preload;

/// The bit of CAP_SYS_PTRACE in the capability masks.
const CAP_SYS_PTRACE: u32 = 19;

pub(crate) fn check(report: &mut Report) {
    device(report);
    let sysctl = "userfaultfd for every account, by the system call, which is not farpage's way: it uses the device";
    match std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
        .as_deref()
        .map(str::trim)
    {
        Ok("0") => report.ok(
            "unprivileged_userfaultfd",
            "0: only privileged accounts",
            sysctl,
        ),
        Ok(value) => report.ok(
            "unprivileged_userfaultfd",
            format!("{value}: every account"),
            sysctl,
        ),
        Err(error) => report.optional(
            "unprivileged_userfaultfd",
            format!("unknown: {error}"),
            sysctl,
            "nothing to do where the device is there",
        ),
    }
    let ptrace = "fork events, and looking into /proc of programs of other accounts";
    if has_capability(CAP_SYS_PTRACE) {
        report.ok("cap_sys_ptrace", "held", ptrace);
    } else {
        report.optional(
            "cap_sys_ptrace",
            "not held",
            ptrace,
            "run the agent as root, or by systemd with AmbientCapabilities=CAP_SYS_PTRACE; programs need it not",
        );
    }
    let shim = "attaching an unmodified program to the agent";
    match find_preload() {
        Ok(path) => report.ok("preload_shim", path.display().to_string(), shim),
        Err(error) => report.missing("preload_shim", "not found", shim, error.to_string()),
    }
}

fn device(report: &mut Report) {
    let (id, purpose) = (
        "dev_userfaultfd",
        "userfaultfd for the accounts that may open this file",
    );
    let path = "/dev/userfaultfd";
    let rule = "as root: groupadd -f farpage; echo 'KERNEL==\"userfaultfd\", GROUP=\"farpage\", MODE=\"0660\"' > \
                /etc/udev/rules.d/70-farpage.rules; udevadm trigger /dev/userfaultfd (or, without udev, chgrp and \
                chmod it); then add the agent's account to that group. Who may open it may stop the kernel in the \
                middle of its work on this account's memory, so it is not for everybody";
    match std::fs::metadata(path) {
        Ok(metadata) => {
            let mode = metadata.permissions().mode() & 0o777;
            let found = format!(
                "mode {mode:o}, owner {}, group {}",
                metadata.uid(),
                metadata.gid()
            );
            match File::options().read(true).write(true).open(path) {
                Ok(_) => report.ok(id, format!("may be opened ({found})"), purpose),
                Err(error) => report.optional(id, format!("{error} ({found})"), purpose, rule),
            }
        }
        Err(error) => {
            let remedy = "Linux 6.1 or newer with devtmpfs; in a container, pass the device in (docker run --device \
                          /dev/userfaultfd ...)";
            report.optional(id, error.to_string(), purpose, remedy);
        }
    }
}

fn has_capability(capability: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> capability & 1 == 1)
}
