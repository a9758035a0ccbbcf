//! The baselines over RDMA: perftest's programs, on the same device, port and address as ours.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use farpage_fabric::verbs::{DeviceChoice, chosen};

use crate::fabric::page_latency_at;
use crate::traffic::{Traffic, What};
use crate::{BenchError, Options};

/// How often a program's end is looked for.
const TICK: Duration = Duration::from_millis(20);

/// The other machine's side is started anew after each run, which takes a moment; an emulated one takes seconds.
const THERE_WITHIN: Duration = Duration::from_secs(60);

/// No run for [`round_trip`] lasts so long; one that hangs is ended.
const RUN_WITHIN: Duration = Duration::from_secs(300);

/// Where the latency that all but one in a hundred keep stands.
const P99_COLUMN: usize = 7;

/// perftest counts bandwidth in these per second.
const MEGABYTE: f64 = (1 << 20) as f64;

/// perftest has a program for each.
impl What {
    pub(crate) fn perftest(self) -> &'static str {
        match self {
            Self::ReadLatency => "ib_read_lat",
            Self::ReadBandwidth => "ib_read_bw",
            Self::WriteBandwidth => "ib_write_bw",
        }
    }

    /// Which column of its one line of figures counts: the typical latency, the average bandwidth.
    fn column(self) -> usize {
        match self {
            Self::ReadLatency => 4,
            Self::ReadBandwidth | Self::WriteBandwidth => 3,
        }
    }
}

impl Traffic {
    fn command(self, device: &DeviceChoice, port: u16) -> Command {
        let mut command = Command::new(self.what.perftest());
        command.args(["-F", "-s", &self.size.to_string(), "-p", &port.to_string()]);
        if self.what != What::ReadLatency {
            command.args(["-q", &self.queues.to_string()]);
        }
        if let Some(name) = &device.device {
            command.args(["-d", name]);
        }
        if let Some(port) = device.port {
            command.args(["-i", &port.to_string()]);
        }
        if let Some(gid) = device.gid {
            command.args(["-x", &gid.to_string()]);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Runs perftest against its server `at`, and returns what it found: microseconds, or bytes per second.
    pub(crate) fn by_perftest(
        self,
        device: &DeviceChoice,
        at: SocketAddr,
        count: usize,
        within: Duration,
    ) -> Result<f64, BenchError> {
        let [value] = self.figures(device, at, count, within, [self.what.column()])?;
        Ok(match self.what {
            What::ReadLatency => value,
            What::ReadBandwidth | What::WriteBandwidth => value * MEGABYTE,
        })
    }

    /// Runs perftest against its server `at`, and returns these columns of its figures.
    fn figures<const N: usize>(
        self,
        device: &DeviceChoice,
        at: SocketAddr,
        count: usize,
        within: Duration,
        columns: [usize; N],
    ) -> Result<[f64; N], BenchError> {
        let failed = |reason: String| BenchError::Fabric {
            what: format!("{} against {at}", self.what.perftest()),
            reason,
        };
        let give_up = Instant::now() + THERE_WITHIN;
        loop {
            let mut command = self.command(device, at.port());
            // It counts them for each queue pair.
            command.args(["-n", &(count / self.queues).to_string()]);
            if self.what != What::ReadLatency {
                command.args(["-t", &self.depth().to_string()]);
            }
            command.arg(at.ip().to_string());
            match outcome(command, within, "install perftest on both machines") {
                Ok(printed) => {
                    let found = columns.map(|column| figure(&printed, self.size, column));
                    if found.iter().all(Option::is_some) {
                        return Ok(found.map(Option::unwrap_or_default));
                    }
                    return Err(failed(format!("prints no figures: {printed}")));
                }
                Err(reason) if Instant::now() >= give_up => return Err(failed(reason)),
                Err(_) => std::thread::sleep(10 * TICK),
            }
        }
    }
}

/// p50 and p99 of `ib_read_lat` against the other machine that was named, or within this one; microseconds.
pub(crate) fn round_trip(options: &Options, rounds: usize) -> Result<(f64, f64), BenchError> {
    let page = Traffic::PAGE_LATENCY;
    let elsewhere = page_latency_at(options)?;
    let at = match elsewhere {
        Some(at) => at,
        None => TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map_err(BenchError::system("looking for a free port"))?,
    };
    let device = device(&options.device, at)?;
    let _server = match elsewhere {
        Some(_) => None,
        None => Some(Servers::start(&device, &[(page, at.port())])?),
    };
    let [p50, p99] = page.figures(
        &device,
        at,
        rounds,
        RUN_WITHIN,
        [page.what.column(), P99_COLUMN],
    )?;
    Ok((p50, p99))
}

/// The line of figures is the last one that begins with the requests' size: bytes, iterations, and so on.
fn figure(printed: &str, size: usize, column: usize) -> Option<f64> {
    let size = size.to_string();
    let fields = printed
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .rfind(|fields| fields.first().is_some_and(|first| *first == size))?;
    fields.get(column)?.parse().ok()
}

/// What a command prints, within its time; why not, otherwise, with `remedy` where it is not there.
pub(crate) fn outcome(
    mut command: Command,
    within: Duration,
    remedy: &str,
) -> Result<String, String> {
    let spawned = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|error| format!("cannot be started: {error}; {remedy}"))?;
    let deadline = Instant::now() + within;
    // What it prints fits into a pipe.
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(TICK),
            _ => {
                end(&mut child);
                return Err(format!("did not end within {} s", within.as_secs()));
            }
        }
    };
    let (mut printed, mut complaint) = (String::new(), String::new());
    if let (Some(mut out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) {
        // Bytes that are no text leave it without figures, which is told.
        let _ = (
            out.read_to_string(&mut printed),
            err.read_to_string(&mut complaint),
        );
    }
    if status.success() {
        Ok(printed)
    } else {
        Err(format!("{status}: {}", complaint.trim()))
    }
}

