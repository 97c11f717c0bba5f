/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: write an index into an image
 *
 * Into a new image, after qcow2's code has created it; or into one that
 * exists and has no valid index, or one that does not fit the layers below.
 *
 * Order on disk for a new image: tables, flush, then the one header write
 * that sets the feature bit and names them.  For an existing one: new stamp
 * and "index valid" cleared, flush; own L2 tables completed in place (what is
 * not a standard entry means nothing while the index is invalid, so a cut
 * anywhere is harmless), new tables and, if memory differs, the L1 table
 * written, flush; then the record that names the new ones.  Old tables that the
 * new root table does not name are freed last: a cut before that leaks them.
 *
 * The L1 table, because an I/O error may have left an entry on disk that memory
 * does not have.  The table that it names is not completed, and an entry 0 in
 * it would stand for zeros once the index is valid (S7).  What memory has is
 * what the guest was told; that table is leaked.
 */
#include "qemu/osdep.h"
#include "qemu/crc32c.h"
#include "qemu/qemu-progress.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

/* Allocate clusters, write @bytes of @buf and zeros behind; set @ref. */
static int GRAPH_RDLOCK write_table(BlockDriverState *bs, const void *buf,
                                    uint32_t entries, size_t entry_size,
                                    Sqcow2TableRef *ref)
{
    BDRVSqcow2State *s = bs->opaque;
    uint64_t bytes = (uint64_t)entries * entry_size;
    uint64_t padded = ROUND_UP(bytes, s->q.cluster_size);
    g_autofree uint8_t *clusters = NULL;
    int64_t host_offset;
    int ret;

    *ref = (Sqcow2TableRef) {};
    if (!entries) {
        return 0;
    }
    clusters = g_try_malloc0(padded);
    if (!clusters) {
        return -ENOMEM;
    }
    memcpy(clusters, buf, bytes);
    host_offset = qcow2_alloc_clusters(bs, padded);
    if (host_offset < 0) {
        return host_offset;
    }
    ret = qcow2_pre_write_overlap_check(bs, 0, host_offset, padded, false);
    if (ret == 0) {
        ret = bdrv_pwrite(bs->file, host_offset, padded, clusters, 0);
    }
    *ref = (Sqcow2TableRef) {
        .host_offset = host_offset,
        .entries = entries,
        .crc = crc32c(0xffffffff, clusters, bytes),
    };
    return ret;
}

static bool show_progress;      /* set once, by qemu-img, at start */

bool sqcow2_show_progress(void)
{
    show_progress = true;
    qemu_progress_init(true, 1.f);
    return true;
}

static void progress(uint32_t done, uint32_t all)
{
    if (show_progress) {
        qemu_progress_print(100.f * done / all, 0);
        if (done == all) {
            qemu_progress_end();
        }
    }
}

/*
 * Merge the table of region @i of @view and write it, unless some file has
 * the same one already; set the root entry.  @table: memory for it.
 */
static int GRAPH_RDLOCK write_merged(BlockDriverState *bs, Sqcow2View *view,
                                     uint32_t i, uint16_t own_layer,
                                     uint64_t *table, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    uint32_t table_entries = s->q.cluster_size / sizeof(uint64_t);
    Sqcow2Root root = {
        .kind = SQCOW2_ROOT_TABLE,
        .layer = own_layer,
    };
    Sqcow2TableRef ref;
    uint64_t entry;
    int ret;

    ret = sqcow2_merge(bs, view, i, 0, table_entries, NULL, table, errp);
    if (ret < 0) {
        return ret;
    }
    ret = sqcow2_merge_root(bs, view, i, table, &entry);
    if (ret == 0) {
        ret = write_table(bs, table, table_entries, sizeof(uint64_t), &ref);
        root.host_offset = ref.host_offset;
        entry = ret < 0 ? 0 : sqcow2_encode_root(&root, s->q.cluster_bits);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write the index");
        return ret;
    }
    view->root[i] = entry;
    return 0;
}

/*
 * Write merged tables and the root table of @view; set rec->root.  Entries of
 * @view for tables to be merged turn into entries for tables in files.
 */
