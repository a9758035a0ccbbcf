//! The handshake on the agent's Unix socket: fixed-size packets, file descriptors beside them.
//!
//! ```text
//! program                                        agent
//!    Hello  ----------------------------------->   who: SO_PEERCRED
//!    <--------- Welcome | Refusal                  fds: /dev/userfaultfd, control memfd, eventfd, lifeline, its pagemap
//!    Ready  ----------------------------------->   fds: the uffd, the drain uffd
//!    <--------- Go                                 fds: after a fork, the uffd to use instead
//!    HelperUp --------------------------------->
//!    <--------- Done                               the program may run
//! ```
//!
//! A library goes on from there: `Region` and `Leave`, each answered by `Done` or `Refusal`. A process that is attached may
//! connect once more to ask about its pages: `Hello`, then any number of `SoftDirty`, all answered likewise.
//!
//! The socket is `SOCK_SEQPACKET`: a packet is a message, and one of another length is refused whole.

/// First word of every packet: "farpage" and a version digit, little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"farpage1");

/// The variable of the environment that names the agent's socket to a program of `farpage run`.
pub const SOCKET_VARIABLE: &str = "FARPAGE_ATTACH";

/// The one that names the job, in hexadecimal.
pub const JOB_VARIABLE: &str = "FARPAGE_JOB";

/// The longest text that a refusal carries.
pub const MAX_TEXT: usize = 512;

/// The most pages of one `SoftDirty`, whose answer has a bit for each.
pub const MAX_PAGES_ASKED: usize = MAX_TEXT * 8;

/// The longest packet either side sends or takes.
pub const MAX_PACKET: usize = PACKET_BYTES + MAX_TEXT;

/// The most file descriptors that one packet carries.
pub const MAX_FDS: usize = 5;

/// How a process comes to attach.
pub mod kind {
    /// A program's start: the shim's constructor, after `execve`.
    pub const START: u32 = 1;
    /// A forked child: its memory may already be managed.
    pub const FORK: u32 = 2;
    /// A program that uses the library: only the regions it names are managed.
    pub const LIBRARY: u32 = 3;
    /// Not a program: `farpage run` opens a job. Answered by the job protocol, in text.
    pub const JOB: u32 = 4;
    /// Not a program: the agent's state, for `farpage status`.
    pub const STATUS: u32 = 5;
    /// A process that is attached already: it asks about its pages.
    pub const PAGES: u32 = 6;
    /// A process that was told to start its helper by an agent which has died since: is it attached? Answered by
    /// [`super::tag::DONE`] or [`super::tag::REFUSAL`].
    pub const CONFIRM: u32 = 7;
}

/// What a packet is.
pub mod tag {
    /// Program to agent, first.
    pub const HELLO: u32 = 1;
    /// Agent to program: come in.
    pub const WELCOME: u32 = 2;
    /// Agent to program: no, with a reason in text.
    pub const REFUSAL: u32 = 3;
    /// Program to agent: descriptors made, ranges mapped.
    pub const READY: u32 = 4;
    /// Agent to program: start the helper.
    pub const GO: u32 = 5;
    /// Program to agent: the helper runs.
    pub const HELPER_UP: u32 = 6;
    /// Agent to program: the handshake is over.
    pub const DONE: u32 = 7;
    /// Library to agent: manage this region. Answered by [`DONE`] or [`REFUSAL`].
    pub const REGION: u32 = 8;
    /// Library to agent: its regions are unmapped, the attachment may end. Answered by [`DONE`].
    pub const LEAVE: u32 = 9;
    /// Which pages of a range are soft-dirty? Answered by [`DONE`] with a bit per page behind it, the lowest of each byte
    /// first, or [`REFUSAL`].
    pub const SOFT_DIRTY: u32 = 10;
}

/// Every packet of the handshake. Fields that a message does not use are zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// [`MAGIC`].
    pub magic: u64,
    /// One of [`tag`].
    pub tag: u32,
    /// `Hello`: one of [`kind`]. `SoftDirty`: 1 if they are not to be soft-dirty any more, else 0.
    pub kind: u32,
    /// `Hello`: the job's token. `Go`: the address space's number, by which its
    /// children name it.
    pub job: u64,
    /// `Hello` after a fork: the parent's address space number; to confirm: its own.
    pub parent: u64,
    /// `Ready`: where the holding range was mapped. `Region`, `SoftDirty`: start address.
    pub holding: u64,
    /// `Ready`: where the drain range was mapped, with the landing range behind it. `Region`, `SoftDirty`: length in bytes.
    pub drain: u64,
    /// `HelperUp`, and `Hello` to confirm: the helper's pid.
    pub helper: u64,
    /// `Refusal`: length of the text that follows the packet. `Done` to `SoftDirty`: of the bits.
    pub text_len: u64,
}

/// Bytes of a [`Packet`] on the socket.
pub const PACKET_BYTES: usize = core::mem::size_of::<Packet>();

impl Packet {
    /// A packet of this tag, other fields zero.
    #[must_use]
    pub fn new(tag: u32) -> Self {
        Self {
            magic: MAGIC,
            tag,
            ..Self::default()
        }
    }

    /// Its bytes, native endian: both ends are on one host.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; PACKET_BYTES] {
        let mut out = [0u8; PACKET_BYTES];
        let words = [
            self.magic,
            u64::from(self.tag) | (u64::from(self.kind) << 32),
            self.job,
            self.parent,
            self.holding,
            self.drain,
            self.helper,
            self.text_len,
        ];
        for (chunk, word) in out.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// Reads a packet; `None` unless it is whole and begins with [`MAGIC`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut words = [0u64; PACKET_BYTES / 8];
        if bytes.len() < PACKET_BYTES {
            return None;
        }
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(chunk.try_into().ok()?);
        }
        let [magic, tags, job, parent, holding, drain, helper, text_len] = words;
        if magic != MAGIC {
            return None;
        }
        Some(Self {
            magic,
            tag: tags as u32,
            kind: (tags >> 32) as u32,
            job,
            parent,
            holding,
            drain,
            helper,
            text_len,
        })
    }
}

const _: () = assert!(PACKET_BYTES == 64, "the packet is eight words");
