//! One-sided operations by RDMA: the responder's device reads and writes its memory, and its CPU takes no part.
//!
//! Each connection has two parts. Over a *control connection* (TCP, frames in `wire.rs`) the requester opens lanes and shows
//! the keys of its grants; the data goes over one reliable queue pair per *lane*: demand reads, reads ahead and writes, so
//! that a fault's read never queues behind a window of others. The responder checks a key once, opens a memory window of
//! type 2B on that extent to that lane's queue pair, and answers with the window's own key; from then on the device checks.
//! What a connection may reach lies in a protection domain of its own.
//!
//! # Why not `rdma_cm`
//!
//! It connects one queue pair at a time, hands over 56 bytes at most, and needs an address on the RDMA interface itself. We
//! need a stream for keys and windows in any case, and to open a lane again after a refused access (which, by the
//! standard, breaks a reliable queue pair): numbers over that stream are simpler and work over any network path.
//!
//! # Ends of grants
//!
//! A revocation must leave no way to the extent. Deallocating its window refuses whatever comes later, but a transfer of
//! many packets is checked at its first one by SoftRoCE, and would go on. So every lane that had a window on the extent is
//! stopped and its queue pair destroyed, which no transfer survives; then the region is deregistered, and the pages can be
//! scrubbed. The requester is told, opens the lane again when it next needs it, and sends again what was under way.
//! A device without such windows is served with a memory region per grant, in the same domain.

mod address;
mod device;
mod door;
mod endpoint;
mod lane;
mod responder;
mod sys;
#[cfg(test)]
mod tests;
mod wire;

pub use address::{DeviceChoice, DeviceChoiceError};
pub use endpoint::VerbsEndpoint;
pub use responder::{VerbsLimits, VerbsResponder, VerbsStats};

/// Whether this host has a device that could be used, by its name; otherwise why not.
///
/// # Errors
/// What is missing, and what to do about it.
pub fn usable_device() -> Result<String, String> {
    device::Device::open(&DeviceChoice::default(), None)
        .map(|device| device.name)
        .map_err(|error| error.to_string())
}

/// What the device that would be used can do at most, in words.
///
/// # Errors
/// What is missing, and what to do about it.
pub fn limits(choice: &DeviceChoice) -> Result<String, String> {
    let device = device::Device::open(choice, None).map_err(|error| error.to_string())?;
    let limits = device.context.limits();
    let windows = match limits.windows {
        true => "memory windows of type 2B",
        false => "no memory windows of type 2B: a region for each grant",
    };
    Ok(format!(
        "{}: {} queue pairs of {} requests, {} reads out and {} in each, {} memory regions, {windows}, packets of {} bytes",
        device.name,
        limits.queues,
        limits.queue_depth,
        limits.reads_out,
        limits.reads_in,
        limits.regions,
        128 << device.state.mtu,
    ))
}

/// The choice completed: which device, port and address a connection from this host's address `from` uses.
///
/// # Errors
/// What is missing, and what to do about it.
pub fn chosen(
    choice: &DeviceChoice,
    from: Option<std::net::IpAddr>,
) -> Result<DeviceChoice, String> {
    device::Device::open(choice, from)
        .map(|device| DeviceChoice {
            device: Some(device.name),
            port: Some(device.port),
            gid: Some(device.gid_index),
        })
        .map_err(|error| error.to_string())
}