static int GRAPH_RDLOCK write_view(BlockDriverState *bs, Sqcow2View *view,
                                   Sqcow2Record *rec, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint64_t *table = g_malloc(s->q.cluster_size);
    g_autofree uint64_t *raw = g_new(uint64_t, MAX(view->entries, 1));
    bool empty = true;
    int ret;

    for (uint32_t i = 0; i < view->entries; i++) {
        if (view->root[i] >> 62 == SQCOW2_ROOT_MERGE) {
            ret = write_merged(bs, view, i, rec->layer, table, errp);
            if (ret < 0) {
                return ret;
            }
        }
        raw[i] = cpu_to_be64(view->root[i]);
        empty = empty && !raw[i];
        if (view->sources) {
            progress(i + 1, view->entries);
        }
    }
    if (empty) {
        return 0;               /* entries behind the end are absent */
    }
    ret = write_table(bs, raw, view->entries, SQCOW2_ROOT_SIZE, &rec->root);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write the index");
    }
    return ret;
}

/*
 * Describe @layers, all that lie below, in a new layer table; set
 * rec->layer_table, and what the record says of the layer directly below.
 */
static int GRAPH_RDLOCK write_layer_table(BlockDriverState *bs,
                                          const Sqcow2Layer *layers,
                                          uint32_t nb_layers,
                                          Sqcow2Record *rec, Error **errp)
{
    g_autofree uint8_t *buf = g_malloc0((size_t)nb_layers * SQCOW2_DESC_SIZE);
    const Sqcow2Layer *top = &layers[nb_layers - 1];
    int ret;

    for (uint32_t i = 0; i < nb_layers; i++) {
        Sqcow2LayerDesc desc;

        ret = sqcow2_describe_layer(&layers[i], &desc, errp);
        if (ret < 0) {
            error_prepend(errp, "Layer %u, '%s', ", i, layers[i].filename);
            return ret;
        }
        sqcow2_encode_desc(&desc, buf + i * SQCOW2_DESC_SIZE);
    }
    rec->layer = nb_layers;
    rec->below_kind = top->kind;
    if (sqcow2_layer_is_stamped(top)) {
        memcpy(rec->below_stamp, top->stamp, SQCOW2_STAMP_SIZE);
    }
    ret = write_table(bs, buf, nb_layers, SQCOW2_DESC_SIZE,
                      &rec->layer_table);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write the layer table");
    }
    return ret;
}

/* The layer below has no index: build one, and describe the whole chain. */
static int GRAPH_RDLOCK index_whole_chain(BlockDriverState *bs,
                                          const Sqcow2Chain *chain,
                                          Sqcow2View *view, Sqcow2Record *rec,
                                          Error **errp)
{
    int ret;

    /* Describe before reading: a change in between then shows */
    ret = write_layer_table(bs, chain->layers, chain->nb_layers, rec, errp);
    if (ret < 0) {
        return ret;
    }
    return sqcow2_view_build(bs, NULL, chain->layers, chain->nb_layers, true,
                             view, errp);
}

/* The layer below is indexed: share its tables. */
static int index_snapshot(BDRVSqcow2State *s, const Sqcow2Chain *chain,
                          Sqcow2View *view, Sqcow2Record *rec, Error **errp)
{
    const Sqcow2Record *lower = &chain->top_record;

    if (lower->layer == SQCOW2_MAX_LAYERS - 1) {
        error_setg(errp, "'%s' is layer %d, the last that an index can count; "
                   "shorten the chain with 'qemu-img commit' or 'qemu-img "
                   "convert'", chain->layers[0].filename, lower->layer);
        return -EFBIG;
    }
    rec->layer = lower->layer + 1;
    memcpy(rec->below_stamp, lower->stamp, SQCOW2_STAMP_SIZE);
    return sqcow2_view_share(&chain->layers[0], lower, s->q.cluster_bits,
                             view, errp);
}

/*
 * Open what @bs names as its backing file and make its view.
 * Returns 0; -EFBIG with @errp set when there is no index for the new layer;
 * another negative errno with @errp set when the image must do without one.
 */
