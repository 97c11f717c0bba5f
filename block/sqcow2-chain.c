/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: opening flat, and the real backing graph on demand
 *
 * A node's life: opened by qcow2's code; then flat, if its chain can be
 * indexed - the layer set attached, and either the index loaded (INDEXED) or,
 * when the chain is not the one it was made for, built anew in memory
 * (REBUILT); or not flat (OFF), with a backing node or none, exactly as
 * qcow2.  A flat node turns into one that is not for operations on the graph,
 * and back when they are over: sqcow2-fold.c.
 *
 * Everything here runs in the main thread; the node has no requests.
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qapi/error.h"
#include "block/dirty-bitmap.h"
#include "qobject/qdict.h"
#include "sqcow2-int.h"

/* Which nodes get a backing node.  Main thread only. */
static enum {
    REAL_NONE,
    /* Those that are not backing nodes; filters may be on top of them */
    REAL_TOP,
    REAL_ALL,
} real_nodes;

void sqcow2_disable_flat(bool all)
{
    real_nodes = MAX(real_nodes, all ? REAL_ALL : REAL_TOP);
}

static bool must_be_real(BlockDriverState *bs)
{
    BlockDriverState *above = bs->inherits_from;

    /* A parent without driver yet opens its "file": it may be a filter */
    return real_nodes == REAL_ALL ||
           (real_nodes == REAL_TOP &&
            (!above || !above->drv || above->drv->is_filter));
}

bool sqcow2_is_flat(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    return bs->drv == &bdrv_sqcow2 && s->mode != SQCOW2_MODE_OFF;
}

bool sqcow2_takes_no_backing(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    return sqcow2_is_flat(bs) && !s->two_ways;
}

static void set_distrust(BDRVSqcow2State *s, const char *why)
{
    g_free(s->distrust);
    s->distrust = g_strdup(why);
}

bool sqcow2_has_backing_options(QDict *options)
{
    for (const QDictEntry *e = qdict_first(options); e;
         e = qdict_next(options, e)) {
        if (!strcmp(e->key, "backing") ||
            g_str_has_prefix(e->key, "backing.")) {
            return true;
        }
    }
    return false;
}

bool sqcow2_locking_wanted(BlockDriverState *bs)
{
    const char *locking = sqcow2_file_option(bs, "locking");

    return !bs->force_share && !(bs->open_flags & BDRV_O_INACTIVE) &&
           qemu_has_ofd_lock() && (!locking || strcmp(locking, "off"));
}

/*
 * Prepare following the links of @bs.  @backing and @layer_table are to be
 * freed when that is done.
 */
static int GRAPH_RDLOCK prepare_walk(BlockDriverState *bs,
                                     Sqcow2WalkOptions *opts, char **backing,
                                     uint8_t **layer_table, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;

    /* Through filters, file names of nodes tell nothing of directories */
    *backing = bdrv_get_full_backing_filename(bs, errp);
    if (!*backing) {
        return -ENOTSUP;        /* and the block layer's own words for it */
    }
    *opts = (Sqcow2WalkOptions) {
        .backing = *backing,
        .backing_fmt = bs->backing_format,
        .cluster_bits = s->q.cluster_bits,
        .locking = sqcow2_locking_wanted(bs),
        /* Unlocked layers must not change under somebody who copies them */
        .may_pool = bdrv_is_read_only(bs),
    };
    if (s->has_record && s->record.flags & SQCOW2_FLAG_INDEX_VALID) {
        *layer_table = sqcow2_read_layer_table(bs, &s->record, NULL);
        opts->record = &s->record;
        opts->layer_table = *layer_table;
    }
    return 0;
}

static const char no_valid_index[] = "the image has no valid index";

/*
 * Without a valid index nothing was verified, so that none which becomes valid
 * meanwhile, by a resize in another thread, may be used.
 */
static void note_unverified(const Sqcow2WalkOptions *opts, Sqcow2Chain *chain)
{
    if (!opts->record) {
        assert(!chain->distrust);
        chain->distrust = g_strdup(no_valid_index);
    }
}

