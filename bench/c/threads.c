/* Many threads in memory that is far. */
#include "far.h"

enum { THREADS = 8 };
static char *shared;
static pthread_barrier_t together;
static volatile int stop;

static void in_threads(void *(*body)(void *), int count)
{
	pthread_t threads[64];
	for (long i = 0; i < count; i++)
		MUST(pthread_create(&threads[i], NULL, body, (void *)i) == 0);
	for (int i = 0; i < count; i++)
		MUST(pthread_join(threads[i], NULL) == 0);
}

static void *read_same(void *unused)
{
	(void)unused;
	for (size_t page = 0; page < DATA / PAGE; page += 7) {
		if (page % 64 == 0)
			pthread_barrier_wait(&together);
		if (wrong_word(shared + page * PAGE, page, 1) >= 0)
			fail("page %zu", page);
	}
	return NULL;
}

static void same_pages(void)
{
	shared = far_map(DATA, 1);
	pthread_barrier_init(&together, NULL, THREADS);
	in_threads(read_same, THREADS);
}

static void *own_part(void *number)
{
	size_t part = DATA / THREADS, at = (size_t)(long)number * part;
	for (int turn = 0; turn < 2; turn++) {
		check_from(shared + at, part, at / PAGE, 1 + turn, "a thread's own part");
		fill_from(shared + at, part, at / PAGE, 2 + turn);
	}
	return NULL;
}

static void different_pages(void)
{
	shared = far_map(DATA, 1);
	in_threads(own_part, THREADS);
	check(shared, DATA, 3, "written by the threads");
}

enum { ADDERS = 2, ROUNDS = 6 };

static void *adder(void *unused)
{
	(void)unused;
	for (int round = 0; round < ROUNDS; round++)
		for (size_t page = 0; page < DATA / PAGE; page++)
			for (int i = 0; i < 4; i++)
				__atomic_fetch_add((uint64_t *)(shared + page * PAGE + (page * 8) % PAGE), 1, __ATOMIC_RELAXED);
	return NULL;
}

/* Both write all pages while they are taken out: no addition is lost. */
static void sums(void)
{
	shared = map(DATA);
	in_threads(adder, ADDERS);
	for (size_t page = 0; page < DATA / PAGE; page++) {
		uint64_t *words = (uint64_t *)(shared + page * PAGE);
		for (size_t i = 0; i < WORDS; i++)
			if (words[i] != (i == page % WORDS ? ADDERS * ROUNDS * 4 : 0))
				fail("page %zu word %zu: %lu", page, i, words[i]);
	}
}

static void *toucher(void *number)
{
	uint64_t x = (uint64_t)number * 12345 + 1;
	while (!stop) {
		x = x * 6364136223846793005ull + 1442695040888963407ull;
		size_t page = (x >> 33) % (DATA / PAGE);
		/* Zeros, or the pattern: nothing else, whoever discards what. */
		uint64_t seen = ((volatile uint64_t *)(shared + page * PAGE))[17];
		if (seen && seen != word_of(page, 1, 17))
			fail("page %zu: %lx", page, seen);
		if (x & 1)
			((volatile uint64_t *)(shared + page * PAGE))[17] = word_of(page, 1, 17);
	}
	return NULL;
}

