/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: make and load the index
 *
 * A view is a root table, perhaps with merged tables.  Three ways lead to
 * one:
 *   share   a new snapshot takes its lower layer's L1 and root tables:
 *           constant work, whatever the length of the chain
 *   build   from the standard entries of all layers (S1): one pass over the
 *           L1 tables counts who has a table for a region; regions that just
 *           one plain layer has are shared, the others are merged from the
 *           top layer down
 *   load    from the active image's own root table
 * A shared or built view lives in memory; sqcow2-store.c writes it into an
 * image.
 *
 * Regions are what one L2 table covers; the index of one is an L1 index.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qemu/qemu-progress.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

/* One region while a view is being built */
typedef struct Region {
    uint64_t *merged;           /* big-endian, as on disk; or NULL */
    uint64_t table_host_offset; /* of the highest layer's table */
    uint32_t layer;             /* that layer */
    uint32_t nb_tables;         /* layers that have a table here */
} Region;

typedef struct Builder {
    const Sqcow2Layer *layers;
    uint32_t nb_layers;
    int cluster_bits;
    uint64_t table_entries;
    uint64_t region_size;
    Region *regions;
    uint64_t nb_regions;
    uint64_t *buf;              /* for one table */
    uint32_t steps;             /* layers done; each is visited twice */
} Builder;

static bool show_progress;      /* set once, by qemu-img, at start */

void sqcow2_show_progress(void)
{
    show_progress = true;
    qemu_progress_init(true, 1.f);
}

static void progress(Builder *b)
{
    b->steps++;
    if (show_progress) {
        qemu_progress_print(50.f * b->steps / b->nb_layers, 0);
        if (b->steps == 2 * b->nb_layers) {
            qemu_progress_end();
        }
    }
}

void sqcow2_view_free(Sqcow2View *view)
{
    g_free(view->root);
    if (view->tables) {
        g_ptr_array_unref(view->tables);
    }
    *view = (Sqcow2View) {};
}

static int table_in_file(const Sqcow2Layer *layer, uint32_t index,
                         uint64_t host_offset, int cluster_bits, Error **errp)
{
    if (host_offset & ((1ULL << cluster_bits) - 1)) {
        error_setg(errp, "Layer %u, '%s', has an L2 table at the unaligned "
                   "offset 0x%" PRIx64, index, layer->filename, host_offset);
        return -EINVAL;
    }
    if (host_offset + (1ULL << cluster_bits) > layer->file_size) {
        error_setg(errp, "Layer %u, '%s', is truncated: its L2 table at "
                   "offset 0x%" PRIx64 " lies behind the end of the file; "
                   "restore the file", index, layer->filename, host_offset);
        return -EINVAL;
    }
    return 0;
}

/* Validate every entry, so that lookups meet nothing that is not there. */
static int check_root(BlockDriverState *bs, const Sqcow2View *view,
                      uint16_t own_layer, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    const Sqcow2Layer self = {
        .filename = bs->filename,
        .file_size = MAX(bdrv_getlength(bs->file->bs), 0),
    };

    for (uint32_t i = 0; i < view->entries; i++) {
        Sqcow2Root root;
        int ret;

        if (sqcow2_decode_root(view->root[i], own_layer, s->q.cluster_bits,
                               &root) < 0) {
            error_setg(errp, "sQcow2 root table entry %u is invalid "
                       "(0x%" PRIx64 ")", i, view->root[i]);
            return -EINVAL;
        }
        if (root.kind == SQCOW2_ROOT_IDENTITY &&
            s->layers[root.layer].kind != SQCOW2_LAYER_RAW) {
            error_setg(errp, "sQcow2 root table entry %u takes layer %u for "
                       "raw", i, root.layer);
            return -EINVAL;
        }
        if (root.kind == SQCOW2_ROOT_TABLE) {
            const Sqcow2Layer *layer = root.layer < own_layer ?
                                       &s->layers[root.layer] : &self;

            if (layer->kind == SQCOW2_LAYER_RAW) {
                error_setg(errp, "sQcow2 root table entry %u names a table "
                           "in raw layer %u", i, root.layer);
                return -EINVAL;
            }
            ret = table_in_file(layer, root.layer, root.host_offset,
                                s->q.cluster_bits, errp);
            if (ret < 0) {
                return ret;
            }
        }
    }
    return 0;
}

