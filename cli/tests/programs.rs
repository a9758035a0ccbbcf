//! Unmodified programs at a half and a quarter of their peak memory: the same output, within the limit, nothing left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use common::runs::{Outcome, digest_of, run_far_with, run_native};
use common::{alone, without_far_memory, without_program};

/// A native run that takes longer than this hangs.
const NATIVE_DEADLINE: Duration = Duration::from_secs(60);
/// A far run that takes longer than this hangs, or is as good as hanging.
const FAR_DEADLINE: Duration = Duration::from_secs(240);

/// What the tree may have above its limit: the larger of this and a twentieth of the limit.
const SLACK_BYTES: u64 = 16 << 20;

/// What part of its peak a program may keep here, and what its environment has in addition.
type Form = (u64, &'static [(&'static str, &'static str)]);

/// The harder of the two parts as this kernel does it, and the easier as on a kernel before 6.8, which takes twice as long.
const FORMS: [Form; 2] = [(4, &[]), (2, &[("FARPAGE_WITHOUT_MOVE", "1")])];
/// What is tried in addition where this variable is set: what passes at a quarter passes at a half.
const ALL_FORMS: &str = "FARPAGE_ALL_FORMS";
const MORE_FORMS: [Form; 2] = [(2, &[]), (4, &[("FARPAGE_WITHOUT_MOVE", "1")])];

/// Runs the program natively, then in each form, and compares.
fn compare(
    name: &str,
    needs: &str,
    program: &[&str],
    folder: &Path,
    peak_mib: std::ops::Range<u64>,
) -> Option<Outcome> {
    let _alone = alone();
    if without_program(name, needs) {
        return None;
    }
    let native = run_native(program, folder, NATIVE_DEADLINE);
    let peak = native.seen.peak_bytes;
    println!(
        "{name}: native {:?}, peak {} MiB, {:?}",
        native.elapsed,
        peak >> 20,
        native.seen
    );
    assert!(
        native.status.success(),
        "{name} natively: {}: {}",
        native.status,
        native.errors
    );
    assert!(
        peak_mib.contains(&(peak >> 20)),
        "{name}: {} MiB is not the size meant: {peak_mib:?}",
        peak >> 20
    );
    if without_far_memory(name) {
        return Some(native);
    }
    let more = std::env::var_os(ALL_FORMS).map_or(&[][..], |_| &MORE_FORMS[..]);
    for (part, environment) in FORMS.iter().chain(more) {
        let limit = peak / part;
        let far = run_far_with(limit, program, folder, FAR_DEADLINE, environment);
        println!(
            "{name}: far 1/{part} {environment:?} {:?}, {} KiB above the limit, {:?}",
            far.elapsed,
            far.seen.peak_bytes as i64 / 1024 - limit as i64 / 1024,
            far.seen
        );
        assert_eq!(
            far.status.code(),
            native.status.code(),
            "{name} at 1/{part}: {}",
            far.errors
        );
        assert_eq!(
            far.output, native.output,
            "{name} at 1/{part} printed something else"
        );
        let allowed = limit + SLACK_BYTES.max(limit / 20);
        assert!(
            far.seen.peak_bytes <= allowed,
            "{name} at 1/{part}: {:?} above {allowed}",
            far.seen
        );
        let summary = far
            .summary
            .unwrap_or_else(|| panic!("{name} at 1/{part}: no summary: {}", far.errors));
        assert_eq!(
            summary["far_slots_in_use_at_exit"], 0,
            "{name} at 1/{part}: {summary}"
        );
        assert_eq!(
            summary["processes_unmanaged"], 0,
            "{name} at 1/{part}: {summary}"
        );
        assert!(
            summary["pages_evicted"].as_u64() > Some(0),
            "{name} at 1/{part} went nowhere: {summary}"
        );
    }
    Some(native)
}

/// Lines of a kilobyte whose keys come in no order. Long lines keep the number of comparisons low per byte.
fn write_lines(path: &Path, lines: u64) {
    let mut text = String::new();
    let mut key = 0x9e37_79b9_7f4a_7c15_u64;
    for line in 0..lines {
        key = key
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        write!(text, "{key:016x}").unwrap();
        for word in 0..60 {
            // Half of it repeats in every line, for the compressors to find something.
            write!(text, "{:08x}{line:08x}", word * 7919).unwrap();
        }
        text.push('\n');
    }
    fs::write(path, text).unwrap();
}

#[test]
fn sort() {
    let folder = tempfile::tempdir().unwrap();
    write_lines(&folder.path().join("lines"), 250_000);
    compare(
        "sort",
        "sort",
        &["sort", "--parallel=1", "-S", "1G", "lines"],
        folder.path(),
        200..300,
    );
}

#[test]
fn python() {
    let folder = tempfile::tempdir().unwrap();
    let script = "
import hashlib
numbers, words, seed = {}, [], 12345
for i in range(450000):
    seed = (seed * 6364136223846793005 + 1442695040888963407) & (2**64 - 1)
    numbers['key%d' % i] = [seed, str(seed)]
    words.append((i, seed))
digest = hashlib.sha256()
for turn in range(2):
    for i in range(450000):
        seed, text = numbers['key%d' % i]
        assert words[i] == (i, seed) and text == str(seed)
        digest.update(text.encode())
print(len(numbers), len(words), digest.hexdigest())
";
    compare(
        "python",
        "python3",
        &["/usr/bin/python3", "-I", "-c", script],
        folder.path(),
        150..350,
    );
}

#[test]
fn sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let script = "
CREATE TABLE t(id INTEGER PRIMARY KEY, k TEXT, v TEXT);
WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<450000)
INSERT INTO t SELECT i, printf('%08x', (i*2654435761)%4294967296), printf('%0300d', i*7919) FROM c;
CREATE INDEX tk ON t(k);
UPDATE t SET v=v||'x' WHERE id%17=0;
DELETE FROM t WHERE id%13=0;
SELECT count(*), sum(length(v)), min(k), max(k) FROM t;
SELECT sum(id) FROM t WHERE k BETWEEN '20000000' AND '60000000';
PRAGMA integrity_check;
";
    fs::write(folder.path().join("script.sql"), script).unwrap();
    compare(
        "sqlite",
        "sqlite3",
        &["sqlite3", "-batch", ":memory:", ".read script.sql"],
        folder.path(),
        200..400,
    );
}

