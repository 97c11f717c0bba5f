/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: the block driver
 *
 * A copy of qcow2's BlockDriver, made at start-up, with these callbacks
 * replaced: open and close (the record, the layer set), read and block
 * status (one lookup for the whole chain), those that write (a new stamp
 * first), create (a plain image first, then its index), info.
 *
 * docs/sqcow2.rst: the format.  sqcow2-int.h: the state, and a map of the
 * files.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qapi/error.h"
#include "block/dirty-bitmap.h"
#include "qapi/qapi-types-block-core.h"
#include "qapi/qapi-visit-block-core.h"
#include "qemu/option.h"
#include "qobject/qdict.h"
#include "sqcow2-int.h"

BlockDriver bdrv_sqcow2;

uint64_t sqcow2_incompat_mask(BlockDriverState *bs)
{
    return bs->drv == &bdrv_sqcow2 ? SQCOW2_INCOMPAT_INDEX : 0;
}

static int sqcow2_probe(const uint8_t *buf, int buf_size, const char *filename)
{
    const QCowHeader *h = (const QCowHeader *)buf;

    if (buf_size < sizeof(*h) || be32_to_cpu(h->magic) != QCOW_MAGIC) {
        return 0;
    }
    if (SQCOW2_IS_QCOW2 ||
        (be32_to_cpu(h->version) == 3 &&
         be64_to_cpu(h->incompatible_features) & SQCOW2_INCOMPAT_INDEX)) {
        return 101;             /* qcow2 says 100 to everything of its magic */
    }
    return 0;
}

/* The budget of our cache is that of qcow2's L2 cache, if the user set one. */
static uint64_t cache_budget(QDict *options)
{
    QObject *value = qdict_get(options, QCOW2_OPT_L2_CACHE_SIZE);
    uint64_t bytes = 0;

    if (value && qobject_type(value) == QTYPE_QSTRING) {
        qemu_strtosz(qdict_get_str(options, QCOW2_OPT_L2_CACHE_SIZE), NULL,
                     &bytes);
    } else if (value && qobject_type(value) == QTYPE_QNUM) {
        bytes = qdict_get_int(options, QCOW2_OPT_L2_CACHE_SIZE);
    }
    return bytes;
}

static int sqcow2_open(BlockDriverState *bs, QDict *options, int flags,
                       Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    int ret;

    s->cache_bytes = cache_budget(options);
    ret = bdrv_qcow2.bdrv_open(bs, options, flags, errp);
    if (ret < 0) {
        return ret;
    }
    sqcow2_record_load(bs);
    if (s->has_record && s->record.flags & SQCOW2_FLAG_WRITING &&
        bdrv_is_writable(bs) && !(flags & BDRV_O_INACTIVE)) {
        /*
         * A session that was not closed.  Its end is a state of its own: a
         * copy of the file may stand in the middle of it (S3).
         */
        bdrv_graph_rdlock_main_loop();
        ret = sqcow2_begin_change_locked(bs);
        bdrv_graph_rdunlock_main_loop();
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not update the sQcow2 header");
            bdrv_qcow2.bdrv_close(bs);
        }
    }
    return ret;
}

/*
 * The session is over once qcow2's caches are on disk.  Whoever writes next
 * takes a new stamp.
 */
static int GRAPH_UNLOCKED end_session(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    int ret;

    if (!s->changed) {
        return 0;
    }
    bdrv_graph_rdlock_main_loop();
    ret = qcow2_flush_caches(bs);
    if (ret == 0) {
        s->record.flags &= ~SQCOW2_FLAG_WRITING;
        ret = sqcow2_record_write(bs);
        s->changed = false;
    }
    bdrv_graph_rdunlock_main_loop();
    return ret;
}

