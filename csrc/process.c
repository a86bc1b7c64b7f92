/* This process: its memory by /proc, its place in the kernel's out-of-memory order, prctl(2). */

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* F_DUPFD_CLOEXEC and pread under -std=c99 */
#endif

#include "memsafe_native.h"

#include <errno.h>

#if defined(__linux__) || defined(__APPLE__)
#include <sys/resource.h>
#endif

#if defined(__linux__)

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

/*
 * A file of /proc/self that stays open: opening and closing statm takes 3 us, reading it 1 us.
 *
 * What is open names the process that opened it: after a fork, the parent. So the pid is kept with it. And the
 * number may be closed or put to another use at any time by code that is not ours (os.closerange, a daemon library,
 * the /dev/null that the forkserver puts over descriptors), so before writing fstat says whether it still is the same
 * file. Between that and the use there is a gap; whoever replaces other people's descriptors in one thread while
 * another thread runs can hit it. What is read is looked at instead, and fstat called when it makes no sense: in a
 * process that has done other things meanwhile each call costs some 5 us, not the 0.2 us of a loop.
 */
struct proc_file {
    const char *path;
    int flags;
    int descriptor;
    pid_t pid;
    dev_t device;
    ino_t inode;
    pid_t holder; /* 0, or the process of which one thread uses this record */
};

static struct proc_file statm = {"/proc/self/statm", O_RDONLY, -1, 0, 0, 0, 0};
static struct proc_file status = {"/proc/self/status", O_RDONLY, -1, 0, 0, 0, 0};
static struct proc_file clear_refs = {"/proc/self/clear_refs", O_WRONLY, -1, 0, 0, 0, 0};

/* Above the numbers that programs expect for themselves, and those that systemd passes from 3 on. */
#define LOWEST_DESCRIPTOR 64