static int walk(BlockDriverState *bs, BlockDriverState *set_bs,
                Sqcow2Chain *chain, Error **errp)
{
    g_autofree uint8_t *layer_table = NULL;
    g_autofree char *backing = NULL;
    Sqcow2WalkOptions opts;
    int ret;

    bdrv_graph_rdlock_main_loop();
    ret = prepare_walk(bs, &opts, &backing, &layer_table, errp);
    bdrv_graph_rdunlock_main_loop();
    if (ret < 0) {
        return ret;
    }
    opts.set = set_bs;
    ret = sqcow2_walk(&opts, chain, errp);
    if (ret == 0) {
        note_unverified(&opts, chain);
    }
    return ret;
}

/* Load the index if the chain is the expected one. */
static bool load_index(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    Error *local_err = NULL;

    if (!s->has_record || !(s->record.flags & SQCOW2_FLAG_INDEX_VALID)) {
        set_distrust(s, no_valid_index);
        return false;
    }
    if (!s->distrust && s->record.layer != s->layer) {
        set_distrust(s, "the chain has another length than when it was "
                     "indexed");
    }
    s->fits = !s->distrust;
    if (!s->distrust &&
        sqcow2_view_load(bs, &s->record, &s->view, &local_err) < 0) {
        set_distrust(s, error_get_pretty(local_err));
        error_free(local_err);
    }
    if (s->distrust) {
        if (!SQCOW2_IS_QCOW2) {     /* whose tests expect no words */
            warn_report("%s: %s; building the index anew", bs->filename,
                        s->distrust);
        }
        return false;
    }
    return true;
}

void sqcow2_renew_cache(BlockDriverState *bs)
{
    sqcow2_idle_stop(bs);
    sqcow2_new_cache(bs->opaque);
    sqcow2_idle_start(bs);
}

/*
 * An image without an index, or with one that does not fit, gets one when it
 * is opened for writing: its first new table would invalidate the old one.
 */
static void GRAPH_RDLOCK store_if_writable(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    if (s->has_record && s->mode != SQCOW2_MODE_INDEXED &&
        bdrv_is_writable(bs) &&
        !(bs->open_flags & (BDRV_O_INACTIVE | BDRV_O_CHECK))) {
        /* On failure the view in memory serves */
        sqcow2_index_store(bs, NULL);
    }
}

/* Load the index, or build one in memory. */
static int GRAPH_RDLOCK load_or_build(BlockDriverState *bs, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    bool valid;

    if (load_index(bs)) {
        return 0;
    }
    valid = s->has_record && s->record.flags & SQCOW2_FLAG_INDEX_VALID;
    return sqcow2_view_build(bs, valid ? &s->record : NULL, s->layers,
                             s->layer, true, &s->view, errp);
}

/*
 * Last: a resize in another thread may have come while the view was loaded,
 * and have failed, so that the index is not valid any more.  None is under way
 * here: the graph is locked for writing; or @bs is being activated, when qcow2
 * could not bear one either.
 */
static void become_flat(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    bool trusted = !s->distrust && s->record.flags & SQCOW2_FLAG_INDEX_VALID;

    sqcow2_renew_cache(bs);
    s->mode = trusted ? SQCOW2_MODE_INDEXED : SQCOW2_MODE_REBUILT;
}

int sqcow2_attach_set_locked(BlockDriverState *bs, BlockDriverState *set_bs,
                             Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;

    if (!bs->drv) {
        error_setg(errp, "The image is corrupt; repair it with "
                   "'qemu-img check -r all'");
        bdrv_schedule_unref(set_bs);
        return -ENOMEDIUM;
    }
    s->set = bdrv_attach_child(bs, set_bs, "layers", &child_of_bds,
                               BDRV_CHILD_DATA, errp);
    return s->set ? 0 : -EPERM;
}

