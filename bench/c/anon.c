/* The semantics of anonymous memory, each in memory that is local, far, in transit and shared after fork.
 * A second argument picks one of these states. */
#include "states.h"

static void read_all(void)
{
	char *at = enter(1), *untouched = map(bytes / 2), *zeros = map(bytes / 4);
	memset(zeros, 0, bytes / 4);
	check_zeros(untouched, bytes / 4, "untouched");
	push(at);
	check(at, bytes, 1, "read");
	check_zeros(untouched, bytes / 2, "untouched, some of it read before");
	check_zeros(zeros, bytes / 4, "zeros that were written");
}

static void read_prot(void)
{
	char *at = enter(1), *part = at + bytes / 4;
	MUST(mprotect(part, bytes / 2, PROT_NONE) == 0);
	MUST(touch_raises(part, 0) == SIGSEGV && fault_address == part);
	MUST(touch_raises(part + bytes / 4, 1) == SIGSEGV);
	push_far(map(PAGE), PAGE);
	check(at, bytes / 4, 1, "beside what is inaccessible");
	MUST(mprotect(part, bytes / 2, PROT_READ) == 0);
	check(at, bytes, 1, "readable again");
	MUST(touch_raises(part, 1) == SIGSEGV);
	MUST(mprotect(part, bytes / 2, PROT_READ | PROT_WRITE) == 0);
	rewrite(at, "writable again");
}

static void write_all(void)
{
	char *at = enter(1);
	rewrite(at, "written");
	/* A word in a page that is not read before. */
	push(at);
	for (size_t page = 0; page < bytes / PAGE; page++)
		((volatile uint64_t *)(at + page * PAGE))[9] = page;
	push(at);
	for (size_t page = 0; page < bytes / PAGE; page++) {
		MUST(((volatile uint64_t *)(at + page * PAGE))[9] == page);
		((uint64_t *)(at + page * PAGE))[9] = word_of(page, 2, 9);
	}
	check(at, bytes, 2, "around a word written");
}

static void write_prot(void)
{
	char *at = enter(1);
	MUST(mprotect(at, bytes, PROT_READ) == 0);
	for (size_t page = 0; page < bytes / PAGE; page += 97)
		MUST(touch_raises(at + page * PAGE + 8, 1) == SIGSEGV && fault_address == at + page * PAGE + 8);
	check(at, bytes, 1, "read-only");
	push(at);
	MUST(touch_raises(at, 1) == SIGSEGV);
	MUST(mprotect(at, bytes, PROT_READ | PROT_WRITE) == 0);
	check(at, bytes, 1, "writable again");
	rewrite(at, "written then");
}

static void write_child(void)
{
	char *at = enter(1);
	pid_t child = fork();
	MUST(child >= 0);
	uint64_t salt = child ? 3 : 2;
	check(at, bytes, 1, child ? "the parent's" : "inherited");
	fill(at, bytes, salt);
	push(at);
	check(at, bytes, salt, child ? "written by the parent" : "written by the child");
	if (!child)
		_exit(0);
	wait_for(child, "the child");
	check(at, bytes, 3, "the parent's, alone");
}

static void write_child_shared(void)
{
	char *at = enter(1);
	char *both = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(both != MAP_FAILED);
	fill(both, 2 * MIB, 7);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		check(both, 2 * MIB, 7, "shared, in the child");
		fill(both, 2 * MIB, 8);
		fill(at, bytes, 9);
		_exit(0);
	}
	wait_for(child, "the child");
	check(both, 2 * MIB, 8, "shared, written by the child");
	check(at, bytes, 1, "private, written by the child");
}

static char *huge_map(void)
{
	char *at = map(bytes + 2 * MIB);
	at = (char *)(((uintptr_t)at + 2 * MIB - 1) & ~(2 * MIB - 1));
	if (madvise(at, bytes, MADV_HUGEPAGE))
		skip("the kernel has no transparent huge pages");
	return at;
}

static void write_huge(void)
{
	char *at = entered(huge_map(), 1);
	check(at, bytes, 1, "read");
	push(at);
	rewrite(at, "written");
}

