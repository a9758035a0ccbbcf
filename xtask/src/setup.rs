//! Installs the Debian packages that building and testing need, or says how.

use std::path::Path;

use crate::step::{Step, StepError, installed};

/// A package, how to see that it is there, and what it is for.
struct Package {
    name: &'static str,
    /// A program, or a file where it starts with a slash.
    sign: &'static str,
    purpose: &'static str,
}

const fn package(name: &'static str, sign: &'static str, purpose: &'static str) -> Package {
    Package {
        name,
        sign,
        purpose,
    }
}

const PACKAGES: [Package; 25] = [
    package(
        "gcc",
        "gcc",
        "linking, and a program to run with far memory",
    ),
    package(
        "libc6-dev",
        "/usr/include/stdlib.h",
        "linking, and static programs, which are to be refused",
    ),
    package(
        "python3",
        "/usr/bin/python3",
        "a program to run with far memory",
    ),
    package("sqlite3", "sqlite3", "a program to run with far memory"),
    package("zstd", "zstd", "a program to run with far memory"),
    package("xz-utils", "xz", "a program to run with far memory"),
    package(
        "stress-ng",
        "stress-ng",
        "a program that checks its own memory",
    ),
    package(
        "redis-server",
        "redis-server",
        "a server to run with far memory",
    ),
    package("gdb", "gdb", "tests of programs under a debugger"),
    package("util-linux", "setpriv", "tests as another account"),
    package("procps", "ps", "tests that look at sessions"),
    package(
        "libibverbs-dev",
        "/usr/include/infiniband/verbs.h",
        "building the RDMA fabric",
    ),
    package(
        "librdmacm-dev",
        "/usr/include/rdma/rdma_cma.h",
        "building the RDMA fabric",
    ),
    package(
        "libclang-dev",
        "/usr/share/doc/libclang-dev",
        "building the RDMA fabric: bindgen reads its headers with it",
    ),
    package("pkg-config", "pkg-config", "building the RDMA fabric"),
    package(
        "ibverbs-providers",
        "/etc/libibverbs.d/rxe.driver",
        "RDMA in the lab",
    ),
    package("ibverbs-utils", "ibv_rc_pingpong", "checking the lab"),
    package("perftest", "ib_read_lat", "checking the lab"),
    package("iproute2", "rdma", "RDMA in the lab"),
    package(
        "qemu-system-x86",
        "qemu-system-x86_64",
        "the lab's machines",
    ),
    package("busybox-static", "busybox", "the lab's machines"),
    package("cpio", "cpio", "the lab's machines"),
    package("kmod", "depmod", "the lab's machines"),
    package(
        "rdma-core",
        "/etc/rdma",
        "RDMA on hosts with hardware, and its udev rules",
    ),
    package("shellcheck", "shellcheck", "checking the lab's scripts"),
];

/// Why something is still missing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    #[error("these packages are missing; install them as root: {0}")]
    NotRoot(String),
    #[error(
        "this is no Debian system (there is no apt-get); install what these Debian packages hold: {0}"
    )]
    NotDebian(String),
    #[error("{0}")]
    Step(#[from] StepError),
}

/// Installs what is missing. What is there is left alone.
pub(crate) fn run() -> Result<(), SetupError> {
    let missing: Vec<&Package> = PACKAGES
        .iter()
        .filter(|package| !is_there(package))
        .collect();
    if missing.is_empty() {
        println!("setup: all packages are there");
        return Ok(());
    }
    for package in &missing {
        println!("setup: {} is missing: {}", package.name, package.purpose);
    }
    let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
    if installed("apt-get").is_none() {
        return Err(SetupError::NotDebian(names.join(" ")));
    }
    let install = [
        &["install", "-y", "--no-install-recommends"],
        names.as_slice(),
    ]
    .concat();
    let root = prefix().ok_or_else(|| {
        SetupError::NotRoot(format!(
            "sudo apt-get update && sudo apt-get {}",
            install.join(" ")
        ))
    })?;
    for arguments in [["update"].as_slice(), install.as_slice()] {
        let words = root
            .iter()
            .chain(&["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"])
            .chain(arguments);
        let words: Vec<&str> = words.copied().collect();
        if let Some((program, rest)) = words.split_first() {
            Step::new(program).args(rest).run()?;
        }
    }
    Ok(())
}

fn is_there(package: &Package) -> bool {
    if package.sign.starts_with('/') {
        return Path::new(package.sign).exists();
    }
    installed(package.sign).is_some()
}

/// What to put before a command to run it as root without being asked for anything; none if there is no way.
fn prefix() -> Option<&'static [&'static str]> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    // The second of the four is the effective one.
    if ids.split_whitespace().nth(1) == Some("0") {
        return Some(&[]);
    }
    let (may, _) = Step::new("sudo").args(["-n", "true"]).quietly()?;
    may.then_some(&["sudo", "-n"])
}