static void *discarder(void *unused)
{
	(void)unused;
	for (int round = 0; round < 200; round++) {
		size_t from = (size_t)(round * 37 % 180) * (DATA / 192);
		MUST(madvise(shared + from, DATA / 192, MADV_DONTNEED) == 0);
		/* Mapped over in one call, so that no thread finds a hole. */
		if (round % 16 == 0) {
			MUST(mmap(shared + from, DATA / 192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == shared + from);
		}
		usleep(1000);
	}
	stop = 1;
	return NULL;
}

static void *discard_or_touch(void *number) { return number ? toucher(number) : discarder(number); }

static void discard_race(void)
{
	shared = map(DATA);
	for (size_t page = 0; page < DATA / PAGE; page++)
		((uint64_t *)(shared + page * PAGE))[17] = word_of(page, 1, 17);
	in_threads(discard_or_touch, 4);
}

static void *short_life(void *number)
{
	size_t page = (size_t)(long)number * 97 % (DATA / PAGE);
	char own[3 * PAGE];
	fill(own, sizeof own / PAGE * PAGE, (uint64_t)number);
	if (wrong_word(shared + page * PAGE, page, 1) >= 0)
		fail("page %zu", page);
	check(own, sizeof own / PAGE * PAGE, (uint64_t)number, "a thread's stack");
	return number;
}

static void thousands(void)
{
	shared = far_map(DATA, 1);
	for (long turn = 0; turn < 60; turn++) {
		pthread_t threads[50];
		for (long i = 0; i < 50; i++)
			MUST(pthread_create(&threads[i], NULL, short_life, (void *)(turn * 50 + i)) == 0);
		for (long i = 0; i < 50; i++) {
			void *result;
			MUST(pthread_join(threads[i], &result) == 0 && result == (void *)(turn * 50 + i));
		}
	}
}

/* A mutex that lies far when its owner dies is handed on. */
static pthread_mutex_t *robust;

static void *die_holding(void *unused)
{
	(void)unused;
	MUST(pthread_mutex_lock(robust) == 0);
	return NULL;
}

static void robust_mutex(void)
{
	shared = far_map(DATA, 1);
	pthread_mutexattr_t attributes;
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	char *memory = map(20 * 5 * PAGE);
	for (int turn = 0; turn < 20; turn++) {
		robust = (pthread_mutex_t *)(memory + (size_t)turn * 5 * PAGE);
		pthread_mutex_init(robust, &attributes);
		in_threads(die_holding, 1);
		int result = pthread_mutex_lock(robust);
		if (result != EOWNERDEAD)
			fail("turn %d: lock says %d", turn, result);
		MUST(pthread_mutex_consistent(robust) == 0 && pthread_mutex_unlock(robust) == 0);
		check_from(shared + (size_t)turn * MIB, 2 * MIB, turn * MIB / PAGE, 1, "other memory");
	}
}

static int steps[2][2];

static void *hold_until_told(void *unused)
{
	(void)unused;
	char byte;
	MUST(pthread_mutex_lock(robust) == 0);
	MUST(write(steps[0][1], "h", 1) == 1 && read(steps[1][0], &byte, 1) == 1);
	return NULL;
}

/* The kernel's limit, pinned: it walks a thread's list of robust mutexes at its end without raising faults. One that is far by
 * then is not handed on, and stays locked; it says so to who tries it, and harms nothing. */
static void robust_far(void)
{
	pthread_mutexattr_t attributes;
	pthread_mutexattr_init(&attributes);
	pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
	MUST(pipe(steps[0]) == 0 && pipe(steps[1]) == 0);
	/* Something beside it, so that the mutex's page is looked at by nobody. */
	char *memory = far_map(DATA, 1), byte;
	robust = (pthread_mutex_t *)(memory + DATA / 2);
	pthread_mutex_init(robust, &attributes);
	pthread_t holder;
	MUST(pthread_create(&holder, NULL, hold_until_told, NULL) == 0);
	MUST(read(steps[0][0], &byte, 1) == 1);
	const int managed = under_farpage();
	for (int turn = 0; managed && present(robust, PAGE); turn++) {
		MUST(turn < 20);
		push_far(memory, DATA);
	}
	MUST(write(steps[1][1], "e", 1) == 1 && pthread_join(holder, NULL) == 0);
	int result = pthread_mutex_trylock(robust);
	if (result != (managed ? EBUSY : EOWNERDEAD))
		fail("trylock says %d", result);
	check(memory, DATA / 2, 1, "before the mutex");
}

static const struct test_case cases[] = {
	{"same_pages", same_pages}, {"different_pages", different_pages}, {"sums", sums},
	{"discard_race", discard_race}, {"thousands", thousands}, {"robust_mutex", robust_mutex},
	{"robust_far", robust_far},
};
MAIN(cases)
