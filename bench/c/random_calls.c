/* Memory calls drawn by lot, and a model of what each page must hold after them.
 *   random_calls run SECONDS SEED     rounds in processes of their own; a failing one is made shorter
 *   random_calls twin                 the same rounds again, as long as there was time for; they must come to the same bytes
 *   random_calls replay SEED [FILE]   one round, only the calls whose numbers are in FILE; tells each
 *   random_calls judge SEED [FILE]    the same, telling only what is wrong */
#include "far.h"
#include <dirent.h>
#include <time.h>

enum { PAGES = 40 * MIB / PAGE, CALLS = 150, CHILDREN = 3, TRIES = 3 };
/* A round that takes longer hangs, seconds; and how long to make a failing one shorter. */
enum { ROUND_DEADLINE = 60, SHRINKING = 45, TWIN_DEADLINE = 600 };
/* What each round has come to, for the twin: its seed and a digest of all that its processes had in the end. */
#define DIGESTS "random_calls.digests"

enum { AS_EVER, WIPED, LEFT_OUT };

/* A page holds zeros or the pattern of (origin, salt); one word may differ. */
struct model {
	uint32_t salt, patch;
	uint16_t origin;
	uint8_t mapped, prot, on_fork;
	/* MADV_FREE: zeros may be found instead, in one run and not in the other, until it is written. */
	uint8_t given_back;
	/* A hole that others may have mapped something into. */
	uint8_t foreign;
};
enum { PATCHED = 7 };

/* In shared memory, which stays here: the judge must not go far itself. */
static struct model *model;
static char *arena;
static uint64_t lot;
/* Of all processes of the round together. */
static _Atomic uint64_t *digest;
static int tells;
static pid_t children[CHILDREN];

static uint32_t draw(uint32_t below)
{
	lot = lot * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)(lot >> 33) % below;
}

__attribute__((format(printf, 1, 2))) static void tell(const char *what, ...)
{
	if (!tells)
		return;
	va_list list;
	va_start(list, what);
	fprintf(stderr, "%d: %s: ", getpid(), context);
	vfprintf(stderr, what, list);
	fprintf(stderr, "\n");
	va_end(list);
}

static char *at(size_t page) { return arena + page * PAGE; }

static uint64_t expected(const struct model *m, uint64_t index)
{
	if (m->patch && index == PATCHED)
		return word_of(m->origin, m->patch, index);
	return m->salt ? word_of(m->origin, m->salt, index) : 0;
}

static void verify_page(size_t page, const void *bytes)
{
	struct model *m = &model[page];
	const volatile uint64_t *words = bytes;
	if (m->given_back) {
		uint64_t i = 0;
		while (i < WORDS && !words[i])
			i++;
		if (i == WORDS) {
			m->salt = m->patch = 0;
			return;
		}
	}
	for (uint64_t i = 0; i < WORDS; i++)
		if (words[i] != expected(m, i))
			fail("page %zu at %p, word %lu is %016lx instead of %016lx (origin %u salt %u patch %u%s)", page,
			     (const void *)words, i, words[i], expected(m, i), m->origin, m->salt, m->patch,
			     m->given_back ? ", given back" : "");
}

static void verify(size_t from, size_t count)
{
	for (size_t page = from; page < from + count; page++)
		if (model[page].mapped && model[page].prot & PROT_READ)
			verify_page(page, at(page));
}

/* Adds what this process has, as far as it is the same in every run. */
static void add_to_digest(uint64_t salt)
{
	uint64_t sum = salt;
	for (size_t page = 0; page < PAGES; page++) {
		const struct model *m = &model[page];
		sum = sum * 0x100000001b3ull + (uint64_t)(m->mapped + 2 * m->prot + 16 * m->on_fork);
		if (!m->mapped || !(m->prot & PROT_READ) || m->given_back)
			continue;
		const volatile uint64_t *words = (void *)at(page);
		for (uint64_t i = 0; i < WORDS; i++)
			sum = (sum ^ words[i]) * 0x9e3779b97f4a7c15ull + (sum >> 29);
	}
	*digest += sum;
}

