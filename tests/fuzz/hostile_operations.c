/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer of hostile images: what qemu-img, qemu-io, a guest and jobs do
 *
 * Each operation opens the active image, works on it, keeps run->truth up to
 * date, and reads it all.
 */
#include "qemu/osdep.h"
#include "qemu/coroutine.h"
#include "qemu/job.h"
#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-block-core.h"
#include "qobject/qdict.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "block/blockjob_int.h"
#include "block/qapi.h"
#include "block/snapshot.h"
#include "../../block/sqcow2-int.h"
#include "hostile_run.h"

static void do_read(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, 0);

    read_all(run, blk, content_is_known(run), "read");
    blk_unref(blk);
}

static void do_info(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, 0);
    BlockGraphInfo *info = NULL;

    if (blk) {
        bdrv_graph_rdlock_main_loop();
        bdrv_query_block_graph_info(blk_bs(blk), &info, NULL);
        bdrv_graph_rdunlock_main_loop();
        qapi_free_BlockGraphInfo(info);
    }
    blk_unref(blk);
}

static bool check(BlockBackend *blk, BdrvCheckMode fix, BdrvCheckResult *res)
{
    int ret;

    bdrv_graph_rdlock_main_loop();
    ret = bdrv_check(blk_bs(blk), res, fix);
    bdrv_graph_rdunlock_main_loop();
    return ret >= 0 && !res->corruptions && !res->check_errors;
}

void do_check(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_CHECK);
    BdrvCheckResult res;
    bool clean;

    if (!blk) {
        return;
    }
    clean = check(blk, 0, &res);
    if (!clean && must_work(run)) {
        failed("check finds something in an intact image");
    }
    read_all(run, blk, content_is_known(run) ||
             (run->damage == DAMAGE_INDEX && !run->unknown && clean &&
              is_trusted(blk)), "read after check");
    blk_unref(blk);
}

static void do_repair(Run *run, Input *in)
{
    BdrvCheckMode fix = input_u8(in) % 4 ? BDRV_FIX_ERRORS | BDRV_FIX_LEAKS
                                         : BDRV_FIX_LEAKS;
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_CHECK);
    BdrvCheckResult res;
    bool clean;

    if (!blk) {
        return;
    }
    clean = check(blk, fix, &res);
    blk_unref(blk);
    if (!clean || !(fix & BDRV_FIX_ERRORS)) {
        return;
    }
    if (run->damage == DAMAGE_INDEX) {
        run->repaired = true;
    }
    blk = open_top(run, BDRV_O_CHECK);
    if (!blk) {
        if (content_is_known(run) && !fault.fired) {
            failed("a repaired image does not open");
        }
        return;
    }
    if (!check(blk, 0, &res) && content_is_known(run) && !fault.fired) {
        failed("check finds something after a repair: %d corruptions, %d "
               "errors", res.corruptions, res.check_errors);
    }
    read_all(run, blk, content_is_known(run), "read after repair");
    blk_unref(blk);
}

static void amend_progress(BlockDriverState *bs, int64_t offset,
                           int64_t total_work_size, void *opaque)
{
}

static void amend(Run *run, const char *options)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_NO_BACKING);
    QemuOptsList *list;
    QemuOpts *opts;
    bool had_index;
    int ret;

    if (!blk) {
        return;
    }
    had_index = sqcow2_has_index_bit(blk_bs(blk)->opaque);
    list = qemu_opts_append(NULL, blk_bs(blk)->drv->amend_opts);
    opts = qemu_opts_create(list, NULL, 0, &error_abort);
    qemu_opts_do_parse(opts, options, NULL, &error_abort);
    bdrv_graph_rdlock_main_loop();
    ret = bdrv_amend_options(blk_bs(blk), opts, amend_progress, NULL, false,
                             NULL);
    bdrv_graph_rdunlock_main_loop();
    /*
     * ENOTSUP: an internal snapshot is larger than the disk now.  EINVAL: no
     * index to rebuild, as it was taken away, and something kept it away
     */
    if (ret < 0 && ret != -ENOTSUP && !(ret == -EINVAL && !had_index) &&
        must_work(run)) {
        failed("'%s' fails with an intact image: %d", options, ret);
    }
    qemu_opts_del(opts);
    qemu_opts_free(list);
    blk_unref(blk);
}

static void do_rebuild(Run *run, Input *in)
{
    amend(run, "index=rebuild");
    do_read(run, in);
}

