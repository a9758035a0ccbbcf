/* Calls whose ranges are not alike all over: huge pages cut into, locks that wait for a touch, mappings of which one part is
 * managed and another is not. Each in memory that is local, far, in transit and shared after fork. */
#include "states.h"

/* Cut out of huge pages: at their borders, across them and within one, on either side of what stays. */
static void huge_unmap(void)
{
	const size_t huge = 2 * MIB;
	for (int turn = 0; turn < 3; turn++) {
		/* Once is enough where it takes longest. */
		if (state == TRANSIT && turn != 1)
			continue;
		char *whole = map(bytes + huge);
		char *at = (char *)(((uintptr_t)whole + huge - 1) & ~(huge - 1));
		if (madvise(at, bytes, MADV_HUGEPAGE))
			skip("the kernel has no transparent huge pages");
		entered(at, 1);
		const size_t from = turn == 0 ? huge : turn == 1 ? huge / 2 : huge / 4;
		const size_t length = turn == 0 ? huge : turn == 1 ? huge : huge / 4;
		if (turn == 2)
			MUST(madvise(at + from, length, MADV_DONTNEED) == 0);
		else
			MUST(munmap(at + from, length) == 0);
		check(at, from, 1, "before the cut");
		const size_t end = from + length;
		check_from(at + end, bytes - end, end / PAGE, 1, "behind the cut");
		if (turn == 2)
			check_zeros(at + from, length, "discarded within a huge page");
		else if (state != TRANSIT) /* there another thread may map something into it */
			MUST(touch_raises(at + from + length / 2, 0) == SIGSEGV);
		fill(at, from, 2);
		fill_from(at + end, bytes - end, end / PAGE, 3);
		push(at);
		check(at, from, 2, "written before the cut");
		check_from(at + end, bytes - end, end / PAGE, 3, "written behind the cut");
		leave();
		MUST(munmap(whole, bytes + huge) == 0);
	}
}

#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif

/* What is locked only as it is touched: nothing comes home for the call, and what has come stays. */
static void locked_on_fault(void)
{
	struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
	setrlimit(RLIMIT_MEMLOCK, &all);
	char *at = enter(1);
	size_t before = present(at, bytes / 4);
	if (syscall(SYS_mlock2, at, bytes / 4, MLOCK_ONFAULT))
		skip("this account may not lock memory, or the kernel has no mlock2");
	if (state == FAR)
		MUST(present(at, bytes / 4) <= before);
	check(at, bytes / 8, 1, "locked as it is touched");
	push(at);
	MUST(present(at, bytes / 8) == bytes / 8 / PAGE);
	check(at, bytes, 1, "partly locked");
	MUST(munlock(at, bytes / 4) == 0);
	fill(at, bytes / 4, 2);
	push(at);
	check(at, bytes / 4, 2, "unlocked");
	munmap(at, bytes);
}