/* How many pages from here on, at most so many, are mapped alike. */
static size_t alike(size_t from, size_t count)
{
	size_t n = 1;
	while (n < count && model[from + n].mapped == model[from].mapped && model[from + n].prot == model[from].prot &&
	       model[from + n].on_fork == model[from].on_fork)
		n++;
	return n;
}

static void write_pages(size_t from, size_t count)
{
	for (size_t page = from; page < from + count; page++) {
		struct model *m = &model[page];
		if (!m->mapped || !(m->prot & PROT_WRITE))
			continue;
		m->origin = (uint16_t)page;
		m->salt = draw(4) ? 1 + draw(1u << 30) : 0;
		m->patch = m->given_back = 0;
		if (m->salt)
			fill_page(at(page), page, m->salt);
		else
			memset(at(page), 0, PAGE);
	}
}

static void patch_pages(size_t from, size_t count)
{
	for (size_t page = from; page < from + count; page++) {
		struct model *m = &model[page];
		if (draw(2) || !m->mapped || !(m->prot & PROT_WRITE) || m->given_back)
			continue;
		m->patch = 1 + draw(1u << 30);
		((volatile uint64_t *)at(page))[PATCHED] = word_of(m->origin, m->patch, PATCHED);
	}
}

/* The kernel reads from these pages and writes to them. The file is nobody else's: a child would write over its parent's. */
static void through_file(size_t from, size_t count)
{
	int fd = memfd_create("pages", MFD_CLOEXEC);
	MUST(fd > 0);
	for (size_t page = from; page < from + count && page < from + 32; page++) {
		struct model *m = &model[page];
		char copy[PAGE];
		if (m->mapped && m->prot & PROT_READ) {
			MUST(pwrite(fd, at(page), PAGE, 0) == PAGE && pread(fd, copy, PAGE, 0) == PAGE);
			verify_page(page, copy);
		}
		if (m->mapped && m->prot & PROT_WRITE) {
			fill_page(copy, page, m->salt = 1 + draw(1u << 30));
			m->origin = (uint16_t)page;
			m->patch = m->given_back = 0;
			MUST(pwrite(fd, copy, PAGE, 0) == PAGE && pread(fd, at(page), PAGE, 0) == PAGE);
		}
	}
	close(fd);
}

/* Holes are held by an inaccessible mapping: what is mapped next, by whomever, would come to lie in them. */
static void reserve(size_t from, size_t count)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
	MUST(mmap(at(from), count * PAGE, PROT_NONE, flags, -1, 0) == at(from));
	memset(&model[from], 0, count * sizeof *model);
}

static void unmap(size_t from, size_t count)
{
	MUST(munmap(at(from), count * PAGE) == 0);
	reserve(from, count);
}

/* How many pages from here on, at most so many, are the arena's. */
static size_t own(size_t from, size_t count)
{
	size_t n = 0;
	while (n < count && !model[from + n].foreign)
		n++;
	return n;
}

static void map_anew(size_t from, size_t count, int flags)
{
	flags |= MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	MUST(mmap(at(from), count * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) == at(from));
	for (size_t page = from; page < from + count; page++)
		model[page] = (struct model){.mapped = 1, .prot = PROT_READ | PROT_WRITE};
}

static void protect(size_t from, size_t count, uint8_t prot)
{
	MUST(mprotect(at(from), count * PAGE, prot) == 0);
	for (size_t page = from; page < from + count; page++)
		model[page].prot = prot;
	if (!(prot & PROT_READ))
		MUST(touch_raises(at(from), 0) == SIGSEGV);
	if (!(prot & PROT_WRITE))
		MUST(touch_raises(at(from + count - 1), 1) == SIGSEGV);
}

static void discard(size_t from, size_t count, int advice)
{
	MUST(madvise(at(from), count * PAGE, advice) == 0);
	for (size_t page = from; page < from + count; page++) {
		struct model *m = &model[page];
		if (advice == MADV_FREE)
			m->given_back = 1;
		else
			m->salt = m->patch = m->given_back = 0;
	}
}

