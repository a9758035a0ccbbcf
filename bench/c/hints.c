/* Hints about memory to come: what they are for happens, soon, and no byte is another. Natively all of it is here. */
#include "far.h"

enum { PIECE = 64 * PAGE, TURNS = 20, PATIENCE_MS = 500 };

/* MADV_COLD and MADV_PAGEOUT by number: older headers have no names for them. */
enum { COLD = 20, PAGEOUT = 21 };

static void advise(char *piece, int advice)
{
	if (!madvise(piece, PIECE, advice))
		return;
	if (errno == EINVAL)
		skip("the kernel does not know this advice");
	fail("advice %d", advice);
}

static int most(const char *piece) { return present(piece, PIECE) * 4 >= 3 * PIECE / PAGE; }
static int few(const char *piece) { return present(piece, PIECE) * 4 <= PIECE / PAGE; }

/* Whether before long it comes to that. */
static int becomes(int (*so)(const char *piece), const char *piece)
{
	for (int ms = 0; ms < PATIENCE_MS; ms++) {
		if (so(piece))
			return 1;
		usleep(1000);
	}
	return 0;
}

static void is_whole(const char *at, const char *piece, const char *what)
{
	check_from(piece, PIECE, (size_t)(piece - at) / PAGE, 1, what);
}

static void will_need(void)
{
	char *at = far_map(DATA, 1);
	int came = 0;
	for (int turn = 0; turn < TURNS; turn++) {
		char *piece = at + turn * PIECE;
		MUST(!under_farpage() || few(piece));
		advise(piece, MADV_WILLNEED);
		came += becomes(most, piece);
		is_whole(at, piece, "asked for");
	}
	if (came < TURNS / 2)
		fail("of %d pieces that will be needed %d came home", TURNS, came);
	/* More than may stay here, and what is not mapped any more by the time it would come. */
	MUST(madvise(at, DATA, MADV_WILLNEED) == 0);
	MUST(munmap(at + DATA / 2, DATA / 2) == 0);
	check(at, DATA / 2, 1, "beside what was unmapped");
}

static void page_out(void)
{
	char *at = far_map(DATA, 1);
	int gone = 0;
	for (int turn = 0; turn < TURNS; turn++) {
		char *piece = at + turn * PIECE;
		is_whole(at, piece, "brought home");
		advise(piece, PAGEOUT);
		gone += becomes(few, piece);
		is_whole(at, piece, "taken out");
	}
	if (under_farpage() && gone < TURNS / 2)
		fail("of %d pieces that were to go %d went", TURNS, gone);
	check(at, DATA, 1, "all of it");
}

/* Of two pieces that were used just now the one that is cold goes before the other, whichever was used first. */
static void cold(void)
{
	char *at = far_map(DATA, 1), *other = at + DATA / 2;
	int first = 0;
	for (int turn = 0; turn < TURNS; turn++) {
		char *piece[2] = {at + 2 * turn * PIECE, at + (2 * turn + 1) * PIECE};
		char *unused = piece[turn & 1], *used = piece[!(turn & 1)];
		is_whole(at, piece[0], "used");
		is_whole(at, piece[1], "used after it");
		advise(unused, COLD);
		for (size_t pushed = 0; pushed < DATA / 2 && !few(unused) && !few(used); pushed += PIECE) {
			is_whole(at, other, "the pressure's");
			other += PIECE;
			if (other == at + DATA)
				other = at + DATA / 2;
		}
		first += few(unused) && most(used);
		is_whole(at, unused, "cold");
	}
	if (under_farpage() && first < 3 * TURNS / 4)
		fail("of %d pieces that are cold %d went first", TURNS, first);
	check(at, DATA, 1, "all of it");
}

static const struct test_case cases[] = {
	{"will_need", will_need}, {"page_out", page_out}, {"cold", cold},
};
MAIN(cases)
