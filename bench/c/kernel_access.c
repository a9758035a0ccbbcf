/* Far pages that the kernel reads and writes: for the program, and for others. */
#include "far.h"
#include <linux/io_uring.h>
#include <sys/ptrace.h>

static int scratch(int flags)
{
	char name[] = "kernel_access.XXXXXX";
	int fd = mkostemp(name, flags);
	if (fd < 0 && errno == EINVAL)
		skip("the folder's file system has no O_DIRECT");
	MUST(fd >= 0);
	unlink(name);
	return fd;
}

static void through_file(int flags)
{
	int fd = scratch(flags);
	char *at = far_map(DATA, 1), *back = far_map(DATA, 2);
	const size_t step = 256 << 10;
	for (size_t from = 0; from < DATA; from += step)
		MUST(pwrite(fd, at + from, step, (off_t)from) == (ssize_t)step);
	for (size_t from = 0; from < DATA; from += step)
		MUST(pread(fd, back + from, step, (off_t)from) == (ssize_t)step);
	check(back, DATA, 1, "read back");
	push_far(back, DATA);
	check(back, DATA, 1, "read back, and far again");
	check(at, DATA, 1, "what was written");
	close(fd);
}

static void plain(void) { through_file(0); }
static void direct(void) { through_file(O_DIRECT); }

static void vectors(void)
{
	int ends[2];
	MUST(pipe(ends) == 0);
	char *at = far_map(DATA, 1), *to = far_map(DATA, 2);
	for (size_t page = 0; page + 8 <= DATA / PAGE; page += 8) {
		struct iovec out[4], in[4];
		for (int i = 0; i < 4; i++) {
			out[i] = (struct iovec){at + (page + 2 * (size_t)i) * PAGE, PAGE};
			in[i] = (struct iovec){to + (page + 2 * (size_t)i) * PAGE, PAGE};
		}
		MUST(writev(ends[1], out, 4) == 4 * PAGE && readv(ends[0], in, 4) == 4 * PAGE);
	}
	for (size_t page = 0; page < DATA / PAGE; page++)
		if (wrong_word(to + page * PAGE, page, page % 2 ? 2 : 1) >= 0)
			fail("page %zu", page);
}

static void from_outside(void)
{
	char *at = far_map(DATA, 1);
	prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
	pid_t parent = getpid(), child = fork();
	MUST(child >= 0);
	if (!child) {
		static char copy[64 * PAGE];
		for (size_t from = 0; from < DATA; from += sizeof copy) {
			struct iovec local = {copy, sizeof copy}, remote = {at + from, sizeof copy};
			MUST(process_vm_readv(parent, &local, 1, &remote, 1, 0) == sizeof copy);
			check_from(copy, sizeof copy, from / PAGE, 1, "read from outside");
			fill_from(copy, sizeof copy, from / PAGE, 2);
			MUST(process_vm_writev(parent, &local, 1, &remote, 1, 0) == sizeof copy);
		}
		_exit(0);
	}
	wait_for(child, "the one outside");
	check(at, DATA, 2, "written from outside");
}

/* A buffer that the kernel holds pinned is not taken out: what is read into it later arrives. With children that are forked
 * meanwhile it arrives in the parent alone. */
