/* Threads that read all of their pages again whenever a line of input says so, and live on where one is lost. Prints
   "built", and for each line how many pages were right, wrong and lost, and how many of the lost had been here. */
#include "far.h"

#define THREADS 4
#define BYTES (24 * MIB)
#define PAGES (BYTES / PAGE)

static struct {
	char *data;
	unsigned long right, wrong, lost, lost_here;
	char was_here[PAGES];
} own;
static __thread sigjmp_buf past_the_page;

static void on_lost(int signal)
{
	(void)signal;
	siglongjmp(past_the_page, 1);
}

static void count(unsigned long *what)
{
	__atomic_fetch_add(what, 1, __ATOMIC_RELAXED);
}

static void *read_share(void *first)
{
	for (volatile size_t page = (size_t)first; page < (size_t)first + PAGES / THREADS; page++) {
		if (sigsetjmp(past_the_page, 1)) {
			count(&own.lost);
			if (own.was_here[page])
				count(&own.lost_here);
		} else {
			count(wrong_word(own.data + page * PAGE, page, 1) < 0 ? &own.right : &own.wrong);
		}
	}
	return NULL;
}

/* What counts the lost must not be lost itself: our variables, and the heap, where the threads' own ones are. */
static void keep_own_here(void)
{
	char *heap = (char *)((uintptr_t)malloc(1) & ~(PAGE - 1));
	MUST(mlock(heap, (size_t)((char *)sbrk(0) - heap)) == 0);
	MUST(mlock(&own, sizeof own) == 0);
}

int main(void)
{
	struct sigaction action = {.sa_handler = on_lost};
	char line[64];
	keep_own_here();
	own.data = map(BYTES);
	fill(own.data, BYTES, 1);
	MUST(sigaction(SIGBUS, &action, NULL) == 0);
	puts("built");
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		pthread_t threads[THREADS];
		own.right = own.wrong = own.lost = own.lost_here = 0;
		for (size_t page = 0; page < PAGES; page++)
			own.was_here[page] = present(own.data + page * PAGE, PAGE) == 1;
		for (size_t i = 0; i < THREADS; i++)
			MUST(pthread_create(&threads[i], NULL, read_share, (void *)(i * PAGES / THREADS)) == 0);
		for (size_t i = 0; i < THREADS; i++)
			MUST(pthread_join(threads[i], NULL) == 0);
		printf("right %lu wrong %lu lost %lu here %lu\n", own.right, own.wrong, own.lost, own.lost_here);
		fflush(stdout);
	}
	return 0;
}