pub(crate) fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// The serving side of perftest's programs, until it is dropped.
#[derive(Debug)]
pub(crate) struct Servers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    pub(crate) fn start(
        device: &DeviceChoice,
        programs: &[(Traffic, u16)],
    ) -> Result<Self, BenchError> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut servers = Self {
            stop: Arc::clone(&stop),
            threads: Vec::new(),
        };
        for &(traffic, port) in programs {
            let (device, stop) = (device.clone(), Arc::clone(&stop));
            let thread = std::thread::Builder::new()
                .name(traffic.what.perftest().into())
                .spawn(move || serve(traffic, &device, port, &stop))
                .map_err(BenchError::system("serving perftest"))?;
            servers.threads.push(thread);
        }
        Ok(servers)
    }
}

/// Starts the program again whenever it has served a run.
fn serve(traffic: Traffic, device: &DeviceChoice, port: u16, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        let mut command = traffic.command(device, port);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        if let Ok(mut child) = child {
            while !stop.load(Ordering::Acquire) && matches!(child.try_wait(), Ok(None)) {
                std::thread::sleep(TICK);
            }
            end(&mut child);
        }
        std::thread::sleep(TICK);
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The device for a connection from, or to, this address.
pub(crate) fn device(choice: &str, at: SocketAddr) -> Result<DeviceChoice, BenchError> {
    let choice = if choice.is_empty() {
        DeviceChoice::default()
    } else {
        choice.parse().map_err(BenchError::fabric("--device"))?
    };
    let from = std::net::UdpSocket::bind(if at.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" })
        .and_then(|socket| socket.connect(at).and_then(|()| socket.local_addr()))
        .map(|address| address.ip());
    chosen(&choice, from.ok()).map_err(BenchError::fabric("choosing an RDMA device"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_perftest_are_found() {
        let latency = " #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]\n 4096    500          \
                       561.12         1871.29      688.46     \t       701.26  \t 92.33  \t 1021.10   1871.29\n----\n";
        assert_eq!(
            figure(latency, 4096, What::ReadLatency.column()),
            Some(688.46)
        );
        assert_eq!(figure(latency, 4096, P99_COLUMN), Some(1021.10));
        let bandwidth = " #bytes     #iterations    BW peak[MiB/sec]    BW average[MiB/sec]   MsgRate[Mpps]\n 4096       \
                         1000             12.57              12.06\t\t     0.003088\n";
        assert_eq!(
            figure(bandwidth, 4096, What::ReadBandwidth.column()),
            Some(12.06)
        );
        assert_eq!(figure(bandwidth, 65536, What::ReadBandwidth.column()), None);
        assert_eq!(figure("no device\n", 4096, 3), None);
    }
}
