/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: check of the index
 *
 * Called by qcow2's refcount check, also by the repair of a dirty image in
 * the middle of open, when nothing of ours is set up yet: so the record is
 * taken from the header extensions here, and the tables are read from the
 * file.  A table that the record names is counted even when what is in it is
 * wrong, or a repair would free its clusters and somebody would get them.
 *
 * Findings name the invariant that is broken (docs/sqcow2.rst).
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

static void G_GNUC_PRINTF(2, 3) finding(BdrvCheckResult *res,
                                        const char *fmt, ...)
{
    va_list ap;

    fprintf(stderr, "ERROR ");
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, "\n");
    res->corruptions++;
}

/* Take the record as it is in memory; NULL record: none that counts. */
static bool get_record(BDRVSqcow2State *s, Sqcow2Record *rec,
                       BdrvCheckResult *res)
{
    Qcow2UnknownHeaderExtension *ext;
    Error *local_err = NULL;

    QLIST_FOREACH(ext, &s->q.unknown_header_ext, next) {
        if (ext->magic != SQCOW2_EXT_MAGIC) {
            continue;
        }
        if (sqcow2_decode_record(ext->data, ext->len, s->q.cluster_bits, rec,
                                 &local_err) == 0) {
            return true;
        }
        finding(res, "%s (S2)", error_get_pretty(local_err));
        error_free(local_err);
        return false;
    }
    return false;
}

/* Read a table into *@table, or note why that fails and return an errno. */
static int coroutine_fn GRAPH_RDLOCK
read_table(BlockDriverState *bs, const Sqcow2TableRef *ref, size_t entry_size,
           const char *name, BdrvCheckResult *res, uint8_t **table)
{
    uint64_t bytes = (uint64_t)ref->entries * entry_size;
    uint8_t *buf = g_try_malloc(bytes);
    int ret = buf ? bdrv_co_pread(bs->file, ref->host_offset, bytes, buf, 0)
                  : -ENOMEM;

    if (ret < 0) {
        fprintf(stderr, "ERROR could not read the sQcow2 %s table: %s\n",
                name, strerror(-ret));
        res->check_errors++;
    } else if (crc32c(0xffffffff, buf, bytes) != ref->crc) {
        finding(res, "sQcow2 %s table has a wrong checksum (S2)", name);
    } else {
        *table = buf;
        return 0;
    }
    g_free(buf);
    return -EINVAL;
}

/* @merged: the table is named by the root table, and owns nothing itself */
static void check_foreign_table(BDRVSqcow2State *s, const Sqcow2Record *rec,
                                const uint64_t *table, uint32_t l1_index,
                                bool merged, BdrvCheckResult *res)
{
    for (int j = 0; j < s->q.l2_size; j++) {
        uint64_t entry = be64_to_cpu(table[j]);
        Sqcow2Cluster cluster;

        if (sqcow2_entry_is_foreign(entry) ?
            sqcow2_decode_entry(entry, rec->layer, s->q.cluster_bits,
                                &cluster) < 0 : merged && entry) {
            finding(res, "%s L2 entry 0x%" PRIx64 " is invalid (L1 index "
                    "%u, L2 index %d) (S6)", merged ? "merged" : "foreign",
                    entry, l1_index, j);
        }
    }
}

static int coroutine_fn GRAPH_RDLOCK
count_merged_table(BlockDriverState *bs, const Sqcow2Record *rec,
                   uint32_t l1_index, uint64_t host_offset,
                   BdrvCheckResult *res, void **refcount_table,
                   int64_t *nb_clusters)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint64_t *table = g_malloc0(s->q.cluster_size);
    int ret;

    ret = qcow2_inc_refcounts_imrt(bs, res, refcount_table, nb_clusters,
                                   host_offset, s->q.cluster_size);
    if (ret < 0 || has_subclusters(&s->q)) {
        return ret;
    }
    ret = bdrv_co_pread(bs->file, host_offset, s->q.cluster_size, table, 0);
    if (ret < 0) {
        fprintf(stderr, "ERROR could not read a merged L2 table: %s\n",
                strerror(-ret));
        res->check_errors++;
        return 0;
    }
    check_foreign_table(s, rec, table, l1_index, true, res);
    return 0;
}

