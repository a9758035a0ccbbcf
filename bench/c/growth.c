/* Programs that allocate and write as fast as they can. */
#include "far.h"
#include <sys/resource.h>

enum { CHUNK = 1 << 20 };
#define GROWN (96 * MIB)
static int advice;

/* A word a page, so that nothing is faster than the faults. */
static void touch(char *at, size_t bytes, uint64_t salt)
{
	for (size_t page = 0; page < bytes / PAGE; page++)
		*(volatile uint64_t *)(at + page * PAGE) = word_of(page, salt, 0);
}

static void verify(const char *at, size_t bytes, uint64_t salt)
{
	for (size_t page = 0; page < bytes / PAGE; page++)
		if (*(volatile uint64_t *)(at + page * PAGE) != word_of(page, salt, 0))
			fail("page %zu of %zu at %p", page, bytes / PAGE, (void *)at);
}

static void one_mapping(size_t bytes, uint64_t salt)
{
	char *at = map(bytes);
	if (advice)
		madvise(at, bytes, advice);
	touch(at, bytes, salt);
	verify(at, bytes, salt);
}

static void mapping(void) { one_mapping(GROWN, 1); }

static void huge(void)
{
	advice = MADV_HUGEPAGE;
	one_mapping(GROWN, 1);
}

static void *half(void *number)
{
	one_mapping(GROWN / 2, (uint64_t)number);
	return NULL;
}

static void two_threads(void)
{
	pthread_t threads[2];
	for (long i = 0; i < 2; i++)
		MUST(pthread_create(&threads[i], NULL, half, (void *)i) == 0);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
}

static void many_mappings(void)
{
	static char *at[GROWN / CHUNK];
	for (size_t i = 0; i < GROWN / CHUNK; i++) {
		at[i] = map(CHUNK);
		touch(at[i], CHUNK, i);
	}
	for (size_t i = 0; i < GROWN / CHUNK; i++)
		verify(at[i], CHUNK, i);
}

/* How many mappings the heap is of. */
static size_t heaps(void)
{
	char line[512];
	size_t found = 0;
	FILE *maps = fopen("/proc/self/maps", "r");
	MUST(maps);
	while (fgets(line, sizeof line, maps))
		found += strstr(line, "[heap]") != NULL;
	fclose(maps);
	return found;
}

/* Each growth of the heap's was a mapping of its own, of which the kernel allows some 65530. */
static void small_blocks(void)
{
	struct block {
		struct block *next;
		uint64_t words[100];
	} *first = NULL;
	size_t count = GROWN / sizeof(struct block);
	for (size_t i = 0; i < count; i++) {
		struct block *block = malloc(sizeof *block);
		MUST(block);
		block->next = first;
		for (int w = 0; w < 100; w++)
			block->words[w] = word_of(i, 1, w);
		first = block;
	}
	for (size_t i = count; i-- > 0; first = first->next)
		for (int w = 0; w < 100; w++)
			if (first->words[w] != word_of(i, 1, w))
				fail("block %zu", i);
	if (heaps() > 4)
		fail("the heap is of %zu mappings", heaps());
}

static void reallocs(void)
{
	char *at = NULL;
	size_t size = 0;
	while (size < GROWN) {
		size_t larger = size + size / 3 / PAGE * PAGE + 64 * PAGE;
		MUST((at = realloc(at, larger)));
		for (size_t page = size / PAGE; page < larger / PAGE; page++)
			*(uint64_t *)(at + page * PAGE) = word_of(page, 1, 0);
		size = larger;
	}
	verify(at, size, 1);
}

/* What one call populates by itself is managed by the time it does, and goes like any other. */
static void populate(void)
{
	char *at = mmap(NULL, GROWN / 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	MUST(at != MAP_FAILED);
	touch(at, GROWN / 2, 1);
	push_far(at, GROWN / 2);
	verify(at, GROWN / 2, 1);
}

/* How much of the mapping there is in huge pages, bytes. */
static size_t in_huge_pages(const char *at)
{
	char line[512];
	size_t start, end, kib, found = 0;
	int inside = 0;
	FILE *maps = fopen("/proc/self/smaps", "r");
	MUST(maps);
	while (fgets(line, sizeof line, maps))
		if (sscanf(line, "%zx-%zx ", &start, &end) == 2)
			inside = start <= (uintptr_t)at && (uintptr_t)at < end;
		else if (inside && sscanf(line, "AnonHugePages: %zu kB", &kib) == 1)
			found = kib << 10;
	fclose(maps);
	return found;
}

/* Memory in huge pages, while there is no shortage and nothing is managed; the kernel may have none to give at times. */
static char *in_huge_map(size_t size)
{
	const size_t huge = 2 * MIB;
	for (int turn = 0; turn < 20; turn++) {
		char *whole = map(size + huge), *at = (char *)(((uintptr_t)whole + huge - 1) & ~(huge - 1));
		if (madvise(at, size, MADV_HUGEPAGE))
			skip("the kernel has no transparent huge pages");
		fill(at, size, 1);
		if (in_huge_pages(at))
			return at;
		MUST(munmap(whole, size + huge) == 0);
		usleep(10000);
	}
	skip("the kernel gave no huge page: see /sys/kernel/mm/transparent_hugepage/enabled, and how much memory is free");
}

/* What was in huge pages before memory became short leaves page by page. */
static void huge_before(void)
{
	const size_t size = 6 * MIB;
	char *at = in_huge_map(size);
	fprintf(stderr, "%zu bytes of %zu are in huge pages\n", in_huge_pages(at), size);
	check(at, size, 1, "in huge pages");
	push_far(at, size);
	check(at, size, 1, "once in huge pages");
	fill(at, size / 2, 2);
	push_far(at, size);
	check(at, size / 2, 2, "once in huge pages, and written");
	check_from(at + size / 2, size / 2, size / 2 / PAGE, 1, "beside what was written");
}

/* Writes to each page of so much stack. */
__attribute__((noinline)) static void go_deep(size_t bytes)
{
	char here[bytes];
	touch(here, bytes, 1);
}

/* A stack that grows beyond what is allowed, and whose pages are given back before that ends the program, counts no longer. The
 * size of what is mapped stays as it is then, so that nothing else asks for a look at the mappings. */
static void given_back(void)
{
	const size_t size = 20 * MIB;
	struct rlimit limit;
	MUST(getrlimit(RLIMIT_STACK, &limit) == 0);
	limit.rlim_cur = 4 * size;
	if (setrlimit(RLIMIT_STACK, &limit))
		skip("the stack may not grow so far: see ulimit -s");
	go_deep(size);
	usleep(200000);
	/* From what was deepest to well below what is in use. */
	char *here = (char *)((uintptr_t)&limit / PAGE * PAGE);
	MUST(madvise(here - size + 2 * PAGE, size - 18 * PAGE, MADV_DONTNEED) == 0);
	/* Longer than what exceeds the limit is put up with. */
	usleep(5000000);
	one_mapping(GROWN / 4, 1);
}

static const struct test_case cases[] = {
	{"mapping", mapping}, {"huge", huge}, {"two_threads", two_threads}, {"many_mappings", many_mappings},
	{"small_blocks", small_blocks}, {"reallocs", reallocs}, {"populate", populate},
	{"huge_before", huge_before}, {"given_back", given_back},
};
MAIN(cases)
