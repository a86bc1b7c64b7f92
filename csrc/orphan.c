/* A fork whose child is an orphan from the start: whoever adopts orphans is its parent. */

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* vfork under -std=c99 */
#endif

#include "memsafe_native.h"

#include <errno.h>

#if defined(__linux__)

#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * Two forks would copy the page tables twice, tear one copy down again, and have both this process and the one in
 * between copy each page that it writes to after: 8 ms for a process of 80 MB. vfork lends the process in between
 * this one's memory, and holds this one up until it is gone. What it calls is safe on lent memory: fork changes the
 * caller's memory by nothing but what atfork handlers do, which run as they would here.
 *
 * CLONE_PARENT would make the child a sibling at once, but only clone(2) has it, and that calls no atfork handlers
 * and leaves the C library's idea of its thread behind.
 */
int64_t ms_fork_orphan(void (*before)(void), void (*in_parent)(void), void (*in_orphan)(void), int64_t *midwife)
{
    volatile int64_t result = 0;
    int status = 0;

    before();
    pid_t pid = vfork();
    if (pid == 0) {
        /* If this process is killed while the other one is stopped, nobody would be left to let that go on. */
        prctl(PR_SET_PDEATHSIG, (unsigned long)SIGKILL, 0UL, 0UL, 0UL);
        *midwife = getpid();
        pid_t orphan = fork();
        if (orphan == 0) {
            in_orphan();
            return 0;
        }
        result = orphan < 0 ? -errno : orphan;
        _exit(0);
    }
    if (pid < 0)
        result = -errno;
    else
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            ;
    /* Killed in the middle of a fork: locks in our memory may be held for ever. */
    if (WIFSIGNALED(status))
        _exit(EXIT_FAILURE);
    in_parent();
    return result;
}

#else

int64_t ms_fork_orphan(void (*before)(void), void (*in_parent)(void), void (*in_orphan)(void), int64_t *midwife)
{
    (void)before, (void)in_parent, (void)in_orphan, (void)midwife;
    return -ENOSYS;
}

#endif
