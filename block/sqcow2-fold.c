/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: fold backing nodes that nobody named back into the layer set
 *
 * A live snapshot puts a new node on the old one, and jobs on the chain open
 * real backing nodes.  Once such an operation is over the nodes below serve
 * nobody but the node above, which can read their files itself.  Folding
 * replaces them by a layer set.  Two ways:
 *   absorb   the node directly below is flat, or a base, and its index is
 *            valid: its layer set moves up by one node, and its file becomes
 *            one more layer.  Constant work, whatever the chain's length; a
 *            live snapshot takes this way.
 *   reopen   the chain is walked and opened flat, as at open; then the nodes
 *            go.
 * On failure the nodes stay, and reads are right as ever.
 *
 * A node below may go if it has no name but the one that QEMU made up, is
 * read-only, has no parent or reference but the node above, no bitmap and no
 * filter in it, and if it is the file that the link in the header above names:
 * the layer set follows those links and nothing else.  A node on which a job
 * works is not folded; that is done when the job ends.  Whatever may have
 * left something to fold asks for it; it is done from the main loop.
 *
 * Then an index is also stored in each node that should have one and became
 * writable, or a base, only after it was opened.
 *
 * Everything here runs in the main thread; the nodes are drained.
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/main-loop.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "block/dirty-bitmap.h"
#include "sqcow2-int.h"

/* Has nobody but its one parent anything to do with @bs? */
static bool GRAPH_RDLOCK is_anonymous(BlockDriverState *bs)
{
    return bs->drv && !bs->drv->is_filter && bs->node_name[0] == '#' &&
           bs->refcnt == 1 && !bdrv_has_named_bitmaps(bs);
}

static bool same_file(const char *a, const char *b)
{
    struct stat st_a, st_b;

    strstart(a, "file:", &a);
    strstart(b, "file:", &b);
    return !strcmp(a, b) ||
           (!stat(a, &st_a) && !stat(b, &st_b) &&
            st_a.st_dev == st_b.st_dev && st_a.st_ino == st_b.st_ino);
}

/* Is the backing node of @bs the file that the header of @bs names? */
static bool GRAPH_RDLOCK backing_is_linked(BlockDriverState *bs)
{
    BlockDriverState *file = bs->backing->bs->file->bs;
    g_autofree char *linked = bdrv_get_full_backing_filename(bs, NULL);

    bdrv_refresh_filename(file);
    return linked && same_file(linked, file->filename);
}

/* Options that the header above, and so the layer set, knows nothing of */
static bool GRAPH_RDLOCK has_own_options(BlockDriverState *bs)
{
    BlockDriverState *lower = bs->backing->bs;

    return sqcow2_has_backing_options(bs->explicit_options) ||
           strcmp(bs->backing_format, lower->drv->format_name) ||
           qdict_haskey(lower->options, "offset") ||
           qdict_haskey(lower->options, "size");
}

/* May the backing node of @bs go?  Not asked of the nodes further below. */
static bool GRAPH_RDLOCK may_go(BlockDriverState *bs)
{
    BlockDriverState *lower = bs->backing->bs;

    return !bs->backing->frozen && is_anonymous(lower) &&
           bdrv_is_read_only(lower) && lower->file &&
           is_anonymous(lower->file->bs) &&
           QLIST_EMPTY(&lower->file->bs->children) &&
           !has_own_options(bs) && backing_is_linked(bs);
}

/* Jobs block operations on their nodes, or on a filter that they put on top */
static bool GRAPH_RDLOCK has_job(BlockDriverState *bs)
{
    BdrvChild *c;

    if (bdrv_op_is_blocked(bs, BLOCK_OP_TYPE_STREAM, NULL)) {
        return true;
    }
    QLIST_FOREACH(c, &bs->parents, next_parent) {
        BlockDriverState *above = c->klass == &child_of_bds ? c->opaque : NULL;

        if (above && above->drv && above->drv->is_filter && has_job(above)) {
            return true;
        }
    }
    return false;
}

/* Can @bs read all that its backing nodes read, and may they go? */
static bool GRAPH_RDLOCK is_foldable(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    if (bs->drv != &bdrv_sqcow2 || !bs->backing || sqcow2_is_flat(bs) ||
        s->keep_graph || !sqcow2_is_indexable(bs) || has_job(bs) ||
        bs->open_flags & (BDRV_O_COPY_ON_READ | BDRV_O_INACTIVE)) {
        return false;
    }
    for (; bs->backing; bs = bs->backing->bs) {
        if (!may_go(bs)) {
            return false;
        }
    }
    /* The links must end where the nodes do */
    return sqcow2_is_flat(bs) || !bs->auto_backing_file[0];
}

