//! Memory cgroups: the limits above a process, and how much of each is taken for good.
//!
//! At such a limit the kernel first takes back what it can (file pages), then ends a process of the group. Whoever puts
//! pages into a process is charged to that process's group and is not refused, so one has to know beforehand.

use std::path::{Path, PathBuf};

/// At and above this a limit is none: version 1 shows the largest whole number of pages for it.
const NO_LIMIT: u64 = 1 << 62;
/// Folders looked at above one process: deeper trees than this are nobody's.
const MAX_DEPTH: usize = 64;

/// The files of one version of the interface.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    /// Each holds a limit in bytes; the least counts.
    limits: &'static [&'static str],
    /// The lines of `memory.stat` that together are what cannot be taken back, descendants' included. Anonymous and shared
    /// memory could be swapped out, but a limit that is kept by swapping is not what anybody wants.
    held: &'static [&'static str],
    /// A file with more of that.
    held_by_kernel: Option<&'static str>,
}

/// Does not tell what of its kernel memory could be taken back: all of it counts.
const ONE: Version = Version {
    limits: &["memory.limit_in_bytes"],
    held: &["total_rss", "total_shmem"],
    held_by_kernel: Some("memory.kmem.usage_in_bytes"),
};

/// At `memory.high` nobody is ended, but everybody is slowed down.
const TWO: Version = Version {
    limits: &["memory.max", "memory.high"],
    held: &[
        "anon",
        "shmem",
        "kernel_stack",
        "pagetables",
        "percpu",
        "sock",
        "slab_unreclaimable",
    ],
    held_by_kernel: None,
};

/// A memory cgroup that has a limit.
#[derive(Clone, Debug)]
pub struct LimitedGroup {
    /// Where the kernel shows it.
    pub folder: PathBuf,
    /// The file in it that holds the limit.
    pub file: &'static str,
    /// The limit.
    pub limit_bytes: u64,
    version: &'static Version,
}

impl LimitedGroup {
    fn at(folder: &Path, version: &'static Version) -> Option<Self> {
        let limits = version
            .limits
            .iter()
            .filter_map(|file| Some((number(&folder.join(file))?, *file)));
        let (limit_bytes, file) = limits.filter(|(bytes, _)| *bytes < NO_LIMIT).min()?;
        Some(Self {
            folder: folder.to_owned(),
            file,
            limit_bytes,
            version,
        })
    }

    /// How much of it is held by memory that the kernel cannot simply take back, descendants' included.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let text = std::fs::read_to_string(self.folder.join("memory.stat")).unwrap_or_default();
        let held = text.lines().filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            let counts = self.version.held.contains(&name);
            counts.then(|| bytes.trim().parse::<u64>().ok())?
        });
        let by_kernel = self.version.held_by_kernel;
        let by_kernel = by_kernel.and_then(|file| number(&self.folder.join(file)));
        held.sum::<u64>().saturating_add(by_kernel.unwrap_or(0))
    }
}

/// A file with one number in it. `max` is none.
fn number(file: &Path) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// In which groups a process is, as the kernel writes it; it changes when the process is moved. None of one that ends:
/// version 1 says of it that it is at the top.
#[must_use]
pub fn membership(pid: i32) -> Option<String> {
    const PF_EXITING: u64 = 4;
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name: state, parent, group, session, terminal, its group, flags.
    let flags = stat.rsplit(") ").next()?.split(' ').nth(6)?;
    (flags.parse::<u64>().ok()? & PF_EXITING == 0).then_some(text)
}

/// Whether a process is in a group that is frozen, or is to be: one in which somebody waits for the kernel is not for as long.
/// Version 1 shows its processes in an uninterruptible sleep instead.
#[must_use]
pub fn is_frozen(pid: i32) -> bool {
    let membership = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    froze(&membership, &mounts)
}

fn froze(membership: &str, mounts: &str) -> bool {
    let mounts = mounts.lines().filter_map(Mount::parse);
    let mut of_two = mounts.filter(|mount| *mount.version == TWO);
    of_two.any(|mount| {
        let mine = membership.lines().find_map(|line| mount.group_of(line));
        mine.is_some_and(|group| {
            let mut groups = mount.up_from(group);
            groups.any(|folder| number(&folder.join("cgroup.freeze")) == Some(1))
        })
    })
}

/// The groups with a limit among those that a process of this membership is in, innermost first.
#[must_use]
pub fn limited_above(membership: &str) -> Vec<LimitedGroup> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    above(membership, &mounts)
}

fn above(membership: &str, mounts: &str) -> Vec<LimitedGroup> {
    let mut found = Vec::new();
    for mount in mounts.lines().filter_map(Mount::parse) {
        let mine = membership.lines().find_map(|line| mount.group_of(line));
        let Some(group) = mine else { continue };
        let groups = mount.up_from(group);
        found.extend(groups.filter_map(|folder| LimitedGroup::at(&folder, mount.version)));
    }
    found
}

/// Where a hierarchy of memory cgroups is mounted.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    version: &'static Version,
    /// The group that the mount shows at its top.
    root: String,
    folder: PathBuf,
}

