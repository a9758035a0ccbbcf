/* Programs that do to themselves what could part them from their pager. */
#include "far.h"
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>

static void work(void)
{
	char *at = far_map(DATA, 1);
	check(at, DATA, 1, "the work's pages");
	fill(at, DATA, 2);
	push_far(at, DATA);
	check(at, DATA, 2, "the work's pages, written again");
}

/* By hand, as daemons do it; not the shim's own descriptors alone but all. */
static void close_everything(void)
{
	for (int fd = 0; fd < 1024; fd++)
		if (fd != 2)
			close(fd);
	work();
}

static void in_child(void (*body)(void))
{
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		body();
		_exit(0);
	}
	wait_for(child, "the child");
}

static void closing_child(void)
{
	char *at = far_map(DATA, 1);
	in_child(close_everything);
	check(at, DATA, 1, "the parent's");
}

static void *wait_idle(void *unused)
{
	(void)unused;
	pause();
	return NULL;
}

/* Kills on madvise, ioctl and socket, in every thread. */
static void forbid(void)
{
	pthread_t other;
	MUST(pthread_create(&other, NULL, wait_idle, NULL) == 0);
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_madvise, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_ioctl, 1, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_socket, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof filter / sizeof filter[0], filter};
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	MUST(syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0);
}

static void filtered(void)
{
	char *at = far_map(DATA, 1);
	forbid();
	check(at, DATA, 1, "under the filter");
	work();
}

static void filtered_child(void)
{
	char *at = far_map(DATA, 1);
	in_child(filtered);
	check(at, DATA, 1, "the parent's");
}

/* The filter is there first, so that the child may not even call the agent: its memory is far all the same. */
static void child_of_filtered(void)
{
	char *at = far_map(DATA, 1);
	forbid();
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		check(at, DATA, 1, "in the filtered child");
		fill(at, DATA / 8, 2);
		_exit(0);
	}
	int status;
	MUST(waitpid(child, &status, 0) == child);
	if (status)
		fail("the filtered child: status %x", status);
	check(at, DATA, 1, "the filtered parent's");
}

static void other_user(void)
{
	char *at = far_map(DATA, 1);
	if (geteuid() != 0)
		skip("needs root to become another user");
	MUST(setgroups(0, NULL) == 0 && setgid(65534) == 0 && setuid(65534) == 0);
	check(at, DATA, 1, "as another user");
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		check(at, DATA, 1, "in another user's child");
		_exit(0);
	}
	wait_for(child, "the child of another user");
	/* For a look at its own pagemap. */
	prctl(PR_SET_DUMPABLE, 1);
	work();
	in_child(work);
}

static void lock_all(void)
{
	struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
	setrlimit(RLIMIT_MEMLOCK, &all);
	char *at = far_map(DATA, 1);
	MUST(mlockall(MCL_CURRENT) == 0);
	check(at, DATA, 1, "locked");
	/* Locked is locked, wherever the limit is. */
	fill(at, DATA, 2);
	MUST(munlockall() == 0);
	check(at, DATA, 2, "unlocked");
	push_far(at, DATA);
	check(at, DATA, 2, "far again");
}

static void lock_future(void)
{
	struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
	setrlimit(RLIMIT_MEMLOCK, &all);
	char *at = far_map(DATA, 1);
	MUST(mlockall(MCL_FUTURE) == 0);
	char *locked = map(8 * MIB);
	fill(locked, 8 * MIB, 3);
	check(at, DATA, 1, "mapped before");
	check(locked, 8 * MIB, 3, "mapped locked");
	MUST(munlockall() == 0);
	work();
}

/* Writes over its arguments and environment, as programs do that show a title. */
extern char **environ;
static void title(void)
{
	for (char **entry = environ; *entry; entry++)
		memset(*entry, 0, strlen(*entry));
	in_child(work);
}

static void limited(void)
{
	struct rlimit space = {400 * MIB, 400 * MIB};
	MUST(setrlimit(RLIMIT_AS, &space) == 0);
	work();
	MUST(mmap(NULL, 500 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == ENOMEM);
}

/* More than may stay here, in mappings that are too small to be managed. */
static void crowd(void)
{
	size_t each = 64 << 10;
	for (size_t i = 0; i < 40 * MIB / each; i++) {
		char *at = map(each + PAGE);
		MUST(mprotect(at + each, PAGE, PROT_NONE) == 0);
		fill(at, each, i);
	}
	/* Ended by now, or soon: the deadline is the agent's. */
	for (int i = 0; i < 300; i++)
		usleep(100000);
}

/* Works for as long as the outside needs to stop, debug and continue it; says so by a file. */
static void long_work(void)
{
	int fd = open("long_work.ready", O_CREAT | O_WRONLY, 0600);
	char *at = far_map(DATA, 1);
	MUST(fd >= 0 && dprintf(fd, "%d\n", getpid()) > 0);
	close(fd);
	for (int turn = 0; access("long_work.ready", F_OK) == 0 || turn < 2; turn++)
		check(at, DATA, 1, "the long work's");
}

/* Writes words drawn by lot over what it shares with its pager, while its pages go and come. How that ends for this program
 * nobody promises. */
static void scribble(void)
{
	unsigned long start = 0, end = 0;
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "r");
	MUST(maps);
	while (fgets(line, sizeof line, maps) && !(strstr(line, "farpage-staging") && sscanf(line, "%lx-%lx", &start, &end) == 2))
		start = end = 0;
	MUST(fclose(maps) == 0 && end > start);
	const char *seed = getenv("SEED");
	unsigned long lot = seed ? strtoul(seed, NULL, 10) : 1;
	char *at = far_map(DATA, 1);
	/* The control block more often than the pages behind it. */
	for (int round = 0; round < 3000000; round++) {
		lot = lot * 6364136223846793005ul + 1442695040888963407ul;
		unsigned long area = lot >> 33 & 7 ? 4096 : end - start;
		if (round % 1000 == 0)
			*(volatile char *)(at + (lot >> 20) % DATA);
		uint32_t value = lot >> 60 ? (uint32_t)(lot >> 60) : (uint32_t)(lot >> 13);
		__atomic_store_n((uint32_t *)(start + (lot >> 24) % area / 4 * 4), value, __ATOMIC_RELAXED);
	}
	_exit(0);
}

static const struct test_case cases[] = {
	{"close_everything", close_everything}, {"closing_child", closing_child}, {"filtered", filtered},
	{"filtered_child", filtered_child}, {"child_of_filtered", child_of_filtered}, {"other_user", other_user},
	{"lock_all", lock_all}, {"lock_future", lock_future}, {"title", title}, {"limited", limited},
	{"long_work", long_work}, {"work", work},
	{"crowd", crowd}, {"scribble", scribble},
};

MAIN(cases)