static void coroutine_fn GRAPH_RDLOCK
check_layer_table(BlockDriverState *bs, const Sqcow2Record *rec,
                  BdrvCheckResult *res)
{
    g_autofree uint8_t *raw = NULL;
    Sqcow2LayerDesc desc;

    if (!rec->layer_table.entries ||
        read_table(bs, &rec->layer_table, SQCOW2_DESC_SIZE, "layer", res,
                   &raw) < 0) {
        return;
    }
    for (uint32_t i = 0; i < rec->layer_table.entries; i++) {
        if (sqcow2_decode_desc(raw + i * SQCOW2_DESC_SIZE, &desc, NULL) < 0) {
            finding(res, "sQcow2 layer table entry %u is invalid (S2)", i);
        }
    }
}

static int coroutine_fn GRAPH_RDLOCK
count_merged_tables(BlockDriverState *bs, const Sqcow2Record *rec,
                    BdrvCheckResult *res, void **refcount_table,
                    int64_t *nb_clusters)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint8_t *raw = NULL;

    if (read_table(bs, &rec->root, SQCOW2_ROOT_SIZE, "root", res, &raw) < 0) {
        return 0;
    }
    for (uint32_t i = 0; i < rec->root.entries; i++) {
        uint64_t entry = ldq_be_p(raw + i * SQCOW2_ROOT_SIZE);
        Sqcow2Root root;
        int ret;

        if (sqcow2_decode_root(entry, rec->layer, s->q.cluster_bits,
                               &root) < 0) {
            finding(res, "sQcow2 root table entry %u is invalid: 0x%" PRIx64
                    " (S4)", i, entry);
            continue;
        }
        if (root.kind != SQCOW2_ROOT_TABLE || root.layer != rec->layer) {
            continue;
        }
        ret = count_merged_table(bs, rec, i, root.host_offset, res,
                                 refcount_table, nb_clusters);
        if (ret < 0) {
            return ret;
        }
    }
    return 0;
}

/* S6 in the active L2 tables; upstream's check does not see foreign entries */
static int coroutine_fn GRAPH_RDLOCK
check_own_tables(BlockDriverState *bs, const Sqcow2Record *rec,
                 BdrvCheckResult *res)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint64_t *table = NULL;

    if (has_subclusters(&s->q)) {
        return 0;
    }
    table = g_malloc(s->q.cluster_size);
    for (int i = 0; i < s->q.l1_size; i++) {
        uint64_t l2_offset = s->q.l1_table[i] & L1E_OFFSET_MASK;
        int ret;

        if (!l2_offset || offset_into_cluster(&s->q, l2_offset)) {
            continue;
        }
        ret = bdrv_co_pread(bs->file, l2_offset, s->q.cluster_size, table, 0);
        if (ret < 0) {
            res->check_errors++;
            return ret;
        }
        check_foreign_table(s, rec, table, i, false, res);
    }
    return 0;
}

int coroutine_fn sqcow2_count_refcounts(BlockDriverState *bs,
                                        BdrvCheckResult *res,
                                        void **refcount_table,
                                        int64_t *nb_clusters)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record rec;
    int ret;

    if (bs->drv != &bdrv_sqcow2 || !sqcow2_has_index_bit(s) ||
        !get_record(s, &rec, res)) {
        return 0;
    }
    ret = qcow2_inc_refcounts_imrt(bs, res, refcount_table, nb_clusters,
                                   rec.root.host_offset,
                                   (uint64_t)rec.root.entries *
                                   SQCOW2_ROOT_SIZE);
    if (ret == 0) {
        ret = qcow2_inc_refcounts_imrt(bs, res, refcount_table, nb_clusters,
                                       rec.layer_table.host_offset,
                                       (uint64_t)rec.layer_table.entries *
                                       SQCOW2_DESC_SIZE);
    }
    if (ret == 0) {
        check_layer_table(bs, &rec, res);
    }
    if (ret == 0 && rec.root.entries) {
        ret = count_merged_tables(bs, &rec, res, refcount_table, nb_clusters);
    }
    if (ret == 0) {
        ret = check_own_tables(bs, &rec, res);
    }
    return ret;
}
