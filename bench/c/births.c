/* Every way in which a program makes another process, with its memory far. The one that makes it and the one that is made
 * both keep their own, and what becomes another program has nothing of either. */
#include "far.h"
#include <spawn.h>

extern char **environ;
static char *shared;

/* What a child that has its parent's memory does with it. */
static void live(uint64_t salt)
{
	check(shared, DATA, 1, "inherited");
	fill(shared, DATA / 4, salt);
	push_far(shared + DATA / 2, DATA / 2);
	check(shared, DATA / 4, salt, "written by the child");
	check_from(shared + DATA / 4, DATA - DATA / 4, DATA / 4 / PAGE, 1, "inherited, beside what it wrote");
}

/* Who is nobody's child any more says by a pipe that all is well, and by its end that it has ended. */
struct told {
	int ends[2];
};

static void tell(struct told *told) { MUST(write(told->ends[1], "y", 1) == 1); }

static void hear(struct told *told, const char *who)
{
	char said = 'n';
	close(told->ends[1]);
	if (read(told->ends[0], &said, 1) != 1 || said != 'y')
		fail("%s said nothing", who);
	MUST(read(told->ends[0], &said, 1) == 0);
	close(told->ends[0]);
}

static void daemonized(void)
{
	shared = far_map(DATA, 1);
	struct told told;
	MUST(pipe(told.ends) == 0);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		/* Its parent is this child, which ends in there. */
		MUST(daemon(1, 1) == 0);
		live(2);
		tell(&told);
		_exit(0);
	}
	wait_for(child, "who became a daemon");
	check(shared, DATA, 1, "beside a daemon");
	hear(&told, "the daemon");
	check(shared, DATA, 1, "after the daemon");
}

/* Not by libc, and so without what it calls in a child; with a child of its own made in the same way. */
static pid_t bare_clone(void)
{
	return (pid_t)syscall(SYS_clone, (unsigned long)SIGCHLD, NULL, NULL, NULL, NULL);
}

static void raw_clone(void)
{
	shared = far_map(DATA, 1);
	pid_t child = bare_clone();
	MUST(child >= 0);
	if (!child) {
		check(shared, DATA, 1, "in a child by clone");
		fill(shared, DATA / 8, 2);
		pid_t grandchild = bare_clone();
		MUST(grandchild >= 0);
		if (!grandchild) {
			check(shared, DATA / 8, 2, "in a grandchild by clone");
			fill_from(shared + DATA / 8, DATA / 8, DATA / 8 / PAGE, 3);
			_exit(0);
		}
		wait_for(grandchild, "a grandchild by clone");
		check(shared, DATA / 8, 2, "written by a child by clone");
		check_from(shared + DATA / 8, DATA / 8, DATA / 8 / PAGE, 1, "beside what a grandchild wrote");
		_exit(0);
	}
	check(shared, DATA, 1, "beside a child by clone");
	wait_for(child, "a child by clone");
	fill(shared, DATA, 4);
	push_far(shared, DATA);
	check(shared, DATA, 4, "after a child by clone");
}

/* Borrows this memory, and this thread with it, until it is another program. What it writes stays. */
static void by_vfork(void)
{
	shared = far_map(DATA, 1);
	for (int turn = 0; turn < 2; turn++) {
		static volatile uint64_t *word;
		word = (uint64_t *)(shared + (size_t)turn * 777 * PAGE) + 5;
		pid_t child = vfork();
		if (!child) {
			/* A far page, for the borrower and by it. */
			if (*word != word_of((uint64_t)turn * 777, 1, 5))
				_exit(9);
			*word = 42;
			if (turn % 2)
				_exit(0);
			execl("/proc/self/exe", "another", "work", NULL);
			_exit(8);
		}
		MUST(child > 0);
		MUST(*word == 42);
		*word = word_of((uint64_t)turn * 777, 1, 5);
		wait_for(child, turn % 2 ? "who ended after vfork" : "who executed after vfork");
		push_far(shared, DATA);
	}
	check(shared, DATA, 1, "after vfork");
}

