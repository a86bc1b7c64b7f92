/* A library that starts a thread when it is loaded: one that waits; with -DHOG one that never lets go of a lock
 * which each fork needs, as allocators have them; with -fopenmp one of OpenMP, which is needed again by each use. */

#define _GNU_SOURCE
#include <pthread.h>
#include <semaphore.h>
#include <unistd.h>

#ifdef _OPENMP
int answer(void)
{
    int sum = 0;

#pragma omp parallel num_threads(2) reduction(+ : sum)
    sum += 21;
    return sum;
}

__attribute__((constructor)) static void load(void)
{
    answer();
}
#else
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t never = PTHREAD_COND_INITIALIZER;
static sem_t begun;

int answer(void)
{
    pthread_mutex_lock(&lock);
    pthread_mutex_unlock(&lock);
    return 42;
}

#ifdef HOG
static void after_fork(void)
{
    answer();
}
#endif

static void *run(void *unused)
{
    pthread_setname_np(pthread_self(), "library_thd");
    pthread_mutex_lock(&lock);
#ifdef HOG
    pthread_atfork(NULL, NULL, after_fork);
    sem_post(&begun);
    for (;;)
        pause();
#endif
    sem_post(&begun);
    for (;;)
        pthread_cond_wait(&never, &lock);
    return unused;
}

__attribute__((constructor)) static void load(void)
{
    pthread_t thread;

    sem_init(&begun, 0, 0);
    pthread_create(&thread, NULL, run, NULL);
    sem_wait(&begun);
}
#endif
