/*
 * What Python cannot reach, or not cheaply: the allocator, the memory of this process, prctl(2).
 *
 * This header is also the cffi declaration: build_native.py reads it without its preprocessor lines, so it holds
 * plain declarations only. Every function returns 0 or a positive value, or -errno; -ENOSYS means that the platform
 * has no such call. Any thread may call them, and a process made by fork starts with what it needs. Not for signal
 * handlers. But for ms_fork_orphan none of them uses the heap (finding the allocator may once, inside dlsym) or needs
 * the GIL.
 *
 * State is kept in two places: which allocator there is (allocator.c), and descriptors of files in /proc (process.c).
 * Times in the comments are of one core of a 2-core virtual machine: Linux 6.18, glibc 2.36.
 */
#ifndef MEMSAFE_NATIVE_H
#define MEMSAFE_NATIVE_H

#include <stdint.h>

/* Allocator */

/* Whose malloc(3) this process uses. UNKNOWN also stands for those that cannot be recognized. */
enum {
    MS_ALLOCATOR_UNKNOWN,
    MS_ALLOCATOR_GLIBC,
    MS_ALLOCATOR_MUSL,
    MS_ALLOCATOR_JEMALLOC,
    MS_ALLOCATOR_MIMALLOC,
    MS_ALLOCATOR_TCMALLOC,
    MS_ALLOCATOR_MACOS
};

/* One of MS_ALLOCATOR_*. A library that is loaded but does not serve malloc does not count. 65 us, then 2 ns. */
int ms_allocator(void);

/*
 * Gives free heap pages back to the kernel; returns how many bytes that was, by the resident anonymous memory of
 * this process before and after. What other threads allocate meanwhile is counted against it; never below 0.
 * Also 0 where the amount cannot be read (no /proc). -ENOSYS with musl and with an unknown allocator.
 */
int64_t ms_release_heap_bytes(void);

/* Memory of this process; Linux only, but for the peak */

/*
 * Resident memory, and what of it is neither file-backed nor shared memory: heap, stacks, private mappings, also those
 * that a fork shares copy-on-write. Both from one reading of statm: 1 us.
 */
int ms_own_memory_bytes(int64_t *resident_bytes, int64_t *anonymous_bytes);

/*
 * The highest resident memory since the last ms_reset_peak, else since exec or fork. On Linux it is exact but for what
 * the kernel has not added up yet, on each CPU that the process ran on: up to 32 pages (or twice the number of CPUs, if
 * that is more) of anonymous, of file-backed and of shared memory. 0.6 MB was the most seen with 2 CPUs.
 * 0.4 us, or 4 us: see the code. macOS: since exec.
 */
int64_t ms_peak_resident_bytes(void);

/* The peak is the present resident memory from now on. 0.8 us. -EACCES if this process is not dumpable (setuid). */
int ms_reset_peak(void);

/* All in one call, for what is asked at the end of each task: resident and anonymous bytes, peak, minor page faults. */
int ms_measure(int64_t numbers[4]);

/*
 * Adds to this process's oom_score_adj, up to 1000, so that the kernel's out-of-memory killer prefers it; returns by
 * how much it was raised, 0 if it was 1000 already. Needs no privileges. Children made later inherit it: add once.
 * -EINVAL: by is negative. 3 us.
 */
int ms_raise_oom_score_adj(int by);

/* prctl(2); Linux only */

/*
 * The kernel sends signum to this process when the thread that is its parent ends; 0 sends nothing any more.
 * Cleared by fork. A parent that has ended before the call is not noticed: compare getppid() afterwards.
 */
int ms_set_parent_death_signal(int signum);

/* While on, orphaned descendants become children of this process instead of init's. Not inherited by fork. */
int ms_set_child_subreaper(int on);

/* 1 when this process adopts orphaned descendants, 0 when not. */
int ms_get_child_subreaper(void);

/* A new process; Linux only */

/*
 * Forks a process that belongs to whoever adopts orphans. Returns 0 in that process, and its pid here, when its parent
 * has ended. midwife: the pid of that parent, which the orphan may still see for a moment. If the parent is killed,
 * this process exits with 1: the two share their memory. Only for a process with one thread.
 *
 * before is called first, then in_parent here and in_orphan there: fork hooks of an interpreter, whose lock is held
 * all the time.
 */
int64_t ms_fork_orphan(void (*before)(void), void (*in_parent)(void), void (*in_orphan)(void), int64_t *midwife);

#endif
