//! The table of cases. A new one is a function in a C program, its name there, a line here, and a test in `cli/tests/`.

use std::time::Duration;

use super::programs::Size;

/// What most programs may keep here: a third of their data.
const LOCAL: u64 = 16 << 20;
/// The least that `farpage run` takes.
const LEAST_LOCAL: u64 = 4 << 20;
/// A case that takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(90);
/// A long one that takes longer does.
const LONG_DEADLINE: Duration = Duration::from_secs(3600);
/// Stands for the seed among a case's arguments.
const SEED: &str = "SEED";

/// By which of the kernel's means pages leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The best there is.
    Plain,
    /// As on kernels that have no `UFFDIO_MOVE`.
    WithoutMove,
}

impl Form {
    /// What asks for it.
    #[must_use]
    pub fn environment(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Plain => &[],
            Self::WithoutMove => &[("FARPAGE_WITHOUT_MOVE", "1")],
        }
    }
}

/// One program run one way.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Which program.
    pub program: &'static str,
    /// What it is told to do.
    pub name: &'static str,
    /// What is shown when it passes.
    pub shows: &'static str,
    /// What may stay here, bytes.
    pub local: u64,
    /// The status to end with; 128 and the signal's number if by one.
    pub status: i32,
    /// After this it is taken for hanging.
    pub deadline: Duration,
    /// For somebody who asks for it, not for every run.
    pub long: bool,
    arguments: &'static [&'static str],
    /// What the program is told afterwards, without farpage, to see that it comes to the same there; nothing if it has no such way.
    pub twin: &'static [&'static str],
    /// Whether what is here at most is judged.
    pub bounded: bool,
    /// Whether it has pages pinned, which only kernels with `UFFDIO_MOVE` say of a page.
    pub pins: bool,
    /// Whether it shows what it is to show on a quarter of the memory too.
    shrinks: bool,
    forms: &'static [Form],
}

const fn case(program: &'static str, name: &'static str, shows: &'static str) -> Case {
    Case {
        program,
        name,
        shows,
        local: LOCAL,
        status: 0,
        deadline: DEADLINE,
        long: false,
        arguments: &[],
        twin: &[],
        bounded: true,
        pins: false,
        shrinks: true,
        forms: &[Form::Plain],
    }
}

impl Case {
    /// In both forms: what shows something of how pages leave.
    const fn both(self) -> Self {
        Self {
            forms: &[Form::Plain, Form::WithoutMove],
            ..self
        }
    }

    const fn unbounded(self) -> Self {
        Self {
            bounded: false,
            ..self
        }
    }

    const fn pinning(self) -> Self {
        Self { pins: true, ..self }
    }

    const fn whole(self) -> Self {
        Self {
            shrinks: false,
            ..self
        }
    }

    const fn ending(self, status: i32) -> Self {
        Self { status, ..self }
    }

    const fn with(self, arguments: &'static [&'static str]) -> Self {
        Self { arguments, ..self }
    }

    /// In plain memory it is to come to the same.
    const fn with_twin(self) -> Self {
        Self {
            twin: &["twin"],
            ..self
        }
    }

    const fn within(self, local: u64) -> Self {
        Self { local, ..self }
    }

    const fn long(self) -> Self {
        Self {
            long: true,
            deadline: LONG_DEADLINE,
            ..self
        }
    }

    /// The size it is run at where smaller ones are asked for.
    #[must_use]
    pub fn smallest(&self) -> Size {
        if self.shrinks {
            Size::Quarter
        } else {
            Size::Whole
        }
    }

    /// What may stay here of it, bytes.
    #[must_use]
    pub fn local_at(&self, size: Size) -> u64 {
        match size {
            Size::Whole => self.local,
            Size::Quarter => (self.local / 4).max(LEAST_LOCAL),
        }
    }

    /// In which forms it is run.
    #[must_use]
    pub fn forms(&self) -> &'static [Form] {
        self.forms
    }

    /// Of the case in this form.
    #[must_use]
    pub fn full_name(&self, form: Form) -> String {
        let suffix = match form {
            Form::Plain => "",
            Form::WithoutMove => ".without_move",
        };
        format!("{}.{}{suffix}", self.program, self.name)
    }

    /// The program's arguments.
    #[must_use]
    pub fn words(&self, seed: u64) -> Vec<String> {
        let rest = self.arguments.iter().map(|word| match *word {
            SEED => seed.to_string(),
            word => word.to_owned(),
        });
        std::iter::once(self.name.to_owned()).chain(rest).collect()
    }
}

