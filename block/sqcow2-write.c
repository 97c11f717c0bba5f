/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: what writing adds to qcow2's
 *
 * All changes are made by qcow2's code.  Ours comes before it: S3, the new
 * stamp, ahead of the first change of a session; and inside it, from the
 * hook in l2_allocate(): the first write to a region copies the table that
 * is inherited from below, so that the new one is complete (S7), or, when
 * the index is not trusted or not used, first clears "index valid".
 *
 * Order on disk: stamp, flush; inherited table, flush (both upstream's);
 * L1 entry.  A cut in between leaves the old table, or a new one that says
 * the same.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

int sqcow2_init_l2_slice(BlockDriverState *bs, int l1_index, unsigned slice,
                         uint64_t *l2_slice)
{
    BDRVSqcow2State *s = bs->opaque;

    if (bs->drv != &bdrv_sqcow2 || !sqcow2_has_index_bit(s)) {
        return 0;
    }
    if (s->mode == SQCOW2_MODE_INDEXED) {
        return sqcow2_inherit_slice(bs, l1_index, slice, l2_slice);
    }
    /* Without layers below, zeros are the truth: the table is complete */
    if (s->record.layer == 0 && !bs->auto_backing_file[0]) {
        return 0;
    }
    return sqcow2_invalidate_index(bs);
}

static int coroutine_fn GRAPH_RDLOCK
sqcow2_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       QEMUIOVector *qiov, size_t qiov_offset,
                       BdrvRequestFlags flags)
{
    int ret = sqcow2_begin_change(bs);

    return ret < 0 ? ret :
        bdrv_qcow2.bdrv_co_pwritev_part(bs, offset, bytes, qiov, qiov_offset,
                                        flags);
}

static int coroutine_fn GRAPH_RDLOCK
sqcow2_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                        BdrvRequestFlags flags)
{
    int ret = sqcow2_begin_change(bs);

    return ret < 0 ? ret :
        bdrv_qcow2.bdrv_co_pwrite_zeroes(bs, offset, bytes, flags);
}

static int coroutine_fn GRAPH_RDLOCK
sqcow2_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    int ret = sqcow2_begin_change(bs);

    return ret < 0 ? ret : bdrv_qcow2.bdrv_co_pdiscard(bs, offset, bytes);
}

static int coroutine_fn GRAPH_RDLOCK
sqcow2_co_copy_range_to(BlockDriverState *bs, BdrvChild *src,
                        int64_t src_offset, BdrvChild *dst,
                        int64_t dst_offset, int64_t bytes,
                        BdrvRequestFlags read_flags,
                        BdrvRequestFlags write_flags)
{
    int ret = sqcow2_begin_change(bs);

    return ret < 0 ? ret :
        bdrv_qcow2.bdrv_co_copy_range_to(bs, src, src_offset, dst, dst_offset,
                                         bytes, read_flags, write_flags);
}

static int coroutine_fn GRAPH_RDLOCK
sqcow2_co_pwritev_compressed_part(BlockDriverState *bs, int64_t offset,
                                  int64_t bytes, QEMUIOVector *qiov,
                                  size_t qiov_offset)
{
    int ret = sqcow2_begin_change(bs);

    return ret < 0 ? ret :
        bdrv_qcow2.bdrv_co_pwritev_compressed_part(bs, offset, bytes, qiov,
                                                   qiov_offset);
}

/*
 * Before the size changes: what is cut off gets entries 0 while the disk still
 * has its old size, and that they may not stand for in a table of a valid index
 * (S7): a layer below may own those clusters.  So the index does not count
 * until the size is on disk; the tables are complete again then, unless
 * something else has found a reason since why the index is wrong.  When that
 * fails, the next open makes a new index.
 *
 * What is behind the end may be 0 in tables of a valid index where a layer
 * below owns clusters.  A growth that goes by the index writes zeros there
 * (S10).  Another one knows the backing nodes at most, which may be none, or
 * others than the layers of the index; so the index does not count any more.
 *
 * A resize is not stopped by a drained section.  It may come while backing
 * nodes are folded: either it is seen by sqcow2_index_store(), or it sees the
 * index that was stored.  q.lock is held.
 */
