/* A pool for the large tensors of the CPU: pages are used again, and no more of them are kept than was said.

   torch asks the C library for the memory of tensors. Either it is given back when a tensor goes, and every new tensor costs the
   system a fault for each page; or it is kept, and gaps between tensors make the process hold up to half as much again. Here both
   are avoided, as addresses cost nothing: where no gap is long enough, a tensor gets addresses that have no pages yet, and as many
   pages of other gaps are given back as would be too many. What is held is therefore what was live at most, to the page, while
   nearly all memory is used again without a fault.

   `frugan_pool_begin` has libc10 call this instead of `posix_memalign` and `free`, by the table through which it calls them. */

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__)
#define IS_CALL(type) ((type) == R_X86_64_JUMP_SLOT || (type) == R_X86_64_GLOB_DAT)
#else
#define IS_CALL(type) ((type) == R_AARCH64_JUMP_SLOT || (type) == R_AARCH64_GLOB_DAT)
#endif

#define LEAST (64UL << 10) /* bytes from which a tensor is large */
#define SPANS 65536        /* at most; thousands are many */

/* Neighbouring pages that are in the same state: of a tensor; free, and kept; or addresses without pages. */
typedef enum { USED, KEPT, BARE } State;
typedef struct {
    uint32_t begin, pages;
    State state;
} Span;

static Span spans[SPANS]; /* in the order of addresses, without gaps; neighbours that are KEPT, or BARE, are joined */
static size_t count;
static char *base; /* of all addresses */
static size_t page, room, end; /* bytes of a page; pages of addresses there are, and of those that belong to a span */
static size_t held, used, limit = SIZE_MAX; /* pages: USED and KEPT; USED; what `held` should not exceed */
static int active;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void insert(size_t i, Span span) {
    memmove(spans + i + 1, spans + i, (count++ - i) * sizeof(Span));
    spans[i] = span;
}

static void erase(size_t i) { memmove(spans + i, spans + i + 1, (--count - i) * sizeof(Span)); }

/* Has span i end after `pages`; the rest follows it. */
static void cut(size_t i, uint32_t pages) {
    if (spans[i].pages == pages) return;
    insert(i + 1, (Span){spans[i].begin + pages, spans[i].pages - pages, spans[i].state});
    spans[i].pages = pages;
}

/* Joins span i, which is not USED, with neighbours of its state. */
static void join(size_t i) {
    if (i + 1 < count && spans[i + 1].state == spans[i].state) {
        spans[i].pages += spans[i + 1].pages;
        erase(i + 1);
    }
    if (i && spans[i - 1].state == spans[i].state) {
        spans[i - 1].pages += spans[i].pages;
        erase(i);
    }
}

/* The span that `at` lies in, which is below `end`. */
static size_t find(uint32_t at) {
    size_t low = 0, high = count;
    while (low + 1 < high) {
        size_t middle = (low + high) / 2;
        if (spans[middle].begin <= at) low = middle;
        else high = middle;
    }
    return low;
}

/* Gives back `pages` of KEPT spans outside [from, to), the longest first; as many as there are. */
static size_t give_back(size_t pages, uint32_t from, uint32_t to) {
    size_t given = 0;
    while (given < pages && count + 2 < SPANS) {
        size_t longest = count;
        for (size_t i = 0; i < count; i++) {
            if (spans[i].state != KEPT || (spans[i].begin < to && spans[i].begin + spans[i].pages > from)) continue;
            if (longest == count || spans[i].pages > spans[longest].pages) longest = i;
        }
        if (longest == count) break;
        if (spans[longest].pages > pages - given) cut(longest, pages - given);
        Span *gone = &spans[longest];
        char *where = base + gone->begin * page;
        if (madvise(where, gone->pages * page, MADV_DONTNEED) || mprotect(where, gone->pages * page, PROT_NONE)) break;
        gone->state = BARE;
        held -= gone->pages;
        given += gone->pages;
        join(longest);
    }
    return given;
}

/* Where `pages` fit: the place that needs the fewest new ones, and of those the shortest; `fresh` says how many. */
static uint32_t place(uint32_t pages, size_t *fresh) {
    uint32_t where = end;
    size_t shortest = SIZE_MAX;
    *fresh = pages;
    for (size_t i = 0; i < count; i++) {
        if (spans[i].state == USED) continue;
        size_t got = 0, bare = 0, j = i;
        for (; got < pages && j < count && spans[j].state != USED; j++) {
            size_t part = spans[j].pages < pages - got ? spans[j].pages : pages - got;
            if (spans[j].state == BARE) bare += part;
            got += part;
        }
        if (got < pages && j < count) continue;
        bare += pages - got; /* beyond the end */
        if (bare < *fresh || (bare == *fresh && spans[i].pages < shortest)) {
            where = spans[i].begin;
            shortest = spans[i].pages;
            *fresh = bare;
        }
    }
    return where;
}

/* Gives what is BARE in [from, from + pages) pages; whether the system allows it. Its spans end where the range does. */
static int furnish(uint32_t from, uint32_t pages) {
    size_t i = find(from);
    if (spans[i].begin < from) cut(i++, from - spans[i].begin);
    for (uint32_t done = 0; done < pages; done += spans[i++].pages) {
        if (spans[i].pages > pages - done) cut(i, pages - done);
        if (spans[i].state != BARE) continue;
        if (mprotect(base + spans[i].begin * page, spans[i].pages * page, PROT_READ | PROT_WRITE)) return 0;
        spans[i].state = KEPT;
        held += spans[i].pages;
    }
    return 1;
}