int sqcow2_attach_set(BlockDriverState *bs, BlockDriverState *set_bs,
                      Error **errp)
{
    int ret;

    bdrv_graph_wrlock();
    ret = sqcow2_attach_set_locked(bs, set_bs, errp);
    bdrv_graph_wrunlock();
    return ret;
}

void sqcow2_drop_flat_locked(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    BdrvChild *set = g_steal_pointer(&s->set);

    s->mode = SQCOW2_MODE_OFF;
    sqcow2_idle_stop(bs);
    sqcow2_view_free(&s->view);
    sqcow2_cache_free(s->cache);
    s->cache = NULL;
    g_free(s->distrust);
    s->distrust = NULL;
    s->layers = NULL;
    s->layer = 0;
    if (set) {
        bdrv_unref_child(bs, set);
    }
}

void sqcow2_drop_flat(BlockDriverState *bs)
{
    bdrv_graph_wrlock();
    sqcow2_drop_flat_locked(bs);
    bdrv_graph_wrunlock();
}

bool sqcow2_is_indexable(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    return sqcow2_has_index_bit(s) && !has_subclusters(&s->q) &&
           !(s->q.incompatible_features & QCOW2_INCOMPAT_DATA_FILE) &&
           !bs->encrypted;
}

bool sqcow2_wants_index(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    if (!s->has_record || !bdrv_is_writable(bs) || !sqcow2_is_indexable(bs)) {
        return false;
    }
    if (sqcow2_is_flat(bs)) {
        return s->mode == SQCOW2_MODE_REBUILT;
    }
    return !bs->backing && !bs->auto_backing_file[0] &&
           !(s->record.flags & SQCOW2_FLAG_INDEX_VALID);
}

void sqcow2_index_wanted(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    bdrv_graph_rdlock_main_loop();
    if (sqcow2_wants_index(bs)) {
        /* Headers and tables of layers are read as they come, not aligned */
        if (s->set) {
            sqcow2_layers_set_direct(s->set->bs, false);
        }
        store_if_writable(bs);
        if (s->set) {
            sqcow2_layers_set_direct(s->set->bs, true);
        }
    }
    bdrv_graph_rdunlock_main_loop();
}

/*
 * The node that is just getting a backing node, if that can take its layer
 * set over: opening a chain once more takes long.  Main thread only.
 */
static BlockDriverState *donor;

/*
 * May the backing node of @bs have the layer set of @bs?  What was verified
 * from @bs downwards by stamps alone holds for the node below as well (S8).
 */
static bool can_donate(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    return s->mode == SQCOW2_MODE_INDEXED && s->layer >= 2 &&
           !s->record.layer_table.entries && s->layers[s->layer - 1].fd >= 0;
}

/* Take the layers of @donor but the top one, which is the file of @bs. */
static int take_from_donor(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque, *ds = donor->opaque;
    const Sqcow2Layer *self = &ds->layers[ds->layer - 1];
    BlockDriverState *set_bs = ds->set->bs;

    if (!s->has_record || s->record.flags != SQCOW2_FLAG_INDEX_VALID ||
        s->record.layer != ds->layer - 1 || !sqcow2_layer_is_stamped(self) ||
        memcmp(s->record.stamp, self->stamp, SQCOW2_STAMP_SIZE)) {
        return 0;
    }
    s->layer = s->record.layer;
    s->layers = ds->layers;
    if (sqcow2_view_load(bs, &s->record, &s->view, NULL) < 0) {
        s->layers = NULL;
        return 0;
    }
    bdrv_ref(set_bs);
    if (sqcow2_attach_set(bs, set_bs, NULL) < 0) {
        sqcow2_drop_flat(bs);
        return 0;
    }
    s->mode = SQCOW2_MODE_INDEXED;
    sqcow2_renew_cache(bs);
    return 1;
}

/*
 * The block layer opens backing nodes by recursion: each takes some 300 bytes
 * of stack, and as many steps as there are nodes already.
 */
#define MAX_NODES 5000

/*
 * A node for each layer: that fails better here than in the depth, where each
 * level adds its own words to the error.
 */