/* Whether the kernel has it as one mapping. */
static int is_one_mapping(size_t from, size_t count)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	MUST(maps);
	char line[512];
	int found = 0;
	while (!found && fgets(line, sizeof line, maps)) {
		uintptr_t start, end;
		if (sscanf(line, "%lx-%lx", &start, &end) == 2)
			found = start <= (uintptr_t)at(from) && end >= (uintptr_t)at(from + count);
	}
	fclose(maps);
	return found;
}

/* To a place that is free; one page after the other where the kernel has several mappings in that range. It would move
 * the first ones and then stop at one that is managed. */
static void move(size_t from, size_t count, size_t to, int flags)
{
	if (to + count > PAGES || own(to, count) < count || (to < from + count && from < to + count))
		return;
	unmap(to, count);
	flags |= MREMAP_MAYMOVE | MREMAP_FIXED;
	size_t step = is_one_mapping(from, count) ? count : 1;
	for (size_t i = 0; i < count; i += step)
		if (mremap(at(from + i), step * PAGE, step * PAGE, flags, at(to + i)) == MAP_FAILED)
			fail("mremap of %zu pages from %zu to %zu", step, from + i, to + i);
	memcpy(&model[to], &model[from], count * sizeof *model);
	if (!(flags & MREMAP_DONTUNMAP))
		reserve(from, count);
	for (size_t page = from; page < from + count; page++)
		model[page].salt = model[page].patch = model[page].given_back = 0;
}

static void advise(size_t from, size_t count)
{
	/* COLD, PAGEOUT, POPULATE_READ and POPULATE_WRITE by number. */
	static const int all[] = {20, 21, MADV_WILLNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_SEQUENTIAL, 22, 23};
	int advice = all[draw(8)];
	if ((advice == 22 && !(model[from].prot & PROT_READ)) || (advice == 23 && !(model[from].prot & PROT_WRITE)))
		return;
	if (madvise(at(from), count * PAGE, advice) && errno != EINVAL)
		fail("advice %d for %zu pages from %zu", advice, count, from);
}

static void on_fork(size_t from, size_t count)
{
	static const struct {
		int advice;
		uint8_t then;
	} all[] = {{MADV_WIPEONFORK, WIPED}, {MADV_DONTFORK, LEFT_OUT}};
	/* What wipes and what leaves out are two flags of the kernel's; here one at a time. */
	MUST(madvise(at(from), count * PAGE, MADV_KEEPONFORK) == 0 && madvise(at(from), count * PAGE, MADV_DOFORK) == 0);
	size_t which = draw(3);
	if (which < 2)
		MUST(madvise(at(from), count * PAGE, all[which].advice) == 0);
	for (size_t page = from; page < from + count; page++)
		model[page].on_fork = which < 2 ? all[which].then : AS_EVER;
}

/* Locked pages must stay, and come home for it; not for longer than this, since what is locked cannot be discarded. */
static void lock(size_t from, size_t count)
{
	if (mlock(at(from), count * PAGE) && errno != ENOMEM && errno != EAGAIN && errno != EPERM)
		fail("mlock of %zu pages from %zu", count, from);
	patch_pages(from, count);
	verify(from, count);
	MUST(munlock(at(from), count * PAGE) == 0);
}

/* The same on all kernels for several mappings too, as munmap. */
static void shrink_mapping(size_t from, size_t count, size_t keep)
{
	if (is_one_mapping(from, count))
		MUST(mremap(at(from), count * PAGE, keep * PAGE, 0) == at(from));
	else
		MUST(munmap(at(from + keep), (count - keep) * PAGE) == 0);
	reserve(from + keep, count - keep);
}

static void any_call(int depth);