/* Convert and checksum the root table in @raw; takes it over. */
static int view_from_bytes(uint64_t *raw, const Sqcow2TableRef *ref,
                           Sqcow2View *view, Error **errp)
{
    uint64_t bytes = (uint64_t)ref->entries * SQCOW2_ROOT_SIZE;

    if (crc32c(0xffffffff, (uint8_t *)raw, bytes) != ref->crc) {
        error_setg(errp, "sQcow2 root table has a wrong checksum");
        g_free(raw);
        return -EINVAL;
    }
    for (uint32_t i = 0; i < ref->entries; i++) {
        raw[i] = be64_to_cpu(raw[i]);
    }
    *view = (Sqcow2View) { .root = raw, .entries = ref->entries };
    return 0;
}

int sqcow2_view_read(BlockDriverState *bs, const Sqcow2Record *record,
                     Sqcow2View *view, Error **errp)
{
    uint64_t bytes = (uint64_t)record->root.entries * SQCOW2_ROOT_SIZE;
    uint64_t *raw;
    int ret;

    *view = (Sqcow2View) {};
    if (!bytes) {
        return 0;
    }
    raw = g_try_malloc(bytes);
    if (!raw) {
        error_setg(errp, "sQcow2 root table does not fit in memory");
        return -ENOMEM;
    }
    ret = bdrv_pread(bs->file, record->root.host_offset, bytes, raw, 0);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read sQcow2 root table");
        g_free(raw);
        return ret;
    }
    return view_from_bytes(raw, &record->root, view, errp);
}

int sqcow2_view_load(BlockDriverState *bs, const Sqcow2Record *record,
                     Sqcow2View *view, Error **errp)
{
    int ret = sqcow2_view_read(bs, record, view, errp);

    if (ret == 0) {
        ret = check_root(bs, view, record->layer, errp);
    }
    if (ret < 0) {
        sqcow2_view_free(view);
    }
    return ret;
}

uint8_t *sqcow2_read_layer_table(BlockDriverState *bs,
                                 const Sqcow2Record *record, Error **errp)
{
    uint64_t bytes = (uint64_t)record->layer_table.entries * SQCOW2_DESC_SIZE;
    uint8_t *buf;
    int ret;

    if (!bytes) {
        return NULL;
    }
    buf = g_malloc(bytes);
    ret = bdrv_pread(bs->file, record->layer_table.host_offset, bytes, buf, 0);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read sQcow2 plain-layer "
                         "table");
    } else if (crc32c(0xffffffff, buf, bytes) != record->layer_table.crc) {
        error_setg(errp, "sQcow2 layer table has a wrong checksum");
        ret = -EINVAL;
    }
    if (ret < 0) {
        g_free(buf);
        return NULL;
    }
    return buf;
}

/*
 * Read the L1 table of @layer, without VM state, in host byte order.
 * Returns its number of entries or a negative errno.
 */
static int64_t read_l1(const Sqcow2Layer *layer, uint32_t index,
                       uint64_t region_size, uint64_t **l1, Error **errp)
{
    uint64_t entries = DIV_ROUND_UP(layer->virtual_size, region_size);
    int ret;

    *l1 = NULL;
    if (entries > layer->l1_entries) {
        error_setg(errp, "Layer %u, '%s', has an L1 table that is too small",
                   index, layer->filename);
        return -EINVAL;
    }
    *l1 = g_try_new(uint64_t, MAX(entries, 1));
    if (!*l1) {
        error_setg(errp, "Layer %u, '%s', has an L1 table that does not fit "
                   "in memory", index, layer->filename);
        return -ENOMEM;
    }
    ret = sqcow2_layer_pread(layer, layer->l1_host_offset,
                             entries * L1E_SIZE, *l1);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read the L1 table of layer "
                         "%u, '%s'", index, layer->filename);
        return ret;
    }
    for (uint64_t i = 0; i < entries; i++) {
        (*l1)[i] = be64_to_cpu((*l1)[i]) & L1E_OFFSET_MASK;
    }
    return entries;
}

typedef int TableFunc(Builder *b, uint32_t layer, uint64_t region,
                      uint64_t host_offset, Error **errp);

