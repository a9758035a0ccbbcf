//! The kernel itself, and its features other than userfaultfd.

use crate::doctor::report::Report;
use crate::doctor::sys;

/// The oldest kernel that the fallback paths are tested on: Debian 12's.
const OLDEST: (u32, u32) = (6, 1);

pub(crate) fn check(report: &mut Report) {
    version(report);
    let scan = "finding pages written since the last look in one call; with WP_ASYNC, without a message per page";
    match sys::pagemap_scan() {
        Ok(()) => report.ok("pagemap_scan", "answers", scan),
        Err(error) => {
            let remedy = "Linux 6.7 or newer; until then written pages are known by their hash";
            report.optional("pagemap_scan", format!("fails: {error}"), scan, remedy);
        }
    }
    let pidfd = "noticing that a program has ended, without a race over its number";
    match sys::pidfd() {
        Ok(()) => report.ok("pidfd", "answers", pidfd),
        Err(error) => {
            let remedy =
                "Linux 5.3 or newer; in a container, a seccomp profile that allows pidfd_open";
            report.missing("pidfd", format!("fails: {error}"), pidfd, remedy);
        }
    }
}

fn version(report: &mut Report) {
    let purpose = "everything; each feature is probed by itself below";
    match sys::kernel() {
        Ok((release, machine)) => {
            let found = format!("Linux {release} on {machine}");
            if number(&release).is_some_and(|number| number < OLDEST) {
                let remedy = "Linux 6.1 or newer; on older ones farpage was never tried";
                report.optional("kernel", found, purpose, remedy);
            } else if machine != "x86_64" {
                let remedy = "an x86-64 machine; on others farpage was never tried";
                report.optional("kernel", found, purpose, remedy);
            } else {
                report.ok("kernel", found, purpose);
            }
        }
        Err(error) => report.optional(
            "kernel",
            format!("unknown: {error}"),
            purpose,
            "mount /proc",
        ),
    }
}

/// The first two numbers of a release.
fn number(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        assert_eq!(number("6.12.107-amd64"), Some((6, 12)));
        assert_eq!(number("6.1-rc3"), Some((6, 1)));
        assert_eq!(number("next"), None);
    }
}
