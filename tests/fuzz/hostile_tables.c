/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer of hostile tables: decoders, validators, and the making of an index
 * from a hostile chain, in memory and without a block layer
 *
 * The first byte of an input picks a part.  Decoders: what is accepted is in
 * its range, and encoding it gives the same bytes.  Index: a chain of files
 * that have the entries that the input says.  An index made from standard
 * entries alone (S1) must say what a plain walk down the chain says; one made
 * with trust in what the files say of each other, and one loaded from a file,
 * must name nothing that is not there.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "../../block/sqcow2-int.h"
#include "hostile_fuzzer.h"

enum {
    CLUSTER_BITS = 9,
    CLUSTER = 1 << CLUSTER_BITS,
    ENTRIES = CLUSTER / 8,
    REGION = ENTRIES * CLUSTER,
    REGIONS = 3,
    MAX_FILES = 6,              /* the last one is the active image */
    FILE_CLUSTERS = 16,
};

/* Where things stand in each file, in clusters; L2 tables: where L1 says */
enum { AT_L1 = 1, AT_ROOT, AT_LAYERS };

typedef struct File {
    Sqcow2Record record;
    uint64_t size;
    uint8_t bytes[FILE_CLUSTERS * CLUSTER];
} File;

static const uint8_t *input;
static size_t input_left;

static File files[MAX_FILES];
static Sqcow2Layer layers[MAX_FILES];
static unsigned nb_layers;
static BdrvChild file_child;
static BlockDriverState active_bs;
static BDRVSqcow2State active;

static uint64_t get(int bytes)
{
    uint64_t value = 0;

    while (bytes-- > 0 && input_left) {
        value = value << 8 | *input++;
        input_left--;
    }
    return value;
}

/*
 * What the files under test call
 */

static void read_file(unsigned layer, uint64_t host_offset, uint64_t bytes,
                      uint8_t *buf)
{
    const File *f = &files[layer];

    g_assert(layer <= nb_layers);
    g_assert(host_offset <= SQCOW2_MAX_HOST_OFFSET && bytes <= 64 * MiB);
    memset(buf, 0, bytes);
    if (host_offset < f->size) {
        memcpy(buf, f->bytes + host_offset, MIN(bytes, f->size - host_offset));
    }
}

int sqcow2_layer_pread(const Sqcow2Layer *layer, uint64_t host_offset,
                       uint64_t bytes, void *buf)
{
    read_file(layer->fd, host_offset, bytes, buf);
    return 0;
}

bool sqcow2_layer_record(const Sqcow2Layer *layer, Sqcow2Record *record)
{
    *record = files[layer->fd].record;
    return layer->has_stamp;
}

uint8_t *sqcow2_layer_read_table(const Sqcow2Layer *layer,
                                 const Sqcow2Record *record)
{
    uint64_t bytes = (uint64_t)record->layer_table.entries * SQCOW2_DESC_SIZE;
    uint8_t *buf = bytes ? g_malloc(bytes) : NULL;

    if (buf) {
        read_file(layer->fd, record->layer_table.host_offset, bytes, buf);
    }
    return buf;
}

Sqcow2LayerCompared sqcow2_compare_layer(const Sqcow2Layer *layer,
                                         const Sqcow2LayerDesc *desc)
{
    return desc->kind != layer->kind ? SQCOW2_LAYER_CHANGED : SQCOW2_LAYER_SAME;
}

int coroutine_mixed_fn bdrv_pread(BdrvChild *child, int64_t offset,
                                  int64_t bytes, void *buf,
                                  BdrvRequestFlags flags)
{
    read_file(nb_layers, offset, bytes, buf);
    return 0;
}

int64_t coroutine_mixed_fn bdrv_getlength(BlockDriverState *bs)
{
    return files[nb_layers].size;
}

/*
 * Decoders
 */

static void try_record(void)
{
    uint8_t buf[SQCOW2_RECORD_SIZE + 8] = {}, again[SQCOW2_RECORD_SIZE];
    bool fix = get(1);
    size_t len = MIN(input_left, sizeof(buf));
    Sqcow2Record rec;

    memcpy(buf, input, len);
    if (fix) {
        stl_be_p(buf + 92, crc32c(0xffffffff, buf, 92));
        len = MAX(len, SQCOW2_RECORD_SIZE);
    }
    if (sqcow2_decode_record(buf, len, CLUSTER_BITS, &rec, NULL) == 0) {
        g_assert(rec.root.entries <= SQCOW2_MAX_ROOT_ENTRIES);
        g_assert(rec.layer_table.entries <= SQCOW2_MAX_DESC_ENTRIES);
        sqcow2_encode_record(&rec, again);
        g_assert(!memcmp(buf, again, sizeof(again)));
    }
}