/* The layer set stays: it goes with the node's children. */
static void free_index(BDRVSqcow2State *s)
{
    s->mode = SQCOW2_MODE_OFF;
    sqcow2_view_free(&s->view);
    sqcow2_cache_free(s->cache);
    s->cache = NULL;
    g_clear_pointer(&s->distrust, g_free);
}

static void GRAPH_UNLOCKED sqcow2_close(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    bool inactive = bs->open_flags & BDRV_O_INACTIVE;

    sqcow2_idle_stop(bs);
    free_index(s);
    if (!inactive) {
        end_session(bs);
    }
    bdrv_qcow2.bdrv_close(bs);
}

static int GRAPH_UNLOCKED
sqcow2_reopen_prepare(BDRVReopenState *state, BlockReopenQueue *queue,
                      Error **errp)
{
    BDRVSqcow2State *s = state->bs->opaque;
    int ret;

    if (state->flags & BDRV_O_RDWR && s->mode != SQCOW2_MODE_OFF &&
        sqcow2_layers_are_pooled(s->layers, s->layer)) {
        error_setg(errp, "'%s' has more layers than files may be open; raise "
                   "the limit (ulimit -n) above the number of layers and "
                   "start again to write to it", state->bs->filename);
        return -EMFILE;
    }
    ret = bdrv_qcow2.bdrv_reopen_prepare(state, queue, errp);

    /* A node that becomes read-only can close its session only now */
    if (ret == 0 && !(state->flags & BDRV_O_RDWR)) {
        ret = end_session(state->bs);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not update the sQcow2 header");
            bdrv_qcow2.bdrv_reopen_abort(state);
        }
    }
    return ret;
}

static void sqcow2_reopen_commit(BDRVReopenState *state)
{
    BDRVSqcow2State *s = state->bs->opaque;

    bdrv_qcow2.bdrv_reopen_commit(state);
    if (s->mode != SQCOW2_MODE_OFF) {
        sqcow2_renew_cache(state->bs);  /* for a new slice size, interval */
    }
    if (s->mode == SQCOW2_MODE_REBUILT && state->flags & BDRV_O_RDWR) {
        sqcow2_fold_later();            /* the index can be stored now */
    }
}

static void GRAPH_RDLOCK
sqcow2_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                  BlockReopenQueue *queue, uint64_t perm, uint64_t shared,
                  uint64_t *nperm, uint64_t *nshared)
{
    if (c && !strcmp(c->name, "layers")) {
        *nperm = BLK_PERM_CONSISTENT_READ;
        *nshared = BLK_PERM_ALL;
        return;
    }
    bdrv_default_perms(bs, c, role, queue, perm, shared, nperm, nshared);
}

/*
 * A flat node takes no backing node.  Permissions are refreshed by all who
 * attach one, also where the block layer asks for a backing node only; and by
 * who resizes it, perhaps while it is folded and still has the old one.
 */
static int GRAPH_RDLOCK sqcow2_check_perm(BlockDriverState *bs, uint64_t perm,
                                          uint64_t shared, Error **errp)
{
    if (bs->backing && sqcow2_takes_no_backing(bs)) {
        error_setg(errp, "Node '%s' already has a backing chain",
                   bs->node_name);
        return -EINVAL;
    }
    return 0;
}

/* The layer set is not for the user to name, nor for json: file names. */
static void GRAPH_RDLOCK
sqcow2_gather_child_options(BlockDriverState *bs, QDict *target,
                            bool backing_overridden)
{
    BdrvChild *child;

    QLIST_FOREACH(child, &bs->children, next) {
        if (strcmp(child->name, "layers") &&
            (child != bs->backing || backing_overridden)) {
            qdict_put(target, child->name,
                      qobject_ref(child->bs->full_open_options));
        }
    }
    if (backing_overridden && !bs->backing) {
        qdict_put_null(target, "backing");
    }
}

/* Never the chain: asked for each request of some devices. */
static bool coroutine_fn GRAPH_RDLOCK
sqcow2_co_is_inserted(BlockDriverState *bs)
{
    return bdrv_co_is_inserted(bs->file->bs);
}