static void fork_child(int depth)
{
	uint32_t slot = draw(CHILDREN);
	if (children[slot]) {
		wait_for(children[slot], "a child");
		children[slot] = 0;
	}
	if (depth > 2)
		return;
	struct model *theirs = mmap(NULL, PAGES * sizeof *model, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(theirs != MAP_FAILED);
	memcpy(theirs, model, PAGES * sizeof *model);
	uint32_t calls = 2 + draw(8), child_lot = draw(1u << 30);
	tell("fork of a child with %u calls", calls);
	pid_t child = fork();
	MUST(child >= 0);
	if (child) {
		munmap(theirs, PAGES * sizeof *model);
		children[slot] = child;
		return;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	memset(children, 0, sizeof children);
	model = theirs;
	lot = child_lot;
	for (size_t page = 0; page < PAGES; page++) {
		if (model[page].on_fork == WIPED)
			model[page].salt = model[page].patch = model[page].given_back = 0;
		if (model[page].on_fork == LEFT_OUT)
			model[page] = (struct model){.foreign = 1};
	}
	for (uint32_t i = 0; i < calls; i++)
		any_call(depth + 1);
	verify(0, PAGES);
	add_to_digest(child_lot);
	for (int i = 0; i < CHILDREN; i++)
		if (children[i])
			wait_for(children[i], "a child's child");
	_exit(0);
}

static void any_call(int depth)
{
	uint32_t what = draw(22);
	size_t count = 1 + draw(draw(2) ? 32 : 1024), from = draw((uint32_t)(PAGES - count)), to = draw(PAGES);
	uint32_t detail = draw(1u << 20);
	count = own(from, count);
	if (!count)
		return;
	if (what == 19) {
		fork_child(depth);
		return;
	}
	if (what < 6 || what == 18) {
		tell("%s %zu pages from %zu", what < 3 ? "write" : what < 5 ? "patch" : what == 5 ? "verify" : "read and write by the kernel",
		     count, from);
		what < 3 ? write_pages(from, count) : what < 5 ? patch_pages(from, count) : what == 5 ? verify(from, count) : through_file(from, count);
		return;
	}
	if (what == 6 || what == 7) {
		/* Holes stay few: most of what is unmapped is mapped again. */
		tell("%s %zu pages at %zu", what == 6 && detail % 4 == 0 ? "unmap" : "map anew", count, from);
		if (what == 6)
			unmap(from, count);
		if (what == 7 || detail % 4)
			map_anew(from, count, detail % 8 == 1 && count <= 64 ? MAP_POPULATE : 0);
		return;
	}
	for (size_t end = from + count, n; from < end; from += n) {
		n = alike(from, end - from);
		if (!model[from].mapped)
			continue;
		static const uint8_t protections[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE};
		switch (what) {
		case 8:
		case 9:
			tell("protect %zu pages from %zu as %u", n, from, protections[detail % 4]);
			protect(from, n, protections[detail % 4]);
			break;
		case 10:
		case 11:
		case 12:
			tell("%s %zu pages from %zu", what == 12 ? "MADV_FREE" : "MADV_DONTNEED", n, from);
			discard(from, n, what == 12 ? MADV_FREE : MADV_DONTNEED);
			break;
		case 13:
		case 14:
		case 15:
			tell("move %zu pages from %zu to %zu%s", n, from, to, what == 15 ? " and leave the mapping" : "");
			move(from, n, to, what == 15 ? MREMAP_DONTUNMAP : 0);
			/* Another run would go to the same place. */
			return;
		case 16:
			tell("advise %zu pages from %zu", n, from);
			advise(from, n);
			break;
		case 17:
			tell("for children, %zu pages from %zu", n, from);
			on_fork(from, n);
			break;
		case 20:
			n = n < 64 ? n : 64;
			tell("lock %zu pages from %zu", n, from);
			if (model[from].prot & PROT_READ)
				lock(from, n);
			/* Not much at a time. */
			return;
		case 21:
			tell("shrink %zu pages from %zu to %zu", n, from, 1 + detail % n);
			if (1 + detail % n < n)
				shrink_mapping(from, n, 1 + detail % n);
			return;
		}
	}
}

/* The call of each round that goes wrong, where a test says so: to see that it is found. */
static unsigned wrong_call(void)
{
	const char *number = getenv("RANDOM_CALLS_WRONG");
	return number ? (unsigned)atoi(number) : CALLS;
}

static void go_wrong(void)
{
	size_t page = 0;
	while (page < PAGES && !(model[page].mapped && (model[page].prot & PROT_WRITE) && !model[page].given_back))
		page++;
	MUST(page < PAGES);
	((volatile char *)at(page))[9] ^= 1;
}

/* One round: all calls, or those that are kept. Returns what all that there is in the end comes to. */
static uint64_t replay(uint64_t seed, const char *kept)
{
	char keep[CALLS];
	memset(keep, !*kept, sizeof keep);
	if (*kept) {
		FILE *file = fopen(kept, "r");
		MUST(file);
		for (unsigned number; fscanf(file, "%u", &number) == 1;)
			keep[number % CALLS] = 1;
		fclose(file);
	}
	model = mmap(NULL, PAGES * sizeof *model, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(model != MAP_FAILED);
	digest = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(digest != MAP_FAILED);
	arena = map(PAGES * PAGE);
	lot = seed;
	map_anew(0, PAGES, 0);
	write_pages(0, PAGES);
	static char name[32];
	context = name;
	for (unsigned i = 0; i < CALLS; i++) {
		/* Each has lots of its own, so that what is left out changes nothing else. */
		lot = seed * 1000003 + i * 7919ull;
		draw(2);
		sprintf(name, "call %u", i);
		if (keep[i])
			any_call(0);
		if (keep[i] && i == wrong_call())
			go_wrong();
		if (i % 16 == 15)
			verify(0, PAGES);
	}
	verify(0, PAGES);
	add_to_digest(seed);
	for (int i = 0; i < CHILDREN; i++)
		if (children[i])
			wait_for(children[i], "a child");
	return *digest;
}

/* Where nothing may be written there is no twin either. */
static void note_digest(uint64_t seed, uint64_t digest)
{
	FILE *file = fopen(DIGESTS, "a");
	if (!file && (errno == EACCES || errno == EROFS))
		return;
	MUST(file && fprintf(file, "%lu %lu\n", seed, digest) > 0 && fclose(file) == 0);
}

/* Runs the rounds of the file again: not under farpage, where this shows anything. */
static void twin(void)
{
	FILE *file = fopen(DIGESTS, "r");
	MUST(file);
	time_t until = time(NULL) + patience(TWIN_DEADLINE);
	uint64_t seed, other, rounds = 0;
	while (fscanf(file, "%lu %lu", &seed, &other) == 2 && time(NULL) < until) {
		pid_t pid = fork();
		MUST(pid >= 0);
		if (!pid) {
			uint64_t own = replay(seed, "");
			if (own != other)
				fail("seed %lu: the round came to %016lx, and here to %016lx", seed, other, own);
			_exit(0);
		}
		wait_for(pid, "a round");
		rounds++;
	}
	fclose(file);
	MUST(rounds > 0);
	fprintf(stderr, "%lu rounds came to the same in plain memory\n", rounds);
}

enum voice { SILENT, TELLS_WHY, TELLS_ALL };

/* Tells what each process of a round that hangs is at: its state, its processor time in ticks, where it waits in the kernel. */
static void tell_where(pid_t group)
{
	DIR *processes = opendir("/proc");
	MUST(processes);
	for (struct dirent *entry; (entry = readdir(processes));) {
		char path[300], waits[64] = "";
		int pid, in;
		char state;
		unsigned long user, kernel;
		sprintf(path, "/proc/%s/stat", entry->d_name);
		FILE *file = fopen(path, "r");
		if (!file)
			continue;
		int found = fscanf(file, "%d (%*[^)]) %c %*d %d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &pid, &state, &in, &user, &kernel);
		fclose(file);
		if (found != 5 || in != group)
			continue;
		sprintf(path, "/proc/%d/wchan", pid);
		if ((file = fopen(path, "r"))) {
			if (!fgets(waits, sizeof waits, file))
				*waits = 0;
			fclose(file);
		}
		fprintf(stderr, "process %d is %c after %lu + %lu ticks, in %s\n", pid, state, user, kernel, waits);
	}
	closedir(processes);
}

/* Whether a round fails. */
static int fails(const char *self, uint64_t seed, const char *kept, enum voice voice)
{
	char number[32];
	sprintf(number, "%lu", seed);
	pid_t pid = fork();
	MUST(pid >= 0);
	if (!pid) {
		setpgid(0, 0);
		if (voice == SILENT)
			MUST(dup2(open("/dev/null", O_WRONLY), 2) == 2);
		execl(self, self, voice == TELLS_ALL ? "replay" : "judge", number, kept, NULL);
		_exit(2);
	}
	time_t until = time(NULL) + patience(ROUND_DEADLINE);
	int status;
	while (waitpid(pid, &status, WNOHANG) == 0) {
		if (time(NULL) > until) {
			if (voice != SILENT)
				tell_where(pid);
			kill(-pid, SIGKILL);
			kill(pid, SIGKILL);
			MUST(waitpid(pid, &status, 0) == pid);
			fprintf(stderr, "seed %lu: it hangs\n", seed);
			return 1;
		}
		usleep(2000);
	}
	return status != 0;
}

static void write_kept(const char *path, const char *keep)
{
	FILE *file = fopen(path, "w");
	MUST(file);
	for (int i = 0; i < CALLS; i++)
		if (keep[i])
			fprintf(file, "%d\n", i);
	/* So that none at all is not taken for all. */
	fprintf(file, "\n");
	MUST(fclose(file) == 0);
}

/* Leaves calls out, many at once and then fewer, for as long as what is left fails. */
static void shrink(const char *self, uint64_t seed)
{
	char keep[CALLS], path[64];
	memset(keep, 1, sizeof keep);
	sprintf(path, "random_calls.%lu", seed);
	time_t until = time(NULL) + patience(SHRINKING);
	for (int size = CALLS / 2; size > 0 && time(NULL) < until; size /= 2)
		for (int from = 0; from < CALLS && time(NULL) < until; from += size) {
			char fewer[CALLS];
			memcpy(fewer, keep, sizeof keep);
			memset(fewer + from, 0, (size_t)(from + size > CALLS ? CALLS - from : size));
			if (!memcmp(fewer, keep, sizeof keep))
				continue;
			write_kept(path, fewer);
			for (int try = 0; try < TRIES; try++)
				if (fails(self, seed, path, SILENT)) {
					memcpy(keep, fewer, sizeof keep);
					break;
				}
		}
	write_kept(path, keep);
	fprintf(stderr, "seed %lu fails with only the calls below, at times; again: random_calls replay %lu %s, with these lines in it:", seed,
		seed, path);
	for (int i = 0; i < CALLS; i++)
		if (keep[i])
			fprintf(stderr, " %d", i);
	fprintf(stderr, "\n");
	for (int try = 0; try < TRIES && !fails(self, seed, path, TELLS_ALL); try++)
		;
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "twin")) {
		twin();
		return 0;
	}
	MUST(argc >= 3);
	if (strcmp(argv[1], "run")) {
		tells = !strcmp(argv[1], "replay");
		uint64_t seed = strtoull(argv[2], NULL, 0), digest = replay(seed, argc > 3 ? argv[3] : "");
		if (argc == 3 || !*argv[3])
			note_digest(seed, digest);
		return 0;
	}
	MUST(argc == 4);
	unlink(DIGESTS);
	time_t until = time(NULL) + atoi(argv[2]);
	uint64_t seed = strtoull(argv[3], NULL, 0) * 100000, first = seed;
	for (; time(NULL) < until; seed++)
		if (fails("/proc/self/exe", seed, "", TELLS_WHY)) {
			fprintf(stderr, "seed %lu fails, after %lu rounds that did not\n", seed, seed - first);
			shrink("/proc/self/exe", seed);
			return 1;
		}
	fprintf(stderr, "%lu rounds of %d calls from seed %lu on\n", seed - first, CALLS, first);
	return 0;
}
