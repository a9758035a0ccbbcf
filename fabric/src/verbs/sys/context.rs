//! An open device.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys::{ibv_context, ibv_device_attr, ibv_port_attr, ibv_port_state};

use super::{Library, check, library};

/// `IBV_DEVICE_MEM_WINDOW_TYPE_2B` of verbs.h: windows that are bound to one queue pair of one protection domain.
const MEM_WINDOW_TYPE_2B: u32 = 1 << 24;

/// What a device can do at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Work requests of one queue pair.
    pub(crate) queue_depth: u32,
    /// Entries of one completion queue.
    pub(crate) completions: u32,
    /// Reads that a queue pair may have under way as requester.
    pub(crate) reads_out: u8,
    /// Reads that a queue pair may be serving.
    pub(crate) reads_in: u8,
    /// Whether it has memory windows of type 2B.
    pub(crate) windows: bool,
    /// Queue pairs, of which each connection has three at either end.
    pub(crate) queues: u32,
    /// Memory regions.
    pub(crate) regions: u32,
}

/// A port as it is now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PortState {
    pub(crate) active: bool,
    /// The verbs' code of its MTU: 1 is 256 bytes, 5 is 4096.
    pub(crate) mtu: u8,
    pub(crate) lid: u16,
    /// Whether its link is Ethernet (RoCE) rather than InfiniBand.
    pub(crate) ethernet: bool,
}

/// An open device.
pub(crate) struct Context {
    pub(super) library: &'static Library,
    pub(super) raw: NonNull<ibv_context>,
    limits: Limits,
}

// SAFETY: the verbs manual makes all verbs safe to call from any thread; nothing else is reached through the pointer.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens the device of this name.
    pub(crate) fn open(name: &str) -> io::Result<Arc<Self>> {
        let library = library()?;
        // SAFETY: the count is not wanted; the list is checked, walked to its terminating null pointer and freed once,
        // after the device in it was opened.
        let raw = unsafe {
            let list = (library.get_device_list)(std::ptr::null_mut());
            if list.is_null() {
                return Err(io::Error::last_os_error());
            }
            let mut at = list;
            let mut opened = Err(io::ErrorKind::NotFound.into());
            while !(*at).is_null() {
                if CStr::from_ptr((library.get_device_name)(*at)).to_bytes() == name.as_bytes() {
                    opened = NonNull::new((library.open_device)(*at))
                        .ok_or_else(io::Error::last_os_error);
                    break;
                }
                at = at.add(1);
            }
            (library.free_device_list)(list);
            opened?
        };
        let mut context = Self {
            library,
            raw,
            limits: Limits {
                queue_depth: 0,
                completions: 0,
                reads_out: 0,
                reads_in: 0,
                windows: false,
                queues: 0,
                regions: 0,
            },
        };
        context.limits = context.query()?;
        Ok(Arc::new(context))
    }

    fn query(&self) -> io::Result<Limits> {
        let mut attributes = MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: an open context and room for the answer, which is plain numbers, valid as zeros too.
        let attributes = unsafe {
            check((self.library.query_device)(
                self.raw.as_ptr(),
                attributes.as_mut_ptr(),
            ))?;
            attributes.assume_init()
        };
        let byte = |value: i32| u8::try_from(value.clamp(0, 255)).unwrap_or(0);
        let count = |value: i32| u32::try_from(value).unwrap_or(0);
        Ok(Limits {
            queue_depth: count(attributes.max_qp_wr),
            completions: count(attributes.max_cqe),
            reads_out: byte(attributes.max_qp_init_rd_atom),
            reads_in: byte(attributes.max_qp_rd_atom),
            windows: attributes.device_cap_flags & MEM_WINDOW_TYPE_2B != 0 && attributes.max_mw > 0,
            queues: count(attributes.max_qp),
            regions: count(attributes.max_mr),
        })
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// A port's state.
    pub(crate) fn port(&self, port: u8) -> io::Result<PortState> {
        let mut attributes = MaybeUninit::<ibv_port_attr>::zeroed();
        // SAFETY: an open context and room for the answer, of which an older library fills only the first part; the rest
        // stays zero.
        let attributes = unsafe {
            check((self.library.query_port)(
                self.raw.as_ptr(),
                port,
                attributes.as_mut_ptr(),
            ))?;
            attributes.assume_init()
        };
        Ok(PortState {
            active: attributes.state == ibv_port_state::IBV_PORT_ACTIVE,
            mtu: u8::try_from(attributes.active_mtu.clamp(1, 5)).unwrap_or(1),
            lid: attributes.lid,
            ethernet: attributes.link_layer == 2,
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened once, and every child holds the Arc, so that none is left. A failure leaks a descriptor.
        let _ = unsafe { (self.library.close_device)(self.raw.as_ptr()) };
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
