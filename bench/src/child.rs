//! The measuring processes' side: what `farpage bench-touch` does. It prints one JSON object.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::bare::{REQUEST_BYTES, send_fd};
use crate::region::{PAGE, Region, shuffled};
use crate::requester;
use crate::traffic::Traffic;

/// How long pages on their way out are given before anything is measured.
const SETTLE: Duration = Duration::from_millis(100);

/// Latencies of single touches, microseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Touches {
    /// Of touches that read.
    pub read_us: Vec<f64>,
    /// Of touches that write.
    pub write_us: Vec<f64>,
}

/// A walk over pages in their order.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Walk {
    /// Pages that were absent when it began.
    pub absent: u64,
    /// Microseconds per absent page.
    pub page_us: f64,
}

/// Forks, each by itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Forks {
    /// How long the call took the parent.
    pub call_ms: Vec<f64>,
    /// From before the call until the child was past it.
    pub child_runs_ms: Vec<f64>,
    /// The parent's first read of a page, one that is not here where there is one.
    pub parent_touch_us: Vec<f64>,
    /// The child's.
    pub child_touch_us: Vec<f64>,
    /// From before the call until the child had ended and was reaped.
    pub child_gone_ms: Vec<f64>,
}

/// A program that ran to its end.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Timed {
    /// From before it was started to after it was reaped.
    pub seconds: f64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// Called by hand.
    #[error("this is the measuring side of farpage bench, which calls it itself")]
    Usage,
    /// A system call failed.
    #[error("cannot measure: {0}")]
    System(#[from] io::Error),
    /// Pages did not move.
    #[error("{0}")]
    Fabric(#[from] Box<crate::BenchError>),
    /// The program to be timed failed.
    #[error("{0} failed: {1}")]
    Program(String, std::process::ExitStatus),
}

/// Does what `words` say: `random PAGES TOUCHES`, `walk PAGES`, `fork PAGES TIMES` (all on memory that was filled before, so that
/// it lies far if little may stay), the same with `bare-` before and a socket's path behind (on memory never
/// touched, whose uffd is sent there), `spin CPU`,
/// `peer ADDRESS`, `fabric-count ADDRESS TRAFFIC SECONDS`, `fabric ADDRESS TRAFFIC COUNT` or `timed CMD ARGS...`.
///
/// # Errors
/// [`ChildError`].
pub fn command(words: &[String]) -> Result<(), ChildError> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["random", pages, touches] => {
            let mut region = filled(number(pages)?)?;
            print(&random(&mut region, number(touches)?)?)
        }
        ["fork", pages, times] => {
            crate::sys::use_small_pages()?;
            print(&forks(&filled(number(pages)?)?, number(times)?)?)
        }
        ["walk", pages] => print(&walk(&filled(number(pages)?)?)?),
        ["bare-random", pages, touches, socket] => {
            let mut region = Region::new(number(pages)?)?;
            let answering = hand_over(&region, socket)?;
            let touches = random(&mut region, number(touches)?)?;
            drop(answering);
            print(&touches)
        }
        ["bare-walk", pages, socket] => {
            let region = Region::new(number(pages)?)?;
            let answering = hand_over(&region, socket)?;
            let walk = walk(&region)?;
            drop(answering);
            print(&walk)
        }
        ["fabric-count", address, traffic, seconds] => {
            let traffic = Traffic::of(traffic).ok_or(ChildError::Usage)?;
            let seconds = seconds.parse().map_err(|_| ChildError::Usage)?;
            print(&requester::count(address, traffic, seconds).map_err(Box::new)?)
        }
        ["fabric", address, traffic, count] => {
            let traffic = Traffic::of(traffic).ok_or(ChildError::Usage)?;
            print(&requester::measure(address, traffic, number(count)?).map_err(Box::new)?)
        }
        ["spin", cpu] => Ok(crate::awake::spin(number(cpu)?)?),
        ["peer", address] => Ok(peer(address)?),
        ["timed", program, ref args @ ..] => print(&timed(program, args)?),
        _ => Err(ChildError::Usage),
    }
}

fn number(word: &str) -> Result<usize, ChildError> {
    word.parse().map_err(|_| ChildError::Usage)
}