static int coroutine_fn GRAPH_RDLOCK begin_resize(BlockDriverState *bs,
                                                  bool shrinks, bool grows)
{
    BDRVSqcow2State *s = bs->opaque;
    bool valid = s->has_record && s->record.layer &&
                 s->record.flags & SQCOW2_FLAG_INDEX_VALID;
    bool invalidate = shrinks || (grows && s->mode != SQCOW2_MODE_INDEXED);
    int ret;

    ret = invalidate && (valid || s->record_unsure) ?
          sqcow2_invalidate_index(bs) : sqcow2_begin_change_locked(bs);
    if (ret == 0) {
        s->nb_resizing++;
        s->revalidate |= valid && shrinks;
    }
    return ret;
}

/*
 * After a shrink that failed, the disk may have entries 0 where qcow2 shows
 * the layers below.  The view of these is as right as ever.  So go on as with
 * an index that was built in memory: 0 and foreign entries mean "ask the layer
 * below".  Nothing is stored here; what the disk has of the L1 table is not
 * known, and whoever stores the index later writes that as well.
 *
 * q.lock is held.
 */
static void coroutine_fn GRAPH_RDLOCK end_resize(BlockDriverState *bs,
                                                 bool shrinks, bool failed)
{
    BDRVSqcow2State *s = bs->opaque;
    bool revalidate;

    if (shrinks && failed) {
        s->revalidate = false;
        if (s->mode == SQCOW2_MODE_INDEXED) {
            s->mode = SQCOW2_MODE_REBUILT;
        }
    }
    s->nb_resizing--;
    if (s->nb_resizing) {
        return;
    }
    revalidate = s->revalidate;
    s->revalidate = false;
    if (revalidate && qcow2_flush_caches(bs) == 0) {
        s->record.flags |= SQCOW2_FLAG_INDEX_VALID;
        if (sqcow2_record_write(bs) < 0) {
            s->record.flags &= ~SQCOW2_FLAG_INDEX_VALID;
        }
    }
}

static int coroutine_fn GRAPH_RDLOCK
sqcow2_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                   PreallocMode prealloc, BdrvRequestFlags flags, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    int64_t old_size = bs->total_sectors * BDRV_SECTOR_SIZE;
    bool shrinks = offset < old_size, grows = offset > old_size;
    int ret;

    qemu_co_mutex_lock(&s->q.lock);
    /*
     * S10: a longer view below must not come to light.  The block layer sees
     * to that where there is a backing node.
     */
    if (grows && s->mode != SQCOW2_MODE_OFF &&
        s->layers[s->layer - 1].virtual_size > old_size) {
        flags |= BDRV_REQ_ZERO_WRITE;
    }
    ret = begin_resize(bs, shrinks, grows);
    qemu_co_mutex_unlock(&s->q.lock);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not update the sQcow2 header");
        return ret;
    }
    ret = bdrv_qcow2.bdrv_co_truncate(bs, offset, exact, prealloc, flags,
                                      errp);
    qemu_co_mutex_lock(&s->q.lock);
    end_resize(bs, shrinks, ret < 0);
    qemu_co_mutex_unlock(&s->q.lock);
    return ret;
}

/*
 * Emptying may rebuild the file without any knowledge of our tables, so the
 * record lets go of them first; what then still names a table is nothing.
 */
