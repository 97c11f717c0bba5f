/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: the layer set, one protocol node over the files of all layers
 *
 * Serves address "layer << 46 | host_offset" of a space of 2^62 bytes, read
 * only.  A layer is a bare descriptor, or a file of a pool where there are too
 * few of them, or for other protocols than local files a child node.  So 1000
 * layers cost one node, and still the block layer gives padding for O_DIRECT,
 * draining, request tracking, statistics.
 *
 * The array of layers is handed over after the walk has opened and locked
 * them, grows by one with each live snapshot, is replaced by an activation,
 * and does not change while requests run: in each case they are drained; so
 * nothing is locked.
 * Requests go through the engine of the active image's file: threads,
 * linux-aio or io_uring.  Closing the node closes the descriptors, which
 * gives up the image locks.
 */
#include "qemu/osdep.h"
#include "qemu/iov.h"
#include "qemu/memalign.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "block/raw-aio.h"
#include "block/thread-pool.h"
#include "sqcow2-int.h"

#define DIRECT_ALIGNMENT 4096

/* As much as may be copied in the event loop: some 10 us */
#define CACHED_READ_BYTES (64 * KiB)
#define MAX_SKIP_SHIFT 6

typedef struct LayerSet {
    Sqcow2Layer *layers;
    uint32_t nb_layers;
    bool use_linux_aio;
    bool use_io_uring;

    /*
     * How many requests go to the engine before the page cache is asked
     * again, and how often in a row it had nothing.  Guesses: accessed
     * atomically, but a lost update does no harm.
     */
    uint32_t skip;
    uint32_t misses;
} LayerSet;

typedef struct ReadTask {
    int fd;
    uint64_t host_offset;
    QEMUIOVector *qiov;
} ReadTask;

/* Runs in a worker thread */
static int read_in_thread(void *opaque)
{
    ReadTask *task = opaque;
    size_t done = 0;

    while (done < task->qiov->size) {
        g_autofree struct iovec *rest = NULL;
        struct iovec *iov = task->qiov->iov;
        unsigned niov = task->qiov->niov;
        ssize_t ret;

        if (done) {
            rest = g_new(struct iovec, niov);
            niov = iov_copy(rest, niov, iov, niov, done,
                            task->qiov->size - done);
            iov = rest;
        }
        ret = RETRY_ON_EINTR(preadv(task->fd, iov, MIN(niov, IOV_MAX),
                                    task->host_offset + done));
        if (ret < 0 && errno == EINVAL && done) {
            ret = 0;            /* O_DIRECT behind an unaligned end of file */
        }
        if (ret < 0) {
            return -errno;
        }
        if (ret == 0) {
            qemu_iovec_memset(task->qiov, done, 0, task->qiov->size - done);
            break;
        }
        done += ret;
    }
    return 0;
}

/*
 * Lower layers do not change and many guests share them, so most of what is
 * asked for is in the page cache: take it from there, which is faster than
 * any engine.  After misses the next 2, 4, ... 64 requests are not tried, so
 * that a cold chain costs no system call more than one in 64 reads.
 * Returns false when the engine has to read.
 */
static bool read_page_cache(LayerSet *set, int fd, uint64_t host_offset,
                            const QEMUIOVector *qiov)
{
#ifdef RWF_NOWAIT
    uint32_t skip = qatomic_read(&set->skip);
    uint32_t misses;
    ssize_t ret;

    if (skip) {
        qatomic_set(&set->skip, skip - 1);
        return false;
    }
    if (qiov->size > CACHED_READ_BYTES) {
        return false;
    }
    ret = preadv2(fd, qiov->iov, MIN(qiov->niov, IOV_MAX), host_offset,
                  RWF_NOWAIT);
    if (ret == qiov->size) {
        qatomic_set(&set->misses, 0);
        return true;
    }
    misses = MIN(qatomic_read(&set->misses) + 1, MAX_SKIP_SHIFT);
    qatomic_set(&set->misses, misses);
    qatomic_set(&set->skip, 1 << misses);
#endif
    return false;
}

static int coroutine_fn GRAPH_RDLOCK
read_descriptor(BlockDriverState *bs, int fd, uint64_t host_offset,
                QEMUIOVector *qiov)
{
    LayerSet *set = bs->opaque;
    ReadTask task;

    if (!(bs->open_flags & BDRV_O_NOCACHE) &&
        read_page_cache(set, fd, host_offset, qiov)) {
        return 0;
    }
#ifdef CONFIG_LINUX_IO_URING
    if (set->use_io_uring &&
        aio_setup_linux_io_uring(qemu_get_current_aio_context(), NULL)) {
        return luring_co_submit(bs, fd, host_offset, qiov,
                                QEMU_AIO_READ, 0);
    }
#endif
#ifdef CONFIG_LINUX_AIO
    if (set->use_linux_aio &&
        aio_setup_linux_aio(qemu_get_current_aio_context(), NULL)) {
        return laio_co_submit(fd, host_offset, qiov, QEMU_AIO_READ, 0,
                              0);
    }
#endif
    task = (ReadTask) {
        .fd = fd,
        .host_offset = host_offset,
        .qiov = qiov,
    };
    return thread_pool_submit_co(read_in_thread, &task);
}

