//! The other baseline over RDMA: the same traffic through the crate async-rdma, by the program of `bench/async-rdma`. It is
//! built by itself, since nothing of farpage's may be under its licence.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use farpage_fabric::verbs::DeviceChoice;

use crate::BenchError;
use crate::perftest::{end, outcome};
use crate::traffic::Traffic;

/// Its serving side, until it is dropped.
#[derive(Debug)]
pub(crate) struct Server(Child);

impl Server {
    pub(crate) fn start(
        program: &Path,
        device: &DeviceChoice,
        at: SocketAddr,
    ) -> Result<Self, BenchError> {
        Command::new(program)
            .arg("serve")
            .arg(at.to_string())
            .args(words(device))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map(Self)
            .map_err(BenchError::fabric("--async-rdma"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

/// Its measuring side.
#[derive(Debug)]
pub(crate) struct AsyncRdma {
    pub(crate) program: PathBuf,
    pub(crate) device: DeviceChoice,
    pub(crate) at: SocketAddr,
}

impl AsyncRdma {
    /// Microseconds, or bytes per second, over `count` requests.
    pub(crate) fn measure(
        &self,
        traffic: Traffic,
        count: usize,
        within: Duration,
    ) -> Result<f64, BenchError> {
        let mut command = Command::new(&self.program);
        command
            .arg(traffic.what.perftest())
            .arg(self.at.to_string())
            .args([count.to_string(), traffic.depth().to_string()])
            .args(words(&self.device))
            .stdin(Stdio::null());
        let printed = outcome(command, within, "build bench/async-rdma on both machines")
            .map_err(BenchError::fabric("--async-rdma"))?;
        let figure = printed.trim().parse();
        figure.map_err(|_| BenchError::fabric("--async-rdma")(format!("prints {printed:?}")))
    }
}

/// Its words for a device: each one needs those before it.
fn words(device: &DeviceChoice) -> Vec<String> {
    let name = device.device.clone();
    let port = device.port.map(|port| port.to_string());
    let gid = device.gid.map(|gid| gid.to_string());
    [name, port, gid]
        .into_iter()
        .map_while(|word| word)
        .collect()
}