static int open_file(const struct proc_file *file)
{
    int low = open(file->path, file->flags | O_CLOEXEC);

    if (low < 0)
        return -errno;
    int high = fcntl(low, F_DUPFD_CLOEXEC, LOWEST_DESCRIPTOR);
    if (high < 0) {
        /* No room up there (RLIMIT_NOFILE): where it is will do, unless somebody may write to it as stdout. */
        if (low > STDERR_FILENO)
            return low;
        high = fcntl(low, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    }
    int saved_errno = errno;
    close(low);
    return high < 0 ? -saved_errno : high;
}

/* 1 if this thread may use the record, 0 if another one does. Never waits: a fork may have taken the other away. */
static int acquire(struct proc_file *file, pid_t pid)
{
    pid_t holder = 0;

    if (__atomic_compare_exchange_n(&file->holder, &holder, pid, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return 1;
    if (holder == pid ||
        !__atomic_compare_exchange_n(&file->holder, &holder, pid, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
        return 0;
    /* Its holder was forked away in the middle, so the record may be half written: forget it. */
    file->descriptor = -1;
    return 1;
}

static int is_still_open(const struct proc_file *file)
{
    struct stat found;

    return file->descriptor >= 0 && fstat(file->descriptor, &found) == 0 && found.st_dev == file->device &&
           found.st_ino == file->inode;
}

static int kept_descriptor(struct proc_file *file, pid_t pid, int trusted)
{
    struct stat opened;

    if (trusted && file->pid == pid && file->descriptor >= 0)
        return file->descriptor;
    if (is_still_open(file)) {
        if (file->pid == pid)
            return file->descriptor;
        close(file->descriptor);
    }
    file->descriptor = -1;
    int descriptor = open_file(file);
    if (descriptor < 0)
        return descriptor;
    if (fstat(descriptor, &opened) < 0) {
        int saved_errno = errno;
        close(descriptor);
        return -saved_errno;
    }
    file->device = opened.st_dev;
    file->inode = opened.st_ino;
    file->pid = pid;
    file->descriptor = descriptor;
    return descriptor;
}

/*
 * Reads the file's beginning into text and ends it with a NUL, or writes text; 0 or -errno. If it is trusted, it may
 * have been another file.
 */
static int transfer(struct proc_file *file, char *text, size_t size, int trusted)
{
    pid_t pid = getpid();
    int is_kept = acquire(file, pid);
    int descriptor = is_kept ? kept_descriptor(file, pid, trusted) : open_file(file);
    int result = descriptor < 0 ? descriptor : 0;

    if (descriptor >= 0) {
        ssize_t length;
        do
            length = file->flags == O_WRONLY ? write(descriptor, text, size) : pread(descriptor, text, size - 1, 0);
        while (length < 0 && errno == EINTR);
        if (length < 0) {
            result = -errno;
            if (is_kept)
                file->pid = 0; /* nobody's: the next call opens it anew */
        } else if (file->flags != O_WRONLY) {
            text[length] = '\0';
        }
        if (!is_kept)
            close(descriptor);
    }
    if (is_kept)
        __atomic_store_n(&file->holder, 0, __ATOMIC_RELEASE);
    return result;
}

/*
 * The numbers of statm in pages; 0 or -errno. Kernels from 6.2 to 6.15 leave some tens of pages per CPU out here.
 * smaps_rollup does not, for 10 ms per GB.
 */
static int read_statm(int64_t pages[7], int trusted)
{
    char text[256];
    char *at = text;
    int result = transfer(&statm, text, sizeof text, trusted);

    if (result < 0)
        return result;
    for (int number = 0; number < 7; number++) {
        char *begin = at;
        pages[number] = (int64_t)strtoull(begin, &at, 10);
        if (at == begin)
            return -ENODATA;
    }
    return at[0] == '\n' && at[1] == '\0' && pages[1] > 0 ? 0 : -ENODATA;
}

int ms_own_memory_bytes(int64_t *resident_bytes, int64_t *anonymous_bytes)
{
    int64_t pages[7] = {0}; /* address space, resident, of these file-backed or shared, and others */
    int64_t page_bytes = sysconf(_SC_PAGESIZE);
    int result = read_statm(pages, 1);

    if (result < 0)
        result = read_statm(pages, 0);
    *resident_bytes = pages[1] * page_bytes;
    *anonymous_bytes = (pages[1] - pages[2]) * page_bytes;
    return result;
}

static int64_t high_water_kilobytes(void)
{
    /* VmHWM begins after some 300 bytes, but each group of the user comes before it, with up to 11. */
    char text[16384];
    int result = transfer(&status, text, sizeof text, 0);

    if (result < 0)
        return result;
    const char *line = strstr(text, "\nVmHWM:");
    return line == NULL ? -ENODATA : (int64_t)strtoull(line + strlen("\nVmHWM:"), NULL, 10);
}

/*
 * ru_maxrss is max(VmHWM, floor): the floor is what the process image before the last exec had, and 0 in a process
 * made by fork. subprocess makes it the peak of the parent: vfork lends the parent's memory until the exec. A Python
 * of 14 MB that a parent with a peak of 514 MB started read 514 MB before and after a reset, with VmHWM at 14 MB.
 *
 * getrusage takes 0.4 us, 4 us with 200 threads; reading VmHWM takes 4 us.
 *
 * The floor does not change, so it is at most the lowest ru_maxrss seen so far, and anything above that is VmHWM.
 * This is the highest value which may be the floor. If VmHWM was as high as the lowest ru_maxrss, that value is
 * taken for VmHWM too: else a process whose tasks need nothing would read the slow file each time.
 */
static long doubtful_kilobytes = LONG_MAX;

static int64_t peak_bytes(const struct rusage *usage)
{
    if (usage->ru_maxrss > __atomic_load_n(&doubtful_kilobytes, __ATOMIC_RELAXED))
        return (int64_t)usage->ru_maxrss * 1024;
    int64_t kilobytes = high_water_kilobytes();
    if (kilobytes == -ENODATA) /* no VmHWM, as in gVisor */
        return (int64_t)usage->ru_maxrss * 1024;
    if (kilobytes < 0)
        return kilobytes;
    __atomic_store_n(&doubtful_kilobytes, usage->ru_maxrss - (kilobytes >= usage->ru_maxrss), __ATOMIC_RELAXED);
    return kilobytes * 1024;
}

int64_t ms_peak_resident_bytes(void)
{
    struct rusage usage;

    return getrusage(RUSAGE_SELF, &usage) < 0 ? -errno : peak_bytes(&usage);
}

int ms_measure(int64_t numbers[4])
{
    struct rusage usage;
    int result = ms_own_memory_bytes(&numbers[0], &numbers[1]);

    if (result < 0)
        return result;
    if (getrusage(RUSAGE_SELF, &usage) < 0)
        return -errno;
    numbers[2] = peak_bytes(&usage);
    numbers[3] = usage.ru_minflt;
    return numbers[2] < 0 ? (int)numbers[2] : 0;
}

int ms_reset_peak(void)
{
    char text[] = "5"; /* CLEAR_REFS_MM_HIWATER_RSS; proc(5) */

    return transfer(&clear_refs, text, 1, 0);
}

int ms_raise_oom_score_adj(int by)
{
    char text[16];
    int result = 0;

    if (by < 0)
        return -EINVAL;
    int descriptor = open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
    if (descriptor < 0)
        return -errno;
    ssize_t length = pread(descriptor, text, sizeof text - 1, 0);
    if (length < 0) {
        result = -errno;
    } else {
        text[length] = '\0';
        int before = atoi(text);
        int raise = by < 1000 - before ? by : 1000 - before;
        int digits = snprintf(text, sizeof text, "%d", before + raise);
        result = raise > 0 && pwrite(descriptor, text, (size_t)digits, 0) < 0 ? -errno : raise;
    }
    close(descriptor);
    return result;
}

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

int ms_own_memory_bytes(int64_t *resident_bytes, int64_t *anonymous_bytes)
{
    *resident_bytes = 0;
    *anonymous_bytes = 0;
    return -ENOSYS;
}

int64_t ms_peak_resident_bytes(void)
{
#if defined(__APPLE__)
    struct rusage usage;
    /* Bytes here, and from nought at exec. */
    return getrusage(RUSAGE_SELF, &usage) < 0 ? -errno : (int64_t)usage.ru_maxrss;
#else
    return -ENOSYS;
#endif
}

int ms_measure(int64_t numbers[4])
{
    numbers[0] = numbers[1] = numbers[2] = numbers[3] = 0;
    return -ENOSYS;
}

int ms_reset_peak(void)
{
    return -ENOSYS;
}

int ms_raise_oom_score_adj(int by)
{
    (void)by;
    return -ENOSYS;
}

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