static void by_posix_spawn(void)
{
	shared = far_map(DATA, 1);
	char *words[] = {"another", "work", NULL};
	pid_t child[2];
	for (int i = 0; i < 2; i++)
		MUST(posix_spawn(&child[i], "/proc/self/exe", NULL, NULL, words, environ) == 0);
	check(shared, DATA, 1, "beside who was spawned");
	for (int i = 0; i < 2; i++)
		wait_for(child[i], "who was spawned");
	MUST(system("true") == 0);
	fill(shared, DATA, 2);
	push_far(shared, DATA);
	check(shared, DATA, 2, "after who was spawned");
}

static void fork_exec(void)
{
	shared = far_map(DATA, 1);
	for (int turn = 0; turn < 2; turn++) {
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			/* At once, or with pages of its own. */
			if (turn)
				fill(shared, DATA / 4, 3);
			execl("/proc/self/exe", "another", "work", NULL);
			fail("exec");
		}
		check(shared, DATA, 1, "beside who executes");
		wait_for(child, "who executes");
	}
	check(shared, DATA, 1, "after who executed");
}

static volatile int stop;
static volatile size_t touched;

static void *touch_all(void *number)
{
	for (uint64_t x = (uint64_t)number + 1; !stop; x = x * 6364136223846793005ull + 1442695040888963407ull) {
		size_t page = (x >> 33) % (DATA / PAGE);
		if (wrong_word(shared + page * PAGE, page, 1) >= 0)
			fail("page %zu, read while others fork", page);
		touched++;
	}
	return NULL;
}

static void *fork_often(void *number)
{
	for (uint64_t turn = 0; turn < 4; turn++) {
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			uint64_t salt = 10 + turn + 100 * (uint64_t)number;
			/* A part each, which differs from turn to turn. */
			size_t part = ((uint64_t)number * 4 + turn) % 16, from = part * (DATA / 16);
			check_from(shared + from, DATA / 16, from / PAGE, 1, "inherited from a thread");
			fill_from(shared + from, DATA / 16, from / PAGE, salt);
			for (size_t page = 0; page < DATA / PAGE; page += 5)
				if (wrong_word(shared + page * PAGE, page, page * PAGE / (DATA / 16) == part ? salt : 1) >= 0)
					fail("page %zu in a thread's child", page);
			_exit(0);
		}
		wait_for(child, "a thread's child");
	}
	return NULL;
}

/* Threads that fork, each by itself, while others wait for far pages all the time. */
static void threads_fork(void)
{
	shared = far_map(DATA, 1);
	pthread_t touching[3], forking[3];
	for (long i = 0; i < 3; i++)
		MUST(pthread_create(&touching[i], NULL, touch_all, (void *)i) == 0);
	for (long i = 0; i < 3; i++)
		MUST(pthread_create(&forking[i], NULL, fork_often, (void *)i) == 0);
	for (int i = 0; i < 3; i++)
		MUST(pthread_join(forking[i], NULL) == 0);
	stop = 1;
	for (int i = 0; i < 3; i++)
		MUST(pthread_join(touching[i], NULL) == 0);
	MUST(touched > 0);
	check(shared, DATA, 1, "after threads forked");
}

/* With descriptors and a folder of their own, while other threads keep theirs. */
static void *unshare_and_fork(void *unused)
{
	(void)unused;
	if (unshare(CLONE_FILES | CLONE_FS))
		skip("unshare is forbidden here");
	MUST(chdir("/") == 0);
	check(shared, DATA, 1, "in a thread that has unshared");
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		live(2);
		_exit(0);
	}
	wait_for(child, "the child of a thread that has unshared");
	return NULL;
}

static void by_unshare(void)
{
	shared = far_map(DATA, 1);
	pthread_t thread;
	MUST(pthread_create(&thread, NULL, unshare_and_fork, NULL) == 0);
	check(shared, DATA, 1, "beside a thread that unshares");
	MUST(pthread_join(thread, NULL) == 0);
	/* The only thread: who else has its descriptors and its folder is not the program's. */
	MUST(unshare(CLONE_FILES | CLONE_FS) == 0);
	check(shared, DATA, 1, "after unshare");
	fill(shared, DATA, 3);
	push_far(shared, DATA);
	check(shared, DATA, 3, "written after unshare");
}

