/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test of requests from several threads: what the main thread does meanwhile
 *
 * What management does by QMP to a disk that is in use, by the functions that
 * QMP calls.  The disk has a second user, as a device is one, which keeps it in
 * its iothread.
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/job.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-block-core.h"
#include "qapi/qapi-commands-job.h"
#include "qapi/qapi-visit-block-core.h"
#include "qobject/qdict.h"
#include "block/aio.h"
#include "block/block.h"
#include "block/block_int.h"
#include "block/snapshot.h"
#include "block/sqcow2.h"
#include "system/runstate.h"
#include "parallel_admin.h"

#define MAX_OVERLAYS 12
#define MAX_SNAPSHOTS 3
#define TAIL_BYTES (64 * KiB)

static const Plan *plan;
static IOThread **threads;
static BlockBackend *disk, *device;
static Random rng;
static const char *without = "";

static unsigned nb_files;       /* that were made, and snapshots */
static unsigned nb_overlays;    /* on the first active layer */
static char *top;               /* the active layer's file */
static unsigned nb_snapshots;   /* internal ones, of the active layer */
static unsigned snapshot_ids[MAX_SNAPSHOTS];
static bool saved;              /* one of them is what the model has saved */
static uint64_t size;           /* of the disk */

void admin_without(const char *names)
{
    without = names;
}

const char *admin_top(void)
{
    return top;
}

static BlockDriverState *active(void)
{
    return bdrv_skip_filters(blk_bs(disk));
}

/* Called by what handles signals, which nobody installs here */
void qemu_system_killed(int signal, pid_t pid)
{
}

static void must(Error *err, const char *what)
{
    if (err) {
        failed("%s: %s", what, error_get_pretty(err));
    }
}

static void turn_for(unsigned us)
{
    int64_t end = g_get_monotonic_time() + us;

    while (g_get_monotonic_time() < end) {
        run_main_loop();
    }
}

/*
 * The tail of the disk, behind all windows: this thread alone writes there, and
 * resizes.  What comes to light when the disk grows must be zero.
 */
static void coroutine_fn use_tail(uint64_t from, bool write)
{
    g_autofree uint8_t *buf = g_malloc(TAIL_BYTES);
    int ret;

    while (from < size) {
        uint64_t bytes = MIN(size - from, TAIL_BYTES);

        if (write) {
            memset(buf, 0xa5, bytes);
            ret = blk_co_pwrite(disk, from, bytes, buf, 0);
        } else {
            ret = blk_co_pread(disk, from, bytes, buf, 0);
            if (ret >= 0 && !buffer_is_zero(buf, bytes)) {
                failed("the disk has grown to %" PRIu64 ", but is not zero "
                       "behind %" PRIu64, size, from);
            }
        }
        if (ret < 0) {
            failed("%s of the tail: %s", write ? "write" : "read",
                   strerror(-ret));
        }
        from += write ? 16 * bytes : bytes;
    }
}

typedef struct Resize {
    uint64_t sizes[2];
    unsigned delay_us;
    bool by_qmp;
    bool done;
} Resize;

static void coroutine_fn resize_to(const Resize *r, uint64_t new_size)
{
    Error *local_err = NULL;
    AioContext *old_context;
    BlockBackend *blk;

    if (r->by_qmp) {
        qmp_block_resize("disk", NULL, new_size, &local_err);
    } else {
        /* The same, without draining before */
        blk = blk_co_new_with_bs(blk_bs(disk), BLK_PERM_RESIZE, BLK_PERM_ALL,
                                 &error_abort);
        old_context = bdrv_co_enter(blk_bs(blk));
        blk_co_truncate(blk, new_size, false, PREALLOC_MODE_OFF, 0,
                        &local_err);
        bdrv_co_leave(blk_bs(blk), old_context);
        blk_co_unref(blk);
    }
    must(local_err, "resize");
    size = new_size;
}