fn print<T: Serialize>(value: &T) -> Result<(), ChildError> {
    let text = serde_json::to_string(value).map_err(io::Error::from)?;
    Ok(io::stdout().write_all(text.as_bytes())?)
}

fn filled(pages: usize) -> io::Result<Region> {
    let mut region = Region::new(pages)?;
    region.fill();
    std::thread::sleep(SETTLE);
    Ok(region)
}

/// Gives the region's faults to whoever listens there, until the result is dropped.
fn hand_over(region: &Region, socket: &str) -> io::Result<(UnixStream, std::os::fd::OwnedFd)> {
    let answering = UnixStream::connect(socket)?;
    let uffd = crate::sys::new_uffd(&region.addresses())?;
    send_fd(&answering, uffd.as_fd())?;
    Ok((answering, uffd))
}

/// Touches absent pages in an order that nothing can foresee, `touches` by reading and as many by writing, in
/// turns, so that both meet the same weather.
fn random(region: &mut Region, touches: usize) -> io::Result<Touches> {
    let mut times = Touches::default();
    for page in shuffled(region.pages()) {
        if !region.is_absent(page)? {
            continue;
        }
        let (reads, writes) = (times.read_us.len(), times.write_us.len());
        if reads > writes {
            let began = Instant::now();
            region.write(page);
            times.write_us.push(began.elapsed().as_secs_f64() * 1e6);
        } else if reads < touches {
            let began = Instant::now();
            region.read(page);
            times.read_us.push(began.elapsed().as_secs_f64() * 1e6);
        } else {
            break;
        }
    }
    Ok(times)
}

/// Forks so many times; neither side ever touches a page that was touched before, if it can help it.
fn forks(region: &Region, times: usize) -> io::Result<Forks> {
    let mut found = Forks::default();
    let mut order = shuffled(region.pages()).into_iter();
    let mut next_page = || {
        let absent = order.find(|page| region.is_absent(*page).unwrap_or(false));
        absent.unwrap_or(region.pages() / 2)
    };
    for _ in 0..times {
        let (parents, childs) = (next_page(), next_page());
        let (mut reader, mut writer) = io::pipe()?;
        let milliseconds = |began: Instant| began.elapsed().as_secs_f64() * 1e3;
        let began = Instant::now();
        let child = crate::sys::fork(|| {
            let runs = milliseconds(began);
            let touched = Instant::now();
            region.read(childs);
            let touch = milliseconds(touched) * 1e3;
            let mut told = runs.to_ne_bytes().to_vec();
            told.extend_from_slice(&touch.to_ne_bytes());
            // The parent finds out that it is not told.
            let _ = writer.write_all(&told);
        })?;
        found.call_ms.push(milliseconds(began));
        drop(writer);
        let touched = Instant::now();
        region.read(parents);
        found.parent_touch_us.push(milliseconds(touched) * 1e3);
        let (mut runs, mut touch) = ([0; 8], [0; 8]);
        reader.read_exact(&mut runs)?;
        reader.read_exact(&mut touch)?;
        found.child_runs_ms.push(f64::from_ne_bytes(runs));
        found.child_touch_us.push(f64::from_ne_bytes(touch));
        crate::sys::reap(child)?;
        found.child_gone_ms.push(milliseconds(began));
    }
    Ok(found)
}

/// Reads from every page in order.
fn walk(region: &Region) -> io::Result<Walk> {
    let mut absent = 0;
    for page in 0..region.pages() {
        absent += u64::from(region.is_absent(page)?);
    }
    let began = Instant::now();
    for page in 0..region.pages() {
        region.read(page);
    }
    Ok(Walk {
        absent,
        page_us: began.elapsed().as_secs_f64() * 1e6 / absent.max(1) as f64,
    })
}

/// The other side of a bare round trip: a page for every request.
fn peer(address: &str) -> io::Result<()> {
    let mut socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    let mut request = [0u8; REQUEST_BYTES];
    while socket.read_exact(&mut request).is_ok() {
        socket.write_all(&[7; PAGE])?;
    }
    Ok(())
}

fn timed(program: &str, args: &[&str]) -> Result<Timed, ChildError> {
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let began = Instant::now();
    let status = command.status()?;
    let seconds = began.elapsed().as_secs_f64();
    if status.success() {
        Ok(Timed { seconds })
    } else {
        Err(ChildError::Program(program.to_owned(), status))
    }
}
