/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: give a disk's memory back while nobody uses it
 *
 * What "cache-clean-interval" is for qcow2's caches it is for ours, too: a
 * slice that was not used for that long is freed.
 *
 * The timer is one of the main thread, which alone begins drained sections.  It
 * starts a coroutine in the node's thread, which takes q.lock as all users of
 * the cache do, and counts as a request: whoever drains afterwards waits for
 * it.  While the node is drained nothing is started, as those who drained it
 * may use the cache without the lock, and nothing is counted, as they rely on
 * that, too.
 *
 * An inactive node is activated in its own thread, and the timer stopped there,
 * perhaps while its callback runs.  So it is an object of its own, with a lock:
 * a callback touches the node only under this lock and while the timer is not
 * stopped.  A stopped one is freed in the main thread, where no callback runs
 * then.
 *
 * A node whose image is too corrupt, or not ours any more, loses its driver,
 * and close is never called: what it has leaks, as with qcow2.  But no timer
 * may outlive it: those that run are stopped, and none is started.
 */
#include "qemu/osdep.h"
#include "qemu/coroutine.h"
#include "qemu/timer.h"
#include "sqcow2-int.h"

struct Sqcow2IdleTimer {
    QEMUTimer timer;
    BlockDriverState *bs;
    int64_t interval_ms;

    QemuMutex lock;
    bool stopped;               /* guarded by it */
};

static void coroutine_fn clean(void *opaque)
{
    BlockDriverState *bs = opaque;
    BDRVSqcow2State *s = bs->opaque;

    qemu_co_mutex_lock(&s->q.lock);
    if (s->cache) {
        sqcow2_cache_clean(s->cache);
    }
    qemu_co_mutex_unlock(&s->q.lock);
    bdrv_dec_in_flight(bs);
}

static void arm(Sqcow2IdleTimer *t)
{
    timer_mod(&t->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                         t->interval_ms);
}

static void timer_cb(void *opaque)
{
    Sqcow2IdleTimer *t = opaque;
    BlockDriverState *bs = NULL;

    WITH_QEMU_LOCK_GUARD(&t->lock) {
        if (t->stopped) {
            return;
        }
        arm(t);
        if (!qatomic_read(&t->bs->quiesce_counter)) {
            bs = t->bs;
            bdrv_inc_in_flight(bs);
        }
    }
    if (bs) {
        aio_co_enter(bdrv_get_aio_context(bs),
                     qemu_coroutine_create(clean, bs));
    }
}

static void free_timer(void *opaque)
{
    Sqcow2IdleTimer *t = opaque;

    timer_deinit(&t->timer);
    qemu_mutex_destroy(&t->lock);
    g_free(t);
}

void sqcow2_idle_stop(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2IdleTimer *t = g_steal_pointer(&s->idle_timer);

    if (!t) {
        return;
    }
    WITH_QEMU_LOCK_GUARD(&t->lock) {
        t->stopped = true;
        timer_del(&t->timer);
    }
    if (qemu_in_main_thread()) {
        free_timer(t);
    } else {
        aio_bh_schedule_oneshot(qemu_get_aio_context(), free_timer, t);
    }
}

void sqcow2_idle_start(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2IdleTimer *t;

    sqcow2_idle_stop(bs);
    if (!s->q.cache_clean_interval || !s->cache || !bs->drv) {
        return;
    }
    t = s->idle_timer = g_new0(Sqcow2IdleTimer, 1);
    t->bs = bs;
    t->interval_ms = (int64_t)s->q.cache_clean_interval * 1000;
    qemu_mutex_init(&t->lock);
    aio_timer_init(qemu_get_aio_context(), &t->timer, QEMU_CLOCK_REALTIME,
                   SCALE_MS, timer_cb, t);
    arm(t);
}

static void stop_timers(void *opaque)
{
    BlockDriverState *bs = opaque;

    if (bs->opaque) {           /* else open has failed, and stopped them */
        sqcow2_idle_stop(bs);
        bdrv_qcow2.bdrv_detach_aio_context(bs);
    }
    bdrv_dec_in_flight(bs);
}

void sqcow2_before_unusable(BlockDriverState *bs)
{
    if (bs->drv == &bdrv_sqcow2) {
        /* Where timers run; whoever frees the node drains first */
        bdrv_inc_in_flight(bs);
        aio_bh_schedule_oneshot(qemu_get_aio_context(), stop_timers, bs);
    }
}