/// The short case of that program and name.
#[must_use]
pub fn find(program: &str, name: &str) -> Option<&'static Case> {
    CASES
        .iter()
        .find(|case| case.program == program && case.name == name && !case.long)
}

/// All cases.
#[rustfmt::skip]
pub const CASES: &[Case] = &[
    // Each of these in memory that is local, far, in transit and shared after fork.
    case("anon", "read", "contents, untouched pages and zeros are read").both(),
    case("anon", "read_prot", "inaccessible memory raises SIGSEGV and keeps its contents").both(),
    case("anon", "write", "what is written stays").both(),
    case("anon", "write_prot", "read-only memory refuses writes until it is writable again").both(),
    case("anon", "write_child", "parent and child write privately").both(),
    case("anon", "write_child_shared", "shared memory is seen by both, private memory beside it is not").both(),
    case("anon", "write_huge", "memory for huge pages is read and written").whole(),
    case("anon", "huge_parts", "huge pages untouched, zero and given back by MADV_FREE").whole(),
    case("anon", "files", "file mappings, shared and private, are left alone"),
    case("anon", "round_trips", "ten times out and home, half of it changed each time").both(),
    case("anon", "teardown", "threads touch what is unmapped and what the process ends with").both(),
    case("anon", "double_map", "memory mapped twice is the same through both"),
    case("anon", "mixed", "neighbours of every kind keep their own").both(),
    case("anon", "snapshot", "mincore and pagemap bring nothing home"),
    case("anon", "cow_far", "a child that reads after its parent wrote everything sees the old"),
    case("anon", "partial_unmap", "half of it unmapped at three offsets").both(),
    case("anon", "remap", "mremap before and after a fault, with and without MREMAP_DONTUNMAP").both(),
    case("anon", "unpopulated", "protection of pages never touched").both(),
    case("anon", "zeros", "pages of zeros come back as zeros, and are written").both(),
    case("anon", "on_fork", "MADV_WIPEONFORK wipes and MADV_DONTFORK leaves out, in the child alone").both().whole(),
    case("anon", "advice", "COLD, PAGEOUT, WILLNEED, POPULATE_READ and POPULATE_WRITE keep contents").both(),
    case("anon", "populate", "what MADV_POPULATE_* and MAP_POPULATE are for is there as they return").both(),
    case("anon", "locked", "locked pages come home, stay, and go once unlocked").both().unbounded(),
    case("anon", "address_reuse", "what is mapped where something was just unmapped is new").both(),
    case("anon", "discard_fetch", "a page discarded while it is fetched is zeros afterwards").both(),

    case("memory_calls", "unmap_whole", "a mapping unmapped, its address used again").both(),
    case("memory_calls", "unmap_part", "half of a mapping unmapped at three offsets").both(),
    case("memory_calls", "dontneed", "MADV_DONTNEED discards, and nothing beside it").both(),
    case("memory_calls", "free", "MADV_FREE leaves old contents or zeros").both(),
    case("memory_calls", "remove", "MADV_REMOVE is refused where the kernel refuses it"),
    case("memory_calls", "remap_grow", "mremap in place").both(),
    case("memory_calls", "remap_move", "mremap elsewhere, half of it far").both(),
    case("memory_calls", "remap_shrink", "mremap to less").both(),
    case("memory_calls", "remap_dontunmap", "mremap that leaves the old range empty").both(),
    case("memory_calls", "remap_fixed", "mremap over far memory").both(),
    case("memory_calls", "brk_shrink", "the heap given back").both(),
    case("memory_calls", "protect_none", "inaccessible memory keeps its contents").both(),
    case("memory_calls", "protect_read", "read-only memory keeps its contents").both(),
    case("memory_calls", "protect_some", "read-only memory among other").both(),
    case("memory_calls", "protect_key", "memory under a protection key").both(),
    case("memory_calls", "reuse", "what is written where memory is just leaving stays").both().whole(),
    case("memory_calls", "exit", "exit frees every far slot").both(),
    case("memory_calls", "killed", "SIGKILL frees every far slot").both().ending(128 + 9),
    case("memory_calls", "exec", "exec frees the old image's far slots").both(),

    case("forks", "child_reads", "a child reads what is far").both(),
    case("forks", "both_write", "both sides write their own").both(),
    case("forks", "outlives", "a child outlives its parent").both(),
    case("forks", "generations", "four generations write their own").both(),
    case("forks", "fork_in_transit", "fork while pages come and go").both(),
    case("forks", "parent_exits", "a parent that ends as it has forked, its pages on their way out").both(),
    case("forks", "storm", "children killed at any moment").both(),
    case("forks", "siblings", "eight children at a time read what they share").both(),
    case("forks", "cow_storm", "eight children at a time write what they share").both(),
    case("forks", "not_inherited", "ranges that a child does not inherit").both(),
    case("forks", "changed_after_fork", "what a child inherits is what was set when it was forked").both(),

    case("births", "daemon", "a daemon keeps what it had before it became one"),
    // Without a helper nothing of a child is taken out: docs/limits.md.
    case("births", "raw_clone", "children by the bare system call, and theirs").both().unbounded(),
    case("births", "vfork", "a child that borrows its parent's memory"),
    case("births", "posix_spawn", "programs spawned, and run by a shell"),
    case("births", "fork_exec", "children that become other programs"),
    case("births", "threads_fork", "threads that fork while others wait for far pages").both(),
    case("births", "unshare", "threads and processes that unshare descriptors and folder, and their children"),
    case("births", "namespaces", "a child in user and mount namespaces of its own, and its child"),
    case("births", "fork_discard", "fork while threads discard, map anew and write").within(6 << 20).both(),

    case("atomics", "exclusive", "atomic additions to pages that go and come").both(),
    case("atomics", "exclusive_mprotect", "the same while their protection changes").both(),
    case("atomics", "exclusive_cow", "the same while the process forks, and in its children").both(),

    // In each of the states again.
    case("parts", "huge_unmap", "pieces cut out of huge pages").both().whole(),
    case("parts", "locked_on_fault", "mlock2 locks what is touched, and brings nothing home").both().unbounded(),
    case("parts", "remap_grown", "mappings that grow, move and shrink, partly managed").both(),
    case("parts", "remap_pieces", "pieces of one mapping moved apart, each with its protection").both(),
    case("parts", "joined", "calls across the border of what is managed"),
    case("parts", "remap_joined", "farpage's limit: mremap across that border says EFAULT"),

    // Asked of the agent by the program itself; nothing comes home for it.
    case("soft_dirty", "local", "pages that are here: never touched, read, written").both(),
    case("soft_dirty", "far", "the bit survives eviction and fetch").both(),
    case("soft_dirty", "transit", "cleared, written and asked about while pages come and go").both(),
    case("soft_dirty", "forked", "it survives fork, and each side has its own from then on").both(),
    case("soft_dirty", "wiped", "what a child does not inherit is written for the child alone").both(),
    case("soft_dirty", "protect", "it survives mprotect").both(),
    case("soft_dirty", "given_up", "discarded and moved pages are written ones, new mappings are not").both(),
    case("soft_dirty", "refused", "who asks about other memory, or nonsense, is told so"),

    case("kernel_access", "plain", "read and write").both(),
    case("kernel_access", "direct", "O_DIRECT").pinning(),
    case("kernel_access", "vectors", "readv and writev").both(),
    case("kernel_access", "from_outside", "process_vm_readv and process_vm_writev").both(),
    case("kernel_access", "pinned", "io_uring fixed buffers stay while pinned").pinning(),
    case("kernel_access", "pinned_fork", "the same while the process forks, and both sides are intact").pinning(),
    case("kernel_access", "direct_fork", "O_DIRECT under way while the process forks").pinning(),
    case("kernel_access", "proc_mem", "the kernel's limit: /proc/PID/mem says EIO").both(),
    case("kernel_access", "peek", "the kernel's limit: a debugger is told EIO, unless the page was brought home").both(),
    case("kernel_access", "guard", "guard pages by libc's madvise fault, and are zeros afterwards").both(),
    case("kernel_access", "guard_raw", "the kernel's limit: under guard pages by the bare system call, far pages stay").both(),
    case("kernel_access", "dump", "the kernel's limit: core dumps have holes").ending(128 + 6),

    case("growth", "mapping", "one mapping written at full speed").both(),
    case("growth", "huge", "the same with huge pages").both(),
    case("growth", "huge_before", "what lay in huge pages before memory was short goes far and comes home").both().whole(),
    case("growth", "two_threads", "two threads that write at full speed").both(),
    case("growth", "many_mappings", "many mappings").both(),
    case("growth", "small_blocks", "malloc of small blocks").both(),
    case("growth", "reallocs", "growth by realloc").both(),
    case("growth", "populate", "memory populated by one call").both(),
    case("growth", "given_back", "a stack above the limit that is given back in time").both().unbounded(),

    case("hints", "will_need", "MADV_WILLNEED brings far memory home").both(),
    case("hints", "page_out", "MADV_PAGEOUT has memory go far").both(),
    case("hints", "cold", "MADV_COLD has memory go before other memory").both(),

    case("threads", "same_pages", "threads touch the same far pages").both(),
    case("threads", "different_pages", "threads write their own parts").both(),
    case("threads", "sums", "no addition is lost in pages that leave").both(),
    case("threads", "discard_race", "discards race touches").both(),
    case("threads", "thousands", "threads by the thousand").both(),
    case("threads", "robust_mutex", "robust mutexes are handed on").both(),
    case("threads", "robust_far", "the kernel's limit: one that is far at its owner's end is not"),

    case("hostile", "close_everything", "every descriptor closed").both(),
    case("hostile", "closing_child", "a child closes every descriptor").both(),
    case("hostile", "filtered", "a filter kills for madvise, ioctl and socket").both(),
    case("hostile", "filtered_child", "a child under such a filter").both(),
    // What lives under a filter that keeps helpers away is outside the limit, and so is what is locked.
    case("hostile", "child_of_filtered", "a child forked under such a filter").both().unbounded(),
    case("hostile", "other_user", "another user").both(),
    case("hostile", "title", "a title over the environment"),
    case("hostile", "limited", "an address space limited"),
    case("hostile", "lock_all", "mlockall of what is there").both().unbounded().whole(),
    case("hostile", "lock_future", "mlockall of what is to come").both().unbounded(),

    // Each at eight stages: filling, fetching, writing, forking, discarding, moving, protecting, unmapping.
    case("stopped", "stopped", "SIGSTOP at every stage").both(),
    case("stopped", "job_control", "in the background at every stage, as a terminal does it"),
    case("stopped", "traced", "a debugger attaches and detaches at every stage"),

    case("fork_tree", "verify", "a tree of processes, each with its own contents").with(&["short", SEED]),
    case("fork_tree", "kill", "the same with processes killed at any moment").with(&["short", SEED]),
    case("fork_tree", "verify", "6 generations, 200 processes, 256 MiB").with(&["long", SEED]).within(64 << 20).long(),
    case("fork_tree", "kill", "the same with processes killed at any moment").with(&["long", SEED]).within(64 << 20).long(),

    case("random_calls", "run", "10 s of memory calls drawn by lot, against a model and a process of plain memory").with(&["10", SEED]).with_twin().both().unbounded(),
    case("random_calls", "run", "10 minutes of the same").with(&["600", SEED]).with_twin().both().unbounded().long(),
];