static void try_desc(void)
{
    uint8_t buf[SQCOW2_DESC_SIZE] = {}, again[SQCOW2_DESC_SIZE];
    Sqcow2LayerDesc desc;

    memcpy(buf, input, MIN(input_left, sizeof(buf)));
    if (sqcow2_decode_desc(buf, &desc, NULL) == 0) {
        sqcow2_encode_desc(&desc, again);
        g_assert(!memcmp(buf, again, sizeof(buf)));
    }
}

static void try_root(void)
{
    int bits = MIN_CLUSTER_BITS + get(1) % 13;
    uint16_t own_layer = get(2);
    uint64_t entry = get(8);
    Sqcow2Root root;

    if (sqcow2_decode_root(entry, own_layer, bits, &root) == 0) {
        g_assert(root.layer <= own_layer);
        g_assert(root.host_offset < SQCOW2_MAX_HOST_OFFSET);
        g_assert(sqcow2_encode_root(&root, bits) == entry);
    }
}

static void try_entry(void)
{
    int bits = MIN_CLUSTER_BITS + get(1) % 13;
    uint16_t layer = get(2);
    uint64_t entry = get(8), table = get(4) % 1024 << bits, inherited;
    Sqcow2Cluster cluster, again;
    int ret = sqcow2_decode_entry(entry, layer, bits, &cluster);

    g_assert(sqcow2_inherit_entry(entry, layer, table, bits, &inherited) ==
             ret);
    if (ret < 0) {
        return;
    }
    g_assert(cluster.owner <= layer);
    if (cluster.kind == SQCOW2_DATA) {
        g_assert(cluster.host_offset < SQCOW2_MAX_HOST_OFFSET);
        g_assert(!(cluster.host_offset & ((1ULL << bits) - 1)));
    }
    if (layer == UINT16_MAX || cluster.kind == SQCOW2_ABSENT) {
        return;
    }
    /* The same cluster, seen from the layer above */
    if (cluster.kind == SQCOW2_COMPRESSED && cluster.own_table && !table) {
        return;
    }
    g_assert(sqcow2_decode_entry(inherited, layer + 1, bits, &again) == 0);
    g_assert(again.owner == cluster.owner && again.kind == cluster.kind);
    g_assert(!again.own_table);
    g_assert(again.host_offset == (cluster.kind == SQCOW2_COMPRESSED &&
                                   cluster.own_table ? table
                                                     : cluster.host_offset));
}

/*
 * The chain
 */

static uint64_t some_entry(void)
{
    uint64_t a, b, c;

    switch (get(1) % 4) {
    case 0:
        return get(8);
    case 1:                     /* standard */
        a = get(1) % (FILE_CLUSTERS + 1);
        b = get(1);
        return a * CLUSTER | (b & 1) << 63 | (b & 2) << 61 | (b & 4) >> 2;
    case 2:                     /* foreign */
        a = get(1);
        b = get(1) % (MAX_FILES + 1);
        c = get(1) % (FILE_CLUSTERS + 1);
        return 1ULL << 61 | (a & 3) << 59 | b << 43 | c;
    default:                    /* of a root table */
        a = get(1);
        b = get(1) % (MAX_FILES + 1);
        c = get(1) % (FILE_CLUSTERS + 1);
        return (a & 3) << 62 | b << 43 | c;
    }
}

static void make_record(unsigned k)
{
    Sqcow2Record *rec = &files[k].record;
    unsigned how = get(1);

    rec->layer = how & 1 ? get(1) % (MAX_FILES + 1) : k;
    rec->flags = how & 2 ? 0 : SQCOW2_FLAG_INDEX_VALID;
    rec->below_kind = k ? layers[k - 1].kind : SQCOW2_LAYER_NONE;
    memset(rec->stamp, how & 4 ? 1 : 0xa0 + k, SQCOW2_STAMP_SIZE);
    memset(rec->below_stamp, how & 8 ? 1 : 0xa0 + k - 1, SQCOW2_STAMP_SIZE);
    if (how & 16) {
        rec->root.host_offset = AT_ROOT * CLUSTER;
        rec->root.entries = 1 + (how >> 6);
    }
    if (how & 32 && rec->layer) {
        rec->layer_table.host_offset = AT_LAYERS * CLUSTER;
        rec->layer_table.entries = rec->layer;
    }
}