static void huge_parts(void)
{
	char *untouched = huge_map(), *zeros = huge_map(), *at = entered(huge_map(), 1);
	check_zeros(untouched, bytes / 2, "huge and untouched");
	memset(zeros, 0, bytes / 2);
	push(at);
	check_zeros(zeros, bytes / 2, "huge and zero");
	MUST(madvise(at, bytes / 2, MADV_FREE) == 0);
	push_far(map(PAGE), PAGE);
	for (size_t page = 0; page < bytes / 2 / PAGE; page++)
		if (wrong_word(at + page * PAGE, page, 1) >= 0)
			check_zeros(at + page * PAGE, PAGE, "huge and given back");
	check_from(at + bytes / 2, bytes / 2, bytes / 2 / PAGE, 1, "beside it");
	rewrite(at, "written after that");
}

static void files(void)
{
	const size_t size = 2 * MIB;
	char name[] = "anon.XXXXXX", *at = enter(1), *copy = map(size);
	int fd = mkstemp(name);
	MUST(fd >= 0);
	unlink(name);
	fill(copy, size, 4);
	MUST(write(fd, copy, size) == (ssize_t)size);
	char *both = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	char *own = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	MUST(both != MAP_FAILED && own != MAP_FAILED);
	check(both, size, 4, "a file, shared");
	check(own, size, 4, "a file, private");
	fill(own, size / 2, 5);
	fill_from(both + size / 2, size / 2, size / 2 / PAGE, 6);
	push(at);
	check(own, size / 2, 5, "a file, private, written");
	check(both, size / 2, 4, "what was written privately");
	MUST(pread(fd, copy, size, 0) == (ssize_t)size);
	check(copy, size / 2, 4, "the file where it was not written");
	check_from(copy + size / 2, size / 2, size / 2 / PAGE, 6, "the file where it was");
	check(at, bytes, 1, "anonymous memory");
	close(fd);
	munmap(both, size);
	munmap(own, size);
}

static void round_trips(void)
{
	char *at = enter(1);
	uint64_t even = 1, odd = 1;
	for (uint64_t turn = 0; turn < 10; turn++) {
		for (size_t page = turn % 2; page < bytes / PAGE; page += 2)
			fill_page(at + page * PAGE, page, 10 + turn);
		*(turn % 2 ? &odd : &even) = 10 + turn;
		push(at);
		for (size_t page = 0; page < bytes / PAGE; page++)
			if (wrong_word(at + page * PAGE, page, page % 2 ? odd : even) >= 0)
				fail("page %zu in turn %lu", page, turn);
	}
}

static char *torn;
static volatile int going;

static void on_gone(int signal, siginfo_t *info, void *context)
{
	(void)signal;
	(void)context;
	char *address = info->si_addr;
	if (!going || address < torn || address >= torn + bytes)
		_exit(9);
	for (;;)
		pause();
}

static void *touch_until_gone(void *number)
{
	for (uint64_t x = (uint64_t)number + 1;; x = x * 6364136223846793005ull + 1442695040888963407ull) {
		size_t page = (x >> 33) % (bytes / PAGE);
		uint64_t seen = *((volatile uint64_t *)(torn + page * PAGE) + 3);
		if (seen != word_of(page, 1, 3))
			fail("page %zu is %lx while it is torn down", page, seen);
	}
}

static void teardown(void)
{
	torn = enter(1);
	for (unsigned turn = 0; turn < 6; turn++) {
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			struct sigaction action = {.sa_sigaction = on_gone, .sa_flags = SA_SIGINFO};
			sigaction(SIGSEGV, &action, NULL);
			pthread_t thread;
			for (long i = 0; i < 4; i++)
				MUST(pthread_create(&thread, NULL, touch_until_gone, (void *)i) == 0);
			usleep(turn * 3000);
			going = 1;
			for (size_t part = 0; turn % 2 && part < 16; part++)
				MUST(munmap(torn + part * (bytes / 16), bytes / 16) == 0);
			_exit(0);
		}
		wait_for(child, "a child that is torn down");
	}
	check(torn, bytes, 1, "the parent's");
}