impl Mount {
    /// From a line of `mountinfo`: number, parent, device, root, folder, options, tags, a dash, kind, source, options.
    fn parse(line: &str) -> Option<Self> {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, folder) = (place.next()?, place.next()?);
        let mut kind = kind.split(' ');
        let version = match (kind.next()?, kind.nth(1)?) {
            ("cgroup2", _) => &TWO,
            ("cgroup", options) if options.split(',').any(|option| option == "memory") => &ONE,
            _ => return None,
        };
        Some(Self {
            version,
            root: unescaped(root),
            folder: unescaped(folder).into(),
        })
    }

    /// The folders of a group and of those above it, up to this mount.
    fn up_from(&self, group: &Path) -> impl Iterator<Item = PathBuf> {
        let inside = self.folder.join(group);
        let up: Vec<PathBuf> = inside
            .ancestors()
            .take_while(|folder| folder.starts_with(&self.folder))
            .take(MAX_DEPTH)
            .map(Path::to_owned)
            .collect();
        up.into_iter()
    }

    /// The group that a line of a membership (`NUMBER:CONTROLLERS:PATH`) names, relative to this mount; none where it is of
    /// another hierarchy, or not shown here.
    fn group_of<'a>(&self, line: &'a str) -> Option<&'a Path> {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, Path::new(fields.next()?));
        let mine = match *self.version {
            TWO => controllers.is_empty(),
            _ => controllers.split(',').any(|name| name == "memory"),
        };
        // A group outside of what this process may see begins with `/..`.
        let shown = path.strip_prefix(&self.root).ok().filter(|_| mine)?;
        (!shown.starts_with("..")).then_some(shown)
    }
}

/// `mountinfo` writes blanks and backslashes as a backslash and three octal digits.
fn unescaped(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..3)
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        match code.zip(part.get(3..)) {
            Some((code, rest)) => {
                text.push(char::from(code));
                text.push_str(rest);
            }
            None => {
                text.push('\\');
                text.push_str(part);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Folders as the kernel would show them.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let file = top.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        top
    }

    fn mount(top: &Path, root: &str, kind: &str) -> String {
        let folder = top.display().to_string().replace(' ', "\\040");
        format!("35 31 0:32 {root} {folder} rw,relatime shared:9 - {kind}\n")
    }

    #[test]
    fn of_version_two_each_ancestor_counts_and_the_lower_of_max_and_high() {
        let top = tree(&[
            ("a/memory.max", "1000000\n"),
            ("a/memory.high", "max\n"),
            ("a/b/memory.max", "max\n"),
            ("a/b/memory.high", "max\n"),
            ("a/b/c/memory.max", "900000\n"),
            ("a/b/c/memory.high", "800000\n"),
            (
                "a/b/c/memory.stat",
                "anon 5000\nfile 70000\nshmem 300\npagetables 20\nslab_reclaimable 9\nslab_unreclaimable 1\n",
            ),
        ]);
        let mounts = mount(top.path(), "/", "cgroup2 cgroup2 rw");
        let found = above("1:cpu:/x\n0::/a/b/c\n", &mounts);
        let limits: Vec<_> = found.iter().map(|g| (g.limit_bytes, g.file)).collect();
        assert_eq!(
            limits,
            [(800_000, "memory.high"), (1_000_000, "memory.max")]
        );
        assert_eq!(found[0].folder, top.path().join("a/b/c"));
        assert_eq!(found[0].held_bytes(), 5321);
        assert_eq!(found[1].held_bytes(), 0);
    }

    #[test]
    fn a_frozen_group_is_told_from_others() {
        let top = tree(&[
            ("paused/cgroup.freeze", "1\n"),
            ("paused/inside/cgroup.freeze", "0\n"),
            ("runs/cgroup.freeze", "0\n"),
        ]);
        let mounts = mount(top.path(), "/", "cgroup2 cgroup2 rw");
        assert!(froze("1:cpu:/runs\n0::/paused\n", &mounts));
        assert!(froze("0::/paused/inside\n", &mounts));
        assert!(!froze("1:cpu:/paused\n0::/runs\n", &mounts));
        assert!(!froze("0::/\n", &mounts) && !froze("0::/gone\n", &mounts));
        assert!(!froze("0::/paused\n", ""));
    }

    #[test]
    fn of_version_one_a_part_that_is_mounted_elsewhere_is_found() {
        let top = tree(&[
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("job/memory.limit_in_bytes", "4096000\n"),
            ("job/memory.stat", "rss 7\ntotal_rss 500\ntotal_shmem 60\n"),
            ("job/memory.kmem.usage_in_bytes", "4\n"),
        ]);
        let mounts = mount(top.path(), "/docker/1", "cgroup cgroup rw,memory");
        let found = above("4:memory:/docker/1/job\n0::/\n", &mounts);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].limit_bytes, found[0].held_bytes()),
            (4_096_000, 564)
        );
        // Another's group, one outside of what is shown, and one of another hierarchy.
        for elsewhere in [
            "4:memory:/docker/12",
            "4:memory:/..",
            "4:memory:/docker/1/../..",
            "5:cpu:/docker/1",
        ] {
            let found = above(elsewhere, &mounts);
            assert!(found.is_empty(), "{elsewhere}: {found:?}");
        }
    }

    #[test]
    fn folders_with_blanks() {
        let top = tree(&[("the job/memory.max", "7\n")]);
        let shown = mount(&top.path().join("the job"), "/", "cgroup2 none rw");
        assert_eq!(above("0::/", &shown)[0].limit_bytes, 7);
        assert_eq!(unescaped("a\\134b\\0"), "a\\b\\0");
    }

    #[test]
    fn this_process_is_somewhere() {
        let own = membership(std::process::id().cast_signed()).unwrap();
        for group in limited_above(&own) {
            assert!(group.limit_bytes > 0 && group.folder.is_dir());
        }
    }
}