static void read_into_pinned(int children)
{
	struct io_uring_params params = {0};
	int ring = (int)syscall(__NR_io_uring_setup, 4, &params);
	if (ring < 0)
		skip("io_uring is switched off");
	const size_t bytes = 2 * MIB;
	char *at = far_map(DATA, 1);
	struct iovec buffer = {at, bytes};
	struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
	setrlimit(RLIMIT_MEMLOCK, &all);
	MUST(syscall(__NR_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1) == 0);
	char *queue = mmap(NULL, params.sq_off.array + params.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	struct io_uring_sqe *entries = mmap(NULL, params.sq_entries * sizeof *entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	MUST(queue != MAP_FAILED && entries != MAP_FAILED);
	int fd = scratch(0);
	char *source = map(bytes);
	fill(source, bytes, 7);
	MUST(pwrite(fd, source, bytes, 0) == (ssize_t)bytes);
	MUST(munmap(source, bytes) == 0);
	push_far(at, DATA);
	MUST(present(at, bytes) == bytes / PAGE);
	int go_on[2];
	char byte;
	pid_t child[4];
	MUST(pipe(go_on) == 0);
	for (int i = 0; i < children; i++) {
		MUST((child[i] = fork()) >= 0);
		if (child[i]) {
			push_far(at + bytes, DATA - bytes);
			continue;
		}
		close(go_on[1]);
		check(at, bytes, 1, "a pinned buffer, in a child");
		MUST(read(go_on[0], &byte, 1) == 0);
		check(at, DATA, 1, "in a child, after its parent's read");
		fill(at, bytes, 9);
		push_far(at, DATA);
		check(at, bytes, 9, "written by a child");
		_exit(0);
	}
	entries[0] = (struct io_uring_sqe){.opcode = IORING_OP_READ_FIXED, .fd = fd, .addr = (uintptr_t)at, .len = bytes};
	((unsigned *)(queue + params.sq_off.array))[0] = 0;
	__atomic_store_n((unsigned *)(queue + params.sq_off.tail), 1, __ATOMIC_RELEASE);
	MUST(syscall(__NR_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1);
	check(at, bytes, 7, "read into a pinned buffer");
	close(go_on[1]);
	for (int i = 0; i < children; i++)
		wait_for(child[i], "a child");
	check(at, bytes, 7, "read into a pinned buffer, and left alone");
	check_from(at + bytes, DATA - bytes, bytes / PAGE, 1, "beside it");
}

static struct {
	int fd;
	char *at;
	volatile int reads, stop;
} device;

/* Reads the file over and over, past the page cache, into a buffer that nobody else touches while a read is under way. */
static void *read_directly(void *unused)
{
	(void)unused;
	const size_t step = MIB;
	for (; !device.stop; device.reads++)
		for (size_t from = 0; from < 8 * MIB; from += step) {
			MUST(pread(device.fd, device.at + from, step, (off_t)from) == (ssize_t)step);
			check_from(device.at + from, step, from / PAGE, 7, "read directly, while others fork");
			memset(device.at + from, 0, step);
		}
	return NULL;
}

/* Forks while a device may be writing into pages: what it brings arrives in the parent. What a child has of these pages is of
 * no one moment; everything else is. */
static void direct_fork(void)
{
	const size_t buffer = 8 * MIB;
	device.fd = scratch(O_DIRECT);
	device.at = far_map(buffer, 7);
	char *at = far_map(DATA / 2, 1);
	MUST(pwrite(device.fd, device.at, buffer, 0) == (ssize_t)buffer);
	pthread_t reader;
	MUST(pthread_create(&reader, NULL, read_directly, NULL) == 0);
	for (int turn = 0; turn < 8 || device.reads < 2; turn++) {
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			check(at, DATA / 2, 1, "in a child, forked while a device writes");
			fill(device.at, buffer, 9);
			push_far(at, DATA / 2);
			check(device.at, buffer, 9, "written by a child over what a device wrote to");
			_exit(0);
		}
		wait_for(child, "a child");
	}
	device.stop = 1;
	MUST(pthread_join(reader, NULL) == 0);
	check(at, DATA / 2, 1, "beside what a device wrote to");
}

static void pinned(void) { read_into_pinned(0); }
static void pinned_fork(void) { read_into_pinned(4); }

/* The kernel's limit, pinned: /proc/PID/mem does not fault absent pages in, it says EIO, and harms nothing. */
static void proc_mem(void)
{
	char *at = far_map(DATA, 1);
	int fd = open("/proc/self/mem", O_RDONLY);
	MUST(fd >= 0);
	size_t refused = 0;
	char page[PAGE];
	for (size_t i = 0; i < DATA / PAGE; i++) {
		ssize_t got = pread(fd, page, PAGE, (off_t)(uintptr_t)(at + i * PAGE));
		if (got == (ssize_t)PAGE)
			MUST(wrong_word(page, i, 1) < 0);
		else if (errno == EIO)
			refused++;
		else
			fail("page %zu", i);
	}
	MUST(refused > DATA / PAGE / 2 || !under_farpage());
	check(at, DATA, 1, "after /proc/self/mem");
}

/* Stops it as a debugger does. Its parent may, where debugging is allowed at all. */
static void debug(pid_t pid)
{
	int status;
	if (ptrace(PTRACE_SEIZE, pid, NULL, NULL) && (errno == EPERM || errno == ENOSYS))
		skip("this account may not debug its own child");
	MUST(ptrace(PTRACE_INTERRUPT, pid, NULL, NULL) == 0);
	MUST(waitpid(pid, &status, __WALL) == pid && WIFSTOPPED(status));
}

/* A word of the page as a debugger reads it; no if that says EIO. */
static int peeked(pid_t pid, char *at, size_t page)
{
	const size_t index = page % WORDS;
	errno = 0;
	long word = ptrace(PTRACE_PEEKDATA, pid, at + page * PAGE + 8 * index, NULL);
	if (errno && errno != EIO)
		fail("page %zu", page);
	if (!errno && (uint64_t)word != word_of(page, 1, index))
		fail("a debugger finds %lx in page %zu, word %zu", word, page, index);
	return !errno;
}

/* The kernel's limit, pinned: a debugger who looks at a far page, or writes to it, is told EIO, and harms nothing. Once the page
 * was read in another way it is there for him too. */
static void peek(void)
{
	/* The child's to fill, at an address that both know. */
	char *at = map(DATA), byte, copy[PAGE];
	int far[2], go_on[2];
	MUST(pipe(far) == 0 && pipe(go_on) == 0);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		fill(at, DATA, 1);
		push_far(at, DATA);
		MUST(write(far[1], "f", 1) == 1 && read(go_on[0], &byte, 1) == 1);
		check(at, DATA, 1, "after a debugger");
		_exit(0);
	}
	close(far[1]);
	MUST(read(far[0], &byte, 1) == 1);
	debug(child);
	size_t refused = 0;
	for (size_t page = 0; page < DATA / PAGE; page++) {
		if (peeked(child, at, page))
			continue;
		char *word = at + page * PAGE + 8 * (page % WORDS);
		MUST(ptrace(PTRACE_POKEDATA, child, word, word_of(page, 1, page % WORDS)) == 0 || errno == EIO);
		struct iovec local = {copy, PAGE}, remote = {at + page * PAGE, PAGE};
		/* It may leave again before it is looked at, but not each time. */
		for (int turn = 0; refused % 2048 == 0; turn++) {
			MUST(turn < 20);
			MUST(process_vm_readv(child, &local, 1, &remote, 1, 0) == PAGE && wrong_word(copy, page, 1) < 0);
			if (peeked(child, at, page))
				break;
		}
		refused++;
	}
	MUST(refused > DATA / PAGE / 2 || !under_farpage());
	MUST(ptrace(PTRACE_DETACH, child, NULL, NULL) == 0);
	MUST(write(go_on[1], "g", 1) == 1);
	wait_for(child, "who was debugged");
}

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

/* Turns the lower half of far memory into guard pages and back. Returns how many of its pages have their old contents. */
static size_t guard_by(long (*advise)(void *, size_t, int))
{
	char *at = far_map(DATA, 1);
	if (advise(at, DATA / 2, MADV_GUARD_INSTALL))
		skip("the kernel has no MADV_GUARD_INSTALL");
	MUST(touch_raises(at + PAGE, 0) == SIGSEGV && touch_raises(at + DATA / 2 - PAGE, 1) == SIGSEGV);
	check_from(at + DATA / 2, DATA / 2, DATA / 2 / PAGE, 1, "beside guard pages");
	push_far(at + DATA / 2, DATA / 2);
	MUST(touch_raises(at + 2 * PAGE, 0) == SIGSEGV);
	MUST(advise(at, DATA / 2, MADV_GUARD_REMOVE) == 0);
	size_t old = 0;
	for (size_t page = 0; page < DATA / 2 / PAGE; page++)
		if (wrong_word(at + page * PAGE, page, 1) < 0)
			old++;
		else
			check_zeros(at + page * PAGE, PAGE, "once a guard page");
	check_from(at + DATA / 2, DATA / 2, DATA / 2 / PAGE, 1, "beside what were guard pages");
	return old;
}

static long by_libc(void *at, size_t bytes, int advice) { return madvise(at, bytes, advice); }

/* Not by libc's function: its `syscall` is as well known to the shim as its `madvise`. */
static long by_the_kernel(void *at, size_t bytes, int advice)
{
	long result;
	__asm__ volatile("syscall" : "=a"(result) : "0"((long)SYS_madvise), "D"(at), "S"(bytes), "d"((long)advice) : "rcx", "r11", "memory");
	return result;
}

static void guard(void) { MUST(guard_by(by_libc) == 0); }

/* The kernel's limit, pinned: guard pages raise no event, so that a far page under one is not forgotten. */
static void guard_raw(void)
{
	size_t old = guard_by(by_the_kernel);
	MUST(under_farpage() ? old > DATA / 2 / PAGE / 2 : old == 0);
}

/* The kernel's limit, pinned: a dump has holes where pages are far, and is made without end or harm. It is judged from outside,
 * by whoever reads this line. */
static void dump(void)
{
	char *at = far_map(DATA, 1);
	/* So that some is here. */
	check(at, DATA / 16, 1, "brought home");
	fprintf(stderr, "DATA %lx %lx\n", (unsigned long)(uintptr_t)at, (unsigned long)DATA);
	struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
	setrlimit(RLIMIT_CORE, &all);
	abort();
}

static const struct test_case cases[] = {
	{"plain", plain}, {"direct", direct}, {"vectors", vectors}, {"from_outside", from_outside}, {"pinned", pinned},
	{"pinned_fork", pinned_fork}, {"direct_fork", direct_fork},
	{"proc_mem", proc_mem}, {"peek", peek}, {"guard", guard}, {"guard_raw", guard_raw}, {"dump", dump},
};
MAIN(cases)
