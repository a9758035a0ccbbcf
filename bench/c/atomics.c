/* Atomic additions by several threads to words in pages that go far and come home all the time: no addition is lost, whatever
 * becomes of the page's protection or of who shares it. */
#include "far.h"

enum { ADDERS = 3, ROUNDS = 3 };
static char *counted;
/* How much memory has counters: in 4096 pages times three, or half of that. */
static size_t size = DATA;
static volatile int stop;

/* Where each page has its counter: not always in the same place. */
static uint64_t *counter(size_t page) { return (uint64_t *)(counted + page * PAGE) + page % WORDS; }

/* All of it, each thread in an order of its own, so that they meet seldom and miss each other's pages often. */
static void *add(void *number)
{
	const size_t pages = size / PAGE;
	/* Has no divisor with the number of pages in common, so that each page comes once. */
	const size_t step = 6 * (333 + 257 * (size_t)(long)number) + 1;
	for (int round = 0; round < ROUNDS; round++)
		for (size_t i = 0; i < pages; i++) {
			uint64_t *word = counter(i * step % pages);
			/* Both of the processor's kinds: one that adds, one that compares first. */
			if (i % 2) {
				__atomic_fetch_add(word, 1, __ATOMIC_SEQ_CST);
			} else {
				uint64_t seen = __atomic_load_n(word, __ATOMIC_SEQ_CST);
				while (!__atomic_compare_exchange_n(word, &seen, seen + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
					;
			}
		}
	return NULL;
}

static void sums_are(uint64_t each, const char *what)
{
	for (size_t page = 0; page < size / PAGE; page++)
		for (size_t i = 0; i < WORDS; i++) {
			uint64_t found = ((uint64_t *)(counted + page * PAGE))[i];
			if (found != (i == page % WORDS ? each : 0))
				fail("%s: page %zu word %zu is %lu, not %lu", what, page, i, found, each);
		}
}

static void start(pthread_t *threads)
{
	for (long i = 0; i < ADDERS; i++)
		MUST(pthread_create(&threads[i], NULL, add, (void *)i) == 0);
}

static void join(pthread_t *threads)
{
	for (int i = 0; i < ADDERS; i++)
		MUST(pthread_join(threads[i], NULL) == 0);
}

static void prepare(void)
{
	counted = map(size);
	memset(counted, 0, size);
	for (size_t page = 0; page < size / PAGE; page++)
		*counter(page) = 1000;
	push_far(counted, size);
}

static void exclusive(void)
{
	pthread_t threads[ADDERS];
	prepare();
	start(threads);
	join(threads);
	sums_are(1000 + ADDERS * ROUNDS, "after all additions");
}

/* An addition that is refused waits until the page may be written again, and is then made: the instruction is repeated. */
static void on_refused(int signal, siginfo_t *info, void *context)
{
	(void)context;
	char *at = info->si_addr;
	if (signal != SIGSEGV || at < counted || at >= counted + size)
		_exit(9);
	sched_yield();
}

static void *protect(void *unused)
{
	(void)unused;
	const size_t part = size / 24;
	for (uint64_t x = 1; !stop; x = x * 6364136223846793005ull + 1442695040888963407ull) {
		char *here = counted + (x >> 33) % 24 * part;
		MUST(mprotect(here, part, x >> 60 & 1 ? PROT_READ : PROT_NONE) == 0);
		if (x >> 61 & 1)
			usleep(300);
		MUST(mprotect(here, part, PROT_READ | PROT_WRITE) == 0);
		usleep(1000);
	}
	return NULL;
}

static void exclusive_mprotect(void)
{
	pthread_t threads[ADDERS], protector;
	struct sigaction action = {.sa_sigaction = on_refused, .sa_flags = SA_SIGINFO};
	prepare();
	MUST(sigaction(SIGSEGV, &action, NULL) == 0);
	MUST(pthread_create(&protector, NULL, protect, NULL) == 0);
	start(threads);
	join(threads);
	stop = 1;
	MUST(pthread_join(protector, NULL) == 0);
	sums_are(1000 + ADDERS * ROUNDS, "after all additions under protection");
	/* Once more by hand: read-only and far, an addition is refused and not lost. */
	MUST(mprotect(counted, size, PROT_READ) == 0);
	push_far(counted, size);
	for (size_t page = 0; page < size / PAGE; page += 101)
		MUST(touch_raises((char *)counter(page), 1) == SIGSEGV);
	sums_are(1000 + ADDERS * ROUNDS, "read-only");
}

/* What each child counts is its own from the fork on: what it inherited is a sum at one moment, which no later addition of its
 * parent's changes. */
static void exclusive_cow(void)
{
	pthread_t threads[ADDERS];
	/* Those who count at the same time have as much together as one has otherwise. */
	size = DATA / 2;
	prepare();
	start(threads);
	for (int turn = 0; turn < 2; turn++) {
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			static uint64_t inherited[DATA / PAGE];
			for (size_t page = 0; page < size / PAGE; page++) {
				inherited[page] = *counter(page);
				if (inherited[page] < 1000 || inherited[page] > 1000 + ADDERS * ROUNDS)
					fail("page %zu has %lu in a child", page, inherited[page]);
			}
			start(threads);
			join(threads);
			for (size_t page = 0; page < size / PAGE; page++)
				if (*counter(page) != inherited[page] + ADDERS * ROUNDS)
					fail("page %zu has %lu in a child, inherited was %lu", page, *counter(page), inherited[page]);
			_exit(0);
		}
		wait_for(child, "a counting child");
	}
	join(threads);
	sums_are(1000 + ADDERS * ROUNDS, "after all additions, beside children's");
}

static const struct test_case cases[] = {
	{"exclusive", exclusive}, {"exclusive_mprotect", exclusive_mprotect}, {"exclusive_cow", exclusive_cow},
};
MAIN(cases)