static int GRAPH_RDLOCK index_lower(BlockDriverState *bs, Sqcow2View *view,
                                    Sqcow2Record *rec, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Chain chain = {};
    Sqcow2WalkOptions opts = {
        .filename = bs->filename,
        .backing = bs->auto_backing_file,
        .backing_fmt = bs->backing_format,
        .cluster_bits = s->q.cluster_bits,
        .one_hop = true,
        .locking = qemu_has_ofd_lock(),
        .may_pool = true,
    };
    int ret;

    ret = sqcow2_walk(&opts, &chain, errp);
    if (ret < 0) {
        return ret;
    }
    rec->below_kind = chain.layers[0].kind;
    if (rec->below_kind == SQCOW2_LAYER_SQCOW2 && chain.top_has_record &&
        chain.top_record.flags & SQCOW2_FLAG_INDEX_VALID) {
        if (chain.top_record.flags & SQCOW2_FLAG_WRITING) {
            error_setg(errp, "'%s' is being written, or was not closed",
                       chain.layers[0].filename);
            ret = -EAGAIN;
        } else {
            ret = index_snapshot(s, &chain, view, rec, errp);
        }
    } else {
        sqcow2_chain_free(&chain);
        opts.one_hop = false;
        ret = sqcow2_walk(&opts, &chain, errp);
        if (ret == 0) {
            ret = index_whole_chain(bs, &chain, view, rec, errp);
        }
    }
    if (ret == 0) {
        ret = write_view(bs, view, rec, errp);
    }
    sqcow2_chain_free(&chain);
    return ret;
}

int coroutine_fn sqcow2_index_create(BlockDriverState *bs, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record rec = {};
    Sqcow2View view = {};
    Error *local_err = NULL;
    int ret = 0;

    if (has_subclusters(&s->q) || has_data_file(bs) || bs->encrypted) {
        ret = -ENOTSUP;
    } else if (bs->auto_backing_file[0]) {
        ret = index_lower(bs, &view, &rec, &local_err);
    }
    sqcow2_view_free(&view);
    if (ret == -EFBIG || ret == -EIO || ret == -ENOSPC || ret == -EINVAL) {
        error_propagate(errp, local_err);
        return ret;
    }
    error_free(local_err);
    if (ret == 0) {
        rec.flags = SQCOW2_FLAG_INDEX_VALID;
    } else {
        rec = (Sqcow2Record) {};
    }

    /*
     * Merged tables have no checksum and must be on disk before a header
     * names them; a root table that did not get there is noticed.
     */
    ret = rec.layer_table.entries ? qcow2_flush_caches(bs)
                                  : qcow2_write_caches(bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write the index");
        return ret;
    }
    return sqcow2_record_create(bs, &rec, errp);
}

/* Complete one own L2 table from the view below; S7. */
static int GRAPH_RDLOCK complete_table(BlockDriverState *bs,
                                       Sqcow2OwnTable *table, void *opaque)
{
    BDRVSqcow2State *s = bs->opaque;
    unsigned slice_entries = s->q.l2_slice_size;
    g_autofree uint64_t *inherited = g_new(uint64_t, slice_entries);
    int changed = 0;

    if (!table->disk_end) {
        return 0;               /* S10: VM state */
    }
    for (unsigned slice = 0; slice < s->q.l2_size / slice_entries; slice++) {
        uint64_t *own = table->entries + (size_t)slice * slice_entries;
        int ret;

        memset(inherited, 0, slice_entries * sizeof(uint64_t));
        ret = sqcow2_inherit_slice(bs, table->l1_index, slice, inherited);
        if (ret < 0) {
            return ret;
        }
        for (unsigned i = 0; i < slice_entries; i++) {
            uint64_t entry = be64_to_cpu(own[i]);

            if ((!entry || sqcow2_entry_is_foreign(entry)) &&
                own[i] != inherited[i]) {
                own[i] = inherited[i];
                changed = 1;
            }
        }
    }
    return changed;
}

int sqcow2_snapshots_fit(BDRVSqcow2State *s, Error **errp)
{
    for (int i = 0; i < s->q.nb_snapshots; i++) {
        if (size_to_l1(&s->q, s->q.snapshots[i].disk_size) >
            s->q.l1_vm_state_index) {
            error_setg(errp, "An internal snapshot is larger than the disk; "
                       "no index can be stored");
            return -ENOTSUP;
        }
    }
    return 0;
}