static int check_room(BlockDriverState *bs, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;

    if (real_nodes != REAL_ALL || !s->has_record ||
        !(s->record.flags & SQCOW2_FLAG_INDEX_VALID) ||
        bs->open_flags & BDRV_O_NO_IO) {
        return 0;
    }
    if (s->record.layer > MAX_NODES) {
        error_setg(errp, "This needs a node for each layer, and there are more "
                   "than %d; shorten the chain with 'qemu-img commit' or "
                   "'qemu-img convert'", MAX_NODES);
        return -EFBIG;
    }
    return sqcow2_have_descriptors(s->record.layer, errp) ? 0 : -EMFILE;
}

static BlockDriverState *next_above(BlockDriverState *bs)
{
    do {
        bs = bs->inherits_from;
    } while (bs && bs->drv != &bdrv_sqcow2);
    return bs;
}

/*
 * Is @bs opened for a node that is, further up, itself opened for an image of
 * this name?  Following the links finds each loop, but it ends at links that
 * only the block layer can follow, as "json:" names: there the block layer
 * would go round until there are no more descriptors, and their limit is
 * raised.
 *
 * Comparing with one node is enough, if it changes at depth 1, 2, 4, 8...: it
 * gets into the loop, and then stays for a whole round.  In a loop names come
 * again, or get longer until they do not fit.
 */
static bool GRAPH_RDLOCK is_in_loop(BlockDriverState *bs)
{
    BlockDriverState *other = bs;
    uint32_t depth = 0;

    for (BlockDriverState *p = next_above(bs); p; p = next_above(p)) {
        depth++;
    }
    if (!depth) {
        return false;
    }
    for (uint32_t i = depth - (pow2floor(depth) - 1); i > 0; i--) {
        other = next_above(other);
    }
    return bs->file && other->file && *bs->file->bs->filename &&
           !strcmp(bs->file->bs->filename, other->file->bs->filename);
}

static int check_loop(BlockDriverState *bs, Error **errp)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (!is_in_loop(bs)) {
        return 0;
    }
    error_setg(errp, "'%s' stands in the backing chain twice; break the loop "
               "with 'qemu-img rebase -u'", bs->file->bs->filename);
    return -ELOOP;
}

int sqcow2_open_flat(BlockDriverState *bs, QDict *options, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    BlockDriverState *set_bs;
    Sqcow2Chain chain;
    Error *local_err = NULL;
    int ret;

    if (bs->drv != &bdrv_sqcow2) {
        return 0;
    }
    ret = check_loop(bs, errp);
    if (ret < 0 || !sqcow2_is_indexable(bs) ||
        bs->open_flags & BDRV_O_COPY_ON_READ ||
        sqcow2_has_backing_options(options)) {
        return ret;
    }
    if (must_be_real(bs)) {
        return check_room(bs, errp);
    }
    if (bs->open_flags & BDRV_O_NO_IO) {
        return 1;               /* nobody will read: open nothing */
    }
    if (!bs->auto_backing_file[0]) {
        sqcow2_index_wanted(bs);
        return 0;
    }

    if (donor && donor == bs->inherits_from && take_from_donor(bs)) {
        return 1;
    }
    set_bs = sqcow2_layers_new(bs, errp);
    if (!set_bs) {
        return -EINVAL;
    }
    ret = walk(bs, set_bs, &chain, &local_err);
    if (ret < 0) {
        bdrv_unref(set_bs);
        if (ret == -ENOTSUP) {
            set_distrust(s, error_get_pretty(local_err));
            error_free(local_err);
            return 0;
        }
        error_propagate(errp, local_err);
        return ret;
    }

    set_distrust(s, chain.distrust);
    g_free(chain.distrust);
    s->layers = chain.layers;
    s->layer = chain.nb_layers;
    sqcow2_layers_set(set_bs, chain.layers, chain.nb_layers);
    ret = sqcow2_attach_set(bs, set_bs, errp);
    if (ret == 0) {
        bdrv_graph_rdlock_main_loop();
        ret = load_or_build(bs, errp);
        bdrv_graph_rdunlock_main_loop();
    }
    if (ret < 0) {
        sqcow2_drop_flat(bs);
        return ret;
    }
    bdrv_graph_wrlock();
    become_flat(bs);
    bdrv_graph_wrunlock();

    bdrv_graph_rdlock_main_loop();
    store_if_writable(bs);
    bdrv_graph_rdunlock_main_loop();
    sqcow2_layers_set_direct(set_bs, true);
    return 1;
}