/* Off, and on again.  What is read in between goes through real nodes. */
static void do_amend(Run *run, Input *in)
{
    amend(run, "index=off");
    do_read(run, in);
    amend(run, "index=on");
    do_read(run, in);
}

/* Note what is at @offset after a write of @buf that returned @ret. */
static void written(Run *run, uint64_t offset, const uint8_t *buf,
                    uint64_t bytes, int ret)
{
    if (ret < 0 && run->damage == DAMAGE_NONE) {
        memset(run->unsure + offset, true, bytes);
        return;
    }
    run->unknown |= ret < 0;
    memcpy(run->truth + offset, buf, bytes);
    memset(run->unsure + offset, false, bytes);
}

/* What could not be flushed is still in caches, and is not to get lost. */
static void close_written(BlockBackend *blk)
{
    fault.armed = false;
    blk_unref(blk);
}

/* One write of @byte, zeroes or discard */
static void write_some(Run *run, BlockBackend *blk, uint8_t byte, Input *in)
{
    uint8_t buf[3 * CLUSTER];
    unsigned how = input_u8(in) % 4;
    uint32_t offset = (uint32_t)input_u8(in) * CLUSTER +
                      (how ? 0 : input_u8(in));
    uint32_t bytes = how ? (1 + input_u8(in) % 3) * CLUSTER
                         : 1 + input_u8(in);
    int ret;

    memset(buf, how < 2 ? byte : 0, sizeof(buf));
    if (offset + bytes > run->disk_size) {
        return;
    }
    if (how == 3) {
        ret = blk_pdiscard(blk, offset, bytes, 0);
    } else if (how == 2) {
        ret = blk_pwrite_zeroes(blk, offset, bytes, BDRV_REQ_MAY_UNMAP);
    } else {
        ret = blk_pwrite(blk, offset, bytes, buf, 0);
    }
    if (ret < 0 && must_work(run)) {
        failed("write to an intact image: %d", ret);
    }
    written(run, offset, buf, bytes, ret);
}

/* What a guest does: write, zeroes, discard, flush */
static void do_write(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_UNMAP);

    if (!blk) {
        return;
    }
    for (int i = 0; i < 4; i++) {
        write_some(run, blk, 0xd0 + i, in);
    }
    if (blk_flush(blk) < 0 && run->damage != DAMAGE_NONE) {
        run->unknown = true;
    }
    read_all(run, blk, content_is_known(run), "read after write");
    close_written(blk);
    do_read(run, in);
}

typedef struct Copy {
    BlockBackend *blk;
    uint32_t from, to;
    int ret;
    bool done;
} Copy;

static void coroutine_fn copy_entry(void *opaque)
{
    Copy *copy = opaque;

    copy->ret = blk_co_copy_range(copy->blk, copy->from, copy->blk, copy->to,
                                  CLUSTER, 0, 0);
    copy->done = true;
}

static int copy_cluster(BlockBackend *blk, uint32_t from, uint32_t to)
{
    Copy copy = { .blk = blk, .from = from, .to = to };

    qemu_coroutine_enter(qemu_coroutine_create(copy_entry, &copy));
    while (!copy.done) {
        aio_poll(qemu_get_aio_context(), true);
    }
    return copy.ret;
}

/* What a guest does more rarely: compressed clusters, VM state, copies */
static void do_write_more(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_UNMAP);
    uint8_t buf[CLUSTER];

    if (!blk) {
        return;
    }
    for (int i = 0; i < 4; i++) {
        unsigned how = input_u8(in) % 4;
        uint32_t offset = (uint32_t)input_u8(in) * CLUSTER;
        int ret;

        memset(buf, 0xe0 + i, sizeof(buf));
        if (offset + CLUSTER > run->disk_size) {
            continue;
        }
        /* qcow2 names a compressed cluster first; if it cannot be written... */
        if (how == 0 && fault.armed) {
            continue;
        }
        if (how == 0) {
            ret = blk_pwrite(blk, offset, CLUSTER, buf,
                             BDRV_REQ_WRITE_COMPRESSED);
        } else if (how == 1) {
            ret = blk_save_vmstate(blk, buf, offset, sizeof(buf));
            if (ret >= 0) {
                blk_load_vmstate(blk, buf, offset, sizeof(buf));
            }
            ret = MIN(ret, 0);
        } else if (how == 2) {
            uint32_t from = (uint32_t)input_u8(in) * CLUSTER;

            if (from + CLUSTER > run->disk_size) {
                continue;
            }
            ret = copy_cluster(blk, from, offset);
            if (ret >= 0) {
                memcpy(buf, run->truth + from, CLUSTER);
            }
        } else {
            ret = blk_pwrite_zeroes(blk, offset, CLUSTER, 0);
            memset(buf, 0, sizeof(buf));
        }
        if (ret < 0 && !fault.fired) {
            /* Not twice compressed; no copy of what another layer owns */
            run->unknown |= run->damage != DAMAGE_NONE && how != 2;
        } else if (how != 1) {
            written(run, offset, buf, CLUSTER, ret);
        }
    }
    read_all(run, blk, content_is_known(run), "read after write");
    close_written(blk);
    do_read(run, in);
}