/// The program's output must be its input: it compressed and decompressed it.
fn compressor(name: &str, script: &str, count: u64, peak_mib: std::ops::Range<u64>) {
    let folder = tempfile::tempdir().unwrap();
    let lines = folder.path().join("lines");
    write_lines(&lines, count);
    if let Some(native) = compare(name, name, &["sh", "-ec", script], folder.path(), peak_mib) {
        assert_eq!(native.output, digest_of(&lines), "{name} natively");
    }
}

#[test]
fn zstd() {
    let script =
        "zstd -q -T2 -12 --long=27 -c lines > packed; zstd -q -d --long=27 -c packed; rm packed";
    compressor("zstd", script, 100_000, 150..450);
}

#[test]
fn xz() {
    let packing = "xz -T2 --lzma2=preset=0,dict=16MiB,nice=64 -c lines > packed";
    compressor(
        "xz",
        &format!("{packing}; xz -T2 -d -c packed; rm packed"),
        150_000,
        150..450,
    );
}

#[test]
fn stress_ng() {
    let folder = tempfile::tempdir().unwrap();
    // It checks itself: a wrong bit is a failure. Its sweeps touch every page again and again, the worst case.
    let program = "stress-ng -q --vm 2 --vm-bytes 240M --vm-keep --vm-method incdec --verify --vm-ops 200000 --seed 1";
    let program: Vec<&str> = program.split(' ').collect();
    compare("stress_ng", "stress-ng", &program, folder.path(), 150..300);
}

#[test]
fn gcc() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = String::from(
        "struct entry { const char *name; int a, b; double d; struct { short x, y; } p; };\n",
    );
    source.push_str("const struct entry table[] = {\n");
    for i in 0..260_000 {
        let (b, x, y) = (i * 7 % 1000 + i % 9 * 3, i % 100, i % 77);
        writeln!(source, "{{\"name{i}\", {i}, {b}, {i}.5, {{{x}, {y}}}}},").unwrap();
    }
    source.push_str("};\n");
    fs::write(folder.path().join("table.c"), source).unwrap();
    let script = "gcc -O1 -c table.c -o table.o && cat table.o && rm table.o";
    compare(
        "gcc",
        "gcc",
        &["sh", "-ec", script],
        folder.path(),
        250..450,
    );
}