/* As a sandbox's process: in a mount namespace of its own, and in a user namespace where that is allowed. */
static void in_namespaces(void)
{
	shared = far_map(DATA, 1);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		check(shared, DATA / 4, 1, "inherited, before it has namespaces");
		if (unshare(CLONE_NEWUSER | CLONE_NEWNS) && unshare(CLONE_NEWNS))
			skip("this account may not make namespaces");
		/* For a look at its own pagemap. */
		prctl(PR_SET_DUMPABLE, 1);
		pid_t grandchild = fork();
		MUST(grandchild >= 0);
		if (!grandchild) {
			live(3);
			_exit(0);
		}
		wait_for(grandchild, "a child made in namespaces");
		live(2);
		_exit(0);
	}
	check(shared, DATA, 1, "beside who is in namespaces");
	int status;
	MUST(waitpid(child, &status, 0) == child);
	/* It has said why. */
	if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
		_exit(77);
	if (status)
		fail("who is in namespaces: status %x", status);
	fill(shared, DATA, 4);
	push_far(shared, DATA);
	check(shared, DATA, 4, "after who was in namespaces");
}

/* Threads with a region each, who discard parts of it, map them anew and write them again, while the process forks. */
enum { WORKERS = 3, PARTS = 16, PART_PAGES = 96, FORKS = 24, AT_A_TIME = 3 };

/* What a worker says of itself before it does it: a child inherits each worker's words and pages as of one moment. */
static struct worker {
	pthread_t thread;
	char *at;
	/* Its pages' numbers begin here: no two workers' pages are alike. */
	size_t first;
	/* What each part has: a pattern of this salt, or zeros if that is 0. */
	uint64_t salts[PARTS];
	/* The part that is changed (PARTS if none), whether it is given up for that, and what it will have. */
	size_t changed, given_up;
	uint64_t next;
	/* The page of that part that is written (PART_PAGES if none), and whether the part is a hole. */
	size_t written, hole;
	size_t rounds;
} workers[WORKERS];

/* In the program's own order with what is written to pages. */
static void say(size_t *what, size_t now) { __atomic_store_n(what, now, __ATOMIC_SEQ_CST); }

static char *page_of(const struct worker *one, size_t part, size_t page) { return one->at + (part * PART_PAGES + page) * PAGE; }

static int holds(const struct worker *one, size_t part, size_t page, uint64_t salt)
{
	const volatile uint64_t *words = (uint64_t *)page_of(one, part, page);
	if (salt)
		return wrong_word((const void *)words, one->first + part * PART_PAGES + page, salt) < 0;
	for (size_t i = 0; i < WORDS; i++)
		if (words[i])
			return 0;
	return 1;
}

static void check_part(const struct worker *one, size_t part, uint64_t salt, const char *what)
{
	for (size_t page = 0; page < PART_PAGES; page++)
		if (!holds(one, part, page, salt))
			fail("%s: worker %td, part %zu, page %zu at %p, salt %lu", what, one - workers, part, page,
			     (void *)page_of(one, part, page), salt);
}

static void write_part(struct worker *one, size_t part, uint64_t salt)
{
	for (size_t page = 0; page < PART_PAGES; page++) {
		say(&one->written, page);
		fill_page(page_of(one, part, page), one->first + part * PART_PAGES + page, salt);
	}
	say(&one->written, PART_PAGES);
}

/* By MADV_DONTNEED, by another mapping over it, or by one where it was. */
static void give_up(struct worker *one, size_t part, int how)
{
	const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	const size_t bytes = PART_PAGES * PAGE;
	char *at = page_of(one, part, 0);
	if (how == 0) {
		MUST(madvise(at, bytes, MADV_DONTNEED) == 0);
		return;
	}
	if (how == 1) {
		say(&one->hole, 1);
		MUST(munmap(at, bytes) == 0);
	}
	MUST(mmap(at, bytes, protection, flags, -1, 0) == at);
	say(&one->hole, 0);
}

