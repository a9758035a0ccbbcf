/* Trees of processes that each write their own pages and verify all of them against a model.
 * fork_tree verify|kill short|long SEED */
#include "far.h"

enum { AT_WORK = 4 };

/* What the whole tree shares, in shared memory, which stays here. */
static struct {
	volatile uint32_t processes, lived, deepest, failures, killed;
	/* Who works now, by process: a processor or two do not serve hundreds at once, and who is killed frees his place. */
	volatile int32_t at_work[AT_WORK];
	volatile int32_t pids[256];
} *tree;

static size_t bytes, pages;
static uint32_t processes_at_most;
static int generations, kills;
/* Whether this is the root, or a firstborn of firstborns: each of them has a place kept, so that all generations live. */
static int of_first_line = 1;

/* What each page must hold, for one process; in shared memory too, so that the judge does not go far. */
static uint32_t *salts;
static uint64_t lot;

static uint32_t draw(uint32_t below)
{
	lot = lot * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(lot >> 33) % below;
}

static void *unmanaged(size_t size)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(at != MAP_FAILED);
	return at;
}

static volatile int32_t *place;

static void begin_work(void)
{
	for (;; usleep(5000))
		for (int i = 0; i < AT_WORK; i++) {
			int32_t holder = tree->at_work[i];
			if (holder && kill(holder, 0) == 0)
				continue;
			if (__atomic_compare_exchange_n(&tree->at_work[i], &holder, getpid(), 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
				place = &tree->at_work[i];
				return;
			}
		}
}

static void end_work(void)
{
	__atomic_store_n(place, 0, __ATOMIC_RELEASE);
}

/* A few words of each page of the whole: its ends and one that wanders. */
static int is_right(const uint64_t *words, size_t page)
{
	size_t between = (page * 37 + salts[page]) % WORDS;
	return words[0] == word_of(page, salts[page], 0) && words[WORDS - 1] == word_of(page, salts[page], WORDS - 1) &&
	       words[between] == word_of(page, salts[page], between);
}

static void verify(const char *at, const char *when)
{
	begin_work();
	for (size_t page = 0; page < pages; page++) {
		const uint64_t *words = (const uint64_t *)(at + page * PAGE);
		/* One in eight as a whole. */
		if (page % 8 == lot % 8 ? wrong_word(words, page, salts[page]) < 0 : is_right(words, page))
			continue;
		__atomic_fetch_add(&tree->failures, 1, __ATOMIC_RELAXED);
		long wrong = wrong_word(words, page, salts[page]);
		fail("%s: page %zu at %p, word %ld, salt %u: %016lx instead of %016lx", when, page, (const void *)words, wrong,
		     salts[page], wrong < 0 ? 0 : words[wrong], wrong < 0 ? 0 : word_of(page, salts[page], (uint64_t)wrong));
	}
	end_work();
}

static void write_some(char *at, uint32_t one_in)
{
	begin_work();
	for (size_t i = 0; i < pages / one_in; i++) {
		size_t page = draw((uint32_t)pages);
		salts[page] = draw(1u << 30);
		fill_page(at + page * PAGE, page, salts[page]);
	}
	end_work();
}

/* A lost page: who dies of it while he has a place would keep it, and his parent may be waiting for one. */
static void lost(int number)
{
	(void)number;
	if (place && *place == getpid())
		end_work();
	_exit(7);
}

static int is_ours(pid_t pid)
{
	for (uint32_t i = 0; i < sizeof tree->pids / sizeof *tree->pids; i++)
		if (tree->pids[i] == pid)
			return 1;
	return 0;
}

/* Waits for children; who was killed is in order where killing is. The root, a subreaper, is also given farpage's helpers of
 * processes that have ended. */
static void reap(void)
{
	int status;
	pid_t pid;
	while ((pid = wait(&status)) > 0) {
		if (status == 0 || !is_ours(pid) || (kills && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL))
			continue;
		__atomic_fetch_add(&tree->failures, 1, __ATOMIC_RELAXED);
		fprintf(stderr, "%d ended with status %x\n", pid, status);
	}
}

/* The number of the next to be born at this depth, or 0 where there are enough. */
static uint32_t next_number(int depth, int first_line)
{
	if (first_line)
		return (uint32_t)depth + 1;
	uint32_t number = __atomic_add_fetch(&tree->processes, 1, __ATOMIC_RELAXED);
	if (number <= processes_at_most)
		return number;
	__atomic_fetch_sub(&tree->processes, 1, __ATOMIC_RELAXED);
	return 0;
}

static void be_counted(uint32_t number, int depth)
{
	tree->pids[number] = getpid();
	__atomic_fetch_add(&tree->lived, 1, __ATOMIC_RELAXED);
	for (uint32_t deepest = tree->deepest; deepest < (uint32_t)depth;)
		if (__atomic_compare_exchange_n(&tree->deepest, &deepest, (uint32_t)depth, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
			break;
}

static void live(char *at, int depth)
{
	write_some(at, 64);
	pid_t children[4];
	int born = 0;
	/* The root has four, and so there are enough in the end whatever is drawn. */
	while (depth < generations && born < (depth ? 2 + (int)draw(3) : 4)) {
		int first_line = of_first_line;
		of_first_line = 0;
		uint32_t number = next_number(depth + 1, first_line);
		if (!number)
			break;
		/* The child goes its own way from here, its model too. */
		uint32_t *theirs = unmanaged(pages * sizeof *salts), child_lot = draw(1u << 30);
		memcpy(theirs, salts, pages * sizeof *salts);
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			of_first_line = first_line;
			be_counted(number, depth + 1);
			munmap(salts, pages * sizeof *salts);
			salts = theirs;
			lot = lot * 31 + child_lot;
			live(at, depth + 1);
			_exit(0);
		}
		munmap(theirs, pages * sizeof *salts);
		children[born++] = child;
		write_some(at, 256);
		/* Some are killed at once, some in the middle of their own forks. */
		if (kills && draw(3) == 0) {
			usleep(draw(200) * 1000);
			/* It is waited for at once, or its place would seem taken. */
			int victim = (int)draw((uint32_t)born), status;
			kill(children[victim], SIGKILL);
			MUST(waitpid(children[victim], &status, 0) == children[victim]);
			children[victim] = children[--born];
			__atomic_fetch_add(&tree->killed, 1, __ATOMIC_RELAXED);
		}
	}
	verify(at, "among its children");
	write_some(at, 256);
	/* A third do not wait: their children outlive them and are the root's to reap. */
	if (depth > 0 && draw(3) == 0)
		_exit(0);
	reap();
	verify(at, "after its children");
}

int main(int argc, char **argv)
{
	MUST(argc == 4);
	kills = !strcmp(argv[1], "kill");
	int is_long = !strcmp(argv[2], "long");
	lot = strtoull(argv[3], NULL, 0) * 2 + 1;
	bytes = (is_long ? 256 : 64) * MIB;
	pages = bytes / PAGE;
	generations = is_long ? 6 : 4;
	processes_at_most = is_long ? 200 : 24;
	tree = unmanaged(PAGE);
	/* The root and the first line have their places. */
	tree->processes = 1 + (uint32_t)generations;
	be_counted(1, 0);
	salts = unmanaged(pages * sizeof *salts);
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0);
	MUST(signal(SIGBUS, lost) != SIG_ERR);
	char *at = map(bytes);
	for (size_t page = 0; page < pages; page++)
		fill_page(at + page * PAGE, page, salts[page] = draw(1u << 30));
	live(at, 0);
	reap();
	verify(at, "in the end");
	fprintf(stderr, "seed %s: %u processes lived in %u generations after the first, %u kills, %u failures\n", argv[3], tree->lived,
		tree->deepest, tree->killed, tree->failures);
	/* Who is killed may have been counted or not, and has fewer descendants than he would have had. */
	if (!kills && (tree->lived != processes_at_most || tree->deepest != (uint32_t)generations))
		fail("%u processes in %d generations were asked for", processes_at_most, generations);
	return tree->failures != 0;
}
