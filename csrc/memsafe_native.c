#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* O_CLOEXEC and malloc_trim under -std=c99 */
#endif

#include "memsafe_native.h"

#include <errno.h>
#include <stdlib.h> /* also defines __GLIBC__, where it is one */

#if defined(__GLIBC__)
#include <malloc.h>
#elif defined(__APPLE__)
#include <malloc/malloc.h>
#endif

#if defined(__linux__)
#include <fcntl.h>
#include <sys/prctl.h>
#include <unistd.h>
#endif

#if defined(__linux__) && defined(__GLIBC__)

/*
 * Resident minus file-backed and shared memory, or -errno. Reads into the stack: stdio would allocate a buffer from
 * the heap that is being measured. The kernel may keep some tens of pages per CPU uncounted; smaps_rollup is exact,
 * but walks the page tables: about 10 ms per GB, twice.
 */
static int64_t resident_anonymous_bytes(void)
{
    char text[256];
    ssize_t length;
    int saved_errno;
    int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return -errno;
    do
        length = read(fd, text, sizeof text - 1);
    while (length < 0 && errno == EINTR);
    saved_errno = errno;
    close(fd);
    if (length < 0)
        return -saved_errno;
    text[length] = '\0';

    char *at = text;
    strtoull(at, &at, 10); /* address space */
    int64_t resident_pages = (int64_t)strtoull(at, &at, 10);
    int64_t shared_pages = (int64_t)strtoull(at, &at, 10);
    return (resident_pages - shared_pages) * sysconf(_SC_PAGESIZE);
}

int64_t ms_release_heap_bytes(void)
{
    int64_t before_bytes = resident_anonymous_bytes();
    malloc_trim(0);
    int64_t after_bytes = resident_anonymous_bytes();

    if (before_bytes < 0 || after_bytes < 0 || after_bytes > before_bytes)
        return 0;
    return before_bytes - after_bytes;
}

#elif defined(__APPLE__)

int64_t ms_release_heap_bytes(void)
{
    /* NULL: every zone; 0: as much as there is. */
    return (int64_t)malloc_zone_pressure_relief(NULL, 0);
}

#else

int64_t ms_release_heap_bytes(void)
{
    return -ENOSYS;
}

#endif

#if defined(__linux__)

/* prctl reads unsigned longs: the casts keep a 32 bit int from leaving the upper half undefined. */

int ms_set_parent_death_signal(int signum)
{
    return prctl(PR_SET_PDEATHSIG, (unsigned long)signum, 0UL, 0UL, 0UL) < 0 ? -errno : 0;
}

int ms_set_child_subreaper(int on)
{
    return prctl(PR_SET_CHILD_SUBREAPER, (unsigned long)(on != 0), 0UL, 0UL, 0UL) < 0 ? -errno : 0;
}

int ms_get_child_subreaper(void)
{
    int on = 0;
    return prctl(PR_GET_CHILD_SUBREAPER, (unsigned long)&on, 0UL, 0UL, 0UL) < 0 ? -errno : on;
}

#else

int ms_set_parent_death_signal(int signum)
{
    (void)signum;
    return -ENOSYS;
}

int ms_set_child_subreaper(int on)
{
    (void)on;
    return -ENOSYS;
}

int ms_get_child_subreaper(void)
{
    return -ENOSYS;
}

#endif
