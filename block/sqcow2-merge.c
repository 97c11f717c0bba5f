/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: L2 tables that no file has, merged from those that the files have
 *
 * After a change below, an index is still right about the layers above the
 * change.  So the chain is taken for a list of segments, top down: in each,
 * one file's index tells which of the segment's layers owns a cluster, and
 * nothing about the layers below it.  A layer whose index tells nothing is a
 * segment of its own, of which only standard entries count (S1).
 *
 * A region's sources are the tables that the segments have for it.  Its
 * merged table takes each cluster from the first source in which a layer of
 * that source's segment owns it: that layer is the highest owner, since the
 * segments follow each other as the layers do.
 *
 * What lies behind the end of a shorter layer (S9) is left out here, or left
 * to the lookup, with the same result: if an owner is clipped, so are all
 * layers below it, for they are seen through the same layers and more.
 *
 * Merged slices are made when they are first asked for and are kept in the
 * slice cache; so memory is bounded by the cache's budget and by the number
 * of L2 tables that there are, not by the size of the disk.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

/* Far more than fit on a disk; keeps an index of them in 32 bits */
#define MAX_SOURCES (1U << 28)

Sqcow2Sources *sqcow2_sources_new(const Sqcow2Layer *layers,
                                  uint32_t nb_layers, int cluster_bits)
{
    Sqcow2Sources *s = g_new0(Sqcow2Sources, 1);

    s->layers = layers;
    s->nb_layers = nb_layers;
    s->cluster_bits = cluster_bits;
    s->segments = g_array_new(false, false, sizeof(Sqcow2Segment));
    return s;
}

void sqcow2_sources_free(Sqcow2Sources *s)
{
    if (s) {
        g_array_unref(s->segments);
        g_free(s->sources);
        g_free(s);
    }
}

uint32_t sqcow2_sources_add(Sqcow2Sources *s, uint16_t layer,
                            uint64_t host_offset)
{
    if (s->nb_sources == s->nb_allocated) {
        uint32_t nb = MAX(64, s->nb_allocated * 2);
        Sqcow2Source *more = nb > MAX_SOURCES ? NULL :
            g_try_renew(Sqcow2Source, s->sources, nb);

        if (!more) {
            return SQCOW2_NO_SOURCE;
        }
        s->sources = more;
        s->nb_allocated = nb;
    }
    s->sources[s->nb_sources] = (Sqcow2Source) {
        .host_offset = host_offset,
        .next = SQCOW2_NO_SOURCE,
        .layer = layer,
        .segment = s->segments->len - 1,
    };
    return s->nb_sources++;
}

static const Sqcow2Segment *segment_of(const Sqcow2Sources *s,
                                       const Sqcow2Source *src)
{
    return &g_array_index(s->segments, Sqcow2Segment, src->segment);
}

/* Read @bytes at @offset of the L2 table @src. */
static int GRAPH_RDLOCK
read_source(BlockDriverState *bs, const Sqcow2Sources *s, BdrvChild *set,
            const Sqcow2Source *src, uint64_t offset, size_t bytes, void *buf)
{
    uint64_t host_offset = src->host_offset + offset;

    if (src->layer == s->nb_layers) {
        return bdrv_pread(bs->file, host_offset, bytes, buf, 0);
    }
    if (set) {
        return bdrv_pread(set, sqcow2_set_offset(src->layer, host_offset),
                          bytes, buf, 0);
    }
    return sqcow2_layer_pread(&s->layers[src->layer], host_offset, bytes, buf);
}

/*
 * What @l2_entry of the table @src says, if it counts, as an entry for a
 * merged table; 0 if it does not, or if its owner is clipped (S9).
 * -EINVAL if it breaks a rule.
 */
static int take_entry(const Sqcow2Sources *s, const Sqcow2Source *src,
                      uint64_t l2_entry, uint64_t guest_offset,
                      uint64_t *taken)
{
    const Sqcow2Segment *seg = segment_of(s, src);
    bool plain = src->layer < s->nb_layers &&
                 s->layers[src->layer].kind != SQCOW2_LAYER_SQCOW2;
    Sqcow2Cluster cluster;
    int64_t owner;

    *taken = 0;
    if (sqcow2_entry_is_foreign(l2_entry)) {
        if (plain) {
            return -EINVAL;     /* S6 */
        }
        if (!seg->vouched) {
            return 0;
        }
    }
    /* Foreign entries count layers as the segment's index does */
    if (sqcow2_decode_entry(l2_entry, src->layer - seg->shift,
                            s->cluster_bits, &cluster) < 0) {
        return -EINVAL;
    }
    if (cluster.kind == SQCOW2_ABSENT) {
        return 0;
    }
    if (cluster.own_table && src->layer == s->nb_layers) {
        return -EINVAL;         /* a merged table owns nothing */
    }
    owner = (int64_t)cluster.owner + seg->shift;
    if (owner < seg->lowest || guest_offset >= s->layers[owner].clip) {
        return 0;
    }
    cluster.owner = owner;
    if (cluster.own_table && cluster.kind == SQCOW2_COMPRESSED) {
        cluster.host_offset = src->host_offset;
    }
    *taken = sqcow2_encode_foreign(&cluster, s->cluster_bits);
    return 0;
}

