/* fork with memory far: both sides keep their own. */
#include "far.h"

static void child_reads(void)
{
	char *at = far_map(DATA, 1);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		check(at, DATA, 1, "in the child");
		_exit(0);
	}
	check(at, DATA, 1, "in the parent");
	wait_for(child, "the child");
	check(at, DATA, 1, "in the parent, alone");
}

/* Everybody writes a part of its own, over what was shared, and must see nothing of the other's. */
static void both_write(void)
{
	char *at = far_map(DATA, 1);
	pid_t child = fork();
	MUST(child >= 0);
	size_t mine = child ? 0 : DATA / 2;
	uint64_t salt = child ? 2 : 3;
	for (int turn = 0; turn < 2; turn++) {
		fill_from(at + mine, DATA / 2, mine / PAGE, salt + turn);
		push_far(at, DATA);
		size_t other = DATA / 2 - mine;
		check_from(at + other, DATA / 2, other / PAGE, 1, "the part left alone");
		check_from(at + mine, DATA / 2, mine / PAGE, salt + turn, "the part written");
	}
	if (!child)
		_exit(0);
	wait_for(child, "the child");
}

static void outlives(void)
{
	char *at = far_map(DATA, 1);
	int pipe_ends[2];
	MUST(pipe(pipe_ends) == 0);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		pid_t self = getpid();
		pid_t grandchild = fork();
		MUST(grandchild >= 0);
		if (grandchild)
			_exit(0);
		/* Its parent, the child, ends; its memory stays. */
		while (getppid() == self)
			usleep(1000);
		check(at, DATA, 1, "in the one who outlives");
		fill(at, DATA, 2);
		push_far(at, DATA);
		check(at, DATA, 2, "what it wrote");
		MUST(write(pipe_ends[1], "y", 1) == 1);
		_exit(0);
	}
	close(pipe_ends[1]);
	wait_for(child, "the child");
	char said = 'n';
	MUST(read(pipe_ends[0], &said, 1) == 1 && said == 'y');
	check(at, DATA, 1, "in the grandparent");
}

static void generation(char *at, int depth, const uint64_t *salts, int parts)
{
	uint64_t own[8];
	memcpy(own, salts, sizeof own);
	size_t part = DATA / parts;
	for (int i = 0; i < parts; i++)
		check_from(at + i * part, part, i * part / PAGE, own[i], "inherited");
	if (depth == 0)
		return;
	int mine = depth % parts;
	own[mine] = 100 + depth * 10 + (uint64_t)getpid() % 7;
	fill_from(at + mine * part, part, mine * part / PAGE, own[mine]);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		generation(at, depth - 1, own, parts);
		_exit(0);
	}
	int theirs = (depth + 1) % parts;
	own[theirs] = 500 + depth;
	fill_from(at + theirs * part, part, theirs * part / PAGE, own[theirs]);
	wait_for(child, "a generation");
	for (int i = 0; i < parts; i++)
		check_from(at + i * part, part, i * part / PAGE, own[i], "after the children");
}

static void generations(void)
{
	uint64_t salts[8] = {1, 1, 1, 1, 1, 1, 1, 1};
	generation(far_map(DATA, 1), 4, salts, 4);
}

static volatile int stop;
static char *shared_with_writer;

static void *writer(void *unused)
{
	(void)unused;
	for (uint64_t turn = 2; !stop; turn++)
		for (size_t page = 0; page < DATA / PAGE && !stop; page++)
			((volatile uint64_t *)(shared_with_writer + page * PAGE))[WORDS - 1] = turn;
	return NULL;
}

/* The parent forks while its pages come and go; all but the last word of each page is constant. */
static void fork_in_transit(void)
{
	shared_with_writer = far_map(DATA, 1);
	pthread_t thread;
	MUST(pthread_create(&thread, NULL, writer, NULL) == 0);
	for (int turn = 0; turn < 6; turn++) {
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			for (size_t page = 0; page < DATA / PAGE; page += turn + 1) {
				long wrong = wrong_word(shared_with_writer + page * PAGE, page, 1);
				if (wrong >= 0 && wrong != (long)WORDS - 1)
					fail("page %zu word %ld in child %d", page, wrong, turn);
			}
			_exit(0);
		}
		wait_for(child, "a child forked in transit");
	}
	stop = 1;
	pthread_join(thread, NULL);
}

