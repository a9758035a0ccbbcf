/* One thread that fills its memory piece by piece; told "forks", it forks after each, and the child looks at the newest piece.
   Prints "built", and for each line of input how many of its pages are right. */
#include "far.h"

#define BYTES (48 * MIB)
#define NEW (16 * PAGE)

static void look_in_a_child(const char *piece, size_t page)
{
	int status;
	pid_t child = fork();
	MUST(child >= 0);
	if (!child)
		_exit(wrong_word(piece, page, 1) >= 0);
	MUST(waitpid(child, &status, 0) == child && status == 0);
}

int main(int argc, char **argv)
{
	char *data = map(BYTES), line[64];
	int forks = argc > 1 && !strcmp(argv[1], "forks");
	for (size_t at = 0; at < BYTES; at += NEW) {
		for (size_t page = at / PAGE; page < (at + NEW) / PAGE; page++)
			fill_page(data + page * PAGE, page, 1);
		if (forks)
			look_in_a_child(data + at, at / PAGE);
	}
	puts("built");
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		size_t right = 0;
		for (size_t page = 0; page < BYTES / PAGE; page++)
			right += wrong_word(data + page * PAGE, page, 1) < 0;
		printf("right %zu of %zu\n", right, (size_t)(BYTES / PAGE));
		fflush(stdout);
	}
	return 0;
}