void sqcow2_free_tables(BlockDriverState *bs, const Sqcow2Record *old,
                        const Sqcow2View *kept)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint8_t *layer_table = sqcow2_read_layer_table(bs, old, NULL);
    Sqcow2View view;

    if (layer_table) {
        qcow2_free_clusters(bs, old->layer_table.host_offset,
                            (uint64_t)old->layer_table.entries *
                            SQCOW2_DESC_SIZE, QCOW2_DISCARD_OTHER);
    }
    if (!old->root.entries || sqcow2_view_read(bs, old, &view, NULL) < 0) {
        return;
    }
    for (uint32_t i = 0; i < view.entries; i++) {
        Sqcow2Root root;

        if (kept && i < kept->entries && kept->root[i] == view.root[i]) {
            continue;
        }
        if (sqcow2_decode_root(view.root[i], old->layer, s->q.cluster_bits,
                               &root) == 0 &&
            root.kind == SQCOW2_ROOT_TABLE && root.layer == old->layer) {
            qcow2_free_clusters(bs, root.host_offset, s->q.cluster_size,
                                QCOW2_DISCARD_OTHER);
        }
    }
    qcow2_free_clusters(bs, old->root.host_offset,
                        (uint64_t)old->root.entries * SQCOW2_ROOT_SIZE,
                        QCOW2_DISCARD_OTHER);
    sqcow2_view_free(&view);
}

/*
 * Put into @rec what the view of the layers below rests on: that the layer
 * directly below is the one that vouches for it, or all layers (S8).
 */
static int GRAPH_RDLOCK describe_below(BlockDriverState *bs,
                                       Sqcow2Record *rec, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;

    if (!s->view.vouched) {
        return write_layer_table(bs, s->layers, s->layer, rec, errp);
    }
    rec->layer = s->layer;
    rec->below_kind = SQCOW2_LAYER_SQCOW2;
    memcpy(rec->below_stamp, s->layers[s->layer - 1].stamp, SQCOW2_STAMP_SIZE);
    return 0;
}

/*
 * Make the record name the new tables.  On failure nobody knows which record is
 * in the file: the new one stays in memory, so that the first table that is not
 * complete clears "index valid" on disk (S7).
 */
static int GRAPH_RDLOCK switch_record(BlockDriverState *bs,
                                      const Sqcow2Record *rec)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record old = s->record;

    s->record = *rec;
    s->record.flags = old.flags | SQCOW2_FLAG_INDEX_VALID;
    memcpy(s->record.stamp, old.stamp, SQCOW2_STAMP_SIZE);
    return sqcow2_record_write(bs);
}

/*
 * The index could not be stored: go on with the view as it was, whose root
 * was @root, and free what was written.
 */
static void GRAPH_RDLOCK undo_store(BlockDriverState *bs, uint64_t *root,
                                    const Sqcow2Record *rec)
{
    BDRVSqcow2State *s = bs->opaque;
    const Sqcow2TableRef *root_table = &rec->root;
    const Sqcow2TableRef *layer_table = &rec->layer_table;

    for (uint32_t i = 0; i < s->view.entries; i++) {
        Sqcow2Root entry;

        if (s->view.root[i] != root[i] &&
            sqcow2_decode_root(s->view.root[i], s->layer, s->q.cluster_bits,
                               &entry) == 0 &&
            entry.kind == SQCOW2_ROOT_TABLE && entry.layer == s->layer) {
            qcow2_free_clusters(bs, entry.host_offset, s->q.cluster_size,
                                QCOW2_DISCARD_OTHER);
        }
        s->view.root[i] = root[i];
    }
    if (root_table->entries) {
        qcow2_free_clusters(bs, root_table->host_offset,
                            (uint64_t)root_table->entries * SQCOW2_ROOT_SIZE,
                            QCOW2_DISCARD_OTHER);
    }
    if (layer_table->entries) {
        qcow2_free_clusters(bs, layer_table->host_offset,
                            (uint64_t)layer_table->entries * SQCOW2_DESC_SIZE,
                            QCOW2_DISCARD_OTHER);
    }
    sqcow2_cache_clear(s->cache);
}