/* A mapping that grows, in place and by moving, and shrinks again: of what it grows by nothing is managed yet. */
static void remap_grown(void)
{
	const size_t more = bytes / 4;
	char *at = enter(1);
	char *place = map(2 * bytes);
	MUST(mremap(at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
	at = place;
	/* In transit another thread may have mapped something right behind it: then it moves. */
	char *to = mremap(at, bytes, bytes + more, MREMAP_MAYMOVE);
	MUST(to != MAP_FAILED);
	check_zeros(to + bytes, more, "grown");
	fill_from(to + bytes, more, bytes / PAGE, 2);
	push(to);
	check(to, bytes, 1, "before what it grew by");
	check_from(to + bytes, more, bytes / PAGE, 2, "what it grew by");
	/* To a chosen place, larger once more, with a part protected since: that makes mappings of their own. */
	char *target = map(2 * bytes);
	at = mremap(to, bytes + more, bytes + 2 * more, MREMAP_MAYMOVE | MREMAP_FIXED, target);
	MUST(at == target);
	check_zeros(at + bytes + more, more, "grown again");
	check(at, bytes, 1, "moved as it grew");
	check_from(at + bytes, more, bytes / PAGE, 2, "moved as it grew, what it grew by first");
	/* Shrunk to a part of what it began with, moved by that, and grown over what was given up: zeros. */
	to = mremap(at, bytes + 2 * more, bytes / 2, MREMAP_MAYMOVE);
	MUST(to == at);
	check(to, bytes / 2, 1, "shrunk");
	at = mremap(to, bytes / 2, bytes, MREMAP_MAYMOVE);
	MUST(at != MAP_FAILED);
	check(at, bytes / 2, 1, "shrunk and grown");
	check_zeros(at + bytes / 2, bytes / 2, "given up and grown over");
	push(at);
	check(at, bytes / 2, 1, "shrunk, grown and far");
	munmap(target, 2 * bytes);
	munmap(place, 2 * bytes);
	munmap(at, bytes);
}

/* Its middle is inaccessible, its end read-only, and each piece is moved by itself, with and without its mapping left behind:
 * the pieces of one managed range become several, and lie in another order. */
static void remap_pieces(void)
{
	const size_t piece = bytes / 4;
	static const int protections[] = {PROT_READ | PROT_WRITE, PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
	for (int stays = 0; stays < 2; stays++) {
		char *at = enter(1), *target = map(bytes);
		for (int i = 0; i < 4; i++)
			MUST(mprotect(at + i * piece, piece, protections[i]) == 0);
		for (int i = 0; i < 4; i++) {
			int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (stays ? MREMAP_DONTUNMAP : 0);
			char *to = target + (3 - i) * piece;
			if (mremap(at + i * piece, piece, piece, flags, to) != to)
				fail("piece %d%s", i, stays ? ", its mapping left" : "");
		}
		MUST(touch_raises(target + 2 * piece, 0) == SIGSEGV);
		MUST(touch_raises(target + piece, 1) == SIGSEGV);
		MUST(mprotect(target, bytes, PROT_READ | PROT_WRITE) == 0);
		for (int i = 0; i < 4; i++)
			check_from(target + (3 - i) * piece, piece, i * piece / PAGE, 1, "a piece where it is");
		if (stays) {
			MUST(mprotect(at, bytes, PROT_READ | PROT_WRITE) == 0);
			check_zeros(at, bytes, "where the pieces were");
		}
		munmap(at, bytes);
		munmap(target, bytes);
		leave();
	}
}

/* Mappings made one beside the other are one to the kernel. Whichever of them is managed, calls on both together do what they
 * do natively. */
static void joined(void)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, rw = PROT_READ | PROT_WRITE;
	const size_t less = 16 * PAGE;
	char *place = mmap(NULL, bytes + 4 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(place != MAP_FAILED);
	char *at = place + 2 * MIB;
	MUST(mmap(at, bytes, rw, flags, -1, 0) == at);
	entered(at, 1);
	/* Too small to be managed by itself. */
	MUST(mmap(at + bytes, less, rw, flags, -1, 0) == at + bytes);
	fill_from(at + bytes, less, bytes / PAGE, 1);
	push(at);
	MUST(mprotect(at, bytes + less, PROT_READ) == 0);
	check(at, bytes + less, 1, "both read-only");
	MUST(mprotect(at, bytes + less, rw) == 0);
	MUST(madvise(at + bytes - less, 2 * less, MADV_DONTNEED) == 0);
	check_zeros(at + bytes - less, 2 * less, "discarded across the border");
	fill_from(at + bytes - less, 2 * less, (bytes - less) / PAGE, 1);
	push(at);
	check(at, bytes + less, 1, "written across the border");
	MUST(munmap(at + bytes - less, 2 * less) == 0);
	check(at, bytes - less, 1, "unmapped across the border");
	leave();
	munmap(place, bytes + 4 * MIB);
}

/* The kernel's limit, pinned: what is one mapping natively is two where one part is managed and the other is not, and mremap
 * takes one at a time (before Linux 6.17; since then several, but none that is managed). It says so, and harms nothing. */
static void remap_joined(void)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, rw = PROT_READ | PROT_WRITE;
	const size_t less = 16 * PAGE;
	char *place = mmap(NULL, bytes + 4 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *target = map(bytes + less);
	MUST(place != MAP_FAILED);
	char *at = place + 2 * MIB;
	MUST(mmap(at, bytes, rw, flags, -1, 0) == at);
	entered(at, 1);
	MUST(mmap(at + bytes, less, rw, flags, -1, 0) == at + bytes);
	fill_from(at + bytes, less, bytes / PAGE, 1);
	errno = 0;
	char *to = mremap(at, bytes + less, bytes + less, MREMAP_MAYMOVE | MREMAP_FIXED, target);
	if (to == MAP_FAILED && (!under_farpage() || errno != EFAULT))
		fail("mremap of two mappings that are one");
	/* The target is gone by then: the kernel unmaps it first. */
	fprintf(stderr, "%s: mremap %s\n", context, to == MAP_FAILED ? "says EFAULT" : "moves both");
	check(to == MAP_FAILED ? at : to, bytes + less, 1, "moved, or left");
	leave();
	munmap(place, bytes + 4 * MIB);
	munmap(target, bytes + less);
}

static const struct test_case cases[] = {
	{"huge_unmap", huge_unmap}, {"locked_on_fault", locked_on_fault}, {"remap_grown", remap_grown},
	{"remap_pieces", remap_pieces}, {"joined", joined}, {"remap_joined", remap_joined},
};
STATES_MAIN(cases)