/* Raw layer @layer owns what nobody above does. */
static void merge_identity(const Sqcow2Sources *s, uint16_t layer,
                           uint64_t guest_offset, uint32_t nb_entries,
                           uint64_t *merged)
{
    for (uint32_t j = 0; j < nb_entries; j++) {
        Sqcow2Cluster cluster = {
            .kind = SQCOW2_DATA,
            .owner = layer,
            .host_offset = guest_offset + ((uint64_t)j << s->cluster_bits),
        };

        if (cluster.host_offset >= s->layers[layer].clip) {
            break;
        }
        if (!merged[j]) {
            merged[j] = cpu_to_be64(sqcow2_encode_foreign(&cluster,
                                                          s->cluster_bits));
        }
    }
}

/* Returns how many entries have no owner yet, or -EINVAL. */
static int merge_table(const Sqcow2Sources *s, const Sqcow2Source *src,
                       uint64_t guest_offset, uint32_t nb_entries,
                       const uint64_t *table, uint64_t *merged, Error **errp)
{
    int left = 0;

    for (uint32_t j = 0; j < nb_entries; j++) {
        uint64_t offset = guest_offset + ((uint64_t)j << s->cluster_bits);
        uint64_t taken;

        if (!table[j] || merged[j]) {
            left += !merged[j];
            continue;
        }
        if (take_entry(s, src, be64_to_cpu(table[j]), offset, &taken) < 0) {
            bool own = src->layer == s->nb_layers;

            error_setg(errp, "Layer %u, '%s', has an invalid L2 entry for "
                       "guest offset 0x%" PRIx64 "; run 'qemu-img check' on "
                       "it", src->layer, own ? "the active image"
                       : s->layers[src->layer].filename, offset);
            return -EINVAL;
        }
        merged[j] = cpu_to_be64(taken);
        left += !taken;
    }
    return left;
}

int sqcow2_merge(BlockDriverState *bs, const Sqcow2View *view,
                 uint32_t l1_index, uint32_t first, uint32_t nb_entries,
                 BdrvChild *set, uint64_t *merged, Error **errp)
{
    const Sqcow2Sources *s = view->sources;
    size_t bytes = nb_entries * sizeof(uint64_t);
    uint64_t guest_offset = ((uint64_t)l1_index << (2 * s->cluster_bits - 3)) +
                            ((uint64_t)first << s->cluster_bits);
    g_autofree uint64_t *table = g_try_malloc(bytes);
    uint32_t i = view->root[l1_index];
    int ret = 1;

    if (!table) {
        error_setg(errp, "The index does not fit in memory");
        return -ENOMEM;
    }
    memset(merged, 0, bytes);
    while (ret > 0 && i != SQCOW2_NO_SOURCE) {
        const Sqcow2Source *src = &s->sources[i];

        i = src->next;
        if (!src->host_offset) {
            merge_identity(s, src->layer, guest_offset, nb_entries, merged);
            continue;
        }
        ret = read_source(bs, s, set, src, first * sizeof(uint64_t), bytes,
                          table);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not read an L2 table of layer "
                             "%u", src->layer);
            return ret;
        }
        ret = merge_table(s, src, guest_offset, nb_entries, table, merged,
                          errp);
    }
    return MIN(ret, 0);
}

/* Does a lookup in the table @src find for this cluster what is in @merged? */
static bool same_entry(const Sqcow2Sources *s, const Sqcow2Source *src,
                       uint64_t l2_entry, uint64_t guest_offset,
                       uint64_t merged)
{
    uint64_t inherited;
    Sqcow2Cluster cluster;

    if (sqcow2_inherit_entry(l2_entry, src->layer, src->host_offset,
                             s->cluster_bits, &inherited) < 0 ||
        sqcow2_decode_entry(inherited, s->nb_layers, s->cluster_bits,
                            &cluster) < 0) {
        return false;
    }
    if (cluster.kind != SQCOW2_ABSENT &&
        guest_offset >= s->layers[cluster.owner].clip) {
        return !merged;
    }
    return inherited == merged;
}

int sqcow2_merge_root(BlockDriverState *bs, const Sqcow2View *view,
                      uint32_t l1_index, const uint64_t *merged,
                      uint64_t *root_entry)
{
    const Sqcow2Sources *s = view->sources;
    const Sqcow2Source *src = &s->sources[(uint32_t)view->root[l1_index]];
    uint32_t nb_entries = 1U << (s->cluster_bits - 3);
    uint64_t guest_offset = (uint64_t)l1_index << (2 * s->cluster_bits - 3);
    g_autofree uint64_t *table = NULL;
    int ret;

    *root_entry = 0;
    if (buffer_is_zero(merged, 1ULL << s->cluster_bits)) {
        return 1;
    }
    /* Tables of the old index in the active image's own file will be freed */
    if (!src->host_offset || src->layer == s->nb_layers) {
        return 0;
    }
    table = g_try_malloc(1ULL << s->cluster_bits);
    if (!table) {
        return -ENOMEM;
    }
    ret = read_source(bs, s, NULL, src, 0, 1ULL << s->cluster_bits, table);
    if (ret < 0) {
        return ret;
    }
    for (uint32_t j = 0; j < nb_entries; j++) {
        if ((table[j] || merged[j]) &&
            !same_entry(s, src, be64_to_cpu(table[j]),
                        guest_offset + ((uint64_t)j << s->cluster_bits),
                        be64_to_cpu(merged[j]))) {
            return 0;
        }
    }
    *root_entry = sqcow2_encode_root(&(Sqcow2Root) {
        .kind = SQCOW2_ROOT_TABLE,
        .layer = src->layer,
        .host_offset = src->host_offset,
    }, s->cluster_bits);
    return 1;
}
