//! The unsafe rim: the loader's hooks and the libc functions that are interposed.

#![allow(unsafe_code)]

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char, c_int, c_long, c_void};
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use farpage_attach::control::Control;

use crate::{allocations, lifecycle, mappings};

unsafe extern "C" {
    static environ: *const *const c_char;
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    fn sbrk(increment: isize) -> *mut c_void;
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> c_int;
}

/// A value set before it is read by others: in the constructor, or in a child with one thread.
pub(crate) struct Slot<T: Copy> {
    set: AtomicBool,
    value: UnsafeCell<Option<T>>,
}

// SAFETY: `set` and `clear` run in the loader's constructor or a forked child's handler, when the process has
// one thread; afterwards the value is only read.
unsafe impl<T: Copy> Sync for Slot<T> {}

impl<T: Copy> Slot<T> {
    pub(crate) const fn new() -> Self {
        Self {
            set: AtomicBool::new(false),
            value: UnsafeCell::new(None),
        }
    }

    pub(crate) fn set(&self, value: T) {
        // SAFETY: one thread, see above.
        unsafe { *self.value.get() = Some(value) };
        self.set.store(true, Ordering::Release);
    }

    pub(crate) fn clear(&self) {
        self.set.store(false, Ordering::Release);
    }

    pub(crate) fn get(&self) -> Option<T> {
        if !self.set.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: set, and not written while others run, see above.
        unsafe { *self.value.get() }
    }
}

/// The control block behind a pointer that is null or its mapping's address.
#[inline]
pub(crate) fn control_ref(pointer: *mut Control) -> Option<&'static Control> {
    // SAFETY: the pointer is null or was made from `Attached::control`, a mapping that stays.
    unsafe { pointer.as_ref() }
}

/// The value of an environment variable, as it lies in the initial environment.
pub(crate) fn variable(name: &[u8]) -> Option<&'static [u8]> {
    // SAFETY: the loader has set `environ` up as an array of C strings that ends with a null pointer; the
    // strings of the initial environment lie on the stack's end for the life of the program image.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let text = CStr::from_ptr(*entry).to_bytes();
            if let Some(value) = text
                .strip_prefix(name)
                .and_then(|rest| rest.strip_prefix(b"="))
            {
                return Some(value);
            }
            entry = entry.add(1);
        }
    }
    None
}

/// Has `child` called in every forked child.
pub(crate) fn at_fork(child: extern "C" fn()) {
    // SAFETY: registers a function with a static lifetime; this object is never unloaded (`-z nodelete` holds
    // for preloaded objects).
    unsafe { pthread_atfork(None, None, Some(child)) };
}

/// Where the heap ends.
pub(crate) fn heap_end() -> usize {
    // SAFETY: an increment of nothing changes nothing; libc answers from a variable of its own.
    unsafe { sbrk(0) }.addr()
}

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

extern "C" fn constructor() {
    lifecycle::start();
}

/// A libc function found behind this object, looked up once.
struct Next {
    name: &'static CStr,
    found: AtomicPtr<c_void>,
}

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            found: AtomicPtr::new(core::ptr::null_mut()),
        }
    }

    #[inline]
    fn get(&self) -> *mut c_void {
        let found = self.found.load(Ordering::Relaxed);
        if found.is_null() {
            self.look_up()
        } else {
            found
        }
    }

    #[cold]
    fn look_up(&self) -> *mut c_void {
        const RTLD_NEXT: *mut c_void = core::ptr::without_provenance_mut(usize::MAX);
        // SAFETY: a NUL-terminated name; RTLD_NEXT is allowed in a preloaded object. glibc's dlsym allocates
        // nothing when it succeeds, so this does not come back to us.
        let found = unsafe { dlsym(RTLD_NEXT, self.name.as_ptr()) };
        self.found.store(found, Ordering::Relaxed);
        found
    }
}

/// Defines an interposed function: what to do before, the real one, what to do after.
macro_rules! interpose {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty, before $before:stmt, after |$result:ident| $after:expr) => {
        $(#[$doc])*
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
            static NEXT: Next = Next::new(match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => c"",
            });
            $before
            // SAFETY: the next object's function of this name has the signature that libc documents for it.
            let real: unsafe extern "C" fn($($ty),*) -> $ret = unsafe { core::mem::transmute(NEXT.get()) };
            // SAFETY: the caller's arguments, unchanged.
            let $result = unsafe { real($($arg),*) };
            $after;
            $result
        }
    };
}

interpose! { fn malloc(size: usize) -> *mut c_void, before allocations::before(), after |result| allocations::after(size) }
interpose! { fn calloc(count: usize, size: usize) -> *mut c_void, before allocations::before(), after |result| allocations::after(count.saturating_mul(size)) }
interpose! { fn realloc(old: *mut c_void, size: usize) -> *mut c_void, before allocations::before(), after |result| allocations::after(size) }
interpose! { fn memalign(alignment: usize, size: usize) -> *mut c_void, before allocations::before(), after |result| allocations::after(size) }
interpose! { fn aligned_alloc(alignment: usize, size: usize) -> *mut c_void, before allocations::before(), after |result| allocations::after(size) }
interpose! { fn posix_memalign(out: *mut *mut c_void, alignment: usize, size: usize) -> c_int, before allocations::before(), after |result| allocations::after(size) }
interpose! { fn mmap(address: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void, before let (flags, populate) = mappings::without_populate(flags, len), after |result| mappings::after(result, len, prot, flags, populate) }
interpose! { fn mmap64(address: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void, before let (flags, populate) = mappings::without_populate(flags, len), after |result| mappings::after(result, len, prot, flags, populate) }
interpose! { fn mremap(old: *mut c_void, old_len: usize, len: usize, flags: c_int, address: *mut c_void) -> *mut c_void, before {}, after |result| mappings::made(result, len, true) }
interpose! { fn madvise(address: *mut c_void, len: usize, advice: c_int) -> c_int, before {}, after |result| mappings::advised(address, len, advice, result) }

const PR_SET_SECCOMP: c_int = 22;
/// Its number on x86-64, as the helper's start is for x86-64.
const NR_SECCOMP: c_long = 317;

// Both are variadic in C; their callers put at most this many words where these look for them.
interpose! { fn prctl(option: c_int, a: usize, b: usize, c: usize, d: usize) -> c_int, before if option == PR_SET_SECCOMP { lifecycle::before_filter() }, after |result| {} }
interpose! { fn syscall(number: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> c_long, before if number == NR_SECCOMP { lifecycle::before_filter() }, after |result| {} }
