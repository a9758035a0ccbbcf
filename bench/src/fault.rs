//! `bench fault`: what touching a far page costs, against a bare userfaultfd loop.
//!
//! One process touches pages, another answers, in both cases. The baseline's answers come from a loop that
//! waits, reads one message and installs one page that it has at hand; where pages travel over TCP or RDMA, the bare
//! round trip for a page is added to it. Ours come from an agent that looks the page up, reads it from a memory
//! node, checks it, installs it, and takes another page out to make room.

use serde_json::Value;

use crate::awake::Awake;
use crate::bare::{self, Source};
use crate::child::{Touches, Walk};
use crate::fabric::Server;
use crate::far::under_farpage;
use crate::median::{median, quantile};
use crate::one_cpu::OneCpu;
use crate::report::{Measurement, Report};
use crate::requester::Requester;
use crate::traffic::Traffic;
use crate::{BenchError, Options};

/// What may stay local of [`RANDOM_PAGES`] or [`WALK_PAGES`]: so little that nearly everything is far.
const LOCAL: &str = "8M";
const FAR: &str = "1G";
/// Pages to touch at random (256 MiB).
const RANDOM_PAGES: &str = "65536";
/// Pages to walk over (128 MiB).
const WALK_PAGES: &str = "32768";
/// Pages that the baseline of the walk installs at each fault.
const WALK_BATCH: usize = 64;
const ROUND_TRIPS: usize = 4000;

/// One regime's figures, one of each per turn.
#[derive(Debug, Default)]
struct Figures {
    read_p50: Pair,
    /// Against one loop that does both; where pages travel.
    one_loop: Pair,
    read_p99: Pair,
    write_p50: Pair,
    walk: Pair,
    bare: Vec<f64>,
    round_trip: Vec<f64>,
    agent_p50: Vec<f64>,
}

#[derive(Debug, Default)]
struct Pair {
    ours: Vec<f64>,
    baseline: Vec<f64>,
}

/// Runs it.
///
/// # Errors
/// [`BenchError`] where nothing can be measured.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let mut awake = Figures::default();
    let (mut idle, mut one_cpu) = (Figures::default(), Figures::default());
    let mut caveat = None;
    for _ in 0..options.turns.max(1) {
        let spinners = Awake::keep(options)?;
        caveat = spinners.caveat();
        turn(options, &mut awake, true)?;
        drop(spinners);
        turn(options, &mut idle, true)?;
        // An agent that is not of this run would not be on that CPU.
        if options.agent.is_none() {
            let _bound = OneCpu::keep()?;
            turn(options, &mut one_cpu, false)?;
        }
    }
    let mut report = Report {
        bench: "fault",
        ..Report::default()
    };
    add(&mut report, options, &awake, "");
    add(&mut report, options, &idle, ".idle");
    if options.agent.is_none() {
        add(&mut report, options, &one_cpu, ".one_cpu");
    }
    report.notes.push(
        "names that end in .idle were measured on idle CPUs, those in .one_cpu with all processes on one CPU, the \
         others while a thread of the idle scheduling class kept each CPU awake; compare within one regime"
            .into(),
    );
    report.notes.extend(caveat);
    if round_trip_of(&options.fabric).is_some() {
        report.notes.push(format!(
            "the baseline over {} is the sum of two medians (or of two 99th percentiles) measured one after \
             the other; that of .one_loop is one loop that does both, which looks all the time and so has no figure on one CPU",
            options.fabric
        ));
    }
    report.notes.push(
        "fault.sequential.page_us: ours also takes one page out for every page brought home; the baseline \
         installs 64 pages it has at hand at each fault and takes nothing out"
            .into(),
    );
    Ok(report)
}

