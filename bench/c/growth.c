/* Programs that allocate and write as fast as they can. */
#include "far.h"

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

static const struct test_case cases[] = {
	{"mapping", mapping}, {"huge", huge}, {"two_threads", two_threads}, {"many_mappings", many_mappings},
	{"small_blocks", small_blocks}, {"reallocs", reallocs}, {"populate", populate},
};
MAIN(cases)