/* Do both describe the same index of the same layer below? */
static bool same_index(const Sqcow2Record *a, const Sqcow2Record *b)
{
    return a->layer == b->layer && a->below_kind == b->below_kind &&
           !memcmp(a->below_stamp, b->below_stamp, SQCOW2_STAMP_SIZE) &&
           !memcmp(&a->root, &b->root, sizeof(a->root)) &&
           !((a->flags ^ b->flags) & SQCOW2_FLAG_INDEX_VALID);
}

static int chain_was_changed(BlockDriverState *bs, Error **errp)
{
    error_setg(errp, "The backing chain of '%s' was changed by another "
               "process; open it again", bs->filename);
    return -EINVAL;
}

/*
 * Walk the chain while the old layers are open, so that a failure leaves the
 * node as it is; or, where descriptors do not suffice for both, after they
 * were closed: then @s has no layers.
 */
static int coroutine_fn GRAPH_RDLOCK
walk_again(BDRVSqcow2State *s, const Sqcow2WalkOptions *opts,
           Sqcow2Chain *chain, Error **errp)
{
    Error *local_err = NULL;
    int ret = sqcow2_walk(opts, chain, &local_err);

    if (ret == -EMFILE || ret == -ENFILE) {
        error_free(local_err);
        sqcow2_view_free(&s->view);
        s->layers = NULL;
        s->layer = 0;
        sqcow2_layers_set(s->set->bs, NULL, 0);
        return sqcow2_walk(opts, chain, errp);
    }
    error_propagate(errp, local_err);
    return ret;
}

/*
 * Requests to @bs are drained.
 * On failure, *@usable: the node is as before.
 */
static int coroutine_fn GRAPH_RDLOCK
reactivate(BlockDriverState *bs, const Sqcow2Record *old, bool *usable,
           Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint8_t *layer_table = NULL;
    g_autofree char *backing = NULL;
    Sqcow2WalkOptions opts;
    Sqcow2Chain chain;
    int ret;

    *usable = false;
    if (!bs->auto_backing_file[0]) {
        return chain_was_changed(bs, errp);
    }
    for (uint32_t i = 0; i < s->layer; i++) {
        if (s->layers[i].child) {
            /*
             * On another protocol: a node, which cannot be opened here.  It
             * needs no lock, and of a change our record tells, if its index
             * is in use; otherwise nothing but standard entries is.
             */
            return s->mode == SQCOW2_MODE_INDEXED &&
                   !(old && s->has_record && same_index(old, &s->record)) ?
                   chain_was_changed(bs, errp) : 0;
        }
    }
    ret = prepare_walk(bs, &opts, &backing, &layer_table, errp);
    if (ret == 0) {
        ret = walk_again(s, &opts, &chain, errp);
    }
    if (ret < 0) {
        *usable = s->layers;
        return ret;
    }

    note_unverified(&opts, &chain);
    sqcow2_view_free(&s->view);
    set_distrust(s, chain.distrust);
    g_free(chain.distrust);
    s->layers = chain.layers;
    s->layer = chain.nb_layers;
    sqcow2_layers_set(s->set->bs, chain.layers, chain.nb_layers);
    qemu_co_mutex_lock(&s->q.lock);
    ret = load_or_build(bs, errp);
    if (ret == 0) {
        become_flat(bs);
        store_if_writable(bs);
    }
    qemu_co_mutex_unlock(&s->q.lock);
    if (ret < 0) {
        return ret;
    }
    sqcow2_layers_set_direct(s->set->bs, true);
    return 0;
}

