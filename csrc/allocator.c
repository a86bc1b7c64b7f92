/* The allocator: whose it is, what it holds free, giving that back. */

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* RTLD_DEFAULT, dladdr and malloc_trim under -std=c99 */
#endif

#include "memsafe_native.h"

#include <errno.h>

#if defined(__linux__)

#include <dlfcn.h>
#include <stdbool.h>
#include <stdlib.h> /* also defines __GLIBC__, where it is one */
#include <string.h>

#if defined(__GLIBC__)
#include <malloc.h>
/* Functions that only the C library has. */
#define C_LIBRARY_FUNCTION "gnu_get_libc_version"
#define C_LIBRARY_ALLOCATOR MS_ALLOCATOR_GLIBC
#else
#define C_LIBRARY_FUNCTION "__libc_start_main"
#define C_LIBRARY_ALLOCATOR MS_ALLOCATOR_MUSL
#endif

/* jemalloc 5: MALLCTL_ARENAS_ALL is 4096. */
#define ALL_ARENAS "4096"

/* The functions of the allocator, found once and kept; null where it has none. */
static int (*jemalloc_mallctl)(const char *, void *, size_t *, void *, size_t);
static void (*mimalloc_collect)(bool);
static void (*tcmalloc_release)(void);
static void (*tcmalloc_leave_thread_cache)(void);

/* Nothing is linked: a library that is not there is a null pointer. memcpy, since C99 cannot cast to a function. */
static void find(const char *name, void *function)
{
    void *address = dlsym(RTLD_DEFAULT, name);
    memcpy(function, &address, sizeof address);
}

/* The address at which the object that provides this function begins, or NULL. */
static const void *provider(const char *name)
{
    Dl_info found;
    void *address = dlsym(RTLD_DEFAULT, name);

    return address != NULL && dladdr(address, &found) != 0 ? found.dli_fbase : NULL;
}

/*
 * Compares who provides malloc with who provides the names of each allocator: a package may bring a jemalloc for
 * itself. malloc_usable_size stands for malloc. It has to come with it, and nobody takes its address; in a program
 * that is not position-independent and does so, malloc would be the program's own stub. Names with a prefix, such as
 * je_mallctl, are not looked for: a library built with them does not replace malloc.
 */
static int find_allocator(void)
{
    const void *allocator = provider("malloc_usable_size");

    if (allocator == NULL)
        return MS_ALLOCATOR_UNKNOWN;
    if (allocator == provider(C_LIBRARY_FUNCTION))
        return C_LIBRARY_ALLOCATOR;
    if (allocator == provider("mallctl")) {
        find("mallctl", &jemalloc_mallctl);
        return MS_ALLOCATOR_JEMALLOC;
    }
    if (allocator == provider("mi_collect")) {
        find("mi_collect", &mimalloc_collect);
        return MS_ALLOCATOR_MIMALLOC;
    }
    if (allocator == provider("MallocExtension_ReleaseFreeMemory")) {
        find("MallocExtension_ReleaseFreeMemory", &tcmalloc_release);
        find("MallocExtension_MarkThreadTemporarilyIdle", &tcmalloc_leave_thread_cache);
        return MS_ALLOCATOR_TCMALLOC;
    }
    return MS_ALLOCATOR_UNKNOWN;
}

int ms_allocator(void)
{
    static int kept = -1;
    int allocator = __atomic_load_n(&kept, __ATOMIC_ACQUIRE);

    /* Who provides malloc does not change while a process lives. Two threads at once find the same. */
    if (allocator < 0) {
        allocator = find_allocator();
        __atomic_store_n(&kept, allocator, __ATOMIC_RELEASE);
    }
    return allocator;
}

/* Its errors are positive. What has no value to get takes NULL and 0, as what has none to set. */
static int jemalloc_do(const char *name)
{
    return -jemalloc_mallctl(name, NULL, NULL, NULL, 0);
}

static int release_heap(void)
{
    switch (ms_allocator()) {
#if defined(__GLIBC__)
    case MS_ALLOCATOR_GLIBC:
        malloc_trim(0);
        return 0;
#endif
    case MS_ALLOCATOR_JEMALLOC:
        /* Fails if thread caches are off, which is as good. Those of other threads cannot be reached. */
        jemalloc_do("thread.tcache.flush");
        return jemalloc_do("arena." ALL_ARENAS ".purge");
    case MS_ALLOCATOR_MIMALLOC:
        /* 2.0.9 keeps each segment of 32 MB in which a block survives: of 395 MB, one survivor kept 36, 60 all. */
        mimalloc_collect(true);
        return 0;
    case MS_ALLOCATOR_TCMALLOC:
        if (tcmalloc_leave_thread_cache != NULL)
            tcmalloc_leave_thread_cache();
        tcmalloc_release();
        return 0;
    default:
        return -ENOSYS;
    }
}

/* Or -errno. */
static int64_t anonymous_memory(void)
{
    int64_t resident_bytes, anonymous_bytes;
    int result = ms_own_memory_bytes(&resident_bytes, &anonymous_bytes);

    return result < 0 ? result : anonymous_bytes;
}

int64_t ms_release_heap_bytes(void)
{
    int64_t before_bytes = anonymous_memory();
    int result = release_heap();
    int64_t after_bytes = anonymous_memory();

    if (result < 0)
        return result;
    if (before_bytes < 0 || after_bytes < 0 || after_bytes > before_bytes)
        return 0;
    return before_bytes - after_bytes;
}

#else

#if defined(__APPLE__)
#include <malloc/malloc.h>
#endif

int ms_allocator(void)
{
#if defined(__APPLE__)
    return MS_ALLOCATOR_MACOS;
#else
    return MS_ALLOCATOR_UNKNOWN;
#endif
}

int64_t ms_release_heap_bytes(void)
{
#if defined(__APPLE__)
    /* NULL: every zone; 0: as much as there is. */
    return (int64_t)malloc_zone_pressure_relief(NULL, 0);
#else
    return -ENOSYS;
#endif
}

#endif