/* For O_DIRECT */
static bool is_aligned(const QEMUIOVector *qiov)
{
    for (int i = 0; i < qiov->niov; i++) {
        if ((uintptr_t)qiov->iov[i].iov_base % DIRECT_ALIGNMENT ||
            qiov->iov[i].iov_len % DIRECT_ALIGNMENT) {
            return false;
        }
    }
    return true;
}

/* O_DIRECT wants aligned memory, and padding takes requests apart. */
static int coroutine_fn GRAPH_RDLOCK
read_bounced(BlockDriverState *bs, int fd, uint64_t host_offset,
             QEMUIOVector *qiov)
{
    QEMUIOVector aligned;
    void *buf = qemu_try_blockalign(bs, qiov->size);
    int ret;

    if (!buf) {
        return -ENOMEM;
    }
    qemu_iovec_init_buf(&aligned, buf, qiov->size);
    ret = read_descriptor(bs, fd, host_offset, &aligned);
    if (ret >= 0) {
        qemu_iovec_from_buf(qiov, 0, buf, qiov->size);
    }
    qemu_vfree(buf);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
read_file(BlockDriverState *bs, int fd, uint64_t host_offset,
          QEMUIOVector *qiov)
{
    if (bs->open_flags & BDRV_O_NOCACHE && !is_aligned(qiov)) {
        return read_bounced(bs, fd, host_offset, qiov);
    }
    return read_descriptor(bs, fd, host_offset, qiov);
}

/* A layer that has no descriptor of its own */
static int coroutine_fn GRAPH_RDLOCK
read_indirectly(BlockDriverState *bs, Sqcow2Layer *layer, uint64_t host_offset,
                QEMUIOVector *qiov)
{
    int fd, ret;

    if (layer->child) {
        BLKDBG_CO_EVENT(layer->child, BLKDBG_READ_AIO);
        return bdrv_co_preadv(layer->child, host_offset, qiov->size, qiov, 0);
    }
    fd = sqcow2_pool_co_get(layer->pooled);
    if (fd < 0) {
        return fd;
    }
    ret = read_file(bs, fd, host_offset, qiov);
    sqcow2_pool_put(layer->pooled);
    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
layers_co_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
                 QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    LayerSet *set = bs->opaque;
    uint32_t index = offset >> SQCOW2_HOST_BITS;
    uint64_t host_offset = offset & (SQCOW2_MAX_HOST_OFFSET - 1);
    Sqcow2Layer *layer;

    if (index >= set->nb_layers ||
        host_offset + bytes > SQCOW2_MAX_HOST_OFFSET) {
        return -EINVAL;
    }
    layer = &set->layers[index];
    if (unlikely(layer->fd < 0)) {
        return read_indirectly(bs, layer, host_offset, qiov);
    }
    return read_file(bs, layer->fd, host_offset, qiov);
}

static int64_t coroutine_fn layers_co_getlength(BlockDriverState *bs)
{
    return (int64_t)SQCOW2_MAX_LAYERS << SQCOW2_HOST_BITS;
}

/* The space belongs to the files of the layers below. */
static int64_t coroutine_fn
layers_co_get_allocated_file_size(BlockDriverState *bs)
{
    return 0;
}

static int layers_open(BlockDriverState *bs, QDict *options, int flags,
                       Error **errp)
{
    return 0;
}

static void layers_close(BlockDriverState *bs)
{
    LayerSet *set = bs->opaque;

    sqcow2_layers_free(set->layers, set->nb_layers);
}

/*
 * The image above is about to be handed over to another process, which may
 * commit into the layers.  The image takes the locks again when it is active.
 */
static int layers_inactivate(BlockDriverState *bs)
{
    LayerSet *set = bs->opaque;

    for (uint32_t i = 0; i < set->nb_layers; i++) {
        if (set->layers[i].fd >= 0) {
            sqcow2_unlock_descriptor(set->layers[i].fd);
        } else if (set->layers[i].pooled) {
            sqcow2_pool_unlock(set->layers[i].pooled);
        }
    }
    return 0;
}

static void layers_refresh_limits(BlockDriverState *bs, Error **errp)
{
    /* The layers may lie on several file systems: a size that fits all */
    if (bs->open_flags & BDRV_O_NOCACHE) {
        bs->bl.request_alignment = DIRECT_ALIGNMENT;
        bs->bl.min_mem_alignment = DIRECT_ALIGNMENT;
        bs->bl.opt_mem_alignment = MAX(DIRECT_ALIGNMENT,
                                       qemu_real_host_page_size());
    } else {
        bs->bl.request_alignment = 1;
    }
}

static void GRAPH_RDLOCK
layers_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                  BlockReopenQueue *queue, uint64_t perm, uint64_t shared,
                  uint64_t *nperm, uint64_t *nshared)
{
    *nperm = BLK_PERM_CONSISTENT_READ;
    *nshared = BLK_PERM_ALL & ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
}

