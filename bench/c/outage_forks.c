/* Fills its memory piece by piece and forks after each; the child looks at the newest piece. Prints "built", and for each line
   of input how many of its pages are right. */
#include "far.h"

#define BYTES (48 * MIB)
#define NEW (16 * PAGE)

int main(void)
{
	char *data = map(BYTES), line[64];
	for (size_t at = 0; at < BYTES; at += NEW) {
		for (size_t page = at / PAGE; page < (at + NEW) / PAGE; page++)
			fill_page(data + page * PAGE, page, 1);
		pid_t child = fork();
		MUST(child >= 0);
		if (!child)
			_exit(wrong_word(data + at, at / PAGE, 1) >= 0);
		int status;
		MUST(waitpid(child, &status, 0) == child && status == 0);
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
