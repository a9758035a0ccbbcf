//! Queue pairs, and the completion queues that they report to.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_sys::{
    ibv_ah_attr, ibv_comp_channel, ibv_cq, ibv_gid, ibv_global_route, ibv_mw_bind_info,
    ibv_poll_cq, ibv_post_send, ibv_qp, ibv_qp_attr, ibv_qp_attr_mask as mask, ibv_qp_cap,
    ibv_qp_init_attr, ibv_qp_state, ibv_qp_type, ibv_req_notify_cq, ibv_send_flags, ibv_send_wr,
    ibv_sge, ibv_wc, ibv_wc_status, ibv_wr_opcode, rdma_t,
};

use super::memory::REMOTE_ACCESS;
use super::{Context, MemoryRegion, MemoryWindow, ProtectionDomain, check};

/// Completions taken from the device at a time.
const POLL_BATCH: usize = 16;

/// How one work request ended, as far as we tell cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Done,
    /// The responder's device refused: the key, the range, or what was asked.
    Refused,
    /// Anything else: no answer, a flushed queue, a local fault. Which, by the verbs' code.
    Failed(ibv_wc_status::Type),
}

/// One entry of a completion queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) id: u64,
    pub(crate) status: Status,
}

/// Where queue pairs report, and what can be slept on until they do.
pub(crate) struct CompletionQueue {
    context: Arc<Context>,
    raw: NonNull<ibv_cq>,
    channel: NonNull<ibv_comp_channel>,
}

// SAFETY: the verbs manual makes all verbs safe to call from any thread.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above; polling takes the device's own lock.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue for at least `entries` completions, at most as many as the device has.
    pub(crate) fn new(context: &Arc<Context>, entries: u32) -> io::Result<Arc<Self>> {
        let entries = entries.min(context.limits().completions).max(1);
        // SAFETY: an open context; on failure the channel is destroyed again, once.
        let (raw, channel) = unsafe {
            let channel = NonNull::new((context.library.create_comp_channel)(context.raw.as_ptr()))
                .ok_or_else(io::Error::last_os_error)?;
            let raw = (context.library.create_cq)(
                context.raw.as_ptr(),
                i32::try_from(entries).unwrap_or(i32::MAX),
                ptr::null_mut(),
                channel.as_ptr(),
                0,
            );
            match NonNull::new(raw) {
                Some(raw) => (raw, channel),
                None => {
                    let error = io::Error::last_os_error();
                    (context.library.destroy_comp_channel)(channel.as_ptr());
                    return Err(error);
                }
            }
        };
        let queue = Self {
            context: Arc::clone(context),
            raw,
            channel,
        };
        let flags = rustix::fs::fcntl_getfl(queue.as_fd())?;
        rustix::fs::fcntl_setfl(queue.as_fd(), flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Arc::new(queue))
    }

    /// Shows each completion that is there to `take`, at most `limit` rounded up to whole batches. Returns how many.
    pub(crate) fn poll(&self, limit: usize, mut take: impl FnMut(Ended)) -> usize {
        let mut total = 0;
        while total < limit {
            let mut batch = [const { MaybeUninit::<ibv_wc>::uninit() }; POLL_BATCH];
            // SAFETY: a live queue, and room for as many entries as are asked for.
            let got = unsafe {
                ibv_poll_cq(
                    self.raw.as_ptr(),
                    POLL_BATCH as i32,
                    batch.as_mut_ptr().cast(),
                )
            };
            let got = usize::try_from(got).unwrap_or(0);
            for entry in batch.iter().take(got) {
                // SAFETY: the device filled as many entries as it says, all of them numbers.
                let entry = unsafe { entry.assume_init_ref() };
                take(Ended {
                    id: entry.wr_id,
                    status: status(entry.status),
                });
            }
            total += got;
            if got < POLL_BATCH {
                break;
            }
        }
        total
    }

    /// Has the next completion make the descriptor readable. What came before must be polled for after this.
    pub(crate) fn arm(&self) -> io::Result<()> {
        // SAFETY: a live queue.
        check(unsafe { ibv_req_notify_cq(self.raw.as_ptr(), 0) })
    }

    /// What the library calls a failure.
    pub(crate) fn name_of(&self, code: ibv_wc_status::Type) -> &'static str {
        // SAFETY: takes any number, and returns a constant, terminated text of a library that is never unloaded.
        let text = unsafe { CStr::from_ptr((self.context.library.wc_status_str)(code)) };
        text.to_str().unwrap_or("unknown")
    }

    /// Takes the notifications that are there. Returns whether there was one: the queue is no longer armed then.
    pub(crate) fn take_notifications(&self) -> bool {
        let mut count = 0;
        loop {
            let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
            // SAFETY: a live channel, nonblocking, and room for the two answers.
            let result = unsafe {
                (self.context.library.get_cq_event)(
                    self.channel.as_ptr(),
                    &raw mut queue,
                    &raw mut context,
                )
            };
            if result != 0 {
                break;
            }
            count += 1;
        }
        if count > 0 {
            // SAFETY: the channel has this one queue, which so many events were taken from and not acknowledged yet.
            unsafe { (self.context.library.ack_cq_events)(self.raw.as_ptr(), count) };
        }
        count > 0
    }
}