int sqcow2_reactivate(BlockDriverState *bs, const Sqcow2Record *old,
                      Error **errp)
{
    bool usable;
    int ret = reactivate(bs, old, &usable, errp);

    if (ret < 0) {
        /*
         * qcow2's code has taken persistent bitmaps from the image.  Layers
         * cannot be looked at earlier: what it has read says which they are.
         */
        bdrv_qcow2.bdrv_inactivate(bs);
        if (!usable) {
            sqcow2_before_unusable(bs);
            bs->drv = NULL;     /* as qcow2 when it cannot read its header */
        }
    }
    return ret;
}

void sqcow2_drop_backing(BlockDriverState *bs)
{
    Error *local_err = NULL;

    if (bdrv_set_backing_hd(bs, NULL, &local_err) < 0) {
        assert(!bs->drv);
        error_free(local_err);
    }
}

/*
 * Replace one node's flat state by a backing node.  The layer set goes last:
 * should the backing file not open any more, or be another by now, the node
 * goes on as it was; and there is no time without locks.  Drained nodes may be
 * resized, in their own thread: so @bs is flat all the time, then real in one
 * step for all who hold the graph lock.  The caller has a reference to @bs.
 */
static int unflatten(BlockDriverState *bs, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque, *below;
    int open_flags = bs->open_flags;
    int ret;

    ret = check_room(bs, errp);
    if (ret < 0) {
        return ret;
    }
    bdrv_drained_begin(bs);
    donor = can_donate(bs) ? bs : NULL;
    s->two_ways = true;
    ret = bdrv_open_backing_file(bs, NULL, "backing", errp);
    donor = NULL;
    if (ret == 0) {
        bdrv_graph_rdlock_main_loop();
        ret = sqcow2_check_same_files(bdrv_cow_bs(bs), s->layers, s->layer,
                                      errp);
        bdrv_graph_rdunlock_main_loop();
        if (ret < 0) {
            sqcow2_drop_backing(bs);
        }
    }
    if (ret < 0) {
        bs->open_flags = open_flags;
    } else {
        bdrv_graph_wrlock();
        below = bs->backing->bs->opaque;
        if (sqcow2_is_flat(bs->backing->bs) && below->layers == s->layers) {
            /* The layer that the backing node is now, may be written */
            sqcow2_layers_pop(below->set->bs);
            sqcow2_set_clips(below->layers, below->layer);
        }
        sqcow2_drop_flat_locked(bs);
        bdrv_graph_wrunlock();
    }
    s->two_ways = false;
    bdrv_drained_end(bs);
    return ret;
}

int sqcow2_make_real(BlockDriverState *bs, bool all, Error **errp)
{
    ERRP_GUARD();
    int before = real_nodes;
    bool filter = true;
    int ret = 0;

    if (!bs) {
        return 0;               /* the caller has words for it */
    }
    /* Opening polls, and what happens then may let go of nodes */
    bdrv_ref(bs);
    while (bs && ret == 0 && (all || filter)) {
        BlockDriverState *above = bs;

        if (sqcow2_is_flat(bs)) {
            /* What is opened below: real all the way down, or flat */
            real_nodes = all ? REAL_ALL : REAL_NONE;
            ret = unflatten(bs, errp);
            real_nodes = before;
        }
        filter = bs->drv && bs->drv->is_filter;
        bdrv_graph_rdlock_main_loop();
        bs = bs->drv ? bdrv_filter_or_cow_bs(bs) : NULL;
        bdrv_graph_rdunlock_main_loop();
        if (bs) {
            bdrv_ref(bs);
        }
        bdrv_unref(above);
    }
    bdrv_unref(bs);
    return ret;
}

/* More hops than this cost more than to open all nodes at once. */
#define MAX_HOPS 100