static void coroutine_fn resize_entry(void *opaque)
{
    Resize *r = opaque;

    if (r->delay_us) {
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, r->delay_us * SCALE_US);
    }
    if (draw_below(&rng, 2)) {
        use_tail(MAX(plan->tail, size - MIN(size, 4 * MiB)), true);
    }
    for (int i = 0; i < ARRAY_SIZE(r->sizes); i++) {
        uint64_t old_size = size;

        resize_to(r, r->sizes[i]);
        /* qcow2 keeps what the last cluster has behind the end. */
        if (size > old_size) {
            use_tail(ROUND_UP(old_size, 1 << plan->cluster_bits), false);
        }
    }
    r->done = true;
}

static Resize resize;

static bool resizing(void)
{
    return resize.sizes[0] && !resize.done;
}

static void start_resize(unsigned delay_us)
{
    uint64_t room = 2 * MIN(plan->region, 16 * MiB) / SECTOR;

    resize = (Resize) {
        .sizes = {
            plan->tail + draw_below(&rng, room) * SECTOR,
            plan->tail + draw_below(&rng, room) * SECTOR,
        },
        .delay_us = delay_us,
        .by_qmp = draw_below(&rng, 4),
    };
    aio_co_schedule(qemu_get_aio_context(),
                    qemu_coroutine_create(resize_entry, &resize));
}

static void end_resize(void)
{
    while (resizing()) {
        run_main_loop();
    }
}

static void do_resize(void)
{
    start_resize(0);
    end_resize();
}

static void do_drain(void)
{
    if (draw_below(&rng, 2)) {
        bdrv_drained_begin(blk_bs(disk));
        turn_for(draw_below(&rng, 1000));
        bdrv_drained_end(blk_bs(disk));
    } else {
        bdrv_drain_all_begin();
        bdrv_drain_all_end();
    }
}

/* An external snapshot; then the nodes below are folded, if the format can. */
static void do_overlay(void)
{
    Error *local_err = NULL;
    g_autofree char *file = NULL;
    bool beside = draw_below(&rng, 2);

    if (nb_overlays == MAX_OVERLAYS || saved) {
        return;
    }
    file = g_strdup_printf("overlay-%u", nb_files++);
    create_image(plan, file, plan->format, top, plan->format, size);
    qmp_blockdev_snapshot_sync("disk", NULL, file, NULL, plan->format, true,
                               NEW_IMAGE_MODE_EXISTING, &local_err);
    must(local_err, "live snapshot");
    g_free(top);
    top = g_steal_pointer(&file);
    nb_overlays++;
    nb_snapshots = 0;
    /* A resize may come while nodes are folded. */
    if (beside && !strstr(without, "resize")) {
        start_resize(draw_below(&rng, 4000));
        end_resize();
    }
}

static bool has_job(bool *ready)
{
    Job *job;

    JOB_LOCK_GUARD();
    job = job_get_locked("job");
    *ready = job && job->status == JOB_STATUS_READY;
    return job;
}

/* It does not come to an end while others write all the time. */
static void wait_for_job(void)
{
    int64_t end = g_get_monotonic_time() + draw_below(&rng, 200 * 1000);
    bool ready, parked = false;

    while (has_job(&ready)) {
        if (ready) {
            qmp_job_complete("job", &error_abort);
        }
        if (!parked && g_get_monotonic_time() > end) {
            park_workers(true);
            parked = true;
        }
        turn_for(1000);
    }
    expect_filter(false);
    if (parked) {
        park_workers(false);
    }
}

/* The active layer into the one below */
static void do_commit(void)
{
    Error *local_err = NULL;
    g_autofree char *below = NULL;

    if (!nb_overlays || nb_snapshots) {
        return;
    }
    bdrv_graph_rdlock_main_loop();
    below = bdrv_get_full_backing_filename(active(), &error_abort);
    bdrv_graph_rdunlock_main_loop();
    expect_filter(true);
    qmp_block_commit("job", "disk", NULL, below, NULL, NULL, NULL, false,
                     false, false, 0, false, 0, NULL, false, false, false,
                     false, &local_err);
    must(local_err, "commit");
    wait_for_job();
    g_free(top);
    top = g_steal_pointer(&below);
    nb_overlays--;
    size = blk_getlength(disk); /* the layer below may be longer */
    turn_for(2000);
}

