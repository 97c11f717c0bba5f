/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: make the view of the layers below from what the files say
 *
 * For a chain that is not the one that the active image's index was made
 * for.  The chain is divided into segments (sqcow2-merge.c), from the top
 * down: a file's index that is valid vouches for the layers below it as far
 * as these are the ones that it was made for (S8); where that ends, the next
 * segment begins.  So after a change of layer m the active image's index
 * still tells who of the layers above m owns a cluster; layer m tells what it
 * owns itself; and the index of m - 1 tells the rest.
 *
 * Here just the L1 and root tables are read; L2 tables are read when they are
 * merged.  A region for which there is but one table, with nothing in it
 * that must not count, shares that table as it is.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

/*
 * Root and layer tables read at most, of 32 MiB and of 2 MiB.  A chain in
 * which more indexes have come apart is read as standard entries below.
 */
#define MAX_TABLES_READ 64

typedef struct Builder {
    BlockDriverState *bs;
    const Sqcow2Record *record; /* of the active image, or NULL */
    const Sqcow2Layer *layers;
    uint32_t nb_layers;
    Sqcow2Layer self;           /* the active image, as the layer above */
    int cluster_bits;
    uint64_t region_size;
    uint64_t nb_regions;
    Sqcow2Sources *sources;
    uint32_t *first;            /* source of each region */
    uint32_t *last;
    uint32_t tables_left;       /* of MAX_TABLES_READ */
    uint32_t walk_top;          /* places that the last walk went over, by */
    uint32_t walk_bottom;       /*     vouched_down_to(), and what it found */
    uint32_t walk_result;
    bool trust;                 /* false: only standard entries count (S1) */
} Builder;

static const Sqcow2Layer *layer_at(const Builder *b, uint32_t place)
{
    return place < b->nb_layers ? &b->layers[place] : &b->self;
}

/* Get the record of the file at @place if its index is valid. */
static bool has_index(const Builder *b, uint32_t place, Sqcow2Record *rec)
{
    const Sqcow2Layer *layer = layer_at(b, place);

    if (place == b->nb_layers) {
        *rec = b->record ? *b->record : (Sqcow2Record) {};
        return b->record;
    }
    return b->trust && sqcow2_layer_is_stamped(layer) &&
           sqcow2_layer_record(layer, rec) &&
           !memcmp(rec->stamp, layer->stamp, SQCOW2_STAMP_SIZE) &&
           rec->flags & SQCOW2_FLAG_INDEX_VALID &&
           !(rec->flags & SQCOW2_FLAG_WRITING);
}

/* How far down are the layers those of the layer table?  Of @place's file */
static uint32_t described_down_to(Builder *b, uint32_t place,
                                  const Sqcow2Record *rec)
{
    g_autofree uint8_t *table = NULL;
    uint32_t index = rec->layer;
    Sqcow2LayerDesc desc;

    if (!b->tables_left) {
        return place;
    }
    b->tables_left--;
    table = place == b->nb_layers ?
            sqcow2_read_layer_table(b->bs, rec, NULL) :
            sqcow2_layer_read_table(&b->layers[place], rec);
    while (table && index && place &&
           sqcow2_decode_desc(table + (index - 1) * SQCOW2_DESC_SIZE, &desc,
                              NULL) == 0 &&
           sqcow2_compare_layer(&b->layers[place - 1], &desc) ==
           SQCOW2_LAYER_SAME) {
        index--;
        place--;
    }
    return place;
}

/*
 * The lowest place for which the index of the file at @place, whose record
 * is @rec, vouches.  S8, but a part of what S8 demands will do: the state of
 * a layer stands for all that its index says of the layers below it, so as
 * long as the hops match, the index tells the truth about these layers.
 *
 * From all places that one walk goes over, it would be the same walk: so no
 * header is read for more than one, however many segments there are.
 */
static uint32_t vouched_down_to(Builder *b, uint32_t place, Sqcow2Record rec)
{
    Sqcow2Record below;

    if (place <= b->walk_top && place >= b->walk_bottom) {
        return b->walk_result;
    }
    b->walk_top = place;
    while (place && !rec.layer_table.entries &&
           has_index(b, place - 1, &below) &&
           !memcmp(below.stamp, rec.below_stamp, SQCOW2_STAMP_SIZE) &&
           below.layer + 1 == rec.layer) {
        rec = below;
        place--;
    }
    b->walk_bottom = place;
    b->walk_result = rec.layer_table.entries ?
                     described_down_to(b, place, &rec) : place;
    return b->walk_result;
}

