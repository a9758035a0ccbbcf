//! `cargo xtask demo`: a real program at a quarter of its peak memory, against its native run.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::sample::{Run, run as sample};
use crate::step::{StepError, build_programs, release_folder, target_folder};

/// How many lines are sorted; each has close to a kilobyte, so that sorting needs some 240 MiB.
const LINES: u64 = 250_000;

/// What the program may have resident above its limit: the larger of this and a twentieth of the limit.
const SLACK_BYTES: u64 = 16 << 20;

/// Why the demonstration did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    #[error("{0}")]
    Step(#[from] StepError),
    #[error("cannot {0}: {1}")]
    Io(&'static str, io::Error),
    #[error("{0} failed by itself ({1}); nothing was shown")]
    Program(&'static str, std::process::ExitStatus),
    #[error("farpage gave no summary; what it said is above")]
    NoSummary,
    #[error("{0}")]
    NotShown(String),
}

/// A folder that is removed at the end, however that comes.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Builds, runs, compares, explains.
pub(crate) fn run() -> Result<(), DemoError> {
    build_programs()?;
    let farpage = release_folder()
        .join("farpage")
        .canonicalize()
        .map_err(|e| DemoError::Io("find farpage", e))?;
    let scratch = Scratch(target_folder().join(format!("demo-{}", std::process::id())));
    fs::create_dir_all(&scratch.0)
        .map_err(|e| DemoError::Io("make a folder for the demonstration", e))?;
    write_lines(&scratch.0.join("lines"))
        .map_err(|e| DemoError::Io("write the lines to sort", e))?;

    println!("\nThe program is Debian's own `sort`, unchanged, sorting {LINES} lines in memory.");
    let native = sample(sort(&mut Command::new("sort"), &scratch.0), &farpage)
        .map_err(|e| DemoError::Io("run sort", e))?;
    if !native.status.success() {
        return Err(DemoError::Program("sort", native.status));
    }
    let limit = native.peak_bytes / 4;
    println!(
        "Natively it took {:.1} s and {} of memory.",
        native.elapsed.as_secs_f64(),
        mib(native.peak_bytes)
    );
    println!(
        "Now with a quarter of that, {}, and the rest on a memory node of this run's own:",
        mib(limit)
    );
    let summary_file = scratch.0.join("summary.json");
    let mut command = Command::new(&farpage);
    command.args([
        "run",
        "--local",
        &limit.to_string(),
        "--summary",
        "json",
        "--summary-file",
    ]);
    command.arg(&summary_file).args(["--", "sort"]);
    let far = sample(sort(&mut command, &scratch.0), &farpage)
        .map_err(|e| DemoError::Io("run farpage", e))?;
    let text = fs::read_to_string(&summary_file).unwrap_or_default();
    let summary: Value = serde_json::from_str(&text).map_err(|_| DemoError::NoSummary)?;
    explain(&native, &far, limit, &summary);
    judge(&native, &far, limit, &summary)
}

fn sort<'c>(command: &'c mut Command, folder: &Path) -> &'c mut Command {
    command
        .args(["--parallel=1", "-S", "1G", "lines"])
        .current_dir(folder)
        .env("LC_ALL", "C")
}

/// Lines whose keys come in no order, the same in every run.
fn write_lines(path: &Path) -> io::Result<()> {
    let mut text = String::new();
    let mut key = 0x9e37_79b9_7f4a_7c15_u64;
    for line in 0..LINES {
        key = key
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        // Writing to a string cannot fail.
        let _ = write!(text, "{key:016x}");
        for word in 0..60_u64 {
            let _ = write!(text, "{:08x}{line:08x}", word * 7919);
        }
        text.push('\n');
    }
    fs::write(path, text)
}

fn explain(native: &Run, far: &Run, limit: u64, summary: &Value) {
    let number = |key: &str| summary[key].as_u64().unwrap_or(0);
    let micros = |key: &str| summary[key].as_f64().unwrap_or(0.0);
    let (fetched, prefetched) = (number("pages_fetched"), number("pages_prefetched"));
    let lines = [
        (
            "output",
            if native.output == far.output {
                "identical".to_owned()
            } else {
                "DIFFERENT".to_owned()
            },
            format!("{} of sorted text, compared by hash", mib(far.output.1)),
        ),
        (
            "time",
            format!("{:.1} s", far.elapsed.as_secs_f64()),
            format!(
                "{:.1} times the native run's",
                far.elapsed.as_secs_f64() / native.elapsed.as_secs_f64()
            ),
        ),
        (
            "local memory",
            mib(far.peak_bytes),
            format!(
                "the most it had here at a time, watched from outside; allowed were {} (farpage counted {})",
                mib(limit),
                mib(number("local_peak_bytes"))
            ),
        ),
        (
            "far memory",
            mib(number("far_peak_bytes")),
            "the most that lay on the memory node".to_owned(),
        ),
        (
            "faults",
            number("faults").to_string(),
            format!(
                "touches of a page that was not here; half were answered within {:.0} us, 99 of 100 within {:.0} us",
                micros("fault_p50_us"),
                micros("fault_p99_us")
            ),
        ),
        (
            "pages in",
            (fetched + prefetched).to_string(),
            format!(
                "of 4 KiB brought back; {prefetched} of them before they were touched, of which {} were then used",
                number("prefetch_hits")
            ),
        ),
        (
            "pages out",
            number("pages_evicted").to_string(),
            format!(
                "taken out to make room; {} had to be sent, the others were zeros or unchanged",
                number("pages_written_back")
            ),
        ),
        (
            "left over",
            number("far_slots_in_use_at_exit").to_string(),
            "far pages still held after the end; anything but 0 is a leak".to_owned(),
        ),
    ];
    println!();
    for (name, value, meaning) in lines {
        println!("  {name:13} {value:>12}  {meaning}");
    }
    println!("\nsummary: {summary}");
}

/// What must hold for the demonstration to have shown anything.
fn judge(native: &Run, far: &Run, limit: u64, summary: &Value) -> Result<(), DemoError> {
    let failed = |what: String| Err(DemoError::NotShown(what));
    if far.status != native.status {
        return failed(format!("with far memory, sort ended with {}", far.status));
    }
    if far.output != native.output {
        return failed("the outputs differ".to_owned());
    }
    if summary["pages_evicted"].as_u64().unwrap_or(0) == 0 {
        return failed(
            "the outputs are identical, but no page went far: far memory was not in use".to_owned(),
        );
    }
    let allowed = limit + SLACK_BYTES.max(limit / 20);
    if far.peak_bytes > allowed {
        return failed(format!(
            "it had {} here, above the limit",
            mib(far.peak_bytes)
        ));
    }
    if summary["far_slots_in_use_at_exit"] != 0 {
        return failed("far pages were left over".to_owned());
    }
    println!(
        "\nThe program never knew: same output, a quarter of the memory here, nothing left behind."
    );
    Ok(())
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