static int GRAPH_RDLOCK sqcow2_has_zero_init(BlockDriverState *bs)
{
    return sqcow2_is_flat(bs) ? 0 : bdrv_qcow2.bdrv_has_zero_init(bs);
}

static Sqcow2IndexState index_state(BDRVSqcow2State *s)
{
    switch (s->mode) {
    case SQCOW2_MODE_INDEXED:
        return SQCOW2_INDEX_STATE_TRUSTED;
    case SQCOW2_MODE_REBUILT:
        return SQCOW2_INDEX_STATE_REBUILT;
    default:
        return s->has_record && s->record.flags & SQCOW2_FLAG_INDEX_VALID ?
               SQCOW2_INDEX_STATE_UNUSED : SQCOW2_INDEX_STATE_NONE;
    }
}

static ImageInfoSpecific * GRAPH_RDLOCK
sqcow2_get_specific_info(BlockDriverState *bs, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    ImageInfoSpecific *qcow2_info, *info;
    ImageInfoSpecificSqcow2 *sqcow2;

    qcow2_info = bdrv_qcow2.bdrv_get_specific_info(bs, errp);
    if (!qcow2_info) {
        return NULL;
    }
    sqcow2 = g_new0(ImageInfoSpecificSqcow2, 1);
    *qapi_ImageInfoSpecificSqcow2_base(sqcow2) = *qcow2_info->u.qcow2.data;
    g_free(qcow2_info->u.qcow2.data);
    g_free(qcow2_info);

    sqcow2->index_state = index_state(s);
    sqcow2->index_reason = g_strdup(s->distrust);
    if (s->has_record) {
        GString *stamp = g_string_new(NULL);

        for (int i = 0; i < SQCOW2_STAMP_SIZE; i++) {
            g_string_append_printf(stamp, "%02x", s->record.stamp[i]);
        }
        sqcow2->stamp = g_string_free(stamp, false);
    }
    if (s->mode != SQCOW2_MODE_OFF ||
        (s->has_record && s->record.flags & SQCOW2_FLAG_INDEX_VALID)) {
        int layer = s->mode != SQCOW2_MODE_OFF ? s->layer : s->record.layer;

        sqcow2->has_layer = sqcow2->has_layers = true;
        sqcow2->layer = layer;
        sqcow2->layers = layer + 1;
    }

    info = g_new0(ImageInfoSpecific, 1);
    info->type = IMAGE_INFO_SPECIFIC_KIND_SQCOW2;
    info->u.sqcow2.data = sqcow2;
    return info;
}

static void coroutine_fn GRAPH_RDLOCK
sqcow2_co_invalidate_cache(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record old = s->record;
    bool had_record = s->has_record;
    BdrvDirtyBitmap *bitmap;

    sqcow2_idle_stop(bs);
    if (sqcow2_is_flat(bs)) {
        /*
         * Bitmaps that came with a migration, or stayed here after one, are
         * not the image's; if activation fails, they are not to be stored in
         * it.  bdrv_activate() takes this back if it succeeds.
         */
        FOR_EACH_DIRTY_BITMAP(bs, bitmap) {
            bdrv_dirty_bitmap_skip_store(bitmap, true);
        }
    }
    bdrv_qcow2.bdrv_co_invalidate_cache(bs, errp);
    if (!*errp) {
        sqcow2_record_load(bs);
        s->changed = false;
        if (sqcow2_is_flat(bs)) {
            sqcow2_reactivate(bs, had_record ? &old : NULL, errp);
        }
    }
    if (!bs->drv) {
        /* Also when an index was to be stored, and qcow2 is too corrupt */
        if (!*errp) {
            error_setg(errp, "%s: The image is corrupt; 'qemu-img check -r "
                       "all' may help", bs->filename);
        }
        free_index(s);          /* our close is never called */
        return;
    }
    if (*errp) {
        return;
    }
    if (!s->idle_timer) {       /* a view that was made anew has started it */
        sqcow2_idle_start(bs);
    }
}