/* Memory for a tensor, or NULL. */
static void *take(size_t bytes) {
    if (bytes > (room - end) * page || count + 8 > SPANS) return NULL;
    uint32_t pages = (bytes + page - 1) / page;
    size_t fresh;
    uint32_t from = place(pages, &fresh);
    if (from + (size_t)pages > room) return NULL;
    if (fresh && held + fresh > limit) give_back(held + fresh - limit, from, from + pages);
    if (from + pages > end) {
        insert(count, (Span){end, from + pages - end, BARE});
        end = from + pages;
        join(count - 1);
    }
    if (!furnish(from, pages)) { /* a limit of the system: what is free elsewhere may do */
        give_back(pages, from, from + pages);
        if (!furnish(from, pages)) {
            give_back(held - used, 0, 0); /* what was got, too: others may need it now */
            return NULL;
        }
    }
    size_t i = find(from);
    while (spans[i].pages < pages) {
        spans[i].pages += spans[i + 1].pages;
        erase(i + 1);
    }
    spans[i].state = USED;
    used += pages;
    return base + from * page;
}

static int allocate(void **memory, size_t alignment, size_t bytes) {
    void *taken = NULL;
    if (active && bytes >= LEAST && alignment <= page) {
        pthread_mutex_lock(&lock);
        taken = take(bytes);
        pthread_mutex_unlock(&lock);
    }
    if (!taken) return posix_memalign(memory, alignment, bytes);
    *memory = taken;
    return 0;
}

static void release(void *memory) {
    if (!base || (char *)memory < base || (char *)memory >= base + room * page) {
        free(memory);
        return;
    }
    int error = errno; /* as free() does */
    pthread_mutex_lock(&lock);
    size_t i = find(((char *)memory - base) / page);
    spans[i].state = KEPT;
    used -= spans[i].pages;
    join(i);
    if (held > limit) give_back(held - limit, 0, 0);
    pthread_mutex_unlock(&lock);
    errno = error;
}

/* Has a library of torch's core call `allocate` and `release`; counts in `data` the calls of each that it found. */
static int divert(struct dl_phdr_info *library, size_t size, void *data) {
    (void)size;
    const char *name = strrchr(library->dlpi_name, '/');
    if (strncmp(name ? name + 1 : library->dlpi_name, "libc10", 6)) return 0;
    const ElfW(Dyn) *entry = NULL;
    for (int i = 0; i < library->dlpi_phnum; i++)
        if (library->dlpi_phdr[i].p_type == PT_DYNAMIC) entry = (void *)(library->dlpi_addr + library->dlpi_phdr[i].p_vaddr);
    const ElfW(Rela) *tables[2] = {NULL, NULL};
    size_t bytes[2] = {0, 0};
    const ElfW(Sym) *symbols = NULL;
    const char *names = NULL;
    for (; entry && entry->d_tag != DT_NULL; entry++) {
        void *there = (void *)entry->d_un.d_ptr; /* glibc has made it an address */
        if (entry->d_tag == DT_JMPREL) tables[0] = there;
        if (entry->d_tag == DT_PLTRELSZ) bytes[0] = entry->d_un.d_val;
        if (entry->d_tag == DT_RELA) tables[1] = there;
        if (entry->d_tag == DT_RELASZ) bytes[1] = entry->d_un.d_val;
        if (entry->d_tag == DT_SYMTAB) symbols = there;
        if (entry->d_tag == DT_STRTAB) names = there;
    }
    if (!symbols || !names) return 0;
    for (int t = 0; t < 2; t++)
        for (size_t i = 0; tables[t] && i < bytes[t] / sizeof(ElfW(Rela)); i++) {
            const ElfW(Rela) *call = &tables[t][i];
            if (!IS_CALL(ELF64_R_TYPE(call->r_info))) continue;
            const char *called = names + symbols[ELF64_R_SYM(call->r_info)].st_name;
            int frees = !strcmp(called, "free");
            if (!frees && strcmp(called, "posix_memalign")) continue;
            void **slot = (void **)(library->dlpi_addr + call->r_offset);
            void *begin = (void *)((uintptr_t)slot & ~(page - 1));
            if (mprotect(begin, page, PROT_READ | PROT_WRITE)) continue;
            *slot = frees ? (void *)release : (void *)allocate;
            ((int *)data)[frees]++;
        }
    return 0;
}

static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }

/* From now on large tensors come from the pool, within `addresses` bytes of them; whether that could be done. */
int frugan_pool_begin(size_t addresses) {
    static int found[2]; /* calls that allocate, and that free */
    if (!base) {
        page = sysconf(_SC_PAGESIZE);
        void *got = mmap(NULL, addresses, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (got == MAP_FAILED) return 0;
        room = addresses / page;
        base = got;
        dl_iterate_phdr(divert, found);
        pthread_atfork(before_fork, after_fork, after_fork);
    }
    active = found[0] && found[1];
    return active;
}

/* New tensors come from the C library again; those of the pool stay until they are freed. */
void frugan_pool_end(void) { active = 0; }

/* Keeps no free pages beyond `bytes`, those of tensors counted. */
void frugan_pool_limit(size_t bytes) {
    pthread_mutex_lock(&lock);
    limit = page ? bytes / page : SIZE_MAX;
    if (held > limit) give_back(held - limit, 0, 0);
    pthread_mutex_unlock(&lock);
}

/* Gives all free pages back. */
void frugan_pool_trim(void) {
    pthread_mutex_lock(&lock);
    give_back(held - used, 0, 0);
    pthread_mutex_unlock(&lock);
}

/* Bytes of tensors, and with what is free. */
void frugan_pool_state(size_t *state) {
    pthread_mutex_lock(&lock);
    state[0] = used * page;
    state[1] = held * page;
    pthread_mutex_unlock(&lock);
}
#else
int frugan_pool_begin(unsigned long addresses) { return (void)addresses, 0; }
#endif
