/* The program's own calls on memory that is far: munmap, madvise, mremap, brk, mprotect. */
#include "far.h"
#include <malloc.h>

static void unmap_whole(void)
{
	for (int turn = 0; turn < 4; turn++) {
		char *at = far_map(DATA, turn);
		MUST(munmap(at, DATA) == 0);
		/* The same address again: zeros, never what was far. */
		char *again = mmap(at, DATA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		MUST(again == at);
		check_zeros(at, DATA, "mapped anew");
		MUST(munmap(at, DATA) == 0);
	}
}

static void unmap_part(void)
{
	const size_t half = DATA / 2, offsets[] = {0, DATA / 4, DATA / 2};
	for (int i = 0; i < 3; i++) {
		char *at = far_map(DATA, i);
		MUST(munmap(at + offsets[i], half) == 0);
		check(at, offsets[i], i, "before the hole");
		size_t end = offsets[i] + half;
		check_from(at + end, DATA - end, end / PAGE, i, "behind the hole");
		MUST(mmap(at + offsets[i], half, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
		check_zeros(at + offsets[i], half, "the hole mapped anew");
		MUST(munmap(at, DATA) == 0);
	}
}

/* Discards every other run of pages while pages come and go; `zeros_only` false: old contents may be left. */
static void discard(int advice, int zeros_only)
{
	const size_t run = 64 * PAGE;
	char *at = far_map(DATA, 5);
	for (size_t from = 0; from < DATA; from += 2 * run) {
		(void)*(volatile char *)(at + from + 7 * PAGE);
		MUST(madvise(at + from, run, advice) == 0);
	}
	for (size_t from = 0; from < DATA; from += 2 * run) {
		for (size_t page = from / PAGE; page < (from + run) / PAGE; page++) {
			char *here = at + page * PAGE;
			if (zeros_only || wrong_word(here, page, 5) >= 0)
				check_zeros(here, PAGE, "a discarded page");
		}
		check_from(at + from + run, run, (from + run) / PAGE, 5, "a page beside a discarded one");
	}
	/* What is written after the discard stays. */
	fill(at, DATA, 6);
	push_far(at, DATA);
	check(at, DATA, 6, "written after a discard");
}

static void dontneed(void) { discard(MADV_DONTNEED, 1); }
static void free_lazily(void) { discard(MADV_FREE, 0); }

/* MADV_REMOVE is for shared mappings; on private memory the kernel refuses it, and the contents stay. */
static void remove_pages(void)
{
	char *at = far_map(DATA, 8);
	MUST(madvise(at, DATA, MADV_REMOVE) == -1 && errno == EINVAL);
	check(at, DATA, 8, "after a refused MADV_REMOVE");
	char *shared = mmap(NULL, DATA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(shared != MAP_FAILED);
	fill(shared, DATA, 9);
	push_far(at, DATA);
	check(shared, DATA, 9, "shared memory");
	MUST(madvise(shared, DATA / 2, MADV_REMOVE) == 0);
	check_zeros(shared, DATA / 2, "removed");
	check(at, DATA, 8, "private memory");
}

static void remap_grow(void)
{
	char *at = map(DATA + PAGE), *end = at + DATA;
	MUST(munmap(end, PAGE) == 0);
	fill(at, DATA / 2, 1);
	MUST(munmap(at + DATA / 2, DATA / 2) == 0);
	push_far(at, DATA / 2);
	for (size_t size = DATA / 2; size < DATA; size += DATA / 8) {
		MUST(mremap(at, size, size + DATA / 8, 0) == at);
		check_zeros(at + size, DATA / 8, "grown in place");
		fill_from(at + size, DATA / 8, size / PAGE, 1);
	}
	push_far(at, DATA);
	check(at, DATA, 1, "after growth in place");
}

static void remap_move(void)
{
	char *at = far_map(DATA, 2);
	for (int turn = 0; turn < 4; turn++) {
		char *wall = mmap(at + DATA, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		char *target = map(DATA);
		/* Half of it is at home when it moves, half far. */
		check(at, DATA / 2, 2, "before the move");
		char *to = mremap(at, DATA, DATA, MREMAP_MAYMOVE | MREMAP_FIXED, target);
		MUST(to == target);
		munmap(wall, PAGE);
		check(to, DATA, 2, "after the move");
		MUST(mmap(at, DATA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at);
		check_zeros(at, DATA, "where it was");
		MUST(munmap(at, DATA) == 0);
		at = to;
	}
	char *larger = mremap(at, DATA, DATA + DATA / 4, MREMAP_MAYMOVE);
	MUST(larger != MAP_FAILED);
	check(larger, DATA, 2, "after growth by moving");
	check_zeros(larger + DATA, DATA / 4, "grown");
}

static void remap_shrink(void)
{
	char *at = far_map(DATA, 3);
	MUST(mremap(at, DATA, DATA / 4, 0) == at);
	check(at, DATA / 4, 3, "after shrinking");
	MUST(mremap(at, DATA / 4, DATA, MREMAP_MAYMOVE) != MAP_FAILED);
}

static void remap_dontunmap(void)
{
	char *at = far_map(DATA, 4);
	char *to = mremap(at, DATA, DATA, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	if (to == MAP_FAILED)
		skip("the kernel has no MREMAP_DONTUNMAP");
	check_zeros(at, DATA, "left behind");
	fill(at, DATA, 5);
	check(to, DATA, 4, "moved");
	push_far(to, DATA);
	check(at, DATA, 5, "written where it was left");
	check(to, DATA, 4, "moved, and far again");
}

/* Over a range that is far itself: its slots are given back, its contents never seen again. */
static void remap_fixed(void)
{
	char *from = far_map(DATA, 6), *over = far_map(DATA, 7);
	MUST(mremap(from, DATA / 2, DATA / 2, MREMAP_MAYMOVE | MREMAP_FIXED, over + DATA / 4) == over + DATA / 4);
	check(over, DATA / 4, 7, "before what was moved in");
	check(over + DATA / 4, DATA / 2, 6, "moved in");
	check_from(over + 3 * (DATA / 4), DATA / 4, 3 * (DATA / 4) / PAGE, 7, "behind what was moved in");
	check_from(from + DATA / 2, DATA / 2, DATA / 2 / PAGE, 6, "not moved");
}

static void brk_shrink(void)
{
	enum { BLOCK = 64 << 10, BLOCKS = DATA / BLOCK };
	static char *blocks[BLOCKS];
	for (int turn = 0; turn < 3; turn++) {
		for (int i = 0; i < BLOCKS; i++) {
			MUST((blocks[i] = malloc(BLOCK)));
			for (int page = 0; page < BLOCK / 4096; page++)
				memset(blocks[i] + page * 4096, i + page + turn, 4096);
		}
		for (int i = 0; i < BLOCKS; i++) {
			for (int at = 0; at < BLOCK; at += 512)
				if (blocks[i][at] != (char)(i + at / 4096 + turn))
					fail("block %d byte %d", i, at);
			if (i >= BLOCKS / 8)
				free(blocks[i]);
		}
		char *before = sbrk(0);
		malloc_trim(0);
		MUST((char *)sbrk(0) < before);
		for (int i = 0; i < BLOCKS / 8; i++) {
			if (blocks[i][BLOCK - 1] != (char)(i + BLOCK / 4096 - 1 + turn))
				fail("block %d after trim", i);
			free(blocks[i]);
		}
	}
}

static void protect_none(void)
{
	char *at = far_map(DATA, 1);
	MUST(mprotect(at + DATA / 4, DATA / 2, PROT_NONE) == 0);
	MUST(touch_raises(at + DATA / 2, 0) == SIGSEGV && fault_address == at + DATA / 2);
	MUST(touch_raises(at + DATA / 2, 1) == SIGSEGV);
	check(at, DATA / 4, 1, "beside what is inaccessible");
	push_far(at, DATA);
	MUST(mprotect(at + DATA / 4, DATA / 2, PROT_READ | PROT_WRITE) == 0);
	check(at, DATA, 1, "accessible again");
}

static void protect_read(void)
{
	char *at = far_map(DATA, 2);
	MUST(mprotect(at, DATA, PROT_READ) == 0);
	MUST(touch_raises(at + DATA / 2 + 5, 1) == SIGSEGV && fault_address == at + DATA / 2 + 5);
	check(at, DATA, 2, "read-only");
	MUST(touch_raises(at + DATA / 4, 1) == SIGSEGV);
	MUST(mprotect(at, DATA, PROT_READ | PROT_WRITE) == 0);
	check(at, DATA, 2, "writable again");
	fill(at, DATA, 3);
	push_far(at, DATA);
	check(at, DATA, 3, "written afterwards");
}

/* Memory that moves, and memory that does not, leave by turns, while the program asks for more of it. */
static void protect_some(void)
{
	enum { BLOCKS = 16, TURNS = 40000 };
	const size_t pages = DATA / PAGE / BLOCKS;
	char *at = far_map(DATA, 1);
	for (size_t block = 0; block < BLOCKS; block += 2)
		MUST(mprotect(at + block * pages * PAGE, pages * PAGE, PROT_READ) == 0);
	uint64_t lot = 1;
	for (int turn = 0; turn < TURNS; turn++) {
		lot = lot * 6364136223846793005ull + 1442695040888963407ull;
		size_t page = (lot >> 33) % (DATA / PAGE);
		check_from(at + page * PAGE, PAGE, page, 1, "a page of some");
		if (page / pages % 2)
			fill_page(at + page * PAGE, page, 1);
		if (turn % 4 == 0) {
			void *more = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			MUST(more != MAP_FAILED && munmap(more, 4 * PAGE) == 0);
		}
	}
}

/* Who takes it out has no right to such memory. */
static void protect_key(void)
{
	int key = pkey_alloc(0, 0);
	if (key < 0)
		skip("the processor has no memory protection keys");
	char *at = far_map(DATA, 2);
	MUST(pkey_mprotect(at, DATA, PROT_READ | PROT_WRITE, key) == 0);
	check(at, DATA, 2, "under a key");
	fill(at, DATA, 3);
	push_far(at, DATA);
	check(at, DATA, 3, "under a key, and far again");
}

/* Until its parent ends. A session of its own has its own share of the processors. */
static void keep_a_processor(void)
{
	pid_t child = fork();
	MUST(child >= 0);
	if (child)
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	setsid();
	for (volatile uint64_t turn = 0;; turn++)
		;
}

/* Something else is written to where memory is about to leave, or just leaving: it stays. The pieces are small, so that what is
 * mapped by the bare system call is not managed at once, and the one that makes way is among those that were not used for longest.
 * Others want the processors: who has looked may act late. */
static void reuse(void)
{
	enum { PIECES = 384, TURNS = 6000, LEAVING = 256, ABOUT = 16 };
	const size_t pages = 16, bytes = pages * PAGE;
	static uint64_t salts[PIECES];
	keep_a_processor();
	keep_a_processor();
	char *arena = map(PIECES * bytes), *at;
	uint64_t lot = 1;
	for (int turn = 0; turn < TURNS; turn++) {
		size_t piece = (size_t)turn % PIECES;
		at = arena + piece * bytes;
		if (salts[piece])
			check(at, bytes, salts[piece], "a piece");
		fill(at, bytes, salts[piece] = 1 + 2 * (uint64_t)turn);
		lot = lot * 6364136223846793005ull + 1442695040888963407ull;
		piece = (piece + PIECES - LEAVING + (lot >> 33) % ABOUT) % PIECES;
		at = arena + piece * bytes;
		const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
		switch (lot >> 61) {
		case 0:
			/* A part of what is leaving together is another mapping for a moment. */
			MUST(mprotect(at + 3 * PAGE, PAGE, PROT_READ) == 0 && mprotect(at + 3 * PAGE, PAGE, PROT_READ | PROT_WRITE) == 0);
			continue;
		case 1:
			/* Its first page is gone for a moment. */
			if (!salts[piece])
				continue;
			MUST(munmap(at, PAGE) == 0);
			MUST(syscall(SYS_mmap, at, PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) == (long)at);
			fill_page(at, 0, salts[piece]);
			continue;
		case 2:
		case 3:;
			/* Mapped before there is a hole that it would fill; or it is moved over what is there. */
			char *other = map(bytes);
			fill(other, bytes, salts[piece] = 2 + 2 * (uint64_t)turn);
			MUST(lot >> 60 & 1 || munmap(at, bytes) == 0);
			MUST(mremap(other, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at);
			continue;
		default:
			MUST(munmap(at, bytes) == 0);
			MUST(syscall(SYS_mmap, at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == (long)at);
			fill(at, bytes, salts[piece] = 2 + 2 * (uint64_t)turn);
		}
	}
	for (size_t piece = 0; piece < PIECES; piece++)
		check(arena + piece * bytes, bytes, salts[piece], "a piece at the end");
}

static void just_exit(void)
{
	far_map(DATA, 1);
	_exit(0);
}

static void be_killed(void)
{
	far_map(DATA, 1);
	kill(getpid(), SIGKILL);
}

static void exec_another(void)
{
	far_map(DATA, 1);
	execl("/proc/self/exe", "another", "protect_read", NULL);
	fail("exec");
}

static const struct test_case cases[] = {
	{"unmap_whole", unmap_whole}, {"unmap_part", unmap_part}, {"dontneed", dontneed}, {"free", free_lazily},
	{"remove", remove_pages}, {"remap_grow", remap_grow}, {"remap_move", remap_move}, {"remap_shrink", remap_shrink},
	{"remap_dontunmap", remap_dontunmap}, {"remap_fixed", remap_fixed}, {"brk_shrink", brk_shrink},
	{"protect_none", protect_none}, {"protect_read", protect_read}, {"protect_some", protect_some}, {"protect_key", protect_key}, {"reuse", reuse}, {"exit", just_exit},
	{"killed", be_killed}, {"exec", exec_another},
};
MAIN(cases)