int sqcow2_make_real_to(BlockDriverState *bs, const char *file, Error **errp)
{
    ERRP_GUARD();
    BlockDriverState *flat;
    int ret = 0;

    bdrv_ref(bs);
    for (int hops = 0; !bdrv_find_backing_image(bs, file); hops++) {
        bdrv_graph_rdlock_main_loop();
        for (flat = bs; flat && !sqcow2_is_flat(flat); ) {
            flat = bdrv_filter_or_cow_bs(flat);
        }
        bdrv_graph_rdunlock_main_loop();
        if (!flat) {
            break;              /* the caller has words for it */
        }
        ret = sqcow2_make_real(flat, hops == MAX_HOPS, errp);
        if (ret < 0) {
            break;
        }
    }
    bdrv_unref(bs);
    return ret;
}

/* Of the image whose chain qemu-img is changing; main thread only */
static char *refresh_filename;

void sqcow2_refresh_later(BlockDriverState *bs)
{
    GLOBAL_STATE_CODE();

    bdrv_graph_rdlock_main_loop();
    if (bdrv_skip_filters(bs)->drv == &bdrv_sqcow2) {
        bdrv_refresh_filename(bs);
        g_free(refresh_filename);
        refresh_filename = g_strdup(bs->filename);
    }
    bdrv_graph_rdunlock_main_loop();
}

/* Of an image that is empty the layer directly below tells enough. */
static int refresh_empty(const char *filename, QDict *options)
{
    BlockDriverState *bs = bdrv_open(filename, NULL, options,
                                     BDRV_O_RDWR | BDRV_O_NO_BACKING, NULL);
    int ret;

    if (!bs) {
        return -EIO;
    }
    bdrv_graph_rdlock_main_loop();
    ret = bs->drv == &bdrv_sqcow2 && sqcow2_is_indexable(bs) ?
          sqcow2_index_empty(bs, NULL) : -ENOTSUP;
    bdrv_graph_rdunlock_main_loop();
    bdrv_unref(bs);
    return ret;
}

void sqcow2_refresh(bool succeeded)
{
    g_autofree char *filename = g_steal_pointer(&refresh_filename);
    QDict *options;

    GLOBAL_STATE_CODE();

    /* The user is to find a failure as it was left: opening might repair it */
    if (!filename || !succeeded) {
        return;
    }
    options = qdict_new();
    if (!strstart(filename, "json:", NULL)) {
        qdict_put_str(options, "driver", bdrv_sqcow2.format_name);
    }
    real_nodes = REAL_NONE;
    if (refresh_empty(filename, qdict_clone_shallow(options)) == -ENOTSUP) {
        bdrv_unref(bdrv_open(filename, NULL, qdict_clone_shallow(options),
                             BDRV_O_RDWR, NULL));
    }
    qobject_unref(options);
}

bool sqcow2_flat_is_disabled(void)
{
    return real_nodes != REAL_NONE;
}

int sqcow2_open_graph_to_bitmap(BlockDriverState *bs, const char *name,
                                Error **errp)
{
    GLOBAL_STATE_CODE();

    while (bs && !bdrv_find_dirty_bitmap(bs, name)) {
        if (sqcow2_is_flat(bs)) {
            int ret = sqcow2_make_real(bs, false, errp);

            if (ret < 0) {
                return ret;
            }
        }
        bdrv_graph_rdlock_main_loop();
        bs = bs->drv ? bdrv_filter_or_cow_bs(bs) : NULL;
        bdrv_graph_rdunlock_main_loop();
    }
    return 0;
}

int sqcow2_keep_graph(BlockDriverState *bs, Error **errp)
{
    bdrv_graph_rdlock_main_loop();
    for (BlockDriverState *p = bs; p; p = bdrv_filter_or_cow_bs(p)) {
        BDRVSqcow2State *s = p->opaque;

        if (p->drv == &bdrv_sqcow2) {
            s->keep_graph = true;
        }
    }
    bdrv_graph_rdunlock_main_loop();
    return sqcow2_make_real(bs, true, errp);
}
