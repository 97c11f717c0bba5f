/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: guest offset -> {owner, host offset, kind, run}
 *
 * The lookup of docs/sqcow2.rst.  Up to two tables speak about a cluster: the
 * own L2 table (through qcow2's cache) and the one that the view of the layer
 * below names (through ours; it may have to be merged first).  While the index
 * is trusted the own table alone decides where it exists (S7); after a rebuild
 * only its standard entries count (S1), and the view below decides for the
 * rest.
 *
 * Everything here runs under q.lock, as qcow2's own lookups do.  The own
 * slice is taken first and is pinned; a slice of ours is good until the next
 * one is loaded.
 */
#include "qemu/osdep.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

/* A slice of a table that speaks about the clusters at hand, or none */
typedef struct Table {
    const uint64_t *slice;
    uint16_t layer;
    uint64_t host_offset;       /* of the table, not of the slice */
    bool identity;              /* no slice: raw @layer owns all */
} Table;

typedef struct Lookup {
    BlockDriverState *bs;
    BDRVSqcow2State *s;
    uint64_t *own_slice;        /* pinned in qcow2's cache; or NULL */
    Table below;
} Lookup;

static int GRAPH_RDLOCK G_GNUC_PRINTF(2, 3)
corrupt(BlockDriverState *bs, const char *fmt, ...)
{
    g_autofree char *msg = NULL;
    va_list ap;

    va_start(ap, fmt);
    msg = g_strdup_vprintf(fmt, ap);
    va_end(ap);
    qcow2_signal_corruption(bs, false, -1, -1, "%s", msg);
    return -EIO;
}

static const char *layer_name(BDRVSqcow2State *s, uint16_t layer)
{
    return layer < s->layer ? s->layers[layer].filename : "the active image";
}

/* As much as qcow2's own L2 cache takes at most by default */
#define DEFAULT_CACHE_BYTES (32 * MiB)

static size_t slice_bytes(const BDRVSqcow2State *s)
{
    return s->q.l2_slice_size * sizeof(uint64_t);
}

void sqcow2_new_cache(BDRVSqcow2State *s)
{
    uint64_t bytes = (uint64_t)s->view.entries * s->q.cluster_size;

    sqcow2_cache_free(s->cache);
    s->cache = sqcow2_cache_new(slice_bytes(s), MIN(bytes, s->cache_bytes ?:
                                                    DEFAULT_CACHE_BYTES));
}

/*
 * As sqcow2_cache_find().  By default the size of slices depends on whether
 * qcow2's cache has room for all tables of the disk.  So a resize may change
 * it, under q.lock; nobody has a slice of ours then.
 */
static uint64_t *find_slice(BDRVSqcow2State *s, uint64_t key)
{
    if (unlikely(sqcow2_cache_slice_bytes(s->cache) != slice_bytes(s))) {
        sqcow2_new_cache(s);
    }
    return sqcow2_cache_find(s->cache, key);
}

/* Load slice @slice_offset (bytes into the table) of a table in a file. */
static int GRAPH_RDLOCK load_slice(BlockDriverState *bs, uint16_t layer,
                                   uint64_t host_offset, const uint64_t **slice)
{
    BDRVSqcow2State *s = bs->opaque;
    uint64_t key = sqcow2_set_offset(layer, host_offset);
    size_t bytes = slice_bytes(s);
    uint64_t *buf = find_slice(s, key);
    int ret;

    if (!buf) {
        buf = sqcow2_cache_take(s->cache);
        if (!buf) {
            return -ENOMEM;
        }
        if (layer == s->layer) {
            ret = bdrv_pread(bs->file, host_offset, bytes, buf, 0);
        } else {
            ret = bdrv_pread(s->set, key, bytes, buf, 0);
        }
        if (ret < 0) {
            return ret;
        }
        sqcow2_cache_add(s->cache, key, buf);
    }
    *slice = buf;
    return 0;
}

/* Merge slice @slice of the table for a region that no file has. */
static int GRAPH_RDLOCK load_merged(BlockDriverState *bs, uint64_t l1_index,
                                    unsigned slice, const uint64_t **merged)
{
    BDRVSqcow2State *s = bs->opaque;
    uint32_t nb_entries = s->q.l2_slice_size;
    /* Past the addresses of all files */
    uint64_t key = ((uint64_t)SQCOW2_MAX_LAYERS << SQCOW2_HOST_BITS) +
                   (l1_index << s->q.cluster_bits) +
                   (uint64_t)slice * nb_entries * sizeof(uint64_t);
    uint64_t *buf = find_slice(s, key);
    Error *local_err = NULL;
    int ret;

    if (!buf) {
        buf = sqcow2_cache_take(s->cache);
        if (!buf) {
            return -ENOMEM;
        }
        ret = sqcow2_merge(bs, &s->view, l1_index, slice * nb_entries,
                           nb_entries, s->set, buf, &local_err);
        if (ret == -EINVAL) {
            ret = corrupt(bs, "%s", error_get_pretty(local_err));
        }
        if (ret < 0) {
            error_free(local_err);
            return ret;
        }
        sqcow2_cache_add(s->cache, key, buf);
    }
    *merged = buf;
    return 0;
}

/* Find what the view of the layer below has for slice @slice of a region. */
static int GRAPH_RDLOCK load_below(BlockDriverState *bs, uint64_t l1_index,
                                   unsigned slice, Table *below)
{
    BDRVSqcow2State *s = bs->opaque;
    uint64_t slice_offset = (uint64_t)slice * s->q.l2_slice_size *
                            sizeof(uint64_t);
    Sqcow2Root root;
    uint64_t entry;

    *below = (Table) {};
    /* S10: behind the active disk's end there is VM state, not the view */
    if (l1_index >= s->view.entries || l1_index >= s->q.l1_vm_state_index) {
        return 0;
    }
    entry = s->view.root[l1_index];
    if (entry >> 62 == SQCOW2_ROOT_MERGE) {
        below->layer = s->layer;
        return load_merged(bs, l1_index, slice, &below->slice);
    }
    if (sqcow2_decode_root(entry, s->layer, s->q.cluster_bits, &root) < 0) {
        return corrupt(bs, "Root table entry 0x%" PRIx64 " is invalid", entry);
    }
    below->layer = root.layer;
    below->identity = root.kind == SQCOW2_ROOT_IDENTITY;
    if (root.kind != SQCOW2_ROOT_TABLE) {
        return 0;
    }
    below->host_offset = root.host_offset;
    return load_slice(bs, root.layer, root.host_offset + slice_offset,
                      &below->slice);
}

/*
 * Decode entry @index (within the slice) of @table; @guest_offset is that of
 * the cluster.  -EINVAL if it breaks a rule.
 */
static int decode_below(BDRVSqcow2State *s, const Table *table, unsigned index,
                        uint64_t guest_offset, Sqcow2Cluster *cluster)
{
    int ret;

    if (table->identity) {
        *cluster = (Sqcow2Cluster) {
            .kind = SQCOW2_DATA,
            .owner = table->layer,
            .host_offset = guest_offset,
        };
        return 0;
    }
    if (!table->slice) {
        *cluster = (Sqcow2Cluster) { .kind = SQCOW2_ABSENT };
        return 0;
    }
    ret = sqcow2_decode_entry(be64_to_cpu(table->slice[index]), table->layer,
                              s->q.cluster_bits, cluster);
    if (ret == 0 && cluster->own_table && table->layer == s->layer &&
        cluster->kind != SQCOW2_ABSENT) {
        return -EINVAL;         /* a merged table owns nothing */
    }
    if (ret == 0 && !cluster->own_table && table->layer < s->layer &&
        s->layers[table->layer].kind != SQCOW2_LAYER_SQCOW2) {
        return -EINVAL;         /* S6: not in plain files */
    }
    return ret;
}

/* Decode what decides about entry @index of the slices at hand. */
static int decode_at(Lookup *l, unsigned index, uint64_t guest_offset,
                     Sqcow2Cluster *cluster)
{
    BDRVSqcow2State *s = l->s;
    int ret;

    if (l->own_slice) {
        ret = sqcow2_decode_entry(be64_to_cpu(l->own_slice[index]), s->layer,
                                  s->q.cluster_bits, cluster);
        /* While rebuilt, neither foreign entries nor absence count (S1) */
        if (s->mode == SQCOW2_MODE_INDEXED ||
            (cluster->own_table && (ret < 0 ||
                                    cluster->kind != SQCOW2_ABSENT))) {
            return ret;
        }
    }
    return decode_below(s, &l->below, index, guest_offset, cluster);
}

static bool same_run(const Sqcow2Cluster *first, const Sqcow2Cluster *next,
                     uint64_t distance)
{
    if (next->kind != first->kind || next->owner != first->owner ||
        next->own_table != first->own_table) {
        return false;
    }
    return first->kind != SQCOW2_DATA ||
           next->host_offset == first->host_offset + distance;
}

/* The descriptor of a foreign compressed cluster stands in the owner's table */
static int GRAPH_RDLOCK
load_descriptor(BlockDriverState *bs, uint64_t guest_offset,
                const Sqcow2Cluster *cluster, uint64_t *descriptor)
{
    BDRVSqcow2State *s = bs->opaque;
    unsigned index = offset_to_l2_index(&s->q, guest_offset);
    unsigned slice_index = offset_to_l2_slice_index(&s->q, guest_offset);
    const uint64_t *slice;
    Sqcow2Cluster own;
    int ret;

    ret = load_slice(bs, cluster->owner, cluster->host_offset +
                     (uint64_t)(index - slice_index) * sizeof(uint64_t),
                     &slice);
    if (ret < 0) {
        return ret;
    }
    *descriptor = be64_to_cpu(slice[slice_index]);
    if (sqcow2_decode_entry(*descriptor, cluster->owner, s->q.cluster_bits,
                            &own) < 0 ||
        !own.own_table || own.kind != SQCOW2_COMPRESSED) {
        return corrupt(bs, "No compressed cluster where the index says, in "
                       "layer %u '%s'", cluster->owner,
                       layer_name(s, cluster->owner));
    }
    return 0;
}

/*
 * Of a raw layer each cluster stands where the guest sees it; in other files
 * offset 0 holds the header.
 */
static bool owner_fits(const Sqcow2Layer *owner, const Sqcow2Cluster *cluster,
                       uint64_t cluster_start)
{
    if (owner->kind == SQCOW2_LAYER_RAW) {
        return cluster->kind == SQCOW2_DATA &&
               cluster->host_offset == cluster_start;
    }
    return cluster->kind != SQCOW2_DATA || cluster->host_offset;
}

/* Turn the cluster at @guest_offset, and those like it, into an extent. */
static int GRAPH_RDLOCK
make_extent(Lookup *l, uint64_t guest_offset, uint64_t run_bytes,
            const Sqcow2Cluster *cluster, Sqcow2Extent *extent)
{
    BDRVSqcow2State *s = l->s;
    uint32_t in_cluster = offset_into_cluster(&s->q, guest_offset);

    extent->kind = cluster->kind;
    extent->owner = cluster->owner;
    extent->host_offset = cluster->host_offset;
    extent->bytes = run_bytes;

    if (cluster->kind == SQCOW2_ABSENT || cluster->owner == s->layer) {
        extent->host_offset += cluster->kind == SQCOW2_DATA ? in_cluster : 0;
        return 0;
    }
    if (cluster->owner > s->layer) {
        return corrupt(l->bs, "Layer %u owns guest offset 0x%" PRIx64
                       " but is not below layer %u", cluster->owner,
                       guest_offset, s->layer);
    }
    if (!owner_fits(&s->layers[cluster->owner], cluster,
                    guest_offset - in_cluster)) {
        return corrupt(l->bs, "Guest offset 0x%" PRIx64 " is not where the "
                       "index says in layer %u '%s'", guest_offset,
                       cluster->owner, layer_name(s, cluster->owner));
    }
    /* S9 */
    if (guest_offset >= s->layers[cluster->owner].clip) {
        extent->kind = SQCOW2_ZERO;
        extent->host_offset = 0;
        return 0;
    }
    extent->bytes = MIN(run_bytes,
                        s->layers[cluster->owner].clip - guest_offset);
    if (cluster->kind == SQCOW2_DATA) {
        /* Every cluster of data has at least its first byte in the file */
        if (s->layers[cluster->owner].kind != SQCOW2_LAYER_RAW &&
            cluster->host_offset + QEMU_ALIGN_DOWN(in_cluster + run_bytes - 1,
                                                   s->q.cluster_size) >=
            s->layers[cluster->owner].file_size) {
            return corrupt(l->bs, "Layer %u '%s' is truncated: data of guest "
                           "offset 0x%" PRIx64 " lies behind the end of the "
                           "file", cluster->owner,
                           layer_name(s, cluster->owner), guest_offset);
        }
        extent->host_offset += in_cluster;
        if (extent->host_offset + extent->bytes > SQCOW2_MAX_HOST_OFFSET) {
            return corrupt(l->bs, "Data past 64 TiB in layer %u '%s'",
                           cluster->owner, layer_name(s, cluster->owner));
        }
    } else if (cluster->kind == SQCOW2_COMPRESSED && !cluster->own_table) {
        return load_descriptor(l->bs, guest_offset, cluster,
                               &extent->host_offset);
    }
    return 0;
}

/* Count the run at @guest_offset and describe it. */
static int GRAPH_RDLOCK find_run(Lookup *l, uint64_t guest_offset,
                                 uint64_t bytes, Sqcow2Extent *extent)
{
    const BDRVQcow2State *q = &l->s->q;
    unsigned index = offset_to_l2_slice_index(&l->s->q, guest_offset);
    uint64_t cluster_start = guest_offset & -(uint64_t)q->cluster_size;
    uint64_t end = guest_offset + bytes;
    Sqcow2Cluster first, next;
    uint64_t run = q->cluster_size;

    if (decode_at(l, index, cluster_start, &first) < 0) {
        goto invalid;
    }
    /* Compressed clusters are read one by one, as in qcow2 */
    while (first.kind != SQCOW2_COMPRESSED && cluster_start + run < end &&
           ++index < q->l2_slice_size) {
        if (decode_at(l, index, cluster_start + run, &next) < 0) {
            break;              /* reported when it is asked for */
        }
        if (!same_run(&first, &next, run)) {
            break;
        }
        run += q->cluster_size;
    }
    return make_extent(l, guest_offset,
                       MIN(end, cluster_start + run) - guest_offset, &first,
                       extent);

invalid:
    return corrupt(l->bs, "Invalid L2 entry for guest offset 0x%" PRIx64
                   " (table of layer %u '%s')", guest_offset,
                   l->own_slice ? l->s->layer : l->below.layer,
                   layer_name(l->s, l->own_slice ? l->s->layer
                                                 : l->below.layer));
}

/* Get the own slice that covers @guest_offset; leave NULL if there is none. */
static int GRAPH_RDLOCK load_own(BlockDriverState *bs, uint64_t l1_index,
                                 unsigned slice, uint64_t **own_slice)
{
    BDRVSqcow2State *s = bs->opaque;
    uint64_t l2_offset;

    if (l1_index >= s->q.l1_size) {
        return 0;
    }
    l2_offset = s->q.l1_table[l1_index] & L1E_OFFSET_MASK;
    if (!l2_offset) {
        return 0;
    }
    if (offset_into_cluster(&s->q, l2_offset)) {
        return corrupt(bs, "L2 table offset 0x%" PRIx64 " unaligned (L1 index: "
                       "0x%" PRIx64 ")", l2_offset, l1_index);
    }
    return qcow2_cache_get(bs, s->q.l2_table_cache, l2_offset +
                           (uint64_t)slice * s->q.l2_slice_size *
                           sizeof(uint64_t),
                           (void **)own_slice);
}

int sqcow2_lookup(BlockDriverState *bs, uint64_t guest_offset,
                  uint64_t bytes, Sqcow2Extent *extent)
{
    BDRVSqcow2State *s = bs->opaque;
    Lookup l = { .bs = bs, .s = s };
    uint64_t l1_index = offset_to_l1_index(&s->q, guest_offset);
    unsigned slice = offset_to_l2_index(&s->q, guest_offset) /
                     s->q.l2_slice_size;
    int ret;

    /* A request that was under way when the node was given up */
    if (unlikely(s->mode == SQCOW2_MODE_OFF)) {
        return -EIO;
    }
    ret = load_own(bs, l1_index, slice, &l.own_slice);
    if (ret < 0) {
        return ret;
    }
    if (!l.own_slice || s->mode == SQCOW2_MODE_REBUILT) {
        ret = load_below(bs, l1_index, slice, &l.below);
    }
    if (ret == 0) {
        ret = find_run(&l, guest_offset, bytes, extent);
    }
    if (l.own_slice) {
        qcow2_cache_put(s->q.l2_table_cache, (void **)&l.own_slice);
    }
    return ret;
}

int sqcow2_inherit_slice(BlockDriverState *bs, int l1_index, unsigned slice,
                         uint64_t *l2_slice)
{
    BDRVSqcow2State *s = bs->opaque;
    uint64_t guest_offset = (uint64_t)l1_index * sqcow2_region_size(&s->q) +
                            ((uint64_t)slice * s->q.l2_slice_size <<
                             s->q.cluster_bits);
    Table below;
    int ret;

    ret = load_below(bs, l1_index, slice, &below);
    if (ret < 0 || (!below.slice && !below.identity)) {
        return ret;
    }
    for (unsigned i = 0; i < s->q.l2_slice_size; i++) {
        uint64_t offset = guest_offset + ((uint64_t)i << s->q.cluster_bits);
        Sqcow2Cluster cluster;
        uint64_t entry = 0;

        ret = decode_below(s, &below, i, offset, &cluster);
        if (ret < 0) {
            return corrupt(bs, "Invalid L2 entry for guest offset 0x%" PRIx64
                           " in layer %u '%s'", offset, below.layer,
                           layer_name(s, below.layer));
        }
        if (below.identity) {
            if (offset < s->layers[below.layer].clip) {
                entry = sqcow2_encode_foreign(&cluster, s->q.cluster_bits);
            }
        } else {
            sqcow2_inherit_entry(be64_to_cpu(below.slice[i]), below.layer,
                                 below.host_offset, s->q.cluster_bits, &entry);
        }
        l2_slice[i] = cpu_to_be64(entry);
    }
    return 0;
}
