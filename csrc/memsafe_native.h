/*
 * What Python cannot reach: the allocator and prctl(2).
 *
 * This header is also the cffi declaration: build_native.py reads it without its preprocessor lines, so it holds
 * plain prototypes only. Every function returns 0 or a positive value, or -errno; -ENOSYS means that the platform
 * has no such call. Nothing here allocates, keeps state, or needs the GIL.
 */
#ifndef MEMSAFE_NATIVE_H
#define MEMSAFE_NATIVE_H

#include <stdint.h>

/*
 * Gives free heap pages back to the kernel; returns how many bytes that was, by the resident anonymous memory of
 * this process before and after. What other threads allocate meanwhile is counted against it; never below 0.
 * Also 0 where the amount cannot be read (no /proc). -ENOSYS with a C library other than glibc and macOS's.
 */
int64_t ms_release_heap_bytes(void);

/*
 * The kernel sends signum to this process when the thread that is its parent ends; 0 sends nothing any more.
 * Cleared by fork. A parent that has ended before the call is not noticed: compare getppid() afterwards.
 */
int ms_set_parent_death_signal(int signum);

/* While on, orphaned descendants become children of this process instead of init's. Not inherited by fork. */
int ms_set_child_subreaper(int on);

/* 1 when this process adopts orphaned descendants, 0 when not. */
int ms_get_child_subreaper(void);

#endif