static void make_layer(unsigned k)
{
    File *f = &files[k];
    Sqcow2Layer *l = &layers[k];
    unsigned how = get(1), size = get(1);

    *f = (File) {};
    f->size = how & 0x80 ? (how & 0x1f) * CLUSTER / 2 : sizeof(f->bytes);
    l->fd = k;
    l->kind = how & 3 ?: SQCOW2_LAYER_SQCOW2;
    if (l->kind == SQCOW2_LAYER_RAW && k) {
        l->kind = SQCOW2_LAYER_QCOW2;
    }
    l->file_size = f->size;
    l->virtual_size = l->kind == SQCOW2_LAYER_RAW ?
                      ROUND_UP(f->size, BDRV_SECTOR_SIZE)
                      : REGIONS * REGION - size * CLUSTER / 2;
    l->l1_host_offset = AT_L1 * CLUSTER;
    l->l1_entries = how & 0x40 ? get(1) : REGIONS;
    l->filename = (char *)"file";
    make_record(k);
    l->has_stamp = l->kind == SQCOW2_LAYER_SQCOW2;
    l->writing = f->record.flags & SQCOW2_FLAG_WRITING;
    memcpy(l->stamp, f->record.stamp, SQCOW2_STAMP_SIZE);
}

static void make_chain(void)
{
    nb_layers = 1 + get(1) % (MAX_FILES - 1);
    for (unsigned k = 0; k <= nb_layers; k++) {
        make_layer(k);
    }
    files[nb_layers].record.layer = nb_layers;
    if (files[nb_layers].record.layer_table.entries) {
        files[nb_layers].record.layer_table.entries = nb_layers;
    }
    while (input_left) {
        File *f = &files[get(1) % (nb_layers + 1)];
        unsigned cluster = 1 + get(1) % (FILE_CLUSTERS - 1);
        unsigned i = get(1) % ENTRIES;
        unsigned n = get(1) % 4;
        uint64_t entry = some_entry();

        for (unsigned j = i; j <= i + n && j < ENTRIES; j++) {
            stq_be_p(f->bytes + cluster * CLUSTER + j * 8, entry);
        }
    }
    for (unsigned k = 0; k <= nb_layers; k++) {
        File *f = &files[k];

        memset(f->bytes + f->size, 0, sizeof(f->bytes) - f->size);
        f->record.root.crc = crc32c(0xffffffff, f->bytes + AT_ROOT * CLUSTER,
                                    f->record.root.entries * 8);
        f->record.layer_table.crc = crc32c(0xffffffff, f->bytes + AT_LAYERS *
                                           CLUSTER, f->record.layer_table.
                                           entries * SQCOW2_DESC_SIZE);
    }
    sqcow2_set_clips(layers, nb_layers);
    file_child.bs = &active_bs;
    active_bs.file = &file_child;
    active_bs.opaque = &active;
    active.layers = layers;
    active.layer = nb_layers;
    active.q.cluster_bits = CLUSTER_BITS;
    active.q.cluster_size = CLUSTER;
    active.q.l2_bits = CLUSTER_BITS - 3;
}

/*
 * Who owns a cluster?  By walking down; false if an entry of the walk breaks
 * a rule, or a table is not in its file.
 */
static bool walk_down(unsigned c, Sqcow2Cluster *owned)
{
    uint64_t guest_offset = (uint64_t)c * CLUSTER;

    *owned = (Sqcow2Cluster) {};
    for (unsigned k = nb_layers; k-- > 0 && guest_offset < layers[k].clip; ) {
        uint64_t entry, table;

        if (layers[k].kind == SQCOW2_LAYER_RAW) {
            *owned = (Sqcow2Cluster) {
                .kind = SQCOW2_DATA,
                .owner = k,
                .host_offset = guest_offset,
            };
            return true;
        }
        table = ldq_be_p(files[k].bytes + AT_L1 * CLUSTER + c / ENTRIES * 8) &
                L1E_OFFSET_MASK;
        if (!table) {
            continue;
        }
        if (table % CLUSTER || table + CLUSTER > files[k].size) {
            return false;
        }
        entry = ldq_be_p(files[k].bytes + table + c % ENTRIES * 8);
        if (sqcow2_entry_is_foreign(entry)) {
            if (layers[k].kind == SQCOW2_LAYER_QCOW2) {
                return false;
            }
            continue;
        }
        if (sqcow2_decode_entry(entry, k, CLUSTER_BITS, owned) < 0) {
            return false;
        }
        if (owned->kind != SQCOW2_ABSENT) {
            if (owned->kind == SQCOW2_COMPRESSED) {
                owned->host_offset = table;
            }
            return true;
        }
    }
    *owned = (Sqcow2Cluster) {};
    return true;
}

