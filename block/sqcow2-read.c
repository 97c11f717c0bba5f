/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: read path and block status
 *
 * A read is cut into extents.  For each: one lookup under q.lock, then, with
 * the lock dropped, one read of the owner's file - the active image's through
 * the data file child, a lower layer's through the layer set.  A request of
 * one extent allocates nothing; others run up to eight reads at a time.
 *
 * A node that is not flat, and VM state, go to qcow2's own functions.
 */
#include "qemu/osdep.h"
#include "qemu/iov.h"
#include "qemu/memalign.h"
#include "block/aio_task.h"
#include "sqcow2-int.h"

typedef struct ReadExtent {
    AioTask task;
    BlockDriverState *bs;
    Sqcow2Extent extent;
    uint64_t guest_offset;
    QEMUIOVector *qiov;
    size_t qiov_offset;
} ReadExtent;

/* VM state lies behind the last L1 entry of the disk; S10 */
static bool is_vmstate(BDRVSqcow2State *s, uint64_t guest_offset)
{
    return guest_offset >= qcow2_vm_state_offset(&s->q);
}

/* Say which of the layers it is: qcow2 has but one. */
static int coroutine_fn GRAPH_RDLOCK undecodable(const ReadExtent *r)
{
    BDRVSqcow2State *s = r->bs->opaque;

    qemu_co_mutex_lock(&s->q.lock);
    qcow2_signal_corruption(r->bs, false, -1, -1, "The compressed cluster at "
                            "guest offset 0x%" PRIx64 " cannot be decoded, in "
                            "layer %u '%s'", r->guest_offset, r->extent.owner,
                            s->layers[r->extent.owner].filename);
    qemu_co_mutex_unlock(&s->q.lock);
    return -EIO;
}

static int coroutine_fn GRAPH_RDLOCK
read_compressed(const ReadExtent *r)
{
    BDRVSqcow2State *s = r->bs->opaque;
    const Sqcow2Extent *e = &r->extent;
    g_autofree uint8_t *compressed = NULL;
    uint8_t *cluster;
    uint64_t coffset;
    int csize, ret;

    qcow2_parse_compressed_l2_entry(r->bs, e->host_offset, &coffset, &csize);
    if (coffset + csize > SQCOW2_MAX_HOST_OFFSET) {
        return undecodable(r);
    }
    compressed = g_try_malloc(csize);
    cluster = qemu_try_blockalign(r->bs, s->q.cluster_size);
    if (!compressed || !cluster) {
        ret = -ENOMEM;
        goto out;
    }
    ret = bdrv_co_pread(s->set, sqcow2_set_offset(e->owner, coffset), csize,
                        compressed, 0);
    if (ret < 0) {
        goto out;
    }
    if (qcow2_co_decompress_type(r->bs, s->layers[e->owner].compression_type,
                                 cluster, s->q.cluster_size, compressed,
                                 csize) < 0) {
        ret = undecodable(r);
        goto out;
    }
    qemu_iovec_from_buf(r->qiov, r->qiov_offset, cluster +
                        offset_into_cluster(&s->q, r->guest_offset),
                        e->bytes);
    ret = 0;
out:
    qemu_vfree(cluster);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK read_extent(const ReadExtent *r)
{
    BDRVSqcow2State *s = r->bs->opaque;
    const Sqcow2Extent *e = &r->extent;

    switch (e->kind) {
    case SQCOW2_DATA:
        if (e->owner == s->layer) {
            BLKDBG_CO_EVENT(r->bs->file, BLKDBG_READ_AIO);
            return bdrv_co_preadv_part(s->q.data_file, e->host_offset,
                                       e->bytes, r->qiov, r->qiov_offset, 0);
        }
        BLKDBG_CO_EVENT(r->bs->file, BLKDBG_READ_BACKING_AIO);
        return bdrv_co_preadv_part(s->set,
                                   sqcow2_set_offset(e->owner, e->host_offset),
                                   e->bytes, r->qiov, r->qiov_offset, 0);
    case SQCOW2_COMPRESSED:
        if (e->owner == s->layer) {
            return bdrv_qcow2.bdrv_co_preadv_part(r->bs, r->guest_offset,
                                                  e->bytes, r->qiov,
                                                  r->qiov_offset, 0);
        }
        return read_compressed(r);
    default:
        qemu_iovec_memset(r->qiov, r->qiov_offset, 0, e->bytes);
        return 0;
    }
}

/* The graph lock is held by sqcow2_co_preadv_part() until this ends. */
static int coroutine_fn GRAPH_RDLOCK read_extent_entry(AioTask *task)
{
    return read_extent(container_of(task, ReadExtent, task));
}

int coroutine_fn
sqcow2_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset,
                      BdrvRequestFlags flags)
{
    BDRVSqcow2State *s = bs->opaque;
    AioTaskPool *pool = NULL;
    int ret = 0;

    if (s->mode == SQCOW2_MODE_OFF || is_vmstate(s, offset)) {
        return bdrv_qcow2.bdrv_co_preadv_part(bs, offset, bytes, qiov,
                                              qiov_offset, flags);
    }

    while (bytes && aio_task_pool_status(pool) == 0) {
        ReadExtent r = {
            .task.func = read_extent_entry,
            .bs = bs,
            .guest_offset = offset,
            .qiov = qiov,
            .qiov_offset = qiov_offset,
        };

        qemu_co_mutex_lock(&s->q.lock);
        ret = sqcow2_lookup(bs, offset, bytes, &r.extent);
        qemu_co_mutex_unlock(&s->q.lock);
        if (ret < 0) {
            break;
        }
        offset += r.extent.bytes;
        qiov_offset += r.extent.bytes;
        bytes -= r.extent.bytes;

        if (!pool && bytes) {
            pool = aio_task_pool_new(QCOW2_MAX_WORKERS);
        }
        if (pool) {
            ReadExtent *task = g_memdup2(&r, sizeof(r));

            aio_task_pool_start_task(pool, &task->task);
        } else {
            ret = read_extent(&r);
        }
    }

    if (pool) {
        aio_task_pool_wait_all(pool);
        if (ret == 0) {
            ret = aio_task_pool_status(pool);
        }
        aio_task_pool_free(pool);
    }
    return ret;
}

