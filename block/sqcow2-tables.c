/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: every L2 table of the own file, of the active disk and of internal
 * snapshots
 *
 * First all L1 tables are read, to learn which tables there are: one that
 * several L1 tables share is visited once.  Then each is read, shown to the
 * caller, and written back if he changed it.
 *
 * A table is written only if its refcount is the number of L1 tables that
 * name it.  Otherwise something else may stand in its cluster, and what looks
 * like a foreign entry may be somebody's data.
 *
 * Tables are read and written directly, past qcow2's L2 cache: it may hold
 * none that is not of the active disk, as its writes are checked for that.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

typedef struct TableSet {
    GPtrArray *tables;          /* of Sqcow2OwnTable, in the order found */
    GHashTable *by_offset;
} TableSet;

/* Note the tables that @l1, @entries long and big-endian, names. */
static int note_l1(BDRVSqcow2State *s, TableSet *set, const uint64_t *l1,
                   uint32_t entries, uint64_t disk_size, Error **errp)
{
    uint64_t disk_entries = size_to_l1(&s->q, disk_size);

    for (uint32_t i = 0; i < entries; i++) {
        int64_t host_offset = be64_to_cpu(l1[i]) & L1E_OFFSET_MASK;
        Sqcow2OwnTable *table;

        if (!host_offset) {
            continue;
        }
        if (offset_into_cluster(&s->q, host_offset)) {
            error_setg(errp, "L1 entry %u names an L2 table at the unaligned "
                       "offset 0x%" PRIx64, i, host_offset);
            return -EINVAL;
        }
        table = g_hash_table_lookup(set->by_offset, &host_offset);
        if (!table) {
            table = g_new0(Sqcow2OwnTable, 1);
            table->host_offset = host_offset;
            table->l1_index = i;
            g_ptr_array_add(set->tables, table);
            g_hash_table_insert(set->by_offset, &table->host_offset, table);
        }
        if (table->l1_index != i) {
            error_setg(errp, "The L2 table at offset 0x%" PRIx64 " is named by "
                       "the L1 entries %u and %u", host_offset,
                       table->l1_index, i);
            return -EINVAL;
        }
        table->nb_users++;
        if (i < disk_entries) {
            table->disk_end = MAX(table->disk_end, disk_size);
        }
    }
    return 0;
}

static int GRAPH_RDLOCK note_snapshot(BlockDriverState *bs, TableSet *set,
                                      const QCowSnapshot *sn, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint64_t *l1 = NULL;
    int ret;

    if (sn->l1_size > QCOW_MAX_L1_SIZE / L1E_SIZE ||
        offset_into_cluster(&s->q, sn->l1_table_offset)) {
        error_setg(errp, "The L1 table of snapshot '%s' has a bad place or "
                   "size", sn->name);
        return -EINVAL;
    }
    l1 = g_try_new(uint64_t, MAX(sn->l1_size, 1));
    if (!l1) {
        error_setg(errp, "The L1 table of snapshot '%s' does not fit in "
                   "memory", sn->name);
        return -ENOMEM;
    }
    ret = bdrv_pread(bs->file, sn->l1_table_offset,
                     (uint64_t)sn->l1_size * L1E_SIZE, l1, 0);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read the L1 table of snapshot "
                         "'%s'", sn->name);
        return ret;
    }
    return note_l1(s, set, l1, sn->l1_size, sn->disk_size, errp);
}

static int GRAPH_RDLOCK find_tables(BlockDriverState *bs, TableSet *set,
                                    Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint64_t *l1 = g_new(uint64_t, MAX(s->q.l1_size, 1));
    int ret;

    for (int i = 0; i < s->q.l1_size; i++) {
        l1[i] = cpu_to_be64(s->q.l1_table[i]);
    }
    ret = note_l1(s, set, l1, s->q.l1_size,
                  bs->total_sectors * BDRV_SECTOR_SIZE, errp);
    for (int i = 0; ret == 0 && i < s->q.nb_snapshots; i++) {
        ret = note_snapshot(bs, set, &s->q.snapshots[i], errp);
    }
    return ret;
}

static int GRAPH_RDLOCK check_refcount(BlockDriverState *bs,
                                       const Sqcow2OwnTable *table,
                                       Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    uint64_t refcount;
    int ret;

    ret = qcow2_get_refcount(bs, table->host_offset >> s->q.cluster_bits,
                             &refcount);
    if (ret == 0 && refcount != table->nb_users) {
        ret = -EINVAL;
    }
    if (ret < 0) {
        error_setg(errp, "The L2 table at offset 0x%" PRIx64 " has a wrong "
                   "refcount; run 'qemu-img check -r all'",
                   table->host_offset);
    }
    return ret;
}