/* Returns a negative errno if the size on disk is not known now. */
static int resize(Run *run, BlockBackend *blk, uint64_t size,
                  PreallocMode mode)
{
    uint64_t kept = MIN(size, run->disk_size);
    int ret;

    /* Preallocation takes free clusters as they are, unless zeros are wanted */
    ret = blk_truncate(blk, size, false, mode,
                       mode == PREALLOC_MODE_OFF ? 0 : BDRV_REQ_ZERO_WRITE,
                       NULL);
    if (ret == 0) {
        memset(run->truth + kept, 0, READ_BYTES - kept);
        memset(run->unsure + kept, false, READ_BYTES - kept);
        run->disk_size = size;
    } else if (fault.fired && run->damage == DAMAGE_NONE) {
        memset(run->unsure + kept, true, run->disk_size - kept);
        run->disk_size = blk_getlength(blk);
        return ret;
    } else {
        /* Cut off in part; or there are internal snapshots */
        run->unknown |= run->damage != DAMAGE_NONE;
    }
    return 0;
}

/* After a resize of unknown success, or before; @blk is open for it. */
static void close_resized(Run *run, BlockBackend *blk, bool failed)
{
    close_written(blk);
    if (failed) {
        fault.fired = false;
        blk = open_top(run, 0);
        run->disk_size = blk_getlength(blk);
        blk_unref(blk);
    }
}

static void do_resize(Run *run, Input *in)
{
    static const PreallocMode modes[] = {
        PREALLOC_MODE_OFF, PREALLOC_MODE_METADATA, PREALLOC_MODE_FALLOC,
        PREALLOC_MODE_FULL,
    };
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_RESIZE);
    uint64_t size = input_u8(in) * 2 * CLUSTER;
    PreallocMode mode = modes[input_u8(in) % ARRAY_SIZE(modes)];

    if (!blk) {
        return;
    }
    close_resized(run, blk, resize(run, blk, size, mode) < 0);
    do_read(run, in);
}

/* Internal snapshots: go back, and delete; make a new one */
static void do_snapshots(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR);
    QEMUSnapshotInfo sn = { .name = "new" };
    QEMUSnapshotInfo *list = NULL;
    int nb;

    if (!blk) {
        return;
    }
    bdrv_graph_rdlock_main_loop();
    bdrv_snapshot_create(blk_bs(blk), &sn);
    nb = bdrv_snapshot_list(blk_bs(blk), &list);
    bdrv_graph_rdunlock_main_loop();
    if (nb > 0 && list) {
        unsigned i = input_u8(in) % nb;

        if ((bdrv_snapshot_goto(blk_bs(blk), list[i].id_str, NULL) < 0 &&
             !fault.fired) || strcmp(list[i].name, "new")) {
            run->unknown = true;
        }
        read_all(run, blk, content_is_known(run), "read after revert");
        bdrv_graph_rdlock_main_loop();
        bdrv_snapshot_delete(blk_bs(blk), list[i].id_str, list[i].name, NULL);
        bdrv_graph_rdunlock_main_loop();
    }
    g_free(list);
    if (fault.fired && run->damage == DAMAGE_NONE) {
        /* qcow2 leaves flags and refcounts that do not agree; data is right */
        run->damage = DAMAGE_DETECTABLE;
    }
    blk_unref(blk);
    do_read(run, in);
}

/* Put another image on top of it all. */
static bool create_overlay(Run *run, int flags)
{
    g_autofree char *options = g_strdup_printf("cluster_size=%d", CLUSTER);
    Error *local_err = NULL;

    if (run->nb_made == MAX_OVERLAYS) {
        return false;
    }
    bdrv_img_create(file_name(run->top + 1), "sqcow2", file_name(run->top),
                    "sqcow2", options, run->disk_size, flags, true,
                    &local_err);
    if (local_err) {
        if (must_work(run)) {
            failed("%s", error_get_pretty(local_err));
        }
        error_free(local_err);
        return false;
    }
    return true;
}