static BlockDriver bdrv_sqcow2_layers = {
    .format_name                    = "sqcow2-layers",
    .protocol_name                  = "sqcow2-layers",
    .instance_size                  = sizeof(LayerSet),
    .bdrv_open                      = layers_open,
    .bdrv_close                     = layers_close,
    .bdrv_inactivate                = layers_inactivate,
    .bdrv_child_perm                = layers_child_perm,
    .bdrv_refresh_limits            = layers_refresh_limits,
    .bdrv_co_preadv                 = layers_co_preadv,
    .bdrv_co_getlength              = layers_co_getlength,
    .bdrv_co_get_allocated_file_size = layers_co_get_allocated_file_size,
};

const char *sqcow2_file_option(BlockDriverState *bs, const char *name)
{
    return qdict_get_try_str(bdrv_skip_filters(bs->file->bs)->options, name);
}

BlockDriverState *sqcow2_layers_new(BlockDriverState *bs, Error **errp)
{
    int flags = bs->open_flags & BDRV_O_NOCACHE;
    const char *aio;
    BlockDriverState *set_bs;
    LayerSet *set;

    bdrv_graph_rdlock_main_loop();
    aio = sqcow2_file_option(bs, "aio");
    bdrv_graph_rdunlock_main_loop();

    flags |= bs->file->bs->open_flags &
             (BDRV_O_NOCACHE | BDRV_O_NATIVE_AIO | BDRV_O_IO_URING);
    set_bs = bdrv_new_open_driver(&bdrv_sqcow2_layers, NULL, flags, errp);
    if (!set_bs) {
        return NULL;
    }
    set = set_bs->opaque;
    set->use_io_uring = aio ? !strcmp(aio, "io_uring")
                            : flags & BDRV_O_IO_URING;
    set->use_linux_aio = aio ? !strcmp(aio, "native")
                             : flags & BDRV_O_NATIVE_AIO;
    return set_bs;
}

void sqcow2_layers_set(BlockDriverState *set_bs, Sqcow2Layer *layers,
                       uint32_t nb_layers)
{
    LayerSet *set = set_bs->opaque;

    sqcow2_layers_free(set->layers, set->nb_layers);
    set->layers = layers;
    set->nb_layers = nb_layers;
}

int sqcow2_layer_file_id(const Sqcow2Layer *layer, struct stat *st)
{
    if (layer->child) {
        return -ENOTSUP;
    }
    if (layer->pooled) {
        sqcow2_pool_file_id(layer->pooled, st);
        return 0;
    }
    return fstat(layer->fd, st) < 0 ? -errno : 0;
}

static void set_direct(BlockDriverState *set_bs, const Sqcow2Layer *layer,
                       bool direct)
{
    if (!(set_bs->open_flags & BDRV_O_NOCACHE)) {
        return;
    }
    /* Where it does not take, reads work all the same */
    if (layer->fd >= 0) {
        fcntl(layer->fd, F_SETFL, direct ? O_DIRECT : 0);
    } else if (layer->pooled) {
        sqcow2_pool_set_direct(layer->pooled, direct);
    }
}

void sqcow2_layers_set_direct(BlockDriverState *set_bs, bool direct)
{
    LayerSet *set = set_bs->opaque;

    for (uint32_t i = 0; i < set->nb_layers; i++) {
        set_direct(set_bs, &set->layers[i], direct);
    }
}

Sqcow2Layer *sqcow2_layers_append(BlockDriverState *set_bs,
                                  const Sqcow2Layer *layer)
{
    LayerSet *set = set_bs->opaque;

    set->layers = g_renew(Sqcow2Layer, set->layers, set->nb_layers + 1);
    set->layers[set->nb_layers++] = *layer;
    set_direct(set_bs, layer, true);
    return set->layers;
}

void sqcow2_layers_pop(BlockDriverState *set_bs)
{
    LayerSet *set = set_bs->opaque;
    Sqcow2Layer *layer = &set->layers[--set->nb_layers];

    assert(!layer->child);
    sqcow2_layer_free(layer);
}