/* Call @func for every L2 table of every layer, from the top layer down. */
static int for_each_table(Builder *b, TableFunc *func, Error **errp)
{
    for (uint32_t layer = b->nb_layers; layer-- > 0; ) {
        g_autofree uint64_t *l1 = NULL;
        int64_t entries = 0;
        int ret;

        if (b->layers[layer].kind != SQCOW2_LAYER_RAW) {
            entries = read_l1(&b->layers[layer], layer, b->region_size, &l1,
                              errp);
        }
        if (entries < 0) {
            return entries;
        }
        for (int64_t i = 0; i < MIN(entries, b->nb_regions); i++) {
            ret = l1[i] ? func(b, layer, i, l1[i], errp) : 0;
            if (ret < 0) {
                return ret;
            }
        }
        progress(b);
    }
    return 0;
}

/* First pass: who has a table for the region? */
static int count_table(Builder *b, uint32_t layer, uint64_t i,
                       uint64_t host_offset, Error **errp)
{
    Region *region = &b->regions[i];

    if (!region->nb_tables++) {
        region->layer = layer;
        region->table_host_offset = host_offset;
    }
    return table_in_file(&b->layers[layer], layer, host_offset,
                         b->cluster_bits, errp);
}

/*
 * May the region's only table be shared as it is?  Not if a raw layer shows
 * through, nor if it has foreign entries, which a rebuild must not trust.
 */
static bool can_share(Builder *b, const Region *region, uint64_t i)
{
    return region->nb_tables == 1 &&
           b->layers[region->layer].kind == SQCOW2_LAYER_QCOW2 &&
           (b->layers[0].kind != SQCOW2_LAYER_RAW ||
            i * b->region_size >= b->layers[0].virtual_size);
}

/* Second pass: add to region @i what @index owns and no higher layer does. */
static int merge_table(Builder *b, uint32_t index, uint64_t i,
                       uint64_t host_offset, Error **errp)
{
    const Sqcow2Layer *layer = &b->layers[index];
    Region *region = &b->regions[i];
    uint64_t guest_offset = i * b->region_size;
    int ret;

    if (can_share(b, region, i)) {
        return 0;
    }
    if (!region->merged) {
        region->merged = g_try_malloc0(1ULL << b->cluster_bits);
        if (!region->merged) {
            error_setg(errp, "The index does not fit in memory");
            return -ENOMEM;
        }
    }
    ret = sqcow2_layer_pread(layer, host_offset, 1ULL << b->cluster_bits,
                             b->buf);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read an L2 table of layer "
                         "%u, '%s'", index, layer->filename);
        return ret;
    }
    for (uint64_t j = 0; j < b->table_entries; j++,
         guest_offset += 1ULL << b->cluster_bits) {
        uint64_t entry = be64_to_cpu(b->buf[j]);

        if (!entry || region->merged[j] || guest_offset >= layer->clip) {
            continue;
        }
        if (sqcow2_entry_is_foreign(entry) &&
            layer->kind == SQCOW2_LAYER_SQCOW2) {
            continue;
        }
        if (sqcow2_entry_is_foreign(entry) ||
            sqcow2_inherit_entry(entry, index, host_offset, b->cluster_bits,
                                 &entry) < 0) {
            error_setg(errp, "Layer %u, '%s', has an invalid L2 entry for "
                       "guest offset 0x%" PRIx64 "; run 'qemu-img check' on it",
                       index, layer->filename, guest_offset);
            return -EINVAL;
        }
        region->merged[j] = cpu_to_be64(entry);
    }
    return 0;
}

/* The raw base owns what no table of region @i mentions. */
static void merge_raw(Builder *b, uint64_t i)
{
    uint64_t guest_offset = i * b->region_size;
    uint64_t *merged = b->regions[i].merged;

    for (uint64_t j = 0; j < b->table_entries; j++,
         guest_offset += 1ULL << b->cluster_bits) {
        Sqcow2Cluster cluster = {
            .kind = SQCOW2_DATA,
            .owner = 0,
            .host_offset = guest_offset,
        };

        if (guest_offset >= b->layers[0].clip) {
            break;
        }
        if (!merged[j]) {
            merged[j] = cpu_to_be64(sqcow2_encode_foreign(&cluster,
                                                          b->cluster_bits));
        }
    }
}