/* Can all entries of the root table be followed, as far as they count? */
static bool root_fits(const Builder *b, const Sqcow2View *root,
                      const Sqcow2Record *rec, const Sqcow2Segment *seg)
{
    for (uint32_t i = 0; i < root->entries; i++) {
        const Sqcow2Layer *layer;
        Sqcow2Root entry;
        int64_t place;

        if (sqcow2_decode_root(root->root[i], rec->layer, b->cluster_bits,
                               &entry) < 0) {
            return false;
        }
        place = (int64_t)entry.layer + seg->shift;
        if (entry.kind == SQCOW2_ROOT_ABSENT || place < seg->lowest) {
            continue;
        }
        layer = layer_at(b, place);
        if ((layer->kind == SQCOW2_LAYER_RAW) !=
            (entry.kind == SQCOW2_ROOT_IDENTITY)) {
            return false;
        }
        if (entry.kind == SQCOW2_ROOT_TABLE &&
            sqcow2_table_in_file(layer, place, entry.host_offset,
                                 b->cluster_bits, NULL) < 0) {
            return false;
        }
    }
    return true;
}

/*
 * What does the index of the file at @place tell?  Set @seg, and @root if
 * that tells more than the file's standard entries.
 */
static void find_segment(Builder *b, uint32_t place, Sqcow2Segment *seg,
                         Sqcow2Record *rec, Sqcow2View *root)
{
    Sqcow2Segment vouched = { .vouched = true };
    int ret;

    *seg = (Sqcow2Segment) { .lowest = place };
    if (!has_index(b, place, rec)) {
        return;
    }
    vouched.lowest = vouched_down_to(b, place, *rec);
    vouched.shift = (int32_t)place - rec->layer;
    vouched.complete = !vouched.lowest && !vouched.shift;
    if (vouched.lowest == place) {
        /* Of the base, all is said by its L1 table */
        seg->complete = vouched.complete;
        return;
    }
    if (!b->tables_left) {
        return;
    }
    b->tables_left--;
    ret = place == b->nb_layers ?
          sqcow2_view_read(b->bs, rec, root, NULL) :
          sqcow2_layer_read_root(&b->layers[place], rec, root, NULL);
    if (ret == 0 && root_fits(b, root, rec, &vouched)) {
        *seg = vouched;
    } else {
        sqcow2_view_free(root);
    }
}

/* Add a source to @region, below those that it has. */
static int add_source(Builder *b, uint64_t region, uint32_t place,
                      uint64_t host_offset, Error **errp)
{
    uint32_t i = sqcow2_sources_add(b->sources, place, host_offset);

    if (i == SQCOW2_NO_SOURCE) {
        error_setg(errp, "The index does not fit in memory");
        return -ENOMEM;
    }
    if (b->first[region] == SQCOW2_NO_SOURCE) {
        b->first[region] = i;
    } else {
        b->sources->sources[b->last[region]].next = i;
    }
    b->last[region] = i;
    return 0;
}

/* Add what root entry @entry, which root_fits(), names, if it counts. */
static int add_root_entry(Builder *b, uint64_t region, uint64_t entry,
                          const Sqcow2Record *rec, const Sqcow2Segment *seg,
                          Error **errp)
{
    Sqcow2Root root;
    int64_t place;

    if (sqcow2_decode_root(entry, rec->layer, b->cluster_bits, &root) < 0 ||
        root.kind == SQCOW2_ROOT_ABSENT) {
        return 0;
    }
    /* A table's owners are not above the file in which it stands */
    place = (int64_t)root.layer + seg->shift;
    return place < seg->lowest ? 0 :
           add_source(b, region, place, root.host_offset, errp);
}

/* Add the tables of the segment that begins at @place. */
static int add_tables(Builder *b, uint32_t place, const Sqcow2Segment *seg,
                      const Sqcow2Record *rec, const Sqcow2View *root,
                      Error **errp)
{
    const Sqcow2Layer *layer = layer_at(b, place);
    g_autofree uint64_t *l1 = NULL;
    uint64_t entries = b->nb_regions;
    int ret = 0;

    if (place < b->nb_layers) {
        /* Behind the end of this layer nothing shows, of it or through it */
        entries = MIN(entries, DIV_ROUND_UP(layer->clip, b->region_size));
        if (layer->kind != SQCOW2_LAYER_RAW) {
            int64_t l1_entries = sqcow2_read_l1(layer, place, b->region_size,
                                                &l1, errp);

            if (l1_entries < 0) {
                return l1_entries;
            }
            assert(entries <= l1_entries);
        }
    }
    for (uint64_t i = 0; ret == 0 && i < entries; i++) {
        if (layer->kind == SQCOW2_LAYER_RAW) {
            ret = add_source(b, i, place, 0, errp);
        } else if (l1 && l1[i]) {
            ret = sqcow2_table_in_file(layer, place, l1[i], b->cluster_bits,
                                       errp);
            if (ret == 0) {
                ret = add_source(b, i, place, l1[i], errp);
            }
        } else if (i < root->entries) {
            ret = add_root_entry(b, i, root->root[i], rec, seg, errp);
        }
    }
    return ret;
}

