/* Which pages were written since that was last cleared: asked of the agent, about pages wherever they are. */
#include "far.h"
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

#define PAGES (DATA / PAGE)
/* As many pages as one answer has bits for. */
#define WINDOW 4096ul

/* The packet of client/attach/src/message.rs. */
struct packet {
	char magic[8];
	uint32_t tag, kind;
	uint64_t job, parent, start, bytes, helper, text_len;
};
enum { HELLO = 1, REFUSAL = 3, DONE = 7, SOFT_DIRTY = 10, ABOUT_PAGES = 6 };

struct reply {
	struct packet packet;
	unsigned char bits[WINDOW / 8];
};

/* What must come out, page by page. */
static char written[PAGES];

static struct reply exchange(int agent, struct packet *asked)
{
	struct reply reply;
	memcpy(asked->magic, "farpage1", 8);
	MUST(send(agent, asked, sizeof *asked, MSG_NOSIGNAL) == sizeof *asked);
	ssize_t got = recv(agent, &reply, sizeof reply, 0);
	MUST(got >= (ssize_t)sizeof reply.packet && (size_t)got == sizeof reply.packet + reply.packet.text_len);
	return reply;
}

/* A connection for each question: a forked child must not ask through its parent's. */
static int agent_of(uint64_t job, struct reply *reply)
{
	const char *name = getenv("FARPAGE_ATTACH");
	MUST(name);
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	strncpy(address.sun_path, name, sizeof address.sun_path - 1);
	socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(name) + (name[0] != '@'));
	if (name[0] == '@')
		address.sun_path[0] = 0;
	int agent = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	MUST(agent >= 0 && connect(agent, (struct sockaddr *)&address, length) == 0);
	struct packet hello = {.tag = HELLO, .kind = ABOUT_PAGES, .job = job};
	*reply = exchange(agent, &hello);
	return agent;
}

static uint64_t this_job(void)
{
	return strtoull(getenv("FARPAGE_JOB"), NULL, 16);
}

static struct reply question(int agent, uint64_t start, uint64_t bytes, int clear)
{
	struct packet asked = {.tag = SOFT_DIRTY, .kind = (uint32_t)clear, .start = start, .bytes = bytes};
	return exchange(agent, &asked);
}

/* Asks about these pages; one char each, 1 if it is soft-dirty. Run by hand, without far memory, nobody can be asked. */
static int ask(const char *at, size_t pages, int clear, char *dirty)
{
	if (!under_farpage())
		return 0;
	struct reply reply;
	int agent = agent_of(this_job(), &reply);
	for (size_t from = 0; from < pages; from += WINDOW) {
		size_t count = pages - from < WINDOW ? pages - from : WINDOW;
		reply = question(agent, (uintptr_t)at + from * PAGE, count * PAGE, clear);
		if (reply.packet.tag != DONE)
			fail("refused: %.*s", (int)reply.packet.text_len, (char *)reply.bits);
		MUST(reply.packet.text_len == (count + 7) / 8);
		for (size_t i = 0; i < count; i++)
			dirty[from + i] = reply.bits[i / 8] >> (i % 8) & 1;
	}
	close(agent);
	return 1;
}

static void must_be(const char *dirty, size_t pages, const char *what)
{
	size_t wrong = 0, first = 0;
	for (size_t page = pages; page-- > 0;)
		if (dirty[page] != written[page]) {
			wrong++;
			first = page;
		}
	if (wrong)
		fail("%s: %zu of %zu pages are wrong, page %zu was %swritten", what, wrong, pages, first,
		     written[first] ? "" : "not ");
}

static void must_be_written(const char *at, size_t pages, const char *what)
{
	static char dirty[PAGES];
	if (ask(at, pages, 0, dirty))
		must_be(dirty, pages, what);
}

/* What is told as it is cleared is what was written until then. */
static void clear(const char *at, size_t pages, const char *what)
{
	static char dirty[PAGES];
	if (ask(at, pages, 1, dirty))
		must_be(dirty, pages, what);
	memset(written, 0, sizeof written);
	must_be_written(at, pages, what);
}

static void write_every(char *at, size_t pages, size_t nth, char value)
{
	for (size_t page = 0; page < pages; page += nth) {
		/* Another byte than the one that is there. */
		at[page * PAGE + 100] ^= value;
		written[page] = 1;
	}
}

/* What is asked about is neither fetched nor touched. */
static void ask_in_place(const char *at, size_t pages, const char *what)
{
	size_t before = present(at, pages * PAGE);
	must_be_written(at, pages, what);
	size_t after = present(at, pages * PAGE);
	if (after > before)
		fail("%s: asking brought %zu pages home", what, after - before);
}

