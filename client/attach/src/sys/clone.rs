//! The helper's birth: a process that shares the program's memory and nothing else.

use core::arch::asm;

use linux_raw_sys::general as k;

use super::calls::Errno;

/// Starts `entry(argument)` in a new process that shares this memory (`CLONE_VM` alone: its own descriptors,
/// signal handlers and directory), on `stack_top`, with `tls` as its thread pointer. It raises no SIGCHLD and
/// is no child that `wait` sees without `__WCLONE`. `entry` must never return.
///
/// # Errors
/// The kernel's errno, EAGAIN when the user may have no more processes.
///
/// # Safety
/// `stack_top` must end a mapped, writable stack that nobody else uses, 16-byte aligned; `tls` must point to
/// mapped memory; `entry` must use neither libc nor thread-locals.
pub unsafe fn start(
    entry: extern "C" fn(usize) -> !,
    argument: usize,
    stack_top: usize,
    tls: usize,
) -> Result<i32, Errno> {
    let flags = (k::CLONE_VM | k::CLONE_SETTLS) as usize;
    let result: isize;
    // SAFETY: in the parent this is a plain system call. The child returns from it on its own stack with rax
    // zero, clears the frame pointer as the ABI asks of an outermost frame, and calls `entry` with a 16-byte
    // aligned stack; it never comes back here.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r13",
            "call r12",
            "ud2",
            "2:",
            inlateout("rax") k::__NR_clone as isize => result,
            in("rdi") flags,
            in("rsi") stack_top,
            in("rdx") 0usize,
            in("r10") 0usize,
            in("r8") tls,
            in("r12") entry,
            in("r13") argument,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if result < 0 {
        Err(Errno(result.unsigned_abs() as u32))
    } else {
        Ok(result as i32)
    }
}
