/* Forks with pages on their way out, and then is gone: its child says what it has of them.
   Prints "built"; told to go on it writes some more and forks. Once its parent is gone the child prints "alone", and, told to
   look, how many of its pages are right, how many cannot be had, and how many hold what nobody wrote. */
#include "far.h"
#include <sys/prctl.h>

#define BYTES (48 * MIB)
/* More than is kept free, so that pages have to leave, and less than finds room while none arrives anywhere. */
#define MORE (160 * PAGE)

static void look(const char *data)
{
	size_t right = 0, lost = 0, wrong = 0;
	for (size_t page = 0; page < BYTES / PAGE; page++)
		if (touch_raises((char *)data + page * PAGE, 0))
			lost++;
		else if (wrong_word(data + page * PAGE, page, 1) < 0)
			right++;
		else
			wrong++;
	printf("right %zu lost %zu wrong %zu\n", right, lost, wrong);
	fflush(stdout);
}

int main(void)
{
	char *data = map(BYTES), *more = map(MORE), line[64];
	pid_t parent = getpid(), child;
	fill(data, BYTES, 1);
	puts("built");
	fflush(stdout);
	if (!fgets(line, sizeof line, stdin))
		return 0;
	fill(more, MORE, 2);
	MUST((child = fork()) >= 0);
	if (child) {
		wait_for(child, "the child, which its parent is not to outlive");
		return 1;
	}
	while (getppid() == parent)
		usleep(10000);
	puts("alone");
	fflush(stdout);
	if (fgets(line, sizeof line, stdin))
		look(data);
	return 0;
}