/* What lies between the active layer and the base, into the active layer */
static void do_stream(void)
{
    Error *local_err = NULL;

    if (nb_snapshots || draw_below(&rng, 4)) {
        return;
    }
    expect_filter(true);
    qmp_block_stream("job", "disk", "layer-0", NULL, NULL, false, false, NULL,
                     false, 0, false, 0, NULL, false, false, false, false,
                     &local_err);
    must(local_err, "stream");
    wait_for_job();
    nb_overlays = 0;
    turn_for(2000);
}

/* Real backing nodes, and back */
static void do_graph(void)
{
    sqcow2_open_graph(blk_bs(disk), draw_below(&rng, 2), &error_abort);
    turn_for(draw_below(&rng, 5000));
}

static void do_reopen(void)
{
    static const char *const sizes[] = {
        "1", "4096", "32768", "256k", "2M",
    };
    QDict *options = qdict_new();
    Error *local_err = NULL;

    qdict_put_str(options, "l2-cache-size",
                  sizes[draw_below(&rng, ARRAY_SIZE(sizes))]);
    if (draw_below(&rng, 2)) {
        g_autofree char *bytes =
            g_strdup_printf("%u", 512U << draw_below(&rng, plan->cluster_bits -
                                                     8));
        qdict_put_str(options, "l2-cache-entry-size", bytes);
    }
    qdict_put_str(options, "cache-clean-interval",
                  draw_below(&rng, 4) ? "1" : "0");
    bdrv_reopen(active(), options, true, &local_err);
    must(local_err, "reopen");
}

static void do_info(void)
{
    BlockDriverInfo bdi;
    ImageInfoSpecific *info;

    bdrv_graph_rdlock_main_loop();
    info = bdrv_get_specific_info(active(), &error_abort);
    bdrv_get_info(active(), &bdi);
    bdrv_get_allocated_file_size(active());
    bdrv_graph_rdunlock_main_loop();
    qapi_free_ImageInfoSpecific(info);
    blk_getlength(disk);
}

/* Layers below may have some, too, and become active again. */
static void snapshot_name(char *name, unsigned i)
{
    snprintf(name, 16, "%u-%u", snapshot_ids[i], i);
}

static void do_snapshot(void)
{
    Error *local_err = NULL;
    char name[16];
    bool save = !saved && draw_below(&rng, 2);

    if (nb_snapshots == MAX_SNAPSHOTS) {
        return;
    }
    /* What it holds is known if nobody writes. */
    if (save) {
        park_workers(true);
        model_save();
    }
    snapshot_ids[nb_snapshots] = nb_files++;
    snapshot_name(name, nb_snapshots++);
    qmp_blockdev_snapshot_internal_sync("disk", name, &local_err);
    must(local_err, "internal snapshot");
    if (save) {
        saved = true;
        park_workers(false);
    } else if (saved) {
        saved = false;          /* that is not the last one any more */
    }
}

static void do_delete(void)
{
    Error *local_err = NULL;
    char name[16];

    if (nb_snapshots) {
        snapshot_name(name, --nb_snapshots);
        qapi_free_SnapshotInfo(qmp_blockdev_snapshot_delete_internal_sync(
            "disk", NULL, name, &local_err));
        must(local_err, "deletion of an internal snapshot");
        saved = false;
    }
}

static void do_goto(void)
{
    Error *local_err = NULL;
    char name[16];

    if (!saved) {
        return;
    }
    snapshot_name(name, nb_snapshots - 1);
    park_workers(true);
    bdrv_drain_all_begin();
    bdrv_snapshot_goto(blk_bs(disk), name, &local_err);
    must(local_err, "return to an internal snapshot");
    bdrv_drain_all_end();
    model_restore();
    park_workers(false);
    size = blk_getlength(disk);
}

