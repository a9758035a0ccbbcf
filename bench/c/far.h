/* What the test programs share: pages with a pattern each, and ways to see that they went far. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#define PAGE 4096ul
/* Smaller where the whole is to be (bench conformance --small). */
#ifndef MIB
#define MIB (1ul << 20)
#endif
#define WORDS (PAGE / 8)

/* Twice and more what the tests allow to stay here. */
#define DATA (48 * MIB)
/* What is written to push everything else out: more than may stay here. Where it is not enough, it is written again. */
#define PRESSURE (24 * MIB)

/* What is being done, for a case that does it several times. */
__attribute__((unused)) static const char *context = "";

__attribute__((unused, noreturn, format(printf, 1, 2))) static void fail(const char *what, ...)
{
	va_list list;
	va_start(list, what);
	fprintf(stderr, "%d: %s ", getpid(), context);
	vfprintf(stderr, what, list);
	fprintf(stderr, " (errno %d)\n", errno);
	va_end(list);
	_exit(1);
}

#define MUST(what) \
	do { \
		if (!(what)) \
			fail("line %d: %s", __LINE__, #what); \
	} while (0)

/* A missing feature: the test prints it and counts as skipped. */
__attribute__((unused, noreturn)) static void skip(const char *why)
{
	fprintf(stderr, "SKIP %s\n", why);
	_exit(77);
}

static inline uint64_t word_of(uint64_t page, uint64_t salt, uint64_t index)
{
	uint64_t x = page * 0x9e3779b97f4a7c15ull + salt * 0xbf58476d1ce4e5b9ull + index * 0x94d049bb133111ebull + 1;
	x ^= x >> 29;
	return x * 0xff51afd7ed558ccdull;
}

static inline void fill_page(void *at, uint64_t page, uint64_t salt)
{
	uint64_t *words = at;
	for (uint64_t i = 0; i < WORDS; i++)
		words[i] = word_of(page, salt, i);
}

/* The index of the first wrong word, or -1. */
static inline long wrong_word(const void *at, uint64_t page, uint64_t salt)
{
	const volatile uint64_t *words = at;
	for (uint64_t i = 0; i < WORDS; i++)
		if (words[i] != word_of(page, salt, i))
			return (long)i;
	return -1;
}

/* Page numbers count from `first`, so that a part that was moved can be checked where it lies now. */
__attribute__((unused)) static void fill_from(void *at, size_t bytes, uint64_t first, uint64_t salt)
{
	for (size_t page = 0; page < bytes / PAGE; page++)
		fill_page((char *)at + page * PAGE, first + page, salt);
}

__attribute__((unused)) static void check_from(const void *at, size_t bytes, uint64_t first, uint64_t salt, const char *what)
{
	for (size_t page = 0; page < bytes / PAGE; page++) {
		long wrong = wrong_word((const char *)at + page * PAGE, first + page, salt);
		if (wrong >= 0)
			fail("%s: page %zu of %zu at %p, word %ld is %016lx instead of %016lx", what, page, bytes / PAGE,
			     (void *)((const char *)at + page * PAGE), wrong,
			     ((const uint64_t *)((const char *)at + page * PAGE))[wrong],
			     word_of(first + page, salt, (uint64_t)wrong));
	}
}

__attribute__((unused)) static void fill(void *at, size_t bytes, uint64_t salt)
{
	fill_from(at, bytes, 0, salt);
}

__attribute__((unused)) static void check(const void *at, size_t bytes, uint64_t salt, const char *what)
{
	check_from(at, bytes, 0, salt, what);
}

__attribute__((unused)) static void check_zeros(const void *at, size_t bytes, const char *what)
{
	for (size_t i = 0; i < bytes / 8; i++)
		if (((const volatile uint64_t *)at)[i])
			fail("%s: byte %zu of %zu at %p is not zero", what, i * 8, bytes, at);
}

__attribute__((unused)) static char *map(size_t bytes)
{
	char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	MUST(at != MAP_FAILED);
	return at;
}

/* How many pages are in this process's memory. */
__attribute__((unused)) static size_t present(const void *at, size_t bytes)
{
	size_t found = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	MUST(fd >= 0);
	for (size_t page = 0; page < bytes / PAGE; page++) {
		uint64_t word;
		MUST(pread(fd, &word, 8, (off_t)(((uintptr_t)at / PAGE + page) * 8)) == 8);
		found += word >> 63;
	}
	close(fd);
	return found;
}

/* Not so where a program is run by hand, by itself: what must hold natively too is the same, but nothing is far. */
__attribute__((unused)) static int under_farpage(void) { return getenv("FARPAGE_JOB") != NULL; }

/* Writes other memory until what lies in `at` has left, or nearly. */
__attribute__((unused)) static void push_far(const void *at, size_t bytes)
{
	for (int turn = 0; turn < 20; turn++) {
		char *other = map(PRESSURE);
		fill(other, PRESSURE, 999);
		check(other, PRESSURE, 999, "the pressure's own pages");
		MUST(munmap(other, PRESSURE) == 0);
		if (present(at, bytes) * 4 <= bytes / PAGE || !under_farpage())
			return;
	}
	fail("%zu of %zu pages stay here", present(at, bytes), bytes / PAGE);
}

/* Memory with a pattern, most of it far. */
__attribute__((unused)) static char *far_map(size_t bytes, uint64_t salt)
{
	char *at = map(bytes);
	fill(at, bytes, salt);
	push_far(at, bytes);
	return at;
}

__attribute__((unused)) static void wait_for(pid_t child, const char *what)
{
	int status;
	MUST(waitpid(child, &status, 0) == child);
	if (status)
		fail("%s: status %x", what, status);
}

static sigjmp_buf out_of_fault;
static void *volatile fault_address;

static void on_fault(int signal, siginfo_t *info, void *context)
{
	(void)context;
	fault_address = info->si_addr;
	siglongjmp(out_of_fault, signal);
}

/* The signal that a read (or write) of this byte raises, 0 if none. */
__attribute__((unused)) static int touch_raises(volatile char *at, int write)
{
	struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, segv, bus;
	sigaction(SIGSEGV, &action, &segv);
	sigaction(SIGBUS, &action, &bus);
	int raised = sigsetjmp(out_of_fault, 1);
	if (!raised) {
		if (write)
			*at = 1;
		else
			(void)*at;
	}
	sigaction(SIGSEGV, &segv, NULL);
	sigaction(SIGBUS, &bus, NULL);
	return raised;
}

/* `usual` seconds, or what the outside says on emulated machines. */
__attribute__((unused)) static int patience(int usual)
{
	const char *said = getenv("FARPAGE_TEST_PATIENCE");
	int seconds = said ? atoi(said) : 0;
	return seconds > usual ? seconds : usual;
}

struct test_case {
	const char *name;
	void (*run)(void);
};

#define MAIN(cases) \
	int main(int argc, char **argv) \
	{ \
		for (size_t i = 0; argc > 1 && i < sizeof(cases) / sizeof(cases[0]); i++) \
			if (!strcmp(cases[i].name, argv[1])) { \
				(void)argv; \
				cases[i].run(); \
				return 0; \
			} \
		fprintf(stderr, "no such case\n"); \
		return 2; \
	}