static int GRAPH_RDLOCK sqcow2_inactivate(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    int ret = bdrv_qcow2.bdrv_inactivate(bs);

    if (ret == 0 && s->changed) {
        s->record.flags &= ~SQCOW2_FLAG_WRITING;
        ret = sqcow2_record_write(bs);
        /* Whoever writes next takes a new stamp */
        s->changed = false;
    }
    return ret;
}

/* In the test build: version 2, and tests that look for bytes in the file */
static bool is_to_be_plain(const BDRVQcow2State *q)
{
    return SQCOW2_IS_QCOW2 && (q->qcow_version < 3 || getenv("SQCOW2_PLAIN"));
}

int coroutine_fn sqcow2_index_new_image(BlockDriverState *bs, Error **errp)
{
    int ret = 0;

    if (bs->drv == &bdrv_sqcow2 && !is_to_be_plain(bs->opaque)) {
        bdrv_graph_co_rdlock();
        ret = sqcow2_index_create(bs, errp);
        bdrv_graph_co_rdunlock();
    }
    /* Creation's callers have a text of their own for this one */
    return ret == -EFBIG ? -EINVAL : ret;
}

/* qcow2's creation does it all; it reads our options as its own. */
QEMU_BUILD_BUG_ON(sizeof(BlockdevCreateOptionsSqcow2) !=
                  sizeof(BlockdevCreateOptionsQcow2));

static int coroutine_fn GRAPH_UNLOCKED
sqcow2_co_create(BlockdevCreateOptions *create_options, Error **errp)
{
    BlockdevCreateOptionsQcow2 *opts =
        qapi_BlockdevCreateOptionsSqcow2_base(&create_options->u.sqcow2);
    BlockDriverState *bs;
    int bits;

    if (!SQCOW2_IS_QCOW2 && opts->has_version &&
        opts->version != BLOCKDEV_QCOW2_VERSION_V3) {
        error_setg(errp, "An sqcow2 image needs version=v3");
        return -EINVAL;
    }
    if (!opts->has_cluster_size && opts->backing_file) {
        bs = bdrv_co_open_blockdev_ref(opts->file, errp);
        if (!bs) {
            return -EIO;
        }
        bits = sqcow2_peek_cluster_bits(bs->filename, opts->backing_file,
                                        opts->has_backing_fmt ?
                                        BlockdevDriver_str(opts->backing_fmt) :
                                        NULL);
        opts->has_cluster_size = bits;
        opts->cluster_size = bits ? 1ULL << bits : 0;
        bdrv_co_unref(bs);
    }
    return bdrv_qcow2.bdrv_co_create(create_options, errp);
}

static int coroutine_fn GRAPH_UNLOCKED
sqcow2_co_create_opts(BlockDriver *drv, const char *filename, QemuOpts *opts,
                      Error **errp)
{
    const char *compat = qemu_opt_get(opts, BLOCK_OPT_COMPAT_LEVEL);
    const char *backing = qemu_opt_get(opts, BLOCK_OPT_BACKING_FILE);
    int bits;

    if (!SQCOW2_IS_QCOW2 && compat && strcmp(compat, "1.1") &&
        strcmp(compat, "v3")) {
        error_setg(errp, "An sqcow2 image needs compat=1.1");
        return -EINVAL;
    }
    if (backing && !qemu_opt_find(opts, BLOCK_OPT_CLUSTER_SIZE)) {
        bits = sqcow2_peek_cluster_bits(filename, backing,
                                        qemu_opt_get(opts,
                                                     BLOCK_OPT_BACKING_FMT));
        if (bits) {
            qemu_opt_set_number(opts, BLOCK_OPT_CLUSTER_SIZE, 1ULL << bits,
                                &error_abort);
        }
    }
    return bdrv_qcow2.bdrv_co_create_opts(drv, filename, opts, errp);
}