impl AsFd for CompletionQueue {
    /// Readable when a notification is there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor is open until the channel is destroyed on drop.
        unsafe { BorrowedFd::borrow_raw((*self.channel.as_ptr()).fd) }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: both made once; every queue pair holds the Arc, and every event taken was acknowledged.
        unsafe {
            (self.context.library.destroy_cq)(self.raw.as_ptr());
            (self.context.library.destroy_comp_channel)(self.channel.as_ptr());
        }
    }
}

fn status(code: ibv_wc_status::Type) -> Status {
    match code {
        ibv_wc_status::IBV_WC_SUCCESS => Status::Done,
        ibv_wc_status::IBV_WC_REM_ACCESS_ERR
        | ibv_wc_status::IBV_WC_REM_INV_REQ_ERR
        | ibv_wc_status::IBV_WC_REM_OP_ERR => Status::Refused,
        other => Status::Failed(other),
    }
}

/// One thing for a queue pair to do.
pub(crate) enum Work<'a> {
    /// Bytes of a peer's memory to ours, or ours to a peer's.
    Transfer {
        write: bool,
        region: &'a MemoryRegion,
        /// In the region, in bytes. Checked by the caller and by the device.
        offset: u64,
        len: u32,
        remote_address: u64,
        remote_key: u32,
    },
    /// Opens a window on all of a region to the queue pair's peer.
    Bind {
        window: &'a MemoryWindow,
        region: &'a MemoryRegion,
    },
}

/// Whom a queue pair talks to, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    /// Our port and our own address in its table.
    pub(crate) port: u8,
    pub(crate) gid_index: u8,
    /// The peer's.
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
    /// By the verbs' code.
    pub(crate) mtu: u8,
    pub(crate) queue: u32,
    /// The peer's first packet number, and ours.
    pub(crate) their_packet: u32,
    pub(crate) our_packet: u32,
    /// Reads under way at most: ours, and the peer's.
    pub(crate) reads_out: u8,
    pub(crate) reads_in: u8,
}

/// How long a packet stays unanswered before it is sent again: 4.096 us * 2^16, 0.27 s. With [`RETRIES`] a peer that is gone
/// is told from a slow one after 2 s, by the manual up to four times that.
const TIMEOUT_CODE: u8 = 16;
const RETRIES: u8 = 7;

/// A reliable connection's end. Used by one thread at a time.
pub(crate) struct QueuePair {
    /// Only dropped after the queue pair.
    domain: Arc<ProtectionDomain>,
    _completions: Arc<CompletionQueue>,
    raw: NonNull<ibv_qp>,
    depth: usize,
    /// Room for a chain of work requests, kept from post to post.
    chain: Vec<ibv_send_wr>,
    pieces: Vec<ibv_sge>,
}