/// A bare loop that waits for the fabric by looking needs a CPU besides those of the others (`may_look`).
fn turn(options: &Options, figures: &mut Figures, may_look: bool) -> Result<(), BenchError> {
    let touches = options.touches.to_string();
    let random = ["bare-random", RANDOM_PAGES, &touches];
    let mut bare: Touches = bare::answered(options, &random, Source::AtHand(1))?;
    let one_loop = if may_look && round_trip_of(&options.fabric).is_some() {
        Some(one_loop(options, &random)?)
    } else {
        None
    };
    let (trip_p50, trip_p99) = match options.fabric.as_str() {
        "tcp" => bare::tcp_round_trip(options, ROUND_TRIPS)?,
        #[cfg(feature = "verbs")]
        "rdma" => crate::perftest::round_trip(options, ROUND_TRIPS)?,
        _ => (0.0, 0.0),
    };
    let (mut ours, account): (Touches, Value) =
        under_farpage(options, LOCAL, FAR, &["random", RANDOM_PAGES, &touches])?;
    let bare_p50 = quantile(&mut bare.read_us, 0.5);
    figures.bare.push(bare_p50);
    figures.round_trip.push(trip_p50);
    figures
        .agent_p50
        .extend(account.get("fault_p50_us").and_then(Value::as_f64));
    figures
        .read_p50
        .push(quantile(&mut ours.read_us, 0.5), bare_p50 + trip_p50);
    if let Some(mut one_loop) = one_loop {
        let (ours, theirs) = (&mut ours.read_us, &mut one_loop.read_us);
        figures
            .one_loop
            .push(quantile(ours, 0.5), quantile(theirs, 0.5));
    }
    figures.read_p99.push(
        quantile(&mut ours.read_us, 0.99),
        quantile(&mut bare.read_us, 0.99) + trip_p99,
    );
    figures.write_p50.push(
        quantile(&mut ours.write_us, 0.5),
        quantile(&mut bare.write_us, 0.5) + trip_p50,
    );
    let bare: Walk = bare::answered(
        options,
        &["bare-walk", WALK_PAGES],
        Source::AtHand(WALK_BATCH),
    )?;
    let (ours, _): (Walk, Value) = under_farpage(options, LOCAL, FAR, &["walk", WALK_PAGES])?;
    figures.walk.push(ours.page_us, bare.page_us);
    Ok(())
}

/// Touches that one bare loop answers with pages that it reads over the fabric.
fn one_loop(options: &Options, random: &[&str]) -> Result<Touches, BenchError> {
    let server = Server::of(options)?;
    let mut requester = Requester::connect(&server.address, Traffic::PAGE_LATENCY)?;
    bare::answered(options, random, Source::Fabric(&mut requester))
}

/// What a page's bare way is measured by, where it has one.
fn round_trip_of(fabric: &str) -> Option<&'static str> {
    match fabric {
        "tcp" => Some("the bare 4 KiB round trip over TCP"),
        "rdma" => Some("ib_read_lat"),
        _ => None,
    }
}

impl Pair {
    fn push(&mut self, ours: f64, baseline: f64) {
        self.ours.push(ours);
        self.baseline.push(baseline);
    }
}

fn add(report: &mut Report, options: &Options, figures: &Figures, regime: &str) {
    let fabric = options.fabric.as_str();
    let bare = "bare userfaultfd loop in another process";
    let one_page = match round_trip_of(fabric) {
        Some(trip) => &format!("{bare}, plus {trip}"),
        None => bare,
    };
    let batched = "bare userfaultfd loop in another process, 64 pages at each fault";
    let one_loop = "one bare userfaultfd loop that reads each page over our fabric";
    for (name, pair, baseline) in [
        ("fault.read.p50", &figures.read_p50, one_page),
        ("fault.read.p50.one_loop", &figures.one_loop, one_loop),
        ("fault.read.p99", &figures.read_p99, one_page),
        ("fault.write.p50", &figures.write_p50, one_page),
        ("fault.sequential.page_us", &figures.walk, batched),
    ] {
        if pair.ours.is_empty() {
            continue;
        }
        let name = format!("{name}{regime}");
        let (ours, theirs) = (&pair.ours, &pair.baseline);
        let one = Measurement::new(name, "us", ours, theirs, baseline, fabric);
        report.measurements.push(one);
    }
    let regime = regime.strip_prefix('.').unwrap_or("awake");
    let mut note = format!(
        "{regime}: bare userfaultfd loop alone {:.1} us",
        median(&figures.bare)
    );
    if let Some(trip) = round_trip_of(fabric) {
        note += &format!(", {trip} {:.1} us", median(&figures.round_trip));
    }
    if !figures.agent_p50.is_empty() {
        note += &format!(
            "; the agent's share of our fault, from reading its message to the wake-up, {:.1} us (p50 over all \
             faults, those of the filling included)",
            median(&figures.agent_p50)
        );
    }
    report.notes.push(note);
}