/* Memory with a pattern, all of it written, most of it far. */
static char *written_map(void)
{
	memset(written, 1, sizeof written);
	return far_map(DATA, 1);
}

static void local(void)
{
	const size_t pages = 4 * MIB / PAGE;
	char *at = map(4 * MIB);
	ask_in_place(at, pages, "never touched");
	write_every(at, pages, 2, 1);
	must_be_written(at, pages, "never cleared");
	clear(at, pages, "cleared");
	check_zeros(at + PAGE, PAGE, "between");
	must_be_written(at, pages, "read");
	write_every(at, pages, 3, 2);
	must_be_written(at, pages, "every third");
	clear(at, pages, "cleared again");
	write_every(at, pages, 5, 4);
	push_far(at, 4 * MIB);
	ask_in_place(at, pages, "far by now");
}

static void far(void)
{
	char *at = written_map();
	must_be_written(at, PAGES, "never cleared");
	clear(at, PAGES, "cleared");
	ask_in_place(at, PAGES, "asked in place");
	check(at, DATA, 1, "fetched");
	must_be_written(at, PAGES, "fetched");
	push_far(at, DATA);
	must_be_written(at, PAGES, "taken out");
	write_every(at, PAGES, 5, 7);
	must_be_written(at, PAGES, "written");
	push_far(at, DATA);
	ask_in_place(at, PAGES, "written, and far again");
	clear(at, PAGES, "cleared, and far");
	write_every(at, PAGES, 7, 7);
	push_far(at, DATA);
	must_be_written(at, PAGES, "written once more");
}

static volatile int stop;
static char *in_transit;

static void *reads(void *unused)
{
	(void)unused;
	for (uint64_t x = 1; !stop; x = x * 6364136223846793005ull + 1442695040888963407ull)
		(void)((volatile char *)in_transit)[(x >> 33) % PAGES * PAGE];
	return NULL;
}

static void *presses(void *unused)
{
	(void)unused;
	char *other = map(PRESSURE);
	for (char turn = 1; !stop; turn++)
		for (size_t page = 0; page < PRESSURE / PAGE && !stop; page++)
			other[page * PAGE] = turn;
	return NULL;
}

/* Pages come and go all the time, while this clears, writes and asks. */
static void transit(void)
{
	in_transit = written_map();
	pthread_t threads[2];
	MUST(pthread_create(&threads[0], NULL, reads, NULL) == 0 && pthread_create(&threads[1], NULL, presses, NULL) == 0);
	for (int turn = 0; turn < 8; turn++) {
		clear(in_transit, PAGES, "cleared in transit");
		write_every(in_transit, PAGES, 3 + (size_t)turn, 1);
		must_be_written(in_transit, PAGES, "written in transit");
		must_be_written(in_transit, PAGES, "a moment later");
	}
	stop = 1;
	pthread_join(threads[0], NULL);
	pthread_join(threads[1], NULL);
}

/* Whatever lies where when it is forked: each side goes on with what was written until then, and with its own. */
static void forked(void)
{
	char *at = written_map();
	clear(at, PAGES, "cleared");
	write_every(at, PAGES, 4, 1);
	/* Of these nothing but a hash that is kept says what they held. */
	const size_t few = PAGES / 16;
	static char dirty[PAGES];
	write_every(at, few, 1, 16);
	ask(at, few, 1, dirty);
	memset(written, 0, few);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		must_be_written(at, PAGES, "in the child");
		write_every(at, PAGES, 3, 2);
		must_be_written(at, PAGES, "written in the child");
		push_far(at, DATA);
		must_be_written(at, PAGES, "written in the child, and far");
		clear(at, PAGES, "cleared in the child");
		write_every(at, PAGES, 7, 4);
		must_be_written(at, PAGES, "written in the child after that");
		_exit(0);
	}
	must_be_written(at, PAGES, "in the parent");
	write_every(at, PAGES, 5, 8);
	must_be_written(at, PAGES, "written in the parent");
	wait_for(child, "the child");
	push_far(at, DATA);
	must_be_written(at, PAGES, "in the parent, alone");
	clear(at, PAGES, "cleared in the parent");
}

/* What a child finds wiped has changed for it, and not for its parent. */
static void wiped(void)
{
	char *at = written_map();
	clear(at, PAGES, "cleared");
	MUST(madvise(at, DATA, MADV_WIPEONFORK) == 0);
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		memset(written, 1, sizeof written);
		must_be_written(at, PAGES, "wiped");
		check_zeros(at, DATA, "wiped");
		clear(at, PAGES, "wiped and read");
		_exit(0);
	}
	wait_for(child, "the child");
	must_be_written(at, PAGES, "in the parent");
}