/*
 * A raw layer owns its holes as well.  *@pnum, a multiple of the alignment of
 * requests, becomes what is alike, and stays such a multiple.
 */
static bool GRAPH_RDLOCK is_raw_hole(BlockDriverState *bs,
                                     const Sqcow2Extent *e, int64_t *pnum)
{
    BDRVSqcow2State *s = bs->opaque;
    const Sqcow2Layer *layer = &s->layers[e->owner];
    uint32_t align = bs->bl.request_alignment;
    uint64_t alike = *pnum;
    bool hole;

    if (layer->kind != SQCOW2_LAYER_RAW) {
        return false;
    }
    hole = sqcow2_layer_is_hole(layer, e->host_offset, &alike);
    if (hole && alike < align) {
        hole = false;
    }
    *pnum = MIN(*pnum, hole ? QEMU_ALIGN_DOWN(alike, align) :
                              QEMU_ALIGN_UP(alike, align));
    return hole;
}

int coroutine_fn
sqcow2_co_block_status(BlockDriverState *bs, bool want_zero, int64_t offset,
                       int64_t bytes, int64_t *pnum, int64_t *map,
                       BlockDriverState **file)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Extent extent;
    int ret;

    if (s->mode == SQCOW2_MODE_OFF) {
        return bdrv_qcow2.bdrv_co_block_status(bs, want_zero, offset, bytes,
                                               pnum, map, file);
    }
    qemu_co_mutex_lock(&s->q.lock);
    ret = sqcow2_lookup(bs, offset, bytes, &extent);
    qemu_co_mutex_unlock(&s->q.lock);
    if (ret < 0) {
        return ret;
    }
    if (extent.kind != SQCOW2_ABSENT && extent.owner == s->layer) {
        return bdrv_qcow2.bdrv_co_block_status(bs, want_zero, offset,
                                               extent.bytes, pnum, map, file);
    }
    /* There is no node for the owner's file: never a map or a file */
    *pnum = extent.bytes;
    switch (extent.kind) {
    case SQCOW2_DATA:
        if (want_zero && is_raw_hole(bs, &extent, pnum)) {
            return BDRV_BLOCK_ZERO;
        }
        return BDRV_BLOCK_DATA;
    case SQCOW2_COMPRESSED:
        return BDRV_BLOCK_DATA | BDRV_BLOCK_COMPRESSED;
    case SQCOW2_ZERO:
        return BDRV_BLOCK_ZERO;
    default:
        return 0;
    }
}

int coroutine_fn
sqcow2_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                          int64_t src_offset, BdrvChild *dst,
                          int64_t dst_offset, int64_t bytes,
                          BdrvRequestFlags read_flags,
                          BdrvRequestFlags write_flags)
{
    BDRVSqcow2State *s = bs->opaque;

    /* qcow2 would copy zeros for what another layer owns */
    if (s->mode != SQCOW2_MODE_OFF) {
        return -ENOTSUP;
    }
    return bdrv_qcow2.bdrv_co_copy_range_from(bs, src, src_offset, dst,
                                              dst_offset, bytes, read_flags,
                                              write_flags);
}