/* A parent that forks while its pages are on their way out, and ends at once: its child has everything. */
static void parent_exits(void)
{
	for (int turn = 0; turn < 10; turn++) {
		int told[2];
		MUST(pipe(told) == 0);
		pid_t parent = fork();
		MUST(parent >= 0);
		if (!parent) {
			shared_with_writer = map(DATA);
			fill(shared_with_writer, DATA, 1);
			pthread_t thread;
			MUST(pthread_create(&thread, NULL, writer, NULL) == 0);
			usleep(1000 * (unsigned)(turn * 7 % 11));
			pid_t child = fork();
			MUST(child >= 0);
			if (child)
				_exit(0);
			for (size_t page = 0; page < DATA / PAGE; page++) {
				long wrong = wrong_word(shared_with_writer + page * PAGE, page, 1);
				if (wrong >= 0 && wrong != (long)WORDS - 1)
					fail("page %zu word %ld in orphan %d", page, wrong, turn);
			}
			MUST(write(told[1], "y", 1) == 1);
			_exit(0);
		}
		close(told[1]);
		wait_for(parent, "the parent");
		/* An orphan that failed says nothing. Then its end is waited for: what it holds at the program's end is its own. */
		char said = 'n';
		MUST(read(told[0], &said, 1) == 1 && said == 'y');
		MUST(read(told[0], &said, 1) == 0);
		close(told[0]);
	}
}

/* Children that are killed at any moment leave nothing behind. */
static void storm(void)
{
	char *at = far_map(DATA, 1);
	for (int turn = 0; turn < 12; turn++) {
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			for (;;)
				fill(at, DATA, 3);
		}
		usleep(1000 * (unsigned)(turn * 7 % 23));
		kill(child, SIGKILL);
		int status;
		MUST(waitpid(child, &status, 0) == child && WTERMSIG(status) == SIGKILL);
	}
	check(at, DATA, 1, "after the storm");
}

/* Many at a time, that have the parent's memory and do something with it; all are there until the last has done. */
static void at_a_time(char *at, void (*each)(char *at, uint64_t number))
{
	int all_have[2];
	MUST(pipe(all_have) == 0);
	pid_t children[8];
	for (size_t i = 0; i < sizeof children / sizeof *children; i++) {
		children[i] = fork();
		MUST(children[i] >= 0);
		if (!children[i]) {
			close(all_have[1]);
			each(at, i + 2);
			char none;
			MUST(read(all_have[0], &none, 1) == 0);
			_exit(0);
		}
	}
	check(at, DATA, 1, "beside the children");
	close(all_have[1]);
	for (size_t i = 0; i < sizeof children / sizeof *children; i++)
		wait_for(children[i], "a sibling");
	check(at, DATA, 1, "after the children");
}

static void reads(char *at, uint64_t number)
{
	(void)number;
	check(at, DATA, 1, "in a sibling");
}

static void siblings(void)
{
	at_a_time(far_map(DATA, 1), reads);
}

static void writes(char *at, uint64_t number)
{
	for (int turn = 0; turn < 3; turn++) {
		fill(at, DATA, number);
		check(at, DATA, number, "in a writing sibling");
	}
}

/* What is here is copied at the first write by each: nine times as much, as fast as memory goes. */
static void cow_storm(void)
{
	char *at = far_map(DATA, 2);
	fill(at, DATA, 1);
	at_a_time(at, writes);
}

/* A child that gets no page table entry for one range and zeros for another. */
static void not_inherited(void)
{
	char *at = far_map(DATA, 1), *left_out = far_map(DATA / 4, 2), *wiped = far_map(DATA / 4, 3);
	MUST(madvise(left_out, DATA / 4, MADV_DONTFORK) == 0);
	MUST(madvise(wiped, DATA / 4, MADV_WIPEONFORK) == 0);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		check_zeros(wiped, DATA / 4, "wiped on fork");
		MUST(touch_raises(left_out + PAGE, 0) == SIGSEGV);
		check(at, DATA, 1, "inherited");
		_exit(0);
	}
	wait_for(child, "the child");
	check(wiped, DATA / 4, 3, "the parent's");
	check(left_out, DATA / 4, 2, "the parent's");
}

/* What holds for a child is what was set when it was forked, though the parent sets something else at once. */
static void changed_after_fork(void)
{
	char *at = far_map(DATA / 4, 1);
	push_far(at, DATA / 4);
	for (int turn = 0; turn < 20; turn++) {
		int wipes = turn % 2;
		MUST(madvise(at, DATA / 4, wipes ? MADV_WIPEONFORK : MADV_KEEPONFORK) == 0);
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			wipes ? check_zeros(at, DATA / 4, "wiped on fork") : check(at, DATA / 4, 1, "inherited");
			_exit(0);
		}
		MUST(madvise(at, DATA / 4, wipes ? MADV_KEEPONFORK : MADV_WIPEONFORK) == 0);
		wait_for(child, "the child");
	}
}

static const struct test_case cases[] = {
	{"child_reads", child_reads}, {"both_write", both_write}, {"outlives", outlives}, {"generations", generations},
	{"fork_in_transit", fork_in_transit}, {"parent_exits", parent_exits}, {"storm", storm}, {"not_inherited", not_inherited},
	{"changed_after_fork", changed_after_fork}, {"siblings", siblings}, {"cow_storm", cow_storm},
};
MAIN(cases)