static void double_map(void)
{
	char *at = enter(1);
	int fd = memfd_create("double", MFD_CLOEXEC);
	MUST(fd >= 0 && ftruncate(fd, 2 * MIB) == 0);
	char *one = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	/* Of no length: the same once more. */
	char *two = mremap(one, 0, 2 * MIB, MREMAP_MAYMOVE);
	MUST(one != MAP_FAILED && two != MAP_FAILED && one != two);
	fill(one, 2 * MIB, 4);
	push(at);
	check(two, 2 * MIB, 4, "through the other mapping");
	fill(two, 2 * MIB, 5);
	MUST(munmap(two, 2 * MIB) == 0);
	check(one, 2 * MIB, 5, "written through the other mapping");
	/* Private memory has one place: of no length, nothing is moved. */
	errno = 0;
	MUST(mremap(at, 0, bytes, MREMAP_MAYMOVE) == MAP_FAILED && errno == EINVAL);
	check(at, bytes, 1, "private memory");
	munmap(one, 2 * MIB);
	close(fd);
}

static void mixed(void)
{
	const size_t block = 64 * PAGE;
	char *at = enter(1);
	int fd = memfd_create("mixed", MFD_CLOEXEC);
	MUST(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
	const int rw = PROT_READ | PROT_WRITE;
	for (size_t i = 0; i < bytes / block; i++) {
		char *here = at + i * block;
		switch (i % 8) {
		case 1: MUST(mprotect(here, block, PROT_READ) == 0); break;
		case 2: MUST(madvise(here, block, MADV_DONTNEED) == 0); break;
		case 3: MUST(mmap(here, block, rw, MAP_PRIVATE | MAP_FIXED, fd, (off_t)(i * block)) == here); break;
		case 4: MUST(mmap(here, block, rw, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == here); break;
		case 5: MUST(mprotect(here, block, PROT_NONE) == 0); break;
		case 6: MUST(mmap(here, block, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == here); break;
		case 7: fill_from(here, block, i * 64, 2);
		}
		if (i % 8 == 4)
			fill_from(here, block, i * 64, 3);
	}
	push_far(map(PAGE), PAGE);
	for (size_t i = 0; i < bytes / block; i++) {
		char *here = at + i * block;
		switch (i % 8) {
		case 0: check_from(here, block, i * 64, 1, "left alone"); break;
		case 1: check_from(here, block, i * 64, 1, "read-only"); break;
		case 2: check_zeros(here, block, "discarded"); break;
		case 3: check_zeros(here, block, "an empty file"); break;
		case 4: check_from(here, block, i * 64, 3, "shared"); break;
		case 5:
			MUST(touch_raises(here, 0) == SIGSEGV && mprotect(here, block, rw) == 0);
			check_from(here, block, i * 64, 1, "once inaccessible");
			break;
		case 6: MUST(touch_raises(here + PAGE, 0) == SIGSEGV); break;
		case 7: check_from(here, block, i * 64, 2, "written");
		}
	}
	munmap(at, bytes);
	close(fd);
}

static void snapshot(void)
{
	char *at = enter(1);
	if (state == TRANSIT || state == LOCAL)
		return;
	static unsigned char seen[24 * MIB / PAGE];
	size_t before = present(at, bytes);
	MUST(mincore(at, bytes, seen) == 0);
	size_t home = 0;
	for (size_t page = 0; page < bytes / PAGE; page++)
		home += seen[page] & 1;
	size_t after = present(at, bytes);
	if (after > before || home > before)
		fail("looking brought pages home: %zu, %zu, %zu", before, home, after);
	check(at, bytes, 1, "after a look");
}

static void cow_far(void)
{
	char *at = enter(1);
	int ends[2];
	MUST(pipe(ends) == 0);
	pid_t child = fork();
	MUST(child >= 0);
	char word;
	if (!child) {
		MUST(read(ends[0], &word, 1) == 1);
		check(at, bytes, 1, "in the child, after the parent has written");
		_exit(0);
	}
	fill(at, bytes, 2);
	push(at);
	MUST(write(ends[1], "!", 1) == 1);
	wait_for(child, "the child");
	check(at, bytes, 2, "written by the parent");
	close(ends[0]);
	close(ends[1]);
}

static void partial_unmap(void)
{
	for (size_t quarter = 0; quarter < 3; quarter++) {
		char *at = enter(1);
		size_t from = quarter * (bytes / 4), end = from + bytes / 2;
		MUST(munmap(at + from, bytes / 2) == 0);
		check(at, from, 1, "before the hole");
		check_from(at + end, bytes - end, end / PAGE, 1, "behind the hole");
		if (state != TRANSIT) /* there another thread may map something into it */
			MUST(touch_raises(at + from + bytes / 4, 0) == SIGSEGV);
		munmap(at, bytes);
		leave();
	}
}

static void remap(void)
{
	for (int turn = 0; turn < 4; turn++) {
		char *at = enter(1);
		int stays = turn / 2 ? MREMAP_DONTUNMAP : 0;
		if (turn % 2)
			check(at, bytes / 2, 1, "before it is moved");
		char *target = map(bytes);
		char *to = mremap(at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | stays, target);
		if (to == MAP_FAILED && stays)
			skip("the kernel has no MREMAP_DONTUNMAP");
		MUST(to == target);
		if (stays) {
			check_zeros(at, bytes / 2, "left behind");
			fill(at, bytes, 3);
		}
		check(to, bytes, 1, "moved");
		fill(to, bytes / 2, 2);
		push(to);
		if (stays)
			check(at, bytes, 3, "written where it was");
		check(to, bytes / 2, 2, "written where it is");
		check_from(to + bytes / 2, bytes / 2, bytes / 2 / PAGE, 1, "only moved");
		if (stays)
			munmap(at, bytes);
		munmap(to, bytes);
		leave();
	}
}

static void unpopulated(void)
{
	char *at = enter(1), *none = map(bytes / 2), *readable = map(bytes / 2);
	MUST(mprotect(none, bytes / 2, PROT_NONE) == 0 && mprotect(readable, bytes / 2, PROT_READ) == 0);
	push(at);
	MUST(touch_raises(none, 0) == SIGSEGV && touch_raises(readable, 1) == SIGSEGV);
	check_zeros(readable, bytes / 4, "never touched, read-only");
	MUST(mprotect(none, bytes / 2, PROT_READ | PROT_WRITE) == 0);
	MUST(mprotect(readable, bytes / 2, PROT_READ | PROT_WRITE) == 0);
	check_zeros(none, bytes / 4, "never touched, once inaccessible");
	fill(none, bytes / 2, 2);
	fill(readable, bytes / 2, 3);
	push(at);
	check(none, bytes / 2, 2, "once inaccessible, written");
	check(readable, bytes / 2, 3, "once read-only, written");
	check(at, bytes, 1, "beside them");
}

static void zeros(void)
{
	char *at = enter(1);
	memset(at, 0, bytes);
	push(at);
	check_zeros(at, bytes, "zeros");
	push(at);
	fill(at, bytes / 2, 2);
	push(at);
	check(at, bytes / 2, 2, "written over zeros");
	check_zeros(at + bytes / 2, bytes / 2, "zeros, still");
}

/* What a child finds there: the contents, zeros (wiped), or nothing. */
static void in_child(char *at, int wiped, int missing)
{
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		if (missing)
			MUST(touch_raises(at + PAGE, 0) == SIGSEGV);
		else if (wiped)
			check_zeros(at, bytes / 2, "wiped");
		else
			check(at, bytes / 2, 1, "inherited");
		if (wiped)
			fill(at, bytes / 2, 4);
		check_from(at + bytes / 2, bytes / 2, bytes / 2 / PAGE, 1, "inherited as ever");
		if (wiped)
			check(at, bytes / 2, 4, "written over what was wiped");
		_exit(0);
	}
	wait_for(child, "the child");
	check(at, bytes, 1, "the parent's");
}

static void on_fork(void)
{
	const int advice[] = {MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_DONTFORK, MADV_DOFORK};
	char *at = enter(1);
	for (int i = 0; i < 4; i++) {
		MUST(madvise(at, bytes / 2, advice[i]) == 0);
		push(at);
		in_child(at, advice[i] == MADV_WIPEONFORK, advice[i] == MADV_DONTFORK);
	}
}

static void advice(void)
{
	/* COLD, PAGEOUT, POPULATE_READ, POPULATE_WRITE by number: older headers have no names for them. */
	const int all[] = {20, 21, MADV_WILLNEED, 22, 23, MADV_RANDOM, MADV_SEQUENTIAL};
	char *at = enter(1);
	for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
		/* A part, since POPULATE would bring all of it home at once. */
		char *part = at + bytes / 8 * i;
		if (madvise(part, bytes / 8, all[i]) && errno != EINVAL)
			fail("advice %d", all[i]);
		check(at, bytes, 1, "after advice");
		push(at);
	}
	rewrite(at, "written after advice");
}

enum { PIECE = 64 * PAGE };

/* The piece of which least is here. */
static char *emptiest(char *at)
{
	char *found = at;
	for (size_t from = PIECE; from < bytes; from += PIECE)
		if (present(at + from, PIECE) < present(found, PIECE))
			found = at + from;
	return found;
}

/* MADV_POPULATE_READ and MADV_POPULATE_WRITE by number. */
enum { POPULATE_READ = 22, POPULATE_WRITE = 23 };

/* All of it is here as the call returns. Some of it may be gone again before it is looked at, but not each time. */
static void populate_piece(char *piece, int advice)
{
	for (int turn = 0; turn < 20; turn++) {
		if (madvise(piece, PIECE, advice)) {
			if (errno == EINVAL)
				skip("the kernel has no MADV_POPULATE_READ");
			fail("advice %d", advice);
		}
		if (present(piece, PIECE) == PIECE / PAGE)
			return;
	}
	fail("advice %d has %zu pages of %lu here", advice, present(piece, PIECE), PIECE / PAGE);
}

/* The same for a mapping that is populated as it is made. */
static void map_populated(size_t size, int protection)
{
	for (int turn = 0; turn < 20; turn++) {
		char *at = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		MUST(at != MAP_FAILED);
		size_t here = present(at, size);
		check_zeros(at, size, "populated as it was mapped");
		MUST(munmap(at, size) == 0);
		if (here == size / PAGE)
			return;
	}
	fail("MAP_POPULATE never has all of %zu bytes here", size);
}

static void populate(void)
{
	char *at = enter(1);
	for (int advice = POPULATE_READ; advice <= POPULATE_WRITE; advice++) {
		char *piece = emptiest(at);
		MUST(state != FAR || !under_farpage() || present(piece, PIECE) < PIECE / PAGE);
		populate_piece(piece, advice);
		check(at, bytes, 1, "populated");
		/* Nothing is there to come home. */
		MUST(madvise(at, PIECE, MADV_DONTNEED) == 0);
		populate_piece(at, advice);
		check_zeros(at, PIECE, "discarded and populated");
		fill(at, PIECE, 1);
		push(at);
	}
	/* Small ones are the kernel's to populate; for others who stands before `mmap` does it, once they are managed. */
	for (size_t size = PIECE / 4; size <= PIECE; size *= 4) {
		map_populated(size, PROT_READ | PROT_WRITE);
		map_populated(size, PROT_READ);
	}
	rewrite(at, "written after it was populated");
}

static void locked(void)
{
	struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
	setrlimit(RLIMIT_MEMLOCK, &all);
	char *at = enter(1);
	if (mlock(at, bytes / 4))
		skip("this account may not lock memory");
	MUST(present(at, bytes / 4) == bytes / 4 / PAGE);
	push(at);
	MUST(present(at, bytes / 4) == bytes / 4 / PAGE);
	check(at, bytes, 1, "partly locked");
	fill(at, bytes / 4, 2);
	MUST(munlock(at, bytes / 4) == 0);
	push(at);
	check(at, bytes / 4, 2, "unlocked");
}

static void address_reuse(void)
{
	enum { PARTS = 16 };
	char *at = enter(1);
	size_t part = bytes / PARTS;
	uint64_t salts[PARTS];
	for (int i = 0; i < PARTS; i++)
		salts[i] = 1;
	uint64_t x = 12345;
	for (uint64_t turn = 0; turn < 60; turn++) {
		x = x * 6364136223846793005ull + 1442695040888963407ull;
		size_t i = (x >> 33) % PARTS;
		char *here = at + i * part;
		/* Half of it on its way home when it goes. */
		for (size_t page = 0; page < part / PAGE; page += 8)
			(void)*(volatile char *)(here + page * PAGE);
		/* Unmapped first, unless another thread could take the place. */
		if (state != TRANSIT)
			MUST(munmap(here, part) == 0);
		MUST(mmap(here, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == here);
		check_zeros(here, part / 2, "mapped anew");
		salts[i] = 10 + turn;
		fill_from(here, part, i * (part / PAGE), salts[i]);
		size_t other = (x >> 40) % PARTS;
		check_from(at + other * part, part, other * (part / PAGE), salts[other], "another part");
	}
	for (size_t i = 0; i < PARTS; i++)
		check_from(at + i * part, part, i * (part / PAGE), salts[i], "in the end");
}

static char *fetched;
static volatile size_t asked, done;

static void *fetch(void *unused)
{
	(void)unused;
	for (size_t turn = 1; turn <= 400; turn++) {
		while (asked < turn)
			;
		size_t page = turn * 13 % (bytes / PAGE);
		uint64_t seen = ((volatile uint64_t *)(fetched + page * PAGE))[3];
		if (seen && seen != word_of(page, 1, 3))
			fail("page %zu, discarded meanwhile, is %lx", page, seen);
		done = turn;
	}
	return NULL;
}

static void discard_fetch(void)
{
	asked = done = 0;
	fetched = enter(1);
	pthread_t thread;
	MUST(pthread_create(&thread, NULL, fetch, NULL) == 0);
	for (size_t turn = 1; turn <= 400; turn++) {
		char *here = fetched + turn * 13 % (bytes / PAGE) * PAGE;
		asked = turn;
		for (volatile size_t spin = 0; spin < turn * 97 % 4000; spin++)
			;
		MUST(madvise(here, PAGE, MADV_DONTNEED) == 0);
		/* Whatever was under way, the page has been given up. */
		check_zeros(here, PAGE, "discarded");
		while (done < turn)
			;
		check_zeros(here, PAGE, "discarded, and read by two");
	}
	pthread_join(thread, NULL);
	char discarded[24 * MIB / PAGE] = {0};
	for (size_t turn = 1; turn <= 400; turn++)
		discarded[turn * 13 % (bytes / PAGE)] = 1;
	for (size_t page = 0; page < bytes / PAGE; page++)
		if (discarded[page])
			check_zeros(fetched + page * PAGE, PAGE, "discarded, in the end");
		else
			check_from(fetched + page * PAGE, PAGE, page, 1, "beside what was discarded");
}

static const struct test_case cases[] = {
	{"read", read_all}, {"read_prot", read_prot}, {"write", write_all}, {"write_prot", write_prot},
	{"write_child", write_child}, {"write_child_shared", write_child_shared}, {"write_huge", write_huge},
	{"huge_parts", huge_parts}, {"files", files}, {"round_trips", round_trips}, {"teardown", teardown},
	{"double_map", double_map}, {"mixed", mixed}, {"snapshot", snapshot}, {"cow_far", cow_far},
	{"partial_unmap", partial_unmap}, {"remap", remap}, {"unpopulated", unpopulated}, {"zeros", zeros},
	{"on_fork", on_fork}, {"advice", advice}, {"populate", populate}, {"locked", locked}, {"address_reuse", address_reuse},
	{"discard_fetch", discard_fetch},
};

STATES_MAIN(cases)