static int GRAPH_RDLOCK sqcow2_make_empty(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record old = s->record;
    int ret;

    if (s->mode != SQCOW2_MODE_OFF) {
        return -ENOTSUP;        /* only commit does it, on the real graph */
    }
    ret = sqcow2_record_drop_tables(bs);
    if (ret < 0) {
        return ret;
    }
    /* With snapshots or bitmaps the file is not rebuilt, and they would leak */
    if (s->has_record) {
        sqcow2_free_tables(bs, &old, NULL);
    }
    return bdrv_qcow2.bdrv_make_empty(bs);
}

static int GRAPH_RDLOCK sqcow2_snapshot_create(BlockDriverState *bs,
                                               QEMUSnapshotInfo *sn_info)
{
    int ret = sqcow2_begin_change_locked(bs);

    return ret < 0 ? ret : bdrv_qcow2.bdrv_snapshot_create(bs, sn_info);
}

static int GRAPH_UNLOCKED sqcow2_snapshot_goto(BlockDriverState *bs,
                                               const char *snapshot_id)
{
    int ret;

    bdrv_graph_rdlock_main_loop();
    ret = sqcow2_begin_change_locked(bs);
    bdrv_graph_rdunlock_main_loop();
    return ret < 0 ? ret : bdrv_qcow2.bdrv_snapshot_goto(bs, snapshot_id);
}

static int GRAPH_RDLOCK sqcow2_snapshot_delete(BlockDriverState *bs,
                                               const char *snapshot_id,
                                               const char *name, Error **errp)
{
    int ret = sqcow2_begin_change_locked(bs);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not update the sQcow2 header");
        return ret;
    }
    return bdrv_qcow2.bdrv_snapshot_delete(bs, snapshot_id, name, errp);
}

/*
 * Another backing file: the index is for the old one.  A file without a
 * valid index is right with any.
 *
 * The new link stands for data that a job or a rebase has just copied, into
 * this file or into the one that is linked now; what names the data there may
 * still be in a cache.  Both go to disk first, or a cut would leave the link
 * without the data.
 */
static int coroutine_fn GRAPH_RDLOCK
sqcow2_co_change_backing_file(BlockDriverState *bs, const char *backing_file,
                              const char *backing_fmt)
{
    BDRVSqcow2State *s = bs->opaque;
    BlockDriverState *below = bs->backing ? bs->backing->bs : NULL;
    int ret = bdrv_co_flush(bs);

    /* Node by node: a flush stops at a node that nobody may write any more */
    for (; ret == 0 && below; below = bdrv_primary_bs(below)) {
        ret = bdrv_co_flush(below);
    }
    if (ret < 0) {
        return ret;
    }
    /* qcow2's code writes the header, with the record as it is in memory */
    qemu_co_mutex_lock(&s->q.lock);
    ret = sqcow2_invalidate_index(bs);
    if (ret == 0) {
        ret = sqcow2_begin_change_locked(bs);
    }
    if (ret == 0) {
        ret = bdrv_qcow2.bdrv_co_change_backing_file(bs, backing_file,
                                                     backing_fmt);
    }
    qemu_co_mutex_unlock(&s->q.lock);
    return ret;
}

void sqcow2_write_init(BlockDriver *drv)
{
    drv->bdrv_co_pwritev_part = sqcow2_co_pwritev_part;
    drv->bdrv_co_pwrite_zeroes = sqcow2_co_pwrite_zeroes;
    drv->bdrv_co_pdiscard = sqcow2_co_pdiscard;
    drv->bdrv_co_copy_range_to = sqcow2_co_copy_range_to;
    drv->bdrv_co_pwritev_compressed_part = sqcow2_co_pwritev_compressed_part;
    drv->bdrv_co_truncate = sqcow2_co_truncate;
    drv->bdrv_make_empty = sqcow2_make_empty;
    drv->bdrv_snapshot_create = sqcow2_snapshot_create;
    drv->bdrv_snapshot_goto = sqcow2_snapshot_goto;
    drv->bdrv_snapshot_delete = sqcow2_snapshot_delete;
    drv->bdrv_co_change_backing_file = sqcow2_co_change_backing_file;
}
