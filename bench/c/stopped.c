/* A process that is stopped, traced or put in the background at every stage of what memory does, while its stopper's own memory
 * goes and comes. In the end everything is what it was. */
#include "far.h"
#include <sys/ptrace.h>
#include <time.h>

/* What the worker is at; it says so itself. */
enum stage { FILLS, FETCHES, WRITES, FORKS, DISCARDS, MOVES, PROTECTS, UNMAPS, STAGES };
static const char *const stages[STAGES] = {"fills", "fetches", "writes", "forks", "discards", "moves", "protects", "unmaps"};
/* How often it is stopped at each, and what the worker has: more than may stay here. */
enum { STOPS = 2, WORK = 20 * MIB };
/* A worker that does not come to a stage hangs, seconds. */
enum { PATIENCE = 60 };

/* Shared by both, and never far. */
static struct {
	volatile int stage;
	volatile int ends;
	volatile unsigned long rounds;
} *said;

static void work(void)
{
	const size_t piece = WORK / 4;
	while (!said->ends) {
		said->stage = FILLS;
		char *at = map(WORK);
		fill(at, WORK, 1);
		said->stage = FETCHES;
		check(at, WORK, 1, "the worker's");
		said->stage = WRITES;
		fill(at, piece, 2);
		said->stage = FORKS;
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			check_from(at + piece, piece, piece / PAGE, 1, "the worker's child's");
			_exit(0);
		}
		wait_for(child, "the worker's child");
		said->stage = DISCARDS;
		for (size_t page = 0; page < piece / PAGE; page += 2)
			MUST(madvise(at + piece + page * PAGE, PAGE, MADV_DONTNEED) == 0);
		said->stage = MOVES;
		char *to = map(piece);
		MUST(mremap(at + 2 * piece, piece, piece, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
		said->stage = PROTECTS;
		for (size_t page = 0; page < piece / PAGE; page += 64)
			MUST(mprotect(at + page * PAGE, 64 * PAGE, page % 128 ? PROT_READ : PROT_NONE) == 0);
		MUST(mprotect(at, piece, PROT_READ) == 0);
		check(at, piece, 2, "written by the worker, and protected");
		for (size_t page = 0; page < piece / PAGE; page++)
			if (page % 2 == 0)
				check_zeros(at + piece + page * PAGE, PAGE, "discarded by the worker");
			else
				check_from(at + piece + page * PAGE, PAGE, piece / PAGE + page, 1, "beside what the worker discarded");
		check_from(to, piece, 2 * piece / PAGE, 1, "moved by the worker");
		check_from(at + 3 * piece, piece, 3 * piece / PAGE, 1, "left by the worker");
		said->stage = UNMAPS;
		for (size_t page = 0; page < piece / PAGE; page += 16)
			MUST(munmap(to + page * PAGE, 16 * PAGE) == 0);
		MUST(munmap(at, 2 * piece) == 0 && munmap(at + 3 * piece, piece) == 0);
		said->rounds++;
	}
	_exit(0);
}

static double now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return (double)at.tv_sec + (double)at.tv_nsec * 1e-9;
}

/* Waits until the worker is at this stage; not at its very beginning each time. */
static void wait_for_stage(int stage, unsigned turn)
{
	double deadline = now() + patience(PATIENCE);
	while (said->stage != stage) {
		if (now() > deadline)
			fail("after %lu rounds the worker does not come to what it %s", said->rounds, stages[stage]);
		sched_yield();
	}
	usleep(turn * 700);
}

static char state_of(pid_t pid)
{
	char path[64], line[512], state = '?';
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	MUST(fd >= 0);
	ssize_t got = read(fd, line, sizeof line - 1);
	close(fd);
	MUST(got > 0);
	line[got] = 0;
	char *behind = strrchr(line, ')');
	if (behind)
		state = behind[2];
	return state;
}

/* Stops the worker at each stage by `stop`, has its own memory go and come meanwhile, and lets it run on. */
static void at_every_stage(void (*stop)(pid_t), void (*go_on)(pid_t))
{
	said = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(said != MAP_FAILED);
	said->stage = -1;
	const size_t own = 20 * MIB;
	char *at = map(own);
	fill(at, own, 5);
	pid_t worker = fork();
	MUST(worker >= 0);
	if (!worker) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		MUST(setpgid(0, 0) == 0);
		work();
	}
	for (unsigned turn = 0; turn < STOPS; turn++)
		for (int stage = 0; stage < STAGES; stage++) {
			wait_for_stage(stage, turn);
			context = stages[stage];
			stop(worker);
			char state = state_of(worker);
			if (state != 'T' && state != 't')
				fail("the worker is in state %c", state);
			/* Who does not run cannot be in anybody's way. */
			check(at, own, 5, "the stopper's");
			unsigned long rounds = said->rounds;
			fill(at, own / 4, 5);
			MUST(said->rounds == rounds);
			go_on(worker);
		}
	context = "in the end";
	/* It runs on as ever: another round and a half. */
	unsigned long rounds = said->rounds;
	double deadline = now() + patience(PATIENCE);
	while (said->rounds < rounds + 2) {
		if (now() > deadline)
			fail("the worker does not run on");
		usleep(1000);
	}
	said->ends = 1;
	wait_for(worker, "the worker");
	check(at, own, 5, "the stopper's, in the end");
}

static void wait_stopped(pid_t pid, int flags)
{
	int status;
	MUST(waitpid(pid, &status, flags) == pid);
	if (!WIFSTOPPED(status))
		fail("status %x instead of a stop", status);
}

static void stop_by_signal(pid_t pid)
{
	MUST(kill(pid, SIGSTOP) == 0);
	wait_stopped(pid, WUNTRACED);
}

static void continue_by_signal(pid_t pid) { MUST(kill(pid, SIGCONT) == 0); }

/* As a terminal does it: to the group, which the worker's own child is in, by a signal that could be caught. */
static void stop_group(pid_t pid)
{
	MUST(kill(-pid, SIGTSTP) == 0);
	wait_stopped(pid, WUNTRACED);
}

static void continue_group(pid_t pid)
{
	/* Twice at once, as a shell may. */
	MUST(kill(-pid, SIGCONT) == 0 && kill(-pid, SIGCONT) == 0);
}

static void attach(pid_t pid)
{
	MUST(ptrace(PTRACE_SEIZE, pid, NULL, NULL) == 0 && ptrace(PTRACE_INTERRUPT, pid, NULL, NULL) == 0);
	wait_stopped(pid, __WALL);
	/* A look at what it has on its stack or nowhere, as debuggers do. */
	struct iovec words = {(char[1024]){0}, 1024};
	MUST(ptrace(PTRACE_GETREGSET, pid, (void *)1, &words) == 0);
}

static void detach(pid_t pid) { MUST(ptrace(PTRACE_DETACH, pid, NULL, NULL) == 0); }

static void stopped(void) { at_every_stage(stop_by_signal, continue_by_signal); }
static void job_control(void) { at_every_stage(stop_group, continue_group); }
static void traced(void) { at_every_stage(attach, detach); }

static const struct test_case cases[] = {{"stopped", stopped}, {"job_control", job_control}, {"traced", traced}};
MAIN(cases)