static void protect(void)
{
	char *at = written_map();
	clear(at, PAGES, "cleared");
	write_every(at, PAGES / 2, 3, 1);
	for (int turn = 0; turn < 2; turn++) {
		MUST(mprotect(at, DATA, turn ? PROT_NONE : PROT_READ) == 0);
		must_be_written(at, PAGES, turn ? "inaccessible" : "read-only");
		char *other = far_map(PRESSURE, 2);
		must_be_written(at, PAGES, turn ? "inaccessible, and far" : "read-only, and far");
		MUST(munmap(other, PRESSURE) == 0);
	}
	MUST(mprotect(at, DATA, PROT_READ | PROT_WRITE) == 0);
	must_be_written(at, PAGES, "writable again");
	write_every(at, PAGES, 5, 2);
	must_be_written(at, PAGES, "written again");
	MUST(mprotect(at, DATA, PROT_READ) == 0);
	clear(at, PAGES, "cleared read-only");
}

/* What is given up has changed, what was zeros has not; what is moved counts as written where it lies now. */
static void given_up(void)
{
	char *at = written_map();
	const size_t part = PAGES / 4;
	clear(at, PAGES, "cleared");
	MUST(madvise(at, part * PAGE, MADV_DONTNEED) == 0);
	memset(written, 1, part);
	must_be_written(at, PAGES, "given up");
	check_zeros(at, part * PAGE, "given up");
	must_be_written(at, PAGES, "given up and read");
	clear(at, PAGES, "cleared again");
	MUST(madvise(at, part * PAGE, MADV_DONTNEED) == 0);
	must_be_written(at, PAGES, "zeros given up");
	memset(at + part * PAGE, 0, part * PAGE);
	memset(written + part, 1, part);
	must_be_written(at, PAGES, "zeros written over it");
	push_far(at, DATA);
	must_be_written(at, PAGES, "zeros written over it, and far");
	clear(at, PAGES, "cleared once more");
	char *moved = map(DATA);
	MUST(mremap(at + DATA / 2, DATA / 2, DATA / 2, MREMAP_MAYMOVE | MREMAP_FIXED, moved) == moved);
	memset(written, 1, PAGES / 2);
	must_be_written(moved, PAGES, "moved");
	check_from(moved, DATA / 2, PAGES / 2, 1, "moved");
	MUST(munmap(moved, DATA) == 0);
	memset(written, 0, sizeof written);
	MUST(mmap(moved, DATA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == moved);
	must_be_written(moved, PAGES, "mapped anew");
}

static void must_be_refused(uint64_t job, uint64_t start, uint64_t bytes, const char *reason)
{
	struct reply reply;
	int agent = agent_of(job, &reply);
	if (reply.packet.tag == DONE)
		reply = question(agent, start, bytes, 1);
	if (reply.packet.tag != REFUSAL || !memmem(reply.bits, reply.packet.text_len, reason, strlen(reason)))
		fail("tag %u instead of \"%s\": %.*s", reply.packet.tag, reason, (int)reply.packet.text_len, (char *)reply.bits);
	close(agent);
}

/* What is no memory of this process's, or no question at all, is refused with a reason, and harms nothing. */
static void refused(void)
{
	char *at = written_map();
	if (!under_farpage())
		return;
	const uint64_t job = this_job(), start = (uintptr_t)at;
	const char *whole = "whole pages", *managed = "not managed memory";
	must_be_refused(job, start, 0, whole);
	must_be_refused(job, start + 1, PAGE, whole);
	must_be_refused(job, start, PAGE + 1, whole);
	must_be_refused(job, start, (WINDOW + 1) * PAGE, whole);
	must_be_refused(job, 0 - PAGE, PAGE, whole);
	must_be_refused(job, 0 - 2 * PAGE, PAGE, managed);
	must_be_refused(job, 0, PAGE, managed);
	must_be_refused(job, (uintptr_t)refused & ~(PAGE - 1), PAGE, managed);
	must_be_refused(job, (uintptr_t)written & ~(PAGE - 1), PAGE, managed);
	must_be_refused(job, start - 4 * DATA, PAGE, managed);
	must_be_refused(job + 1, start, PAGE, "no such job");
	/* Whoever comes with this process's name is answered about its own memory: a child about none of its parent's. */
	pid_t child = fork();
	MUST(child >= 0);
	if (!child) {
		MUST(munmap(at, DATA) == 0);
		must_be_refused(job, start, PAGE, managed);
		_exit(0);
	}
	wait_for(child, "the child");
	clear(at, PAGES, "as it was");
}

static const struct test_case cases[] = {
	{"local", local}, {"far", far}, {"transit", transit}, {"forked", forked}, {"wiped", wiped},
	{"protect", protect}, {"given_up", given_up}, {"refused", refused},
};
MAIN(cases)