// SAFETY: the verbs manual makes all verbs safe to call from any thread; the chain's pointers are only meant within `post`.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// Makes one that takes `depth` work requests, or as many as the device can.
    pub(crate) fn new(
        domain: &Arc<ProtectionDomain>,
        completions: &Arc<CompletionQueue>,
        depth: u32,
    ) -> io::Result<Self> {
        let depth = depth.min(domain.context.limits().queue_depth).max(1);
        let mut attributes = ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: completions.raw.as_ptr(),
            recv_cq: completions.raw.as_ptr(),
            srq: ptr::null_mut(),
            cap: ibv_qp_cap {
                max_send_wr: depth,
                max_recv_wr: 1,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: a live domain and attributes that name a live completion queue of the same device.
        let raw =
            unsafe { (domain.context.library.create_qp)(domain.raw.as_ptr(), &raw mut attributes) };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Self {
            domain: Arc::clone(domain),
            _completions: Arc::clone(completions),
            raw,
            depth: depth as usize,
            chain: Vec::with_capacity(depth as usize),
            pieces: Vec::with_capacity(depth as usize),
        })
    }

    /// Work requests that it takes at a time.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// Its number, for the peer.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: the library's structure lives until the queue pair is destroyed on drop, and is only read.
        unsafe { (*self.raw.as_ptr()).qp_num }
    }

    /// Connects it: reset, init, ready to receive, ready to send. `serving`: whether the peer may reach memory through it.
    pub(crate) fn connect(&mut self, path: &Path, serving: bool) -> io::Result<()> {
        let mut init = empty_attributes();
        init.qp_state = ibv_qp_state::IBV_QPS_INIT;
        init.port_num = path.port;
        init.qp_access_flags = if serving { REMOTE_ACCESS } else { 0 };
        self.modify(
            &mut init,
            mask::IBV_QP_STATE
                | mask::IBV_QP_PKEY_INDEX
                | mask::IBV_QP_PORT
                | mask::IBV_QP_ACCESS_FLAGS,
        )?;
        let mut receive = empty_attributes();
        receive.qp_state = ibv_qp_state::IBV_QPS_RTR;
        receive.path_mtu = path.mtu.into();
        receive.dest_qp_num = path.queue;
        receive.rq_psn = path.their_packet;
        receive.max_dest_rd_atomic = path.reads_in;
        receive.min_rnr_timer = 12;
        receive.ah_attr = ibv_ah_attr {
            grh: ibv_global_route {
                dgid: ibv_gid { raw: path.gid },
                flow_label: 0,
                sgid_index: path.gid_index,
                hop_limit: 64,
                traffic_class: 0,
            },
            dlid: path.lid,
            sl: 0,
            src_path_bits: 0,
            static_rate: 0,
            is_global: 1,
            port_num: path.port,
        };
        self.modify(
            &mut receive,
            mask::IBV_QP_STATE
                | mask::IBV_QP_AV
                | mask::IBV_QP_PATH_MTU
                | mask::IBV_QP_DEST_QPN
                | mask::IBV_QP_RQ_PSN
                | mask::IBV_QP_MAX_DEST_RD_ATOMIC
                | mask::IBV_QP_MIN_RNR_TIMER,
        )?;
        let mut send = empty_attributes();
        send.qp_state = ibv_qp_state::IBV_QPS_RTS;
        send.sq_psn = path.our_packet;
        send.max_rd_atomic = path.reads_out;
        send.timeout = TIMEOUT_CODE;
        send.retry_cnt = RETRIES;
        send.rnr_retry = RETRIES;
        self.modify(
            &mut send,
            mask::IBV_QP_STATE
                | mask::IBV_QP_TIMEOUT
                | mask::IBV_QP_RETRY_CNT
                | mask::IBV_QP_RNR_RETRY
                | mask::IBV_QP_SQ_PSN
                | mask::IBV_QP_MAX_QP_RD_ATOMIC,
        )
    }

    /// Stops it: the device serves and sends nothing more, and what is queued is flushed.
    pub(crate) fn stop(&mut self) -> io::Result<()> {
        let mut attributes = empty_attributes();
        attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
        self.modify(&mut attributes, mask::IBV_QP_STATE)
    }

    fn modify(&mut self, attributes: &mut ibv_qp_attr, what: mask) -> io::Result<()> {
        // SAFETY: a live queue pair and complete attributes, of which `what` names those to be used.
        check(unsafe {
            (self.domain.context.library.modify_qp)(self.raw.as_ptr(), attributes, what.0 as i32)
        })
    }

    /// Hands a chain of work over with one doorbell. Each has an id and whether its success is to be reported; failures always
    /// are.
    ///
    /// Safe whatever the numbers say: the device lets a work request touch only memory that is registered in its domain.
    pub(crate) fn post<'a>(
        &mut self,
        works: impl Iterator<Item = (u64, bool, Work<'a>)>,
    ) -> io::Result<()> {
        self.chain.clear();
        self.pieces.clear();
        for (id, report, work) in works.take(self.depth) {
            // SAFETY: all zeros is a valid request: null pointers and numbers.
            let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
            request.wr_id = id;
            request.send_flags = if report {
                ibv_send_flags::IBV_SEND_SIGNALED.0
            } else {
                0
            };
            match work {
                Work::Transfer {
                    write,
                    region,
                    offset,
                    len,
                    remote_address,
                    remote_key,
                } => {
                    request.opcode = if write {
                        ibv_wr_opcode::IBV_WR_RDMA_WRITE
                    } else {
                        ibv_wr_opcode::IBV_WR_RDMA_READ
                    };
                    request.num_sge = 1;
                    request.wr.rdma = rdma_t {
                        remote_addr: remote_address,
                        rkey: remote_key,
                    };
                    self.pieces.push(ibv_sge {
                        addr: region.address().wrapping_add(offset),
                        length: len,
                        lkey: region.local_key(),
                    });
                }
                Work::Bind { window, region } => {
                    let registered = region.raw().ok_or(io::ErrorKind::InvalidInput)?;
                    request.opcode = ibv_wr_opcode::IBV_WR_BIND_MW;
                    request.bind_mw_tso_union.bind_mw = rdma_sys::bind_mw_t {
                        mw: window.raw.as_ptr(),
                        rkey: window.key(),
                        bind_info: ibv_mw_bind_info {
                            mr: registered.as_ptr(),
                            addr: region.address(),
                            length: region.len(),
                            mw_access_flags: REMOTE_ACCESS,
                        },
                    };
                    self.pieces.push(ibv_sge {
                        addr: 0,
                        length: 0,
                        lkey: 0,
                    });
                }
            }
            self.chain.push(request);
        }
        // Neither vector grows from here on: addresses in them are good until the next post.
        let mut next = ptr::null_mut();
        for (request, piece) in self.chain.iter_mut().zip(&mut self.pieces).rev() {
            if request.num_sge > 0 {
                request.sg_list = piece;
            }
            request.next = next;
            next = request;
        }
        if next.is_null() {
            return Ok(());
        }
        let mut refused = ptr::null_mut();
        // SAFETY: a live queue pair and a null-terminated chain whose requests and pieces lie in our two vectors, which the
        // device copies from before it returns; windows and regions are borrowed for the call.
        check(unsafe { ibv_post_send(self.raw.as_ptr(), next, &raw mut refused) })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made once; nobody else has the pointer. Afterwards the device touches no memory on its behalf.
        let _ = unsafe { (self.domain.context.library.destroy_qp)(self.raw.as_ptr()) };
    }
}

fn empty_attributes() -> ibv_qp_attr {
    // SAFETY: all zeros is a valid ibv_qp_attr: numbers, and enumerations that have a zero.
    unsafe { std::mem::zeroed() }
}