/* Its index is valid, and nobody has written since; S8 holds below it. */
static bool has_sealed_index(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    return bs->drv == &bdrv_sqcow2 && s->has_record && !s->changed &&
           s->record.flags == SQCOW2_FLAG_INDEX_VALID &&
           (s->mode == SQCOW2_MODE_INDEXED ||
            (s->mode == SQCOW2_MODE_OFF && !s->record.layer &&
             !bs->backing && !bs->auto_backing_file[0]));
}

/*
 * Open the file of @lower as a layer, verify that it is in the state that the
 * node knows, and share its view.
 */
static int open_layer(BlockDriverState *bs, BlockDriverState *lower,
                      Sqcow2Chain *chain, Sqcow2View *view, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque, *ls = lower->opaque;
    Sqcow2WalkOptions opts = {
        .backing = lower->file->bs->filename,
        .backing_fmt = "sqcow2",
        .cluster_bits = s->q.cluster_bits,
        .one_hop = true,
    };
    int ret;

    bdrv_graph_rdlock_main_loop();
    opts.locking = sqcow2_locking_wanted(bs);
    bdrv_graph_rdunlock_main_loop();
    ret = sqcow2_walk(&opts, chain, errp);
    if (ret < 0) {
        return ret;
    }
    if (!chain->top_has_record ||
        chain->top_record.layer != ls->record.layer ||
        chain->top_record.flags != ls->record.flags ||
        memcmp(chain->top_record.stamp, ls->record.stamp,
               SQCOW2_STAMP_SIZE)) {
        error_setg(errp, "'%s' is not in the state that it was left in",
                   chain->layers[0].filename);
        ret = -EINVAL;
    } else {
        /* It may be a copy by now; of layers further below nobody asks */
        bdrv_graph_rdlock_main_loop();
        ret = sqcow2_check_is_file(&chain->layers[0], 0, lower, errp);
        bdrv_graph_rdunlock_main_loop();
    }
    if (ret == 0) {
        ret = sqcow2_view_share(&chain->layers[0], &chain->top_record,
                                s->q.cluster_bits, view, errp);
    }
    if (ret < 0) {
        sqcow2_chain_free(chain);
    }
    return ret;
}

/*
 * Move the layer set of @lower to @bs, or make a new one; add @layer to it, and
 * take @view over.  Drained nodes may still be resized, in their own thread,
 * and a resize reads and writes: so this is one step for all who hold the graph
 * lock.
 */
static int take_layers(BlockDriverState *bs, BlockDriverState *lower,
                       const Sqcow2Layer *layer, const Sqcow2View *view,
                       Error **errp)
{
    BDRVSqcow2State *s = bs->opaque, *ls = lower->opaque;
    BlockDriverState *set_bs;
    int ret;

    if (ls->set) {
        set_bs = ls->set->bs;
        bdrv_ref(set_bs);
    } else {
        set_bs = sqcow2_layers_new(bs, errp);
        if (!set_bs) {
            return -EINVAL;
        }
    }
    bdrv_graph_wrlock();
    ret = sqcow2_attach_set_locked(bs, set_bs, errp);
    if (ret == 0) {
        s->layer = ls->record.layer + 1;
        s->layers = sqcow2_layers_append(set_bs, layer);
        sqcow2_set_clips(s->layers, s->layer);
        s->view = *view;
        s->view.vouched = true;
        sqcow2_renew_cache(bs);
        s->mode = SQCOW2_MODE_REBUILT;
        sqcow2_drop_flat_locked(lower);
    }
    bdrv_graph_wrunlock();
    return ret;
}

/* See at the top of the file. */
static int absorb(BlockDriverState *bs, BlockDriverState *lower, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque, *ls = lower->opaque;
    Sqcow2Chain chain;
    Sqcow2View view;
    int ret;

    if (ls->record.layer == SQCOW2_MAX_LAYERS - 1) {
        error_setg(errp, "The chain has as many layers as an index can count");
        return -EFBIG;
    }
    if (!bdrv_is_read_only(bs) && ls->set &&
        sqcow2_layers_are_pooled(ls->layers, ls->layer)) {
        error_setg(errp, "A writer needs all layers open");
        return -EMFILE;
    }
    ret = open_layer(bs, lower, &chain, &view, errp);
    if (ret < 0) {
        return ret;
    }
    ret = take_layers(bs, lower, &chain.layers[0], &view, errp);
    if (ret < 0) {
        sqcow2_chain_free(&chain);
        sqcow2_view_free(&view);
        return ret;
    }
    g_free(chain.layers);               /* what is in it has been handed over */

    if (s->has_record && bdrv_is_writable(bs)) {
        bdrv_graph_rdlock_main_loop();
        /* On failure the view in memory serves */
        sqcow2_index_store(bs, NULL);
        bdrv_graph_rdunlock_main_loop();
    }
    return 0;
}

