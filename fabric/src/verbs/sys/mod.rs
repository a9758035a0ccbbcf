//! The verbs library's objects, made safe: one file per noun, and a child holds its parents.
//!
//! `libibverbs.so.1` is loaded when it is first wanted, so that one binary runs on machines with and without it. What the
//! manual calls functions and the headers define inline (post, poll, arm, memory windows) goes through the device's own
//! table of operations, by way of `rdma-sys`.

#![allow(unsafe_code)]

mod context;
mod memory;
mod queue;

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::io;
use std::sync::OnceLock;

use rdma_sys::{
    ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_mr, ibv_pd,
    ibv_port_attr, ibv_qp, ibv_qp_attr, ibv_qp_init_attr,
};

pub(crate) use context::{Context, PortState};
pub(crate) use memory::{Granted, MemoryRegion, MemoryWindow, ProtectionDomain};
pub(crate) use queue::{CompletionQueue, Ended, Path, QueuePair, Status, Work};

/// The library's name; its major number is part of the binary interface.
const LIBRARY: &CStr = c"libibverbs.so.1";

macro_rules! functions {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions that the library exports and we use.
        pub(super) struct Library {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl Library {
            fn load() -> Result<Self, String> {
                // SAFETY: a constant, terminated name; loading libibverbs runs its constructors, which set up tables.
                let handle = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
                if handle.is_null() {
                    return Err(format!("{} is not installed; install Debian's libibverbs1 and ibverbs-providers", LIBRARY.to_string_lossy()));
                }
                Ok(Self {
                    $($name: {
                        let name = concat!("ibv_", stringify!($name), "\0");
                        // SAFETY: a live handle and a terminated name.
                        let symbol = unsafe { libc::dlsym(handle, name.as_ptr().cast()) };
                        if symbol.is_null() {
                            return Err(format!("{} has no ibv_{}; update it", LIBRARY.to_string_lossy(), stringify!($name)));
                        }
                        // SAFETY: the symbol is the function of this name, whose signature verbs.h gives as above; the
                        // library is never unloaded.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(symbol) }
                    },)*
                })
            }
        }
    };
}

functions! {
    get_device_list(*mut c_int) -> *mut *mut ibv_device;
    free_device_list(*mut *mut ibv_device);
    get_device_name(*mut ibv_device) -> *const std::ffi::c_char;
    open_device(*mut ibv_device) -> *mut ibv_context;
    close_device(*mut ibv_context) -> c_int;
    query_device(*mut ibv_context, *mut ibv_device_attr) -> c_int;
    query_port(*mut ibv_context, u8, *mut ibv_port_attr) -> c_int;
    alloc_pd(*mut ibv_context) -> *mut ibv_pd;
    dealloc_pd(*mut ibv_pd) -> c_int;
    reg_mr(*mut ibv_pd, *mut c_void, usize, c_int) -> *mut ibv_mr;
    dereg_mr(*mut ibv_mr) -> c_int;
    create_comp_channel(*mut ibv_context) -> *mut ibv_comp_channel;
    destroy_comp_channel(*mut ibv_comp_channel) -> c_int;
    create_cq(*mut ibv_context, c_int, *mut c_void, *mut ibv_comp_channel, c_int) -> *mut ibv_cq;
    destroy_cq(*mut ibv_cq) -> c_int;
    get_cq_event(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
    ack_cq_events(*mut ibv_cq, c_uint);
    create_qp(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;
    modify_qp(*mut ibv_qp, *mut ibv_qp_attr, c_int) -> c_int;
    destroy_qp(*mut ibv_qp) -> c_int;
    wc_status_str(c_uint) -> *const std::ffi::c_char;
}

/// The library, loaded once; later calls repeat what the first one found.
pub(super) fn library() -> io::Result<&'static Library> {
    static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
    LOADED
        .get_or_init(Library::load)
        .as_ref()
        .map_err(|why| io::Error::new(io::ErrorKind::NotFound, why.clone()))
}

/// What a verb that returns an error number said.
fn check(result: c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        // Some return -1 and set errno.
        -1 => Err(io::Error::last_os_error()),
        error => Err(io::Error::from_raw_os_error(error.abs())),
    }
}
