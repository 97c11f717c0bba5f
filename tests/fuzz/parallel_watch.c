/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test of requests from several threads: linked in place of functions of the
 * drivers (ld --wrap)
 *
 * Two purposes.  First, time: worker threads are slow at random, the page cache
 * has nothing at random, timers of seconds are timers of milliseconds; so
 * coroutines yield wherever they may, and threads meet.  Second, the rules:
 * whoever is in a function that uses a cache has it for himself, as q.lock
 * says; a lookup is made with q.lock held.
 *
 * With ThreadSanitizer the caches are not watched: what watches them would be
 * the order that it looks for.
 */
#include "qemu/osdep.h"
#include "qemu/coroutine.h"
#include "qemu/timer.h"
#include "parallel_fuzz.h"
#include "parallel_watch.h"

#define NB_WATCHED 4096         /* a power of two */

static bool watching;
static __thread Random thread_random;

uint64_t draw(Random *r)
{
    uint64_t x = r->state += 0x9e3779b97f4a7c15ULL;

    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
    return x ^ x >> 31;
}

/* Not from the seed: when a thread does something is not, either. */
static bool one_in(uint32_t n)
{
    if (!qatomic_read(&watching)) {
        return false;
    }
    if (!thread_random.state) {
        thread_random.state = (uintptr_t)&thread_random;
    }
    return draw_below(&thread_random, n) == 0;
}

void watch_start(bool on)
{
    qatomic_set(&watching, on);
}

/*
 * Time
 */

typedef struct SlowTask {
    ThreadPoolFunc *func;
    void *arg;
} SlowTask;

static int run_slowly(void *opaque)
{
    SlowTask *task = opaque;

    if (one_in(32)) {
        g_usleep(draw_below(&thread_random, 1500));
    }
    return task->func(task->arg);
}

int coroutine_fn __wrap_thread_pool_submit_co(ThreadPoolFunc *func, void *arg)
{
    SlowTask task = { .func = func, .arg = arg };

    return __real_thread_pool_submit_co(run_slowly, &task);
}

ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int niov, off_t pos,
                          int flags)
{
    if (one_in(4)) {
        errno = EAGAIN;
        return -1;
    }
    return __real_preadv64v2(fd, iov, niov, pos, flags);
}

/*
 * Seconds are milliseconds to the timers that the drivers set.  A timer does
 * not tell its clock, but the two that they use are far apart.
 */
void __wrap_timer_mod(QEMUTimer *ts, int64_t expire_time)
{
    static const QEMUClockType clocks[] = {
        QEMU_CLOCK_REALTIME, QEMU_CLOCK_VIRTUAL,
    };

    for (int i = 0; i < ARRAY_SIZE(clocks); i++) {
        int64_t wait = expire_time - qemu_clock_get_ms(clocks[i]);

        if (qatomic_read(&watching) && ts->scale == SCALE_MS && wait > 500 &&
            wait < 60 * 1000) {
            expire_time -= wait - wait / 300;
            break;
        }
    }
    __real_timer_mod(ts, expire_time);
}

/*
 * Rules
 */

#ifdef CONFIG_TSAN
static void enter(const void *cache, const char *what) {}
static void leave(const void *cache) {}
#else
/* Of each cache that was ever used: who is in it */
static struct {
    const void *cache;
    const char *inside;
} watched[NB_WATCHED];

static int place_of(const void *cache)
{
    uint32_t i = ((uintptr_t)cache * 0x9e3779b97f4a7c15ULL) >> 40;

    for (;; i++) {
        i %= NB_WATCHED;
        if (qatomic_read(&watched[i].cache) == cache ||
            !qatomic_cmpxchg(&watched[i].cache, NULL, cache) ||
            qatomic_read(&watched[i].cache) == cache) {
            return i;
        }
    }
}

static void enter(const void *cache, const char *what)
{
    int i = place_of(cache);
    const char *other = qatomic_cmpxchg(&watched[i].inside, NULL, what);

    if (other) {
        failed("%s while %s is at work on the same cache", what, other);
    }
    if (one_in(512)) {
        g_usleep(draw_below(&thread_random, 300));
    }
}

static void leave(const void *cache)
{
    qatomic_set(&watched[place_of(cache)].inside, NULL);
}
#endif

static void check_lock(BlockDriverState *bs, const char *what)
{
    BDRVQcow2State *q = bs->opaque;

    if (qemu_in_coroutine() &&
        (!qatomic_read(&q->lock.locked) ||
         q->lock.holder != qemu_coroutine_self())) {
        failed("%s without q.lock", what);
    }
}

int __wrap_sqcow2_lookup(BlockDriverState *bs, uint64_t guest_offset,
                         uint64_t bytes, Sqcow2Extent *extent)
{
    check_lock(bs, "a lookup");
    return __real_sqcow2_lookup(bs, guest_offset, bytes, extent);
}

int __wrap_sqcow2_init_l2_slice(BlockDriverState *bs, int l1_index,
                                unsigned slice, uint64_t *l2_slice)
{
    if (qatomic_read(&watching)) {
        check_lock(bs, "a new table");
    }
    return __real_sqcow2_init_l2_slice(bs, l1_index, slice, l2_slice);
}

uint64_t *__wrap_sqcow2_cache_find(Sqcow2Cache *c, uint64_t key)
{
    uint64_t *slice;

    enter(c, "sqcow2_cache_find");
    slice = __real_sqcow2_cache_find(c, key);
    leave(c);
    return slice;
}

/* A slice that was taken and not added yet: somebody is in the cache. */
uint64_t *__wrap_sqcow2_cache_take(Sqcow2Cache *c)
{
    enter(c, "the reading of a slice");
    return __real_sqcow2_cache_take(c);
}

void __wrap_sqcow2_cache_add(Sqcow2Cache *c, uint64_t key, uint64_t *slice)
{
    __real_sqcow2_cache_add(c, key, slice);
    leave(c);
}

void __wrap_sqcow2_cache_clear(Sqcow2Cache *c)
{
    enter(c, "sqcow2_cache_clear");
    __real_sqcow2_cache_clear(c);
    leave(c);
}

void __wrap_sqcow2_cache_clean(Sqcow2Cache *c)
{
    enter(c, "sqcow2_cache_clean");
    if (one_in(4)) {
        g_usleep(draw_below(&thread_random, 3000));
    }
    __real_sqcow2_cache_clean(c);
    leave(c);
}

void __wrap_sqcow2_cache_free(Sqcow2Cache *c)
{
    if (c) {
        enter(c, "sqcow2_cache_free");
        leave(c);               /* the next one may have this address */
        __real_sqcow2_cache_free(c);
    }
}

int __wrap_qcow2_cache_get(BlockDriverState *bs, Qcow2Cache *c, uint64_t offset,
                           void **table)
{
    int ret;

    enter(c, "qcow2_cache_get");
    ret = __real_qcow2_cache_get(bs, c, offset, table);
    leave(c);
    return ret;
}

void __wrap_qcow2_cache_clean_unused(Qcow2Cache *c)
{
    enter(c, "qcow2_cache_clean_unused");
    __real_qcow2_cache_clean_unused(c);
    leave(c);
}

int __wrap_qcow2_cache_destroy(Qcow2Cache *c)
{
    enter(c, "qcow2_cache_destroy");
    leave(c);
    return __real_qcow2_cache_destroy(c);
}