/* Third pass: from regions to root entries */
static void finish_view(Builder *b, Sqcow2View *view)
{
    view->root = g_new0(uint64_t, b->nb_regions);
    view->entries = b->nb_regions;
    view->tables = g_ptr_array_new_with_free_func(g_free);

    for (uint64_t i = 0; i < b->nb_regions; i++) {
        Region *region = &b->regions[i];
        Sqcow2Root root = {};

        if (b->layers[0].kind == SQCOW2_LAYER_RAW &&
            i * b->region_size < b->layers[0].clip) {
            if (region->merged) {
                merge_raw(b, i);
            } else {
                root.kind = SQCOW2_ROOT_IDENTITY;
            }
        }
        if (region->merged) {
            view->root[i] = (uint64_t)SQCOW2_ROOT_MEMORY << 62 |
                            view->tables->len;
            g_ptr_array_add(view->tables, g_steal_pointer(&region->merged));
            continue;
        }
        if (region->nb_tables) {
            root.kind = SQCOW2_ROOT_TABLE;
            root.layer = region->layer;
            root.host_offset = region->table_host_offset;
        }
        view->root[i] = sqcow2_encode_root(&root, b->cluster_bits);
    }
}

int sqcow2_view_build(const Sqcow2Layer *layers, uint32_t nb_layers,
                      int cluster_bits, Sqcow2View *view, Error **errp)
{
    Builder b = {
        .layers = layers,
        .nb_layers = nb_layers,
        .cluster_bits = cluster_bits,
        .table_entries = (1ULL << cluster_bits) / sizeof(uint64_t),
    };
    int ret;

    *view = (Sqcow2View) {};
    b.region_size = b.table_entries << cluster_bits;
    b.nb_regions = DIV_ROUND_UP(layers[nb_layers - 1].virtual_size,
                                b.region_size);
    if (b.nb_regions > SQCOW2_MAX_ROOT_ENTRIES) {
        error_setg(errp, "Layer %u, '%s', is too large for its cluster size",
                   nb_layers - 1, layers[nb_layers - 1].filename);
        return -EFBIG;
    }
    b.regions = g_try_new0(Region, MAX(b.nb_regions, 1));
    if (!b.regions) {
        error_setg(errp, "The index does not fit in memory");
        return -ENOMEM;
    }
    b.buf = g_malloc(1ULL << cluster_bits);
    ret = for_each_table(&b, count_table, errp);
    if (ret == 0) {
        ret = for_each_table(&b, merge_table, errp);
    }
    if (ret == 0) {
        finish_view(&b, view);
    }
    for (uint64_t i = 0; i < b.nb_regions; i++) {
        g_free(b.regions[i].merged);
    }
    g_free(b.regions);
    g_free(b.buf);
    return ret;
}

int sqcow2_view_share(const Sqcow2Layer *lower, const Sqcow2Record *record,
                      int cluster_bits, Sqcow2View *view, Error **errp)
{
    uint64_t region_size = 1ULL << (2 * cluster_bits - 3);
    uint64_t root_bytes = (uint64_t)record->root.entries * SQCOW2_ROOT_SIZE;
    g_autofree uint64_t *l1 = NULL;
    Sqcow2View below = {};
    int64_t entries;
    uint64_t *raw;
    int ret;

    *view = (Sqcow2View) {};
    entries = read_l1(lower, record->layer, region_size, &l1, errp);
    if (entries < 0) {
        return entries;
    }
    raw = g_try_malloc(MAX(root_bytes, 1));
    if (!raw) {
        error_setg(errp, "The root table does not fit in memory");
        return -ENOMEM;
    }
    ret = sqcow2_layer_pread(lower, record->root.host_offset, root_bytes, raw);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read the root table of '%s'",
                         lower->filename);
        g_free(raw);
        return ret;
    }
    if (root_bytes) {
        ret = view_from_bytes(raw, &record->root, &below, errp);
    } else {
        g_free(raw);
    }
    view->root = g_new0(uint64_t, MAX(entries, 1));
    view->entries = entries;
    for (int64_t i = 0; ret == 0 && i < entries; i++) {
        Sqcow2Root root = {};

        if (l1[i]) {
            ret = table_in_file(lower, record->layer, l1[i], cluster_bits,
                                errp);
            root.kind = SQCOW2_ROOT_TABLE;
            root.layer = record->layer;
            root.host_offset = l1[i];
        } else if (i < below.entries &&
                   sqcow2_decode_root(below.root[i], record->layer,
                                      cluster_bits, &root) < 0) {
            error_setg(errp, "The root table of '%s' is invalid",
                       lower->filename);
            ret = -EINVAL;
        }
        if (ret == 0) {
            view->root[i] = sqcow2_encode_root(&root, cluster_bits);
        }
    }
    sqcow2_view_free(&below);
    if (ret < 0) {
        sqcow2_view_free(view);
    }
    return ret;
}
