//! Page traffic as `farpage bench fabric` makes it, through the crate async-rdma.
//!
//! ```text
//! farpage-async-rdma serve ADDR:PORT [DEVICE [PORT [GID]]]
//! farpage-async-rdma ib_read_lat|ib_read_bw|ib_write_bw ADDR:PORT COUNT DEPTH [DEVICE [PORT [GID]]]
//! ```
//!
//! The second prints one figure: the median of the reads' latencies in microseconds, or bytes per second.

use std::alloc::Layout;
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_rdma::{LocalMr, Rdma, RdmaBuilder, RemoteMr};

const PAGE: usize = 4096;
/// The other machine's side may be starting yet.
const THERE_WITHIN: Duration = Duration::from_secs(60);
/// No run lasts so long.
const RUN_WITHIN: Duration = Duration::from_secs(300);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", at, ref device @ ..] => serve(at, device).await,
        [what, at, count, depth, ref device @ ..] => {
            let (count, depth) = (count.parse()?, depth.parse()?);
            let measured = measure(what, at, count, depth, device);
            let figure = tokio::time::timeout(RUN_WITHIN, measured).await??;
            println!("{figure}");
            Ok(())
        }
        _ => Err("see the head of main.rs".into()),
    }
}

fn builder(device: &[&str], depth: u32) -> Result<RdmaBuilder, Box<dyn Error>> {
    let mut builder = RdmaBuilder::default()
        .set_cq_size(4 * depth)
        .set_max_cqe(4 * depth as i32)
        .set_qp_max_send_wr(2 * depth);
    if let Some(name) = device.first() {
        builder = builder.set_dev(name);
    }
    if let Some(port) = device.get(1) {
        builder = builder.set_port_num(port.parse()?);
    }
    if let Some(gid) = device.get(2) {
        builder = builder.set_gid_index(gid.parse()?);
    }
    Ok(builder)
}

/// Serves whoever connects, until it is killed. A connection is kept for good: its end is not told.
async fn serve(at: &str, device: &[&str]) -> Result<(), Box<dyn Error>> {
    let mut first = builder(device, 128)?.listen(at).await?;
    let mut others = Vec::new();
    loop {
        others.push(first.listen().await?);
    }
}

async fn connected(at: &str, depth: usize, device: &[&str]) -> Result<Rdma, Box<dyn Error>> {
    let give_up = Instant::now() + THERE_WITHIN;
    loop {
        match builder(device, depth.max(16) as u32)?.connect(at).await {
            Ok(rdma) => return Ok(rdma),
            Err(error) if Instant::now() > give_up => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

async fn measure(
    what: &str,
    at: &str,
    count: usize,
    depth: usize,
    device: &[&str],
) -> Result<f64, Box<dyn Error>> {
    let rdma = Arc::new(connected(at, depth, device).await?);
    match what {
        "ib_read_lat" => latency(&rdma, count).await.map_err(Into::into),
        "ib_read_bw" | "ib_write_bw" => {
            let write = what == "ib_write_bw";
            bandwidth(&rdma, count, depth, write)
                .await
                .map_err(Into::into)
        }
        _ => Err("nothing is called so that could be measured".into()),
    }
}

/// Whether the crate has yet to let go of the memory of the transfer before: it wakes who waits for one a moment earlier.
fn is_too_early(result: &io::Result<()>) -> bool {
    matches!(result, Err(error) if error.to_string().contains("is locked by other ops"))
}

async fn read(rdma: &Rdma, local: &mut LocalMr, remote: &RemoteMr) -> io::Result<()> {
    loop {
        let result = rdma.read(local, remote).await;
        if !is_too_early(&result) {
            return result;
        }
        tokio::task::yield_now().await;
    }
}

async fn write(rdma: &Rdma, local: &LocalMr, remote: &mut RemoteMr) -> io::Result<()> {
    loop {
        let result = rdma.write(local, remote).await;
        if !is_too_early(&result) {
            return result;
        }
        tokio::task::yield_now().await;
    }
}

/// The median, microseconds.
async fn latency(rdma: &Rdma, count: usize) -> io::Result<f64> {
    let remote = rdma.request_remote_mr(Layout::new::<[u8; PAGE]>()).await?;
    let mut local = rdma.alloc_local_mr(Layout::new::<[u8; PAGE]>())?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        read(rdma, &mut local, &remote).await?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).copied().unwrap_or(0.0))
}

/// Bytes per second, with `depth` requests under way.
async fn bandwidth(rdma: &Arc<Rdma>, count: usize, depth: usize, writes: bool) -> io::Result<f64> {
    let mut places = Vec::new();
    for _ in 0..depth {
        let remote = rdma.request_remote_mr(Layout::new::<[u8; PAGE]>()).await?;
        let local = rdma.alloc_local_mr(Layout::new::<[u8; PAGE]>())?;
        places.push((local, remote));
    }
    let each = count.div_ceil(depth);
    let began = Instant::now();
    let tasks: Vec<_> = places
        .into_iter()
        .map(|(mut local, mut remote)| {
            let rdma = Arc::clone(rdma);
            tokio::spawn(async move {
                for _ in 0..each {
                    if writes {
                        write(&rdma, &local, &mut remote).await?;
                    } else {
                        read(&rdma, &mut local, &remote).await?;
                    }
                }
                io::Result::Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await.map_err(io::Error::other)??;
    }
    Ok((each * depth * PAGE) as f64 / began.elapsed().as_secs_f64())
}