static int GRAPH_RDLOCK store(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record old = s->record, rec = {};
    g_autofree uint64_t *root = g_memdup2(s->view.root, (size_t)
                                          s->view.entries * sizeof(uint64_t));
    int ret;

    assert(s->has_record && (s->mode == SQCOW2_MODE_REBUILT || !s->layer));

    if (!bs->drv) {
        error_setg(errp, "The image is corrupt; repair it with "
                   "'qemu-img check -r all'");
        return -ENOMEDIUM;
    }
    if (s->nb_resizing) {
        error_setg(errp, "The image is being resized");
        return -EBUSY;
    }
    ret = sqcow2_snapshots_fit(s, errp);
    if (ret == 0) {
        ret = sqcow2_invalidate_index(bs);
    }
    if (ret == 0) {
        ret = sqcow2_begin_change_locked(bs);
    }
    if (ret == 0 && s->layer) {
        ret = describe_below(bs, &rec, errp);
    }
    /* Merged tables first: to complete others, they need not be merged again */
    if (ret == 0) {
        ret = write_view(bs, &s->view, &rec, errp);
    }
    if (ret == 0) {
        ret = sqcow2_for_each_own_table(bs, true, complete_table, NULL, errp);
    }
    if (ret == 0) {
        ret = sqcow2_write_l1(bs);
    }
    if (ret == 0) {
        ret = qcow2_flush_caches(bs);
    }
    if (ret < 0 && s->layer) {
        undo_store(bs, root, &rec);
    }
    if (ret == 0) {
        ret = switch_record(bs, &rec);
    }
    if (ret < 0) {
        if (!*errp) {
            error_setg_errno(errp, -ret, "Could not store the index");
        }
        return ret;
    }
    s->mode = s->layer ? SQCOW2_MODE_INDEXED : SQCOW2_MODE_OFF;
    sqcow2_sources_free(s->view.sources);
    s->view.sources = NULL;
    s->fits = true;
    g_clear_pointer(&s->distrust, g_free);
    /*
     * A view that was loaded, or whose storing has failed after all tables were
     * written, has tables of its own that stay.
     */
    sqcow2_free_tables(bs, &old, &s->view);
    if (s->cache) {
        /* Clusters of tables that it may have are free now */
        sqcow2_cache_clear(s->cache);
    }
    return 0;
}

typedef struct StoreCo {
    BlockDriverState *bs;
    Error **errp;
    int ret;
    bool done;
} StoreCo;

static void coroutine_fn store_entry(void *opaque)
{
    StoreCo *co = opaque;
    BDRVSqcow2State *s = co->bs->opaque;

    bdrv_graph_co_rdlock();
    qemu_co_mutex_lock(&s->q.lock);
    co->ret = store(co->bs, co->errp);
    qemu_co_mutex_unlock(&s->q.lock);
    bdrv_graph_co_rdunlock();
    co->done = true;
    aio_wait_kick();
}

/*
 * The main thread polls, and a resize may come then, drained or not: what keeps
 * it away from tables that are completed, and from the record, is q.lock.
 */
int sqcow2_index_store(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    StoreCo co = { .bs = bs, .errp = errp };

    if (qemu_in_coroutine()) {
        return store(bs, errp);
    }
    qemu_coroutine_enter(qemu_coroutine_create(store_entry, &co));
    BDRV_POLL_WHILE(bs, !co.done);
    return co.ret;
}

/* Own tables would have to be completed from the layers below. */
static bool has_own_tables(BDRVSqcow2State *s)
{
    for (int i = 0; i < s->q.l1_size; i++) {
        if (s->q.l1_table[i]) {
            return true;
        }
    }
    return s->q.nb_snapshots;
}

/*
 * So far nothing in the file has meant anything to a layer above but the
 * record: the new tables stand in clusters that were free.  So the new stamp
 * (S3) may come with the index that it is for, in one write.
 */
int sqcow2_index_empty(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record old = s->record, rec = {};
    Sqcow2View view = {};
    int ret;

    if (!s->has_record || s->changed || old.flags || old.root.entries ||
        old.layer_table.entries || !bs->auto_backing_file[0] ||
        has_own_tables(s)) {
        return -ENOTSUP;
    }
    ret = index_lower(bs, &view, &rec, errp);
    sqcow2_view_free(&view);
    if (ret == 0) {
        ret = qcow2_flush_caches(bs);
    }
    if (ret == 0) {
        rec.flags = SQCOW2_FLAG_INDEX_VALID;
        s->record = rec;
        ret = sqcow2_record_new_stamp(s, errp);
    }
    if (ret == 0) {
        ret = sqcow2_record_write(bs);
    }
    if (ret < 0) {
        s->record = old;
        if (!*errp) {
            error_setg_errno(errp, -ret, "Could not store the index");
        }
    }
    return ret;
}