static int reopen(BlockDriverState *bs, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    QDict *options = qdict_new();
    int ret = sqcow2_open_flat(bs, options, errp);

    qobject_unref(options);
    if (ret <= 0) {
        return ret == 0 ? -ENOTSUP : ret;
    }
    /* An index that was stored is that of the files that have the names now */
    bdrv_graph_rdlock_main_loop();
    ret = sqcow2_check_same_files(bdrv_cow_bs(bs), s->layers, s->layer, errp);
    bdrv_graph_rdunlock_main_loop();
    if (ret < 0) {
        sqcow2_drop_flat(bs);
    }
    return ret;
}

/* A job has taken away what was below, or made the node writable */
static bool GRAPH_RDLOCK may_be_indexed(BlockDriverState *bs)
{
    return bs->drv == &bdrv_sqcow2 && sqcow2_wants_index(bs) && !has_job(bs);
}

static void fold_drained(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    BlockDriverState *lower;
    bool foldable, indexable;
    int ret = -ENOTSUP;

    bdrv_graph_rdlock_main_loop();
    foldable = is_foldable(bs);
    indexable = may_be_indexed(bs);
    lower = foldable ? bs->backing->bs : NULL;
    bdrv_graph_rdunlock_main_loop();

    if (indexable) {
        sqcow2_index_wanted(bs);
    }
    if (!foldable) {
        return;
    }
    bdrv_ref(lower);
    s->two_ways = true;
    if (has_sealed_index(lower)) {
        ret = absorb(bs, lower, NULL);
    }
    if (ret < 0) {
        ret = reopen(bs, NULL);
    }
    if (ret >= 0) {
        sqcow2_drop_backing(bs);
    }
    s->two_ways = false;
    bdrv_unref(lower);
}

/* @bs is referenced. */
static void fold(BlockDriverState *bs)
{
    bool wanted;

    bdrv_graph_rdlock_main_loop();
    wanted = is_foldable(bs) || may_be_indexed(bs);
    bdrv_graph_rdunlock_main_loop();
    if (!wanted) {
        return;                 /* draining would disturb a job */
    }

    /*
     * Jobs may end while this waits: all is looked at again afterwards.  Nodes
     * below have no requests when @bs has none, but clean their own caches.
     */
    bdrv_drain_all_begin();
    fold_drained(bs);
    bdrv_drain_all_end();
}

/* Will folding its parent take @bs along? */
static bool GRAPH_RDLOCK is_inner(BlockDriverState *bs)
{
    BdrvChild *parent = QLIST_FIRST(&bs->parents);
    BlockDriverState *above;

    if (!parent || QLIST_NEXT(parent, next_parent) ||
        parent->klass != &child_of_bds || bs->node_name[0] != '#') {
        return false;
    }
    above = parent->opaque;
    return above->drv == &bdrv_sqcow2 && parent == above->backing;
}

static void fold_all(void *opaque)
{
    BlockDriverState *bs, *next;
    GPtrArray *found;

    if (sqcow2_flat_is_disabled()) {
        return;                 /* qemu-img works on the nodes */
    }
    found = g_ptr_array_new();
    bdrv_graph_rdlock_main_loop();
    for (bs = bdrv_next_all_states(NULL); bs; bs = next) {
        next = bdrv_next_all_states(bs);
        if (bs->drv == &bdrv_sqcow2 &&
            (!sqcow2_is_flat(bs) || may_be_indexed(bs)) && !is_inner(bs)) {
            bdrv_ref(bs);
            g_ptr_array_add(found, bs);
        }
    }
    bdrv_graph_rdunlock_main_loop();

    for (guint i = 0; i < found->len; i++) {
        bs = g_ptr_array_index(found, i);
        fold(bs);
        bdrv_unref(bs);
    }
    g_ptr_array_unref(found);
}

/*
 * Not at once: jobs end, and commands change the graph, in the midst of other
 * operations that hold nodes.  iohandlers' context is polled by the main loop
 * only, never from within a command or a drained section.
 */
void sqcow2_fold_later(void)
{
    static QEMUBH *bh;

    GLOBAL_STATE_CODE();

    if (!bh) {
        bh = aio_bh_new(iohandler_get_aio_context(), fold_all, NULL);
    }
    qemu_bh_schedule(bh);
}

int sqcow2_open_graph(BlockDriverState *bs, bool all, Error **errp)
{
    /* Also if the command then finds that it cannot do its work */
    sqcow2_fold_later();
    return sqcow2_make_real(bs, all, errp);
}

int sqcow2_open_graph_to(BlockDriverState *bs, const char *file, Error **errp)
{
    /* Also if the command then finds that it cannot do its work */
    sqcow2_fold_later();
    return sqcow2_make_real_to(bs, file, errp);
}
