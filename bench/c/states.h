/* The states of memory that a case works on: local, far, in transit and shared after fork. */
#pragma once
#include "far.h"

enum state { LOCAL, FAR, TRANSIT, SHARED, STATES };
static const char *const names[STATES] = {"local", "far", "transit", "shared"};
static enum state state;
/* How much a case works on: what is local has to fit. */
static size_t bytes;

static struct {
	pthread_t thread;
	volatile int runs;
	char *at;
} churn;

/* Other memory that keeps coming and going, so that the frames of the rest do. */
static void *come_and_go(void *unused)
{
	(void)unused;
	const size_t pages = 20 * MIB / PAGE;
	for (uint64_t x = 1; churn.runs; x = x * 6364136223846793005ull + 1442695040888963407ull) {
		size_t page = (x >> 33) % pages;
		volatile uint64_t *word = (uint64_t *)(churn.at + page * PAGE) + 5;
		if (*word && *word != word_of(page, 77, 5))
			fail("churned page %zu is %lx", page, *word);
		*word = word_of(page, 77, 5);
	}
	return NULL;
}

static struct {
	pid_t pid;
	int ends[2];
} holder;

/* A child that keeps what it inherited until it is asked to look whether it is still that. */
static void hold(char *at, uint64_t salt)
{
	MUST(pipe(holder.ends) == 0);
	holder.pid = fork();
	MUST(holder.pid >= 0);
	if (holder.pid)
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	char word;
	MUST(read(holder.ends[0], &word, 1) == 1);
	check(at, bytes, salt, "what the holder inherited");
	_exit(0);
}

static void leave(void)
{
	if (churn.runs) {
		churn.runs = 0;
		pthread_join(churn.thread, NULL);
		munmap(churn.at, 20 * MIB);
	}
	if (holder.pid) {
		MUST(write(holder.ends[1], "?", 1) == 1);
		wait_for(holder.pid, "the holder");
		close(holder.ends[0]);
		close(holder.ends[1]);
		holder.pid = 0;
	}
}

/* Out with it, where the state says that it lies out there. */
static void push(char *at)
{
	if (state != LOCAL)
		push_far(at, bytes);
}

/* Fills the mapping and brings it into the state. */
static char *entered(char *at, uint64_t salt)
{
	fill(at, bytes, salt);
	push_far(at, bytes);
	if (state == LOCAL)
		check(at, bytes, salt, "brought home");
	if (state == SHARED)
		hold(at, salt);
	if (state == TRANSIT) {
		churn.at = map(20 * MIB);
		churn.runs = 1;
		MUST(pthread_create(&churn.thread, NULL, come_and_go, NULL) == 0);
	}
	return at;
}

static char *enter(uint64_t salt) { return entered(map(bytes), salt); }

/* Writes other contents and finds them again. */
__attribute__((unused)) static void rewrite(char *at, const char *when)
{
	fill(at, bytes, 2);
	push(at);
	check(at, bytes, 2, when);
}

/* Runs a case in each of the states, or in the one that the second argument picks. */
#define STATES_MAIN(cases) \
	int main(int argc, char **argv) \
	{ \
		for (size_t i = 0; argc > 1 && i < sizeof cases / sizeof *cases; i++) { \
			if (strcmp(cases[i].name, argv[1])) \
				continue; \
			for (int each = LOCAL; each < STATES; each++) { \
				if (argc > 2 && strcmp(names[each], argv[2])) \
					continue; \
				state = each; \
				context = names[each]; \
				bytes = each == LOCAL ? 4 * MIB : 24 * MIB; \
				cases[i].run(); \
				leave(); \
			} \
			return 0; \
		} \
		fprintf(stderr, "no such case\n"); \
		return 2; \
	}
