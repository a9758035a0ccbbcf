//! `bench fits`: a program whose memory fits should not notice that farpage is there.
//!
//! Each program runs natively and under `farpage run`, in turn. What is compared is the time from its start to
//! its end, taken by a process beside it; bringing farpage's own processes up and down is reported apart.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::child::Timed;
use crate::far::{finish, spawn_child, under_farpage};
use crate::report::{Measurement, Report};
use crate::{BenchError, Options};

const LOCAL: &str = "2G";
const FAR: &str = "2G";
/// The work of the run by which the size for [`Options::seconds`] is found.
const PROBE_SIZE: usize = 20;

/// A program: its name, the least that writes its input, and its command line.
struct Program {
    name: &'static str,
    binary: &'static str,
    write_input: fn(&mut dyn Write, usize) -> std::io::Result<()>,
    words: fn(&str) -> Vec<String>,
}

const PROGRAMS: &[Program] = &[
    Program {
        name: "sort",
        binary: "sort",
        write_input: numbers,
        words: |input| words(&["sort", "-g", "-S", "1G", "-o", "/dev/null", input]),
    },
    Program {
        name: "python",
        binary: "python3",
        write_input: script,
        words: |input| words(&["python3", input]),
    },
    Program {
        name: "gcc",
        binary: "gcc",
        write_input: functions,
        words: |input| words(&["gcc", "-O2", "-x", "c", "-c", "-o", "/dev/null", input]),
    },
];

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Runs it.
///
/// # Errors
/// [`BenchError`] where nothing can be measured.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let mut report = Report {
        bench: "fits",
        ..Report::default()
    };
    let folder = std::env::temp_dir().join(format!("farpage-fits-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(BenchError::system("making a folder for inputs"))?;
    let result = run_in(options, &folder, &mut report);
    let _ = std::fs::remove_dir_all(&folder);
    result.map(|()| report)
}

fn run_in(options: &Options, folder: &Path, report: &mut Report) -> Result<(), BenchError> {
    let (mut bring_up, mut spawn) = (Vec::new(), Vec::new());
    for program in PROGRAMS {
        if !is_installed(program.binary) {
            let note = format!(
                "{} could not be measured: it is not installed",
                program.name
            );
            report.notes.push(note);
            continue;
        }
        let input = sized_input(options, program, folder)?;
        let command = (program.words)(&input.to_string_lossy());
        let mut timed = vec!["timed"];
        timed.extend(command.iter().map(String::as_str));
        let (mut ours, mut native) = (Vec::new(), Vec::new());
        for _ in 0..options.turns.max(1) {
            let began = Instant::now();
            native.push(run_natively(options, &timed)?);
            spawn.push((began.elapsed().as_secs_f64() - last(&native)) * 1e3);
            let began = Instant::now();
            let (one, account): (Timed, Value) = under_farpage(options, LOCAL, FAR, &timed)?;
            ours.push(one.seconds);
            bring_up.push((began.elapsed().as_secs_f64() - one.seconds) * 1e3);
            note_if_managed(report, program.name, &account);
        }
        report.measurements.push(Measurement::new(
            format!("fits.{}.ratio", program.name),
            "s",
            &ours,
            &native,
            "the same program without farpage",
            &options.fabric,
        ));
    }
    if !spawn.is_empty() {
        report.measurements.push(Measurement::new(
            "fits.own_processes",
            "ms",
            &bring_up,
            &spawn,
            "the measuring process alone",
            &options.fabric,
        ));
    }
    report.notes.push(format!(
        "programs were sized to run {} s natively; --seconds changes that",
        options.seconds
    ));
    report.notes.push(
        "times are the program's own, from its start to its end; fits.own_processes is what bringing up and \
         taking down farpage's processes for one run adds around it"
            .into(),
    );
    Ok(())
}

fn last(times: &[f64]) -> f64 {
    times.last().copied().unwrap_or(0.0)
}

fn run_natively(options: &Options, timed: &[&str]) -> Result<f64, BenchError> {
    let timed: Timed = finish(spawn_child(options, timed, &[])?, timed)?;
    Ok(timed.seconds)
}

/// Says so where a program did not fit after all.
fn note_if_managed(report: &mut Report, name: &str, account: &Value) {
    let evicted = account.get("pages_evicted").and_then(Value::as_u64);
    if evicted.is_some_and(|pages| pages > 0) {
        let note = format!("{name} did not fit in {LOCAL}: {evicted:?} pages were taken out");
        if !report.notes.contains(&note) {
            report.notes.push(note);
        }
    }
}

/// Writes an input with which the program runs about as long as asked for: a probe shows how fast it is.
fn sized_input(options: &Options, program: &Program, folder: &Path) -> Result<PathBuf, BenchError> {
    let input = folder.join(program.name);
    let failed = BenchError::system("writing a program's input");
    let write = |size: usize| {
        let mut file = BufWriter::new(File::create(&input)?);
        (program.write_input)(&mut file, size)?;
        file.flush()
    };
    write(PROBE_SIZE).map_err(failed)?;
    let command = (program.words)(&input.to_string_lossy());
    let mut timed = vec!["timed"];
    timed.extend(command.iter().map(String::as_str));
    run_natively(options, &timed)?;
    let seconds = run_natively(options, &timed)?;
    let size = PROBE_SIZE as f64 * options.seconds / seconds.max(0.001);
    write((size as usize).max(1)).map_err(BenchError::system("writing a program's input"))?;
    Ok(input)
}

fn is_installed(binary: &str) -> bool {
    let status = Command::new(binary)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// Thousands of numbers, in no order.
fn numbers(out: &mut dyn Write, size: usize) -> std::io::Result<()> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    for _ in 0..size * 1000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        writeln!(out, "{}", state % 1_000_000_007)?;
    }
    Ok(())
}

/// A script that keeps tens of megabytes of small objects busy, `size` rounds long.
fn script(out: &mut dyn Write, size: usize) -> std::io::Result<()> {
    write!(
        out,
        "kept = {{i: [i, str(i)] for i in range(200000)}}\n\
         total = 0\n\
         for round in range({size}):\n\
         \x20   part = [[j, round] for j in range(20000)]\n\
         \x20   for j, pair in enumerate(part):\n\
         \x20       kept[(j * 7919 + round) % 200000][0] = pair\n\
         \x20       total += len(kept[j][1])\n\
         print(total)\n"
    )
}

/// C functions with loops and branches to optimise, four times `size` of them.
fn functions(out: &mut dyn Write, size: usize) -> std::io::Result<()> {
    for i in 0..size * 4 {
        writeln!(
            out,
            "int f{i}(int *a, int n) {{ int s = {i}; for (int i = 0; i < n; i++) {{ \
             switch (a[i] % 7) {{ case 0: s += a[i] * {i}; break; case 1: s ^= a[i] << 3; break; \
             case 2: s -= s / (a[i] | 1); break; case 3: for (int j = i; j < n; j++) s += a[j] ^ j; break; \
             default: s = s * 31 + a[i]; }} if (s > {i} * 1000) s %= 997; a[i] = s; }} return s; }}"
        )?;
    }
    Ok(())
}