static int coroutine_fn GRAPH_UNLOCKED_PTR
(*qcow2_co_create_opts)(BlockDriver *drv, const char *filename, QemuOpts *opts,
                        Error **errp);

/* Also for block.c, which knows qcow2's driver by its variable */
static int coroutine_fn GRAPH_UNLOCKED
create_opts_as_qcow2(BlockDriver *drv, const char *filename, QemuOpts *opts,
                     Error **errp)
{
    return qcow2_co_create_opts(&bdrv_sqcow2, filename, opts, errp);
}

/* Its info is what tests of qcow2 look at; some need the real graph. */
static void take_place_of_qcow2(void)
{
    bdrv_sqcow2.format_name = bdrv_qcow2.format_name;
    bdrv_qcow2.format_name = "qcow2-replaced";
    qcow2_co_create_opts = bdrv_qcow2.bdrv_co_create_opts;
    bdrv_qcow2.bdrv_co_create_opts = create_opts_as_qcow2;
    bdrv_sqcow2.bdrv_get_specific_info = bdrv_qcow2.bdrv_get_specific_info;
    if (getenv("SQCOW2_REAL_GRAPH")) {
        sqcow2_disable_flat(true);
    }
}

static void bdrv_sqcow2_init(void)
{
    bdrv_sqcow2 = bdrv_qcow2;
    memset(&bdrv_sqcow2.list, 0, sizeof(bdrv_sqcow2.list));

    bdrv_sqcow2.format_name = "sqcow2";
    bdrv_sqcow2.instance_size = sizeof(BDRVSqcow2State);
    bdrv_sqcow2.bdrv_probe = sqcow2_probe;
    bdrv_sqcow2.bdrv_open = sqcow2_open;
    bdrv_sqcow2.bdrv_close = sqcow2_close;
    bdrv_sqcow2.bdrv_reopen_prepare = sqcow2_reopen_prepare;
    bdrv_sqcow2.bdrv_reopen_commit = sqcow2_reopen_commit;
    bdrv_sqcow2.bdrv_gather_child_options = sqcow2_gather_child_options;
    bdrv_sqcow2.bdrv_check_perm = sqcow2_check_perm;
    bdrv_sqcow2.bdrv_child_perm = sqcow2_child_perm;
    bdrv_sqcow2.bdrv_co_create = sqcow2_co_create;
    bdrv_sqcow2.bdrv_co_create_opts = sqcow2_co_create_opts;
    bdrv_sqcow2.bdrv_co_is_inserted = sqcow2_co_is_inserted;
    bdrv_sqcow2.bdrv_has_zero_init = sqcow2_has_zero_init;
    bdrv_sqcow2.bdrv_get_specific_info = sqcow2_get_specific_info;
    bdrv_sqcow2.bdrv_co_invalidate_cache = sqcow2_co_invalidate_cache;
    bdrv_sqcow2.bdrv_inactivate = sqcow2_inactivate;
    bdrv_sqcow2.bdrv_co_preadv_part = sqcow2_co_preadv_part;
    bdrv_sqcow2.bdrv_co_block_status = sqcow2_co_block_status;
    bdrv_sqcow2.bdrv_co_copy_range_from = sqcow2_co_copy_range_from;
    bdrv_sqcow2.bdrv_co_check = sqcow2_co_check;
    bdrv_sqcow2.bdrv_amend_options = sqcow2_amend_options;
    bdrv_sqcow2.amend_opts = sqcow2_amend_opts();
    sqcow2_write_init(&bdrv_sqcow2);

    if (SQCOW2_IS_QCOW2) {
        take_place_of_qcow2();
    }
    bdrv_register(&bdrv_sqcow2);
}

block_init(bdrv_sqcow2_init);
