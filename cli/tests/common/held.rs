//! A program that holds still while somebody counts its pages, and what the kernel counts.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdout, Command, Stdio};

/// The kernel keeps resident sizes per CPU and adds them up now and then: so many pages they may be off.
pub fn kernels_slack() -> u64 {
    64 * std::thread::available_parallelism().unwrap().get() as u64
}

/// The program, which says who holds still with how many pages touched.
pub struct Program(Child, BufReader<ChildStdout>);

impl Program {
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self(child, out)
    }

    /// Waits until it holds still as `who`; its pid, and the pages it has touched.
    pub fn holds(&mut self, who: &str) -> (i32, u64) {
        let mut line = String::new();
        self.1.read_line(&mut line).unwrap();
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        assert_eq!(words.first(), Some(&who), "{line:?}");
        (words[1].parse().unwrap(), words[2].parse().unwrap())
    }

    pub fn goes_on(&mut self) {
        self.0.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    /// Waits for its end, which must be a good one.
    pub fn end(mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

/// What `/proc` says of a process, in pages.
#[derive(Debug, Default)]
pub struct Proc {
    /// Resident and anonymous.
    pub anonymous: u64,
    /// Present in mappings that a uffd manages.
    pub managed: u64,
}

/// Counts them.
pub fn proc(pid: i32) -> Proc {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let mut found = Proc::default();
    let mut range = 0..0;
    for line in smaps.lines() {
        let first = line.split_ascii_whitespace().next().unwrap();
        if let Some(size) = line.strip_prefix("Anonymous:") {
            let kib: u64 = size.trim().trim_end_matches(" kB").parse().unwrap();
            found.anonymous += kib / 4;
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_ascii_whitespace().any(|flag| flag == "um") {
                found.managed += present(&pagemap, &range);
            }
        } else if let Some((start, end)) = first.split_once('-') {
            let parse = |word| u64::from_str_radix(word, 16).unwrap();
            range = parse(start)..parse(end);
        }
    }
    found
}

fn present(pagemap: &File, range: &std::ops::Range<u64>) -> u64 {
    let mut words = vec![0; ((range.end - range.start) / 4096 * 8) as usize];
    pagemap
        .read_exact_at(&mut words, range.start / 512)
        .unwrap();
    words
        .chunks_exact(8)
        .filter(|word| word[7] & 0x80 != 0)
        .count() as u64
}