/* To another iothread, as when a device is reset, and back */
static void do_move(void)
{
    Error *local_err = NULL;

    blk_set_allow_aio_context_change(device, true);
    blk_set_aio_context(disk, iothread_get_aio_context(
        threads[draw_below(&rng, plan->nb_threads)]), &local_err);
    must(local_err, "move to another iothread");
    blk_set_allow_aio_context_change(device, false);
}

static struct {
    void (*run)(void);
    const char *name;
    unsigned weight;
    unsigned nb_done;
} works[] = {
    { do_drain, "drain", 6 },
    { do_overlay, "overlay", 6 },
    { do_commit, "commit", 2 },
    { do_stream, "stream", 1 },
    { do_graph, "graph", 3 },
    { do_resize, "resize", 8 },
    { do_reopen, "reopen", 8 },
    { do_info, "info", 6 },
    { do_snapshot, "snapshot", 3 },
    { do_delete, "delete", 3 },
    { do_goto, "goto", 2 },
    { do_move, "move", 2 },
};

void admin_work(void)
{
    unsigned sum = 0, n;
    int i;

    for (i = 0; i < ARRAY_SIZE(works); i++) {
        sum += works[i].weight;
    }
    n = draw_below(&rng, sum);
    for (i = 0; n >= works[i].weight; i++) {
        n -= works[i].weight;
    }
    if (!strstr(without, works[i].name)) {
        works[i].nb_done++;
        works[i].run();
    }
    turn_for(draw_below(&rng, 30) * 1000);
}

void admin_say(FILE *f)
{
    for (int i = 0; i < ARRAY_SIZE(works); i++) {
        fprintf(f, "  %s: %u\n", works[i].name, works[i].nb_done);
    }
}

BlockBackend *admin_open(const Plan *p, IOThread **all_threads)
{
    QDict *options = qdict_new();

    plan = p;
    threads = all_threads;
    rng.state = p->seed ^ 0x61646d696eULL;
    nb_files = nb_overlays = nb_snapshots = 0;
    saved = false;
    resize = (Resize) {};
    size = p->disk_size;
    g_free(top);
    top = g_strdup_printf("layer-%u", p->nb_layers);
    for (int i = 0; i < ARRAY_SIZE(works); i++) {
        works[i].nb_done = 0;
    }

    qdict_put_str(options, "driver", p->format);
    qdict_put_str(options, "l2-cache-size", p->cache_size);
    qdict_put_str(options, "cache-clean-interval", "1");
    if (*p->entry_size) {
        qdict_put_str(options, "l2-cache-entry-size", p->entry_size);
    }
    disk = blk_new_open(top, NULL, options, p->open_flags | BDRV_O_NO_FLUSH,
                        &error_fatal);
    blk_set_enable_write_cache(disk, true);
    monitor_add_blk(disk, "disk", &error_abort);
    blk_set_aio_context(disk, iothread_get_aio_context(threads[0]),
                        &error_abort);
    device = blk_new(iothread_get_aio_context(threads[0]), 0, BLK_PERM_ALL);
    blk_insert_bs(device, blk_bs(disk), &error_abort);
    return disk;
}

void admin_close(void)
{
    char name[16];

    end_resize();
    turn_for(5000);             /* for what is to be folded */
    while (nb_snapshots) {
        snapshot_name(name, --nb_snapshots);
        qapi_free_SnapshotInfo(qmp_blockdev_snapshot_delete_internal_sync(
            "disk", NULL, name, &error_abort));
    }
    /* The disk goes back to the main thread, as when a guest is shut down. */
    blk_set_allow_aio_context_change(device, true);
    blk_set_aio_context(disk, qemu_get_aio_context(), &error_abort);
    blk_unref(device);
    monitor_remove_blk(disk);
    blk_unref(disk);
}