static void do_overlay(Run *run, Input *in)
{
    if (create_overlay(run, 0)) {
        run->top++;
        run->nb_made++;
        do_read(run, in);
    }
}

/* What has been put off to the main loop, as folding */
static void settle(void)
{
    for (int i = 0; i < 3; i++) {
        main_loop_wait(true);
    }
}

/* As blockdev-snapshot-sync: the old top is folded into the layer set. */
static void do_live_snapshot(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR);
    BlockDriverState *old, *new = NULL;
    QDict *options;

    if (!blk) {
        return;
    }
    old = blk_bs(blk);
    if (create_overlay(run, BDRV_O_NO_BACKING)) {
        options = qdict_new();
        qdict_put_str(options, "driver", "sqcow2");
        new = bdrv_open(file_name(run->top + 1), NULL, options,
                        BDRV_O_RDWR | BDRV_O_NO_BACKING, NULL);
    }
    if (new) {
        bdrv_drained_begin(old);
        if (bdrv_append(new, old, NULL) == 0) {
            bdrv_reopen_set_read_only(old, true, NULL);
            run->top++;
            run->nb_made++;
        }
        bdrv_drained_end(old);
        sqcow2_fold_later();
        bdrv_unref(new);
        settle();
        read_all(run, blk, content_is_known(run), "read after snapshot");
    }
    blk_unref(blk);
    do_read(run, in);
}

/* Everything through real nodes: no index is used. */
static void do_graph(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, 0);
    unsigned layer = input_u8(in) % MAX_LAYERS;

    if (blk && sqcow2_open_graph_to(blk_bs(blk), file_name(layer),
                                    NULL) == 0) {
        settle();
        read_all(run, blk, content_is_known(run), "read after folding");
    }
    if (blk && sqcow2_keep_graph(blk_bs(blk), NULL) == 0) {
        read_all(run, blk, !run->unknown && run->damage <= DAMAGE_INDEX,
                 "read through the graph");
    }
    blk_unref(blk);
}

/* All this in one session, which goes on after what fails in it */
static void do_session(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_RESIZE |
                                 BDRV_O_UNMAP);
    bool size_unknown = false;

    if (!blk) {
        return;
    }
    for (int i = 0; i < 4; i++) {
        switch (input_u8(in) % 4) {
        case 0:
            if (resize(run, blk, input_u8(in) * 2 * CLUSTER,
                       PREALLOC_MODE_OFF) < 0) {
                size_unknown = true;
            }
            break;
        case 1:             /* to real nodes, and back */
            sqcow2_open_graph(blk_bs(blk), false, NULL);
            if (input_u8(in) % 2) {
                write_some(run, blk, 0xf0 + i, in);
            }
            settle();
            break;
        default:
            write_some(run, blk, 0xf8 + i, in);
        }
        read_all(run, blk, content_is_known(run), "read in session");
    }
    close_resized(run, blk, size_unknown);
    do_read(run, in);
}

/* From reading to writing and back, as when a guest is migrated */
static void do_reopen(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, 0);

    if (!blk) {
        return;
    }
    if (bdrv_reopen_set_read_only(blk_bs(blk), false, NULL) == 0) {
        read_all(run, blk, content_is_known(run), "read after reopen");
        if (bdrv_inactivate_all() == 0) {
            bdrv_activate_all(NULL);
            read_all(run, blk, content_is_known(run), "read when active");
        }
        bdrv_reopen_set_read_only(blk_bs(blk), true, NULL);
    }
    read_all(run, blk, content_is_known(run), "read after reopen");
    blk_unref(blk);
    do_read(run, in);
}

/* Into the layer below; needs the real graph */
static void do_commit(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR);
    int ret;

    if (!blk) {
        return;
    }
    ret = sqcow2_open_graph(blk_bs(blk), false, NULL);
    if (ret == 0) {
        read_all(run, blk, content_is_known(run), "read through the graph");
        ret = bdrv_commit(blk_bs(blk));
    }
    /* ENOTSUP: a stream has left no backing file */
    if (ret < 0 && ret != -ENOTSUP && must_work(run)) {
        failed("commit of an intact image: %d", ret);
    }
    run->unknown |= ret < 0 && run->damage != DAMAGE_NONE;
    fault.armed = false;            /* as close_written() */
    settle();
    read_all(run, blk, content_is_known(run), "read after commit");
    /* As qemu-img, which has an index stored that fits */
    sqcow2_refresh_later(blk_bs(blk));
    blk_unref(blk);
    sqcow2_refresh(ret == 0);
    do_read(run, in);
}