/* Go through the chain, from the active image down. */
static int add_segments(Builder *b, Sqcow2View *view, Error **errp)
{
    uint32_t next = b->nb_layers + 1;
    int ret = 0;

    while (ret == 0 && next > 0) {
        uint32_t place = next - 1;
        Sqcow2View root = {};
        Sqcow2Record rec = {};
        Sqcow2Segment seg;

        find_segment(b, place, &seg, &rec, &root);
        next = seg.lowest;
        if (place == b->nb_layers && !seg.vouched) {
            continue;           /* the view is of the layers below it */
        }
        if (place == b->nb_layers - 1) {
            view->vouched = seg.complete &&
                            layer_at(b, place)->kind == SQCOW2_LAYER_SQCOW2;
        }
        g_array_append_val(b->sources->segments, seg);
        ret = add_tables(b, place, &seg, &rec, &root, errp);
        sqcow2_view_free(&root);
    }
    return ret;
}

/*
 * May the region's only table be named as it is?  A table of a plain layer
 * has nothing but standard entries, and all entries of one that a complete
 * segment names are true.  Not a merged table of the active image's old
 * index: it will be freed when a new one is stored.
 */
static bool can_share(const Builder *b, const Sqcow2Source *src)
{
    const Sqcow2Sources *s = b->sources;

    return src->next == SQCOW2_NO_SOURCE && src->layer < b->nb_layers &&
           (!src->host_offset ||
            layer_at(b, src->layer)->kind == SQCOW2_LAYER_QCOW2 ||
            g_array_index(s->segments, Sqcow2Segment, src->segment).complete);
}

/* From regions to root entries */
static void finish_view(Builder *b, Sqcow2View *view)
{
    bool merge = false;

    view->entries = b->nb_regions;
    for (uint64_t i = 0; i < b->nb_regions; i++) {
        const Sqcow2Source *src = b->first[i] == SQCOW2_NO_SOURCE ? NULL :
                                  &b->sources->sources[b->first[i]];
        Sqcow2Root root = {};

        if (src && !can_share(b, src)) {
            view->root[i] = (uint64_t)SQCOW2_ROOT_MERGE << 62 | b->first[i];
            merge = true;
            continue;
        }
        if (src) {
            root.kind = src->host_offset ? SQCOW2_ROOT_TABLE
                                         : SQCOW2_ROOT_IDENTITY;
            root.layer = src->layer;
            root.host_offset = src->host_offset;
        }
        view->root[i] = sqcow2_encode_root(&root, b->cluster_bits);
    }
    if (merge) {
        view->sources = g_steal_pointer(&b->sources);
    }
}

/* Returns false if it does not fit in memory. */
static bool prepare(Builder *b, Sqcow2View *view)
{
    size_t nb = MAX(b->nb_regions, 1);
    int64_t length = bdrv_getlength(b->bs->file->bs);

    b->self.kind = SQCOW2_LAYER_SQCOW2;
    b->self.file_size = MAX(length, 0);
    b->self.filename = b->bs->filename;
    b->sources = sqcow2_sources_new(b->layers, b->nb_layers, b->cluster_bits);
    view->root = g_try_new0(uint64_t, nb);
    b->first = g_try_new(uint32_t, nb);
    b->last = g_try_new(uint32_t, nb);
    if (!view->root || !b->first || !b->last) {
        return false;
    }
    memset(b->first, 0xff, nb * sizeof(*b->first));
    return true;
}

int sqcow2_view_build(BlockDriverState *bs, const Sqcow2Record *record,
                      const Sqcow2Layer *layers, uint32_t nb_layers,
                      bool trust, Sqcow2View *view, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    Builder b = {
        .bs = bs,
        .record = trust ? record : NULL,
        .layers = layers,
        .nb_layers = nb_layers,
        .cluster_bits = s->q.cluster_bits,
        .region_size = sqcow2_region_size(&s->q),
        .tables_left = MAX_TABLES_READ,
        .walk_bottom = UINT32_MAX,
        .trust = trust,
    };
    int ret = -ENOMEM;

    *view = (Sqcow2View) {};
    b.nb_regions = DIV_ROUND_UP(layers[nb_layers - 1].virtual_size,
                                b.region_size);
    if (b.nb_regions > SQCOW2_MAX_ROOT_ENTRIES) {
        error_setg(errp, "Layer %u, '%s', is too large for its cluster size",
                   nb_layers - 1, layers[nb_layers - 1].filename);
        return -EFBIG;
    }
    if (!prepare(&b, view)) {
        error_setg(errp, "The index does not fit in memory");
    } else {
        ret = add_segments(&b, view, errp);
    }
    if (ret == 0) {
        finish_view(&b, view);
    } else {
        sqcow2_view_free(view);
    }
    sqcow2_sources_free(b.sources);
    g_free(b.first);
    g_free(b.last);
    return ret;
}