/* What @view says of cluster @c, clipped; false if it is damaged there. */
static bool look_up(const Sqcow2View *view, unsigned c, Sqcow2Cluster *found)
{
    uint64_t merged = 0, entry;
    unsigned i = c / ENTRIES, j = c % ENTRIES;
    Sqcow2Root root;

    *found = (Sqcow2Cluster) {};
    if (i >= view->entries) {
        return true;
    }
    if (view->root[i] >> 62 == SQCOW2_ROOT_MERGE) {
        if (sqcow2_merge(&active_bs, view, i, j, 1, NULL, &merged, NULL) < 0) {
            return false;
        }
        merged = be64_to_cpu(merged);
    } else {
        g_assert(sqcow2_decode_root(view->root[i], nb_layers, CLUSTER_BITS,
                                    &root) == 0);
        if (root.kind == SQCOW2_ROOT_ABSENT) {
            return true;
        }
        if (root.kind == SQCOW2_ROOT_IDENTITY) {
            g_assert(layers[root.layer].kind == SQCOW2_LAYER_RAW);
            *found = (Sqcow2Cluster) {
                .kind = SQCOW2_DATA,
                .owner = root.layer,
                .host_offset = (uint64_t)c * CLUSTER,
            };
        } else {
            g_assert(root.host_offset + CLUSTER <= files[root.layer].size);
            entry = ldq_be_p(files[root.layer].bytes + root.host_offset +
                             j * 8);
            if (sqcow2_inherit_entry(entry, root.layer, root.host_offset,
                                     CLUSTER_BITS, &merged) < 0) {
                return false;
            }
        }
    }
    if (merged) {
        g_assert(sqcow2_entry_is_foreign(merged));
        if (sqcow2_decode_entry(merged, nb_layers, CLUSTER_BITS, found) < 0) {
            return false;
        }
        found->own_table = false;
    }
    if (found->kind != SQCOW2_ABSENT &&
        (uint64_t)c * CLUSTER >= layers[found->owner].clip) {
        *found = (Sqcow2Cluster) {};
    }
    return true;
}

static void try_view(const Sqcow2View *view, bool compare)
{
    for (unsigned c = 0; c < REGIONS * ENTRIES; c++) {
        Sqcow2Cluster found, owned;

        if (!look_up(view, c, &found) || !compare || !walk_down(c, &owned)) {
            continue;
        }
        g_assert(found.kind == owned.kind);
        if (owned.kind != SQCOW2_ABSENT) {
            g_assert(found.owner == owned.owner);
            g_assert(found.host_offset == owned.host_offset);
        }
    }
}

static void try_chain(void)
{
    Sqcow2View view;
    const Sqcow2Record *record;
    unsigned how = get(1);

    make_chain();
    record = &files[nb_layers].record;
    if (sqcow2_view_build(&active_bs, how & 1 ? record : NULL, layers,
                          nb_layers, false, &view, NULL) == 0) {
        try_view(&view, true);
        sqcow2_view_free(&view);
    }
    if (sqcow2_view_build(&active_bs, how & 1 ? record : NULL, layers,
                          nb_layers, true, &view, NULL) == 0) {
        try_view(&view, false);
        for (unsigned i = 0; i < view.entries; i++) {
            uint64_t merged[ENTRIES], root;

            if (view.root[i] >> 62 == SQCOW2_ROOT_MERGE &&
                sqcow2_merge(&active_bs, &view, i, 0, ENTRIES, NULL, merged,
                             NULL) == 0) {
                sqcow2_merge_root(&active_bs, &view, i, merged, &root);
            }
        }
        sqcow2_view_free(&view);
    }
    if (sqcow2_view_load(&active_bs, record, &view, NULL) == 0) {
        try_view(&view, false);
        sqcow2_view_free(&view);
    }
    if (layers[nb_layers - 1].kind == SQCOW2_LAYER_SQCOW2 &&
        sqcow2_view_share(&layers[nb_layers - 1],
                          &files[nb_layers - 1].record, CLUSTER_BITS, &view,
                          NULL) == 0) {
        sqcow2_view_free(&view);
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const parts[])(void) = {
        try_record, try_desc, try_root, try_entry, try_chain, try_chain,
        try_chain, try_chain,
    };

    input = data;
    input_left = size;
    parts[get(1) % ARRAY_SIZE(parts)]();
    return 0;
}