#define JOB "job"

/* Let the job end, if there is one.  Returns a negative errno if it failed. */
static int finish_job(void)
{
    bool completed = false;
    Job *job;
    int ret;

    WITH_JOB_LOCK_GUARD() {
        job = job_get_locked(JOB);
        if (!job) {
            return 0;
        }
        job_ref_locked(job);
    }
    while (!completed) {
        WITH_JOB_LOCK_GUARD() {
            completed = job_is_completed_locked(job);
            if (!completed && job_is_ready_locked(job)) {
                job_complete_sync_locked(job, NULL);
                completed = true;
            }
        }
        if (!completed) {
            aio_poll(qemu_get_aio_context(), true);
        }
    }
    WITH_JOB_LOCK_GUARD() {
        ret = job->ret;
        job_unref_locked(job);
    }
    return ret;
}

/* The node @n layers below @bs, or the last one that there is */
static BlockDriverState *node_below(BlockDriverState *bs, unsigned n)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    while (n-- > 0 && bdrv_cow_bs(bs)) {
        bs = bdrv_cow_bs(bs);
    }
    return bs;
}

/* Jobs on the chain: commit, from the active image or below it; stream */
static void do_job(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR);
    unsigned how = input_u8(in) % 3;
    unsigned from = 1 + input_u8(in) % 2;
    unsigned to = from + input_u8(in) % 2;
    BlockDriverState *bs, *top, *base;
    Error *local_err = NULL;
    int ret;

    if (!blk) {
        return;
    }
    bs = blk_bs(blk);
    ret = sqcow2_open_graph(bs, true, &local_err);
    if (ret == 0) {
        top = node_below(bs, from);
        base = node_below(bs, to + (how == 1));
        if (how == 0 && base == bs) {
            /* Streamed before */
            ret = bs->auto_backing_file[0] ? -EINVAL : 0;
        } else if (how == 0) {
            commit_active_start(JOB, bs, base, JOB_DEFAULT, 0,
                                BLOCKDEV_ON_ERROR_REPORT, NULL, NULL, NULL,
                                false, &local_err);
        } else if (how == 1 && base != top) {
            commit_start(JOB, bs, base, top, JOB_DEFAULT, 0,
                         BLOCKDEV_ON_ERROR_REPORT, NULL, false, NULL,
                         &local_err);
        } else if (how == 2) {
            base = node_below(base, 1) == base ? NULL : base;
            stream_start(JOB, bs, base, base ? base->filename : NULL, false,
                         NULL, JOB_DEFAULT, 0, BLOCKDEV_ON_ERROR_REPORT, NULL,
                         &local_err);
        }
        ret = local_err || ret < 0 ? ret : finish_job();
    }
    if ((ret < 0 || local_err) && must_work(run)) {
        failed("job %u fails: %d %s", how, ret,
               local_err ? error_get_pretty(local_err) : "");
    }
    error_free(local_err);
    run->unknown |= ret < 0 && run->damage != DAMAGE_NONE;
    settle();
    /* The node is the base now, which may be larger */
    read_all(run, blk, content_is_known(run) &&
             blk_getlength(blk) == run->disk_size, "read after job");
    blk_unref(blk);
    do_read(run, in);
}

/* Inputs name them by their place: add at the end. */
static const struct {
    void (*run)(Run *, Input *);
    bool writes;
} operations[] = {
    { do_read }, { do_info }, { do_check }, { do_repair },
    { do_rebuild, true }, { do_amend, true }, { do_write, true },
    { do_resize, true }, { do_snapshots, true }, { do_overlay, true },
    { do_commit, true }, { do_graph }, { do_reopen, true }, { do_job, true },
    { do_live_snapshot, true }, { do_write_more, true },
    { do_session, true },
};

/* Others than the one with faults lack the last: inputs keep their meaning */
const unsigned nb_operations = ARRAY_SIZE(operations) - !HOSTILE_FAULTS;

void operate(Run *run, unsigned i, Input *in)
{
    fault.fired = false;
    /* An index that lies costs content if it is not repaired first. */
    if (operations[i].writes && run->damage == DAMAGE_INDEX &&
        !run->repaired) {
        run->unknown = true;
    }
    operations[i].run(run, in);
    fault.armed = false;
}