static void *discard_often(void *worker)
{
	struct worker *self = worker;
	uint64_t lot = self->first + 1;
	for (uint64_t round = 2; !stop; round++) {
		lot = lot * 6364136223846793005ull + 1442695040888963407ull;
		size_t part = (lot >> 33) % PARTS;
		check_part(self, part, self->salts[part], "before a change");
		/* A quarter is only written over; of the rest a quarter stays zeros. */
		int how = (int)(lot >> 62), stays = how < 3 && (lot >> 58) % 4 == 0;
		say(&self->next, stays ? 0 : round);
		say(&self->given_up, how < 3);
		say(&self->changed, part);
		if (self->given_up) {
			give_up(self, part, how);
			check_part(self, part, 0, "given up");
		}
		if (!stays)
			write_part(self, part, round);
		say(&self->salts[part], self->next);
		say(&self->changed, PARTS);
		say(&self->rounds, self->rounds + 1);
		usleep(200);
	}
	for (size_t part = 0; part < PARTS; part++)
		check_part(self, part, self->salts[part], "in the end");
	return NULL;
}

/* What a child finds of a part that was just being changed is, page by page, what it had, zeros if it was given up, or what it
 * was to have; of the page that was just being written it may be some of each. */
static void check_changed(const struct worker *one)
{
	const size_t part = one->changed;
	for (size_t page = 0; page < PART_PAGES; page++)
		if (page != one->written && !holds(one, part, page, one->salts[part]) && !holds(one, part, page, one->next) &&
		    !(one->given_up && holds(one, part, page, 0)))
			fail("a part that changed as it was inherited: worker %td, part %zu, page %zu at %p, salts %lu and %lu", one - workers,
			     part, page, (void *)page_of(one, part, page), one->salts[part], one->next);
}

static void live_beside_workers(uint64_t salt)
{
	for (struct worker *one = workers; one < workers + WORKERS; one++)
		for (size_t part = 0; part < PARTS; part++)
			if (part != one->changed)
				check_part(one, part, one->salts[part], "inherited");
			else if (!one->hole)
				check_changed(one);
	for (int checks = 0; checks < 2; checks++)
		for (struct worker *one = workers; one < workers + WORKERS; one++)
			for (size_t part = 0; part < PARTS; part++) {
				/* Something else may lie in a hole by now. */
				if (part == one->changed && one->hole)
					continue;
				if (checks)
					check_part(one, part, salt, "written by a child");
				else
					write_part(one, part, salt);
			}
}

static int all_have_worked(void)
{
	for (struct worker *one = workers; one < workers + WORKERS; one++)
		if (__atomic_load_n(&one->rounds, __ATOMIC_SEQ_CST) < PARTS)
			return 0;
	return 1;
}

static void fork_discard(void)
{
	pid_t children[AT_A_TIME] = {0};
	for (size_t i = 0; i < WORKERS; i++) {
		workers[i].at = map(PARTS * PART_PAGES * PAGE);
		workers[i].first = i * PARTS * PART_PAGES;
		workers[i].changed = PARTS;
		workers[i].written = PART_PAGES;
		for (size_t part = 0; part < PARTS; part++)
			write_part(&workers[i], part, workers[i].salts[part] = 1);
	}
	for (size_t i = 0; i < WORKERS; i++)
		MUST(pthread_create(&workers[i].thread, NULL, discard_often, &workers[i]) == 0);
	for (unsigned turn = 0; turn < FORKS || !all_have_worked(); turn++) {
		pid_t *child = &children[turn % AT_A_TIME];
		if (*child)
			wait_for(*child, "a child beside workers");
		usleep(turn * 7 % 23 * 100);
		*child = fork();
		MUST(*child >= 0);
		if (!*child) {
			live_beside_workers(1000000 + turn);
			_exit(0);
		}
	}
	for (size_t i = 0; i < AT_A_TIME; i++)
		wait_for(children[i], "a child beside workers");
	stop = 1;
	for (size_t i = 0; i < WORKERS; i++)
		MUST(pthread_join(workers[i].thread, NULL) == 0);
}

/* What another program does. */
static void work(void)
{
	char *at = far_map(DATA, 7);
	check(at, DATA, 7, "another program's");
}

static const struct test_case cases[] = {
	{"daemon", daemonized}, {"raw_clone", raw_clone}, {"vfork", by_vfork}, {"posix_spawn", by_posix_spawn},
	{"fork_exec", fork_exec}, {"threads_fork", threads_fork}, {"unshare", by_unshare}, {"namespaces", in_namespaces},
	{"fork_discard", fork_discard}, {"work", work},
};
MAIN(cases)