static int GRAPH_RDLOCK visit(BlockDriverState *bs, Sqcow2OwnTable *table,
                              bool write, Sqcow2OwnTableFunc *func,
                              void *opaque, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    int ret;

    ret = bdrv_pread(bs->file, table->host_offset, s->q.cluster_size,
                     table->entries, 0);
    if (ret == 0) {
        ret = func(bs, table, opaque);
    }
    if (ret > 0) {
        assert(write);
        ret = check_refcount(bs, table, errp);
        if (ret < 0) {
            return ret;
        }
        ret = qcow2_pre_write_overlap_check(bs, QCOW2_OL_ACTIVE_L2 |
                                            QCOW2_OL_INACTIVE_L2,
                                            table->host_offset,
                                            s->q.cluster_size, false);
        if (ret == 0) {
            ret = bdrv_pwrite(bs->file, table->host_offset,
                              s->q.cluster_size, table->entries, 0);
        }
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not %s the L2 table at offset 0x%"
                         PRIx64, write ? "update" : "read",
                         table->host_offset);
    }
    return ret;
}

int sqcow2_for_each_own_table(BlockDriverState *bs, bool write,
                              Sqcow2OwnTableFunc *func, void *opaque,
                              Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint64_t *entries = NULL;
    TableSet set;
    int ret;

    if (has_subclusters(&s->q)) {
        return 0;               /* S5: no foreign entries */
    }
    ret = write ? qcow2_cache_empty(bs, s->q.l2_table_cache)
                : qcow2_cache_write(bs, s->q.l2_table_cache);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write L2 tables");
        return ret;
    }
    set = (TableSet) {
        .tables = g_ptr_array_new_with_free_func(g_free),
        .by_offset = g_hash_table_new(g_int64_hash, g_int64_equal),
    };
    entries = g_malloc(s->q.cluster_size);
    ret = find_tables(bs, &set, errp);
    for (guint i = 0; ret == 0 && i < set.tables->len; i++) {
        Sqcow2OwnTable *table = g_ptr_array_index(set.tables, i);

        table->entries = entries;
        table->progress = i;
        table->total = set.tables->len;
        ret = visit(bs, table, write, func, opaque, errp);
    }
    g_hash_table_destroy(set.by_offset);
    g_ptr_array_unref(set.tables);
    return ret;
}

int sqcow2_write_l1(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    size_t bytes = (size_t)s->q.l1_size * L1E_SIZE;
    g_autofree uint64_t *l1 = g_try_malloc(bytes);
    g_autofree uint64_t *on_disk = g_try_malloc(bytes);
    int ret;

    if (!bytes) {
        return 0;
    }
    if (!l1 || !on_disk) {
        return -ENOMEM;
    }
    for (int i = 0; i < s->q.l1_size; i++) {
        l1[i] = cpu_to_be64(s->q.l1_table[i]);
    }
    ret = bdrv_pread(bs->file, s->q.l1_table_offset, bytes, on_disk, 0);
    if (ret < 0 || !memcmp(l1, on_disk, bytes)) {
        return ret;
    }
    ret = qcow2_pre_write_overlap_check(bs, QCOW2_OL_ACTIVE_L1,
                                        s->q.l1_table_offset, bytes, false);
    return ret < 0 ? ret :
        bdrv_pwrite(bs->file, s->q.l1_table_offset, bytes, l1, 0);
}

/* A foreign entry says what the layers below say anyway, and so does 0. */
static int forget_foreign(BlockDriverState *bs, Sqcow2OwnTable *table,
                          void *opaque)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Progress *progress = opaque;
    int changed = 0;

    for (int i = 0; i < s->q.l2_size; i++) {
        if (sqcow2_entry_is_foreign(be64_to_cpu(table->entries[i]))) {
            table->entries[i] = 0;
            changed = 1;
        }
    }
    if (progress) {
        progress->func(bs, table->progress, table->total, progress->opaque);
    }
    return changed;
}

int sqcow2_forget_foreign(BlockDriverState *bs, Sqcow2Progress *progress,
                          Error **errp)
{
    return sqcow2_for_each_own_table(bs, true, forget_foreign, progress, errp);
}
