/* Memory of every kind in known amounts, in a parent and its child, which hold still while somebody counts. */
#include "far.h"

#define ZEROS (4 * MIB)
#define UNTOUCHED (8 * MIB)
/* More than what is taken for the guard of a thread's stack. */
#define APART (256ul << 10)

/* A mapping that is merged with no other. */
static char *map_apart(size_t bytes)
{
	char *at = mmap(NULL, bytes + 2 * APART, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(at != MAP_FAILED);
	MUST(mprotect(at + APART, bytes, PROT_READ | PROT_WRITE) == 0);
	return at + APART;
}

/* Says who holds still with how many pages touched, and waits for a line. No stdio: its buffers are memory too. */
static void hold_still(const char *who, size_t pages)
{
	char line[64];
	int length = snprintf(line, sizeof line, "%s %d %zu\n", who, getpid(), pages);
	MUST(write(1, line, (size_t)length) == length);
	MUST(read(0, line, 1) == 1);
}

static void parent_and_child(void)
{
	char *filled = map_apart(DATA), *zeros = map_apart(ZEROS), *untouched = map_apart(UNTOUCHED);
	const size_t pages = (DATA + ZEROS) / PAGE;
	fill(filled, DATA, 1);
	memset(zeros, 0, ZEROS);
	hold_still("filled", pages);
	push_far(filled, DATA);
	hold_still("far", pages);
	int done[2];
	MUST(pipe(done) == 0);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		check(filled, DATA / 2, 1, "in the child");
		hold_still("child", pages);
		fill(filled, DATA / 4, 2);
		MUST(munmap(filled + DATA / 2, DATA / 4) == 0);
		hold_still("written", pages - DATA / 4 / PAGE);
		_exit(0);
	}
	wait_for(child, "the child");
	hold_still("alone", pages);
	MUST(madvise(filled, DATA / 2, MADV_DONTNEED) == 0);
	untouched[0] = 1;
	check_from(filled + DATA / 2, DATA / 2, DATA / 2 / PAGE, 1, "in the parent");
	hold_still("discarded", pages - DATA / 2 / PAGE + 1);
}

static const struct test_case cases[] = {{"parent_and_child", parent_and_child}};
MAIN(cases)
