/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: check and repair of the index
 *
 * A check has three parts.  First record, root table, layer table and merged
 * tables are looked at.  Then qcow2's own check runs; its refcount check
 * calls sqcow2_count_refcounts(), also in the repair of a dirty image in the
 * midst of open, when nothing of ours is set up yet: so the record is taken
 * from the header extensions there.  A table that the record names is counted
 * even when what is in it is wrong, or a repair would free its clusters and
 * somebody would get them.  Last, when the own L2 tables are known to be
 * consistent, their foreign entries are looked at, and all of the index is
 * compared with what the layers say (S1).
 *
 * A repair throws the index away and makes a new one.  A record that names
 * what it should not lets go of it before qcow2's repair, which frees the
 * clusters.  Own L2 tables are changed only if nothing is wrong with the file
 * itself afterwards; at each moment each table is right for an index that is
 * not valid.
 *
 * Findings name the invariant that is broken (docs/sqcow2.rst).
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

/* Stands for an entry that breaks a rule; no valid entry looks like it */
#define INVALID_ENTRY UINT64_MAX

typedef struct IndexCheck {
    BlockDriverState *bs;
    BDRVSqcow2State *s;
    bool repair;
    Sqcow2Record rec;           /* as it was found */
    bool has_record;
    uint64_t findings;
    uint64_t check_errors;
    GHashTable *merged;         /* host offsets of merged tables */
    bool comparable;            /* @index is for the layers that are there */
    Sqcow2View index;
    bool has_truth;
    Sqcow2View truth;           /* what the layers say (S1) */
} IndexCheck;

static void G_GNUC_PRINTF(2, 3) finding(IndexCheck *c, const char *fmt, ...)
{
    va_list ap;

    fprintf(stderr, c->repair ? "Repairing " : "ERROR ");
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, "\n");
    c->findings++;
}

/*
 * The index cannot be used: it breaks a rule (-EINVAL), which is a finding,
 * or could not be read, which is no reason to repair it.  Takes @err over.
 */
static void unusable(IndexCheck *c, int ret, const char *where, Error *err)
{
    if (ret == -EINVAL) {
        finding(c, "%s%s (S4)", where, error_get_pretty(err));
    } else {
        fprintf(stderr, "ERROR %s%s\n", where, error_get_pretty(err));
        c->check_errors++;
    }
    error_free(err);
}

/*
 * Take the record as it is in memory.  Returns 0, -ENOENT if there is none,
 * or -EINVAL with @errp set if it does not count.
 */
static int get_record(BDRVSqcow2State *s, Sqcow2Record *rec, Error **errp)
{
    Qcow2UnknownHeaderExtension *ext;

    QLIST_FOREACH(ext, &s->q.unknown_header_ext, next) {
        if (ext->magic == SQCOW2_EXT_MAGIC) {
            return sqcow2_decode_record(ext->data, ext->len, s->q.cluster_bits,
                                        rec, errp) < 0 ? -EINVAL : 0;
        }
    }
    return -ENOENT;
}

/* Read a table into *@table, or note why that fails and return an errno. */
static int coroutine_fn GRAPH_RDLOCK
read_table(IndexCheck *c, const Sqcow2TableRef *ref, size_t entry_size,
           const char *name, uint8_t **table)
{
    uint64_t bytes = (uint64_t)ref->entries * entry_size;
    uint64_t padded = ROUND_UP(bytes, c->s->q.cluster_size);
    g_autofree uint8_t *buf = g_try_malloc(padded);
    int ret = buf ? bdrv_co_pread(c->bs->file, ref->host_offset, padded, buf,
                                  0) : -ENOMEM;

    if (ret < 0) {
        fprintf(stderr, "ERROR could not read the sQcow2 %s table: %s\n",
                name, strerror(-ret));
        c->check_errors++;
        return ret;
    }
    if (crc32c(0xffffffff, buf, bytes) != ref->crc) {
        finding(c, "sQcow2 %s table has a wrong checksum (S2)", name);
        return -EINVAL;
    }
    if (!buffer_is_zero(buf + bytes, padded - bytes)) {
        finding(c, "sQcow2 %s table is not zero behind its end (S2)", name);
    }
    *table = g_steal_pointer(&buf);
    return 0;
}

static void coroutine_fn GRAPH_RDLOCK check_layer_table(IndexCheck *c)
{
    g_autofree uint8_t *raw = NULL;
    Sqcow2LayerDesc desc;

    if (!c->rec.layer_table.entries ||
        read_table(c, &c->rec.layer_table, SQCOW2_DESC_SIZE, "layer",
                   &raw) < 0) {
        return;
    }
    for (uint32_t i = 0; i < c->rec.layer_table.entries; i++) {
        if (sqcow2_decode_desc(raw + i * SQCOW2_DESC_SIZE, &desc, NULL) < 0) {
            finding(c, "sQcow2 layer table entry %u is invalid (S2)", i);
        }
    }
}

/* A merged table owns nothing itself (S4). */
static void coroutine_fn GRAPH_RDLOCK
check_merged_table(IndexCheck *c, uint32_t l1_index, uint64_t host_offset)
{
    BDRVSqcow2State *s = c->s;
    g_autofree uint64_t *table = g_malloc(s->q.cluster_size);
    int ret;

    if (!g_hash_table_add(c->merged, g_memdup2(&host_offset,
                                               sizeof(host_offset)))) {
        finding(c, "sQcow2 root table entry %u names a merged table that "
                "another entry names, too (S4)", l1_index);
        return;
    }
    ret = bdrv_co_pread(c->bs->file, host_offset, s->q.cluster_size, table, 0);
    if (ret < 0) {
        fprintf(stderr, "ERROR could not read a merged L2 table: %s\n",
                strerror(-ret));
        c->check_errors++;
        return;
    }
    for (int j = 0; j < s->q.cluster_size / sizeof(uint64_t); j++) {
        uint64_t entry = be64_to_cpu(table[j]);
        Sqcow2Cluster cluster;

        if (entry && (!sqcow2_entry_is_foreign(entry) ||
                      sqcow2_decode_entry(entry, c->rec.layer,
                                          s->q.cluster_bits, &cluster) < 0)) {
            finding(c, "merged L2 entry 0x%" PRIx64 " is invalid (L1 index "
                    "%u, L2 index %d) (S6)", entry, l1_index, j);
        }
    }
}

static void coroutine_fn GRAPH_RDLOCK check_root_table(IndexCheck *c)
{
    g_autofree uint8_t *raw = NULL;

    if (!c->rec.root.entries ||
        read_table(c, &c->rec.root, SQCOW2_ROOT_SIZE, "root", &raw) < 0) {
        return;
    }
    for (uint32_t i = 0; i < c->rec.root.entries; i++) {
        uint64_t entry = ldq_be_p(raw + i * SQCOW2_ROOT_SIZE);
        Sqcow2Root root;

        if (sqcow2_decode_root(entry, c->rec.layer, c->s->q.cluster_bits,
                               &root) < 0) {
            finding(c, "sQcow2 root table entry %u is invalid: 0x%" PRIx64
                    " (S4)", i, entry);
        } else if (root.kind == SQCOW2_ROOT_TABLE &&
                   root.layer == c->rec.layer) {
            check_merged_table(c, i, root.host_offset);
        }
    }
}

/* Fields that can be told from the layers, which are those of the record */
static void check_fields(IndexCheck *c)
{
    static const uint8_t no_stamp[SQCOW2_STAMP_SIZE];
    BDRVSqcow2State *s = c->s;
    const Sqcow2Layer *below = &s->layers[s->layer - 1];
    const uint8_t *stamp = sqcow2_layer_is_stamped(below) ? below->stamp
                                                          : no_stamp;

    if (c->rec.below_kind != below->kind) {
        finding(c, "sQcow2 record has a wrong kind of layer below: %d (S8)",
                c->rec.below_kind);
    }
    if (memcmp(c->rec.below_stamp, stamp, SQCOW2_STAMP_SIZE)) {
        finding(c, "sQcow2 record expects a wrong stamp below (S8)");
    }
}

/* Part one: the record and what it names */
static void coroutine_fn GRAPH_RDLOCK check_record(IndexCheck *c)
{
    BDRVSqcow2State *s = c->s;
    bool valid;
    Error *local_err = NULL;
    int ret;

    ret = get_record(s, &c->rec, &local_err);
    if (ret == -EINVAL) {
        finding(c, "%s (S2)", error_get_pretty(local_err));
        error_free(local_err);
    }
    if (ret < 0) {
        return;
    }
    c->has_record = true;
    valid = c->rec.flags & SQCOW2_FLAG_INDEX_VALID;
    check_layer_table(c);
    check_root_table(c);
    if (valid && !c->bs->auto_backing_file[0] &&
        (c->rec.layer || c->rec.root.entries || c->rec.layer_table.entries ||
         c->rec.below_kind ||
         !buffer_is_zero(c->rec.below_stamp, SQCOW2_STAMP_SIZE))) {
        finding(c, "sQcow2 record speaks of layers below the base (S8)");
    }
    if (!valid || !s->fits || !sqcow2_is_flat(c->bs)) {
        return;
    }
    check_fields(c);
    if (c->findings) {
        return;
    }
    ret = sqcow2_view_load(c->bs, &c->rec, &c->index, &local_err);
    if (ret < 0) {
        unusable(c, ret, "", local_err);
        return;
    }
    c->comparable = true;
}

int coroutine_fn sqcow2_count_refcounts(BlockDriverState *bs,
                                        BdrvCheckResult *res,
                                        void **refcount_table,
                                        int64_t *nb_clusters)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record rec;
    Sqcow2View view;
    int ret;

    if (bs->drv != &bdrv_sqcow2 || !sqcow2_has_index_bit(s) ||
        get_record(s, &rec, NULL) < 0) {
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
    if (ret < 0) {
        return ret;
    }
    ret = sqcow2_view_read(bs, &rec, &view, NULL);
    if (ret < 0) {
        /*
         * Nobody uses merged tables under a wrong checksum, and check_record()
         * has words for it.  But if the root table could not be read, a repair
         * must not take their clusters for free.
         */
        return ret == -EINVAL ? 0 : ret;
    }
    for (uint32_t i = 0; ret == 0 && i < view.entries; i++) {
        Sqcow2Root root;

        if (sqcow2_decode_root(view.root[i], rec.layer, s->q.cluster_bits,
                               &root) == 0 &&
            root.kind == SQCOW2_ROOT_TABLE && root.layer == rec.layer) {
            ret = qcow2_inc_refcounts_imrt(bs, res, refcount_table,
                                           nb_clusters, root.host_offset,
                                           s->q.cluster_size);
        }
    }
    sqcow2_view_free(&view);
    return ret;
}

/*
 * What a foreign entry or 0, in a table of this image, says of the cluster at
 * @guest_offset: in one way only, so that it can be compared.
 */
static uint64_t normalise(BDRVSqcow2State *s, uint64_t entry,
                          uint64_t guest_offset)
{
    Sqcow2Cluster cluster;

    if (!entry) {
        return 0;
    }
    if (!sqcow2_entry_is_foreign(entry) ||
        sqcow2_decode_entry(entry, s->layer, s->q.cluster_bits,
                            &cluster) < 0) {
        return INVALID_ENTRY;
    }
    return cluster.kind == SQCOW2_ABSENT ||
           guest_offset >= s->layers[cluster.owner].clip ? 0 : entry;
}

/* What the raw layer @layer, which owns all, has for a region */
static void expand_identity(BDRVSqcow2State *s, uint16_t layer,
                            uint64_t guest_offset, uint64_t *entries)
{
    for (int j = 0; j < s->q.l2_size; j++) {
        Sqcow2Cluster cluster = {
            .kind = SQCOW2_DATA,
            .owner = layer,
            .host_offset = guest_offset,
        };

        if (guest_offset >= s->layers[layer].clip) {
            break;
        }
        entries[j] = sqcow2_encode_foreign(&cluster, s->q.cluster_bits);
        guest_offset += s->q.cluster_size;
    }
}

/*
 * Write out what @view says of a region, as normalised entries in host byte
 * order; @table is room for a table.
 */
static int GRAPH_RDLOCK expand(BlockDriverState *bs, const Sqcow2View *view,
                               uint64_t l1_index, uint64_t *table,
                               uint64_t *entries, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    uint64_t guest_offset = l1_index * sqcow2_region_size(&s->q);
    Sqcow2Root root = { .kind = SQCOW2_ROOT_ABSENT };
    int ret = 0;

    memset(entries, 0, s->q.cluster_size);
    if (l1_index < view->entries &&
        view->root[l1_index] >> 62 == SQCOW2_ROOT_MERGE) {
        root.layer = s->layer;
        root.kind = SQCOW2_ROOT_TABLE;
        ret = sqcow2_merge(bs, view, l1_index, 0, s->q.l2_size, s->set, table,
                           errp);
    } else if (l1_index < view->entries) {
        ret = sqcow2_decode_root(view->root[l1_index], s->layer,
                                 s->q.cluster_bits, &root);
        if (ret == 0 && root.kind == SQCOW2_ROOT_TABLE) {
            ret = root.layer == s->layer ?
                bdrv_pread(bs->file, root.host_offset, s->q.cluster_size,
                           table, 0) :
                bdrv_pread(s->set, sqcow2_set_offset(root.layer,
                                                     root.host_offset),
                           s->q.cluster_size, table, 0);
        }
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not read an L2 table of layer "
                             "%u", root.layer);
        }
    }
    if (ret < 0 || root.kind == SQCOW2_ROOT_ABSENT) {
        return ret;
    }
    if (root.kind == SQCOW2_ROOT_IDENTITY) {
        expand_identity(s, root.layer, guest_offset, entries);
        return 0;
    }
    for (int j = 0; j < s->q.l2_size; j++, guest_offset += s->q.cluster_size) {
        uint64_t entry = be64_to_cpu(table[j]);

        if (root.layer < s->layer &&
            ((sqcow2_entry_is_foreign(entry) &&
              s->layers[root.layer].kind != SQCOW2_LAYER_SQCOW2) ||
             sqcow2_inherit_entry(entry, root.layer, root.host_offset,
                                  s->q.cluster_bits, &entry) < 0)) {
            entries[j] = INVALID_ENTRY;
        } else {
            entries[j] = normalise(s, entry, guest_offset);
        }
    }
    return 0;
}

/* A layer cannot be read as far as needed: that is for its own check. */
static void give_up_comparison(IndexCheck *c, Error *err)
{
    warn_reportf_err(err, "The index is not compared with what the layers "
                     "say: ");
    c->has_truth = false;
}

/* Entries behind a table's end are absent, which is 0. */
static uint64_t root_at(const Sqcow2View *view, uint64_t l1_index)
{
    return l1_index < view->entries ? view->root[l1_index] : 0;
}

/* Does the root table name for each region what the layers say? */
static void GRAPH_RDLOCK compare_root(IndexCheck *c)
{
    BDRVSqcow2State *s = c->s;
    g_autofree uint64_t *table = g_malloc(s->q.cluster_size);
    g_autofree uint64_t *have = g_malloc(s->q.cluster_size);
    g_autofree uint64_t *want = g_malloc(s->q.cluster_size);
    Error *local_err = NULL;

    for (uint64_t i = 0; i < MAX(c->index.entries, c->truth.entries); i++) {
        int wrong = 0, first = 0, ret;

        if (root_at(&c->index, i) == root_at(&c->truth, i)) {
            continue;           /* the same table, perhaps of a plain layer */
        }
        if (expand(c->bs, &c->truth, i, table, want, &local_err) < 0) {
            give_up_comparison(c, local_err);
            return;
        }
        ret = expand(c->bs, &c->index, i, table, have, &local_err);
        if (ret < 0) {
            g_autofree char *where =
                g_strdup_printf("sQcow2 root table entry %" PRIu64 ": ", i);

            unusable(c, ret, where, g_steal_pointer(&local_err));
            continue;
        }
        for (int j = s->q.l2_size - 1; j >= 0; j--) {
            if (have[j] != want[j]) {
                first = j;
                wrong++;
            }
        }
        if (wrong) {
            finding(c, "sQcow2 root table entry %" PRIu64 ": %d clusters are "
                    "not where the layers have them, the first at guest "
                    "offset 0x%" PRIx64 " (S8)", i, wrong,
                    i * sqcow2_region_size(&s->q) +
                    ((uint64_t)first << s->q.cluster_bits));
        }
    }
}

/*
 * Are there foreign entries that break a rule (S6)?  While the index is not
 * valid they mean nothing, and may be for a chain of another length.
 */
static void check_foreign(IndexCheck *c, const Sqcow2OwnTable *t)
{
    BDRVSqcow2State *s = c->s;

    if (!(c->rec.flags & SQCOW2_FLAG_INDEX_VALID)) {
        return;
    }
    for (int j = 0; j < s->q.l2_size; j++) {
        uint64_t entry = be64_to_cpu(t->entries[j]);
        Sqcow2Cluster cluster;

        if (sqcow2_entry_is_foreign(entry) &&
            sqcow2_decode_entry(entry, c->rec.layer, s->q.cluster_bits,
                                &cluster) < 0) {
            finding(c, "foreign L2 entry 0x%" PRIx64 " is invalid (table at "
                    "offset 0x%" PRIx64 ", L1 index %u, L2 index %d) (S6)",
                    entry, t->host_offset, t->l1_index, j);
        }
    }
}

/* An own L2 table: its foreign entries, and those that are 0 (S7) */
static int GRAPH_RDLOCK check_own_table(BlockDriverState *bs,
                                        Sqcow2OwnTable *t, void *opaque)
{
    IndexCheck *c = opaque;
    BDRVSqcow2State *s = c->s;
    g_autofree uint64_t *table = NULL;
    g_autofree uint64_t *want = NULL;
    uint64_t guest_offset = t->l1_index * sqcow2_region_size(&s->q);
    Error *local_err = NULL;
    uint64_t first = 0;
    int wrong = 0;

    check_foreign(c, t);
    if (!c->has_truth) {
        return 0;
    }
    table = g_malloc(s->q.cluster_size);
    want = g_malloc(s->q.cluster_size);
    if (expand(bs, &c->truth, t->l1_index, table, want, &local_err) < 0) {
        give_up_comparison(c, local_err);
        return 0;
    }
    for (int j = 0; j < s->q.l2_size && guest_offset < t->disk_end;
         j++, guest_offset += s->q.cluster_size) {
        uint64_t entry = be64_to_cpu(t->entries[j]);
        uint64_t have;

        if (entry && !sqcow2_entry_is_foreign(entry)) {
            continue;
        }
        have = normalise(s, entry, guest_offset);
        if (have != want[j] && have != INVALID_ENTRY && !wrong++) {
            first = guest_offset;
        }
    }
    if (wrong) {
        finding(c, "L2 table at offset 0x%" PRIx64 ": %d clusters of other "
                "layers are not where these have them, the first at guest "
                "offset 0x%" PRIx64 " (S7)", t->host_offset, wrong, first);
    }
    return 0;
}

/*
 * Part three: the entries, each alone and against what the layers say.
 * @clean: nothing else is wrong with the file.
 */
static void GRAPH_RDLOCK check_entries(IndexCheck *c, bool clean)
{
    BDRVSqcow2State *s = c->s;
    Error *local_err = NULL;

    if (!c->has_record) {
        return;                 /* nothing to judge them by */
    }
    if (c->comparable) {
        int ret;

        sqcow2_layers_set_direct(s->set->bs, false);
        ret = sqcow2_view_build(c->bs, NULL, s->layers, s->layer, false,
                                &c->truth, &local_err);
        sqcow2_layers_set_direct(s->set->bs, true);
        if (ret < 0) {
            give_up_comparison(c, local_err);
            local_err = NULL;
        } else {
            c->has_truth = true;
            compare_root(c);
        }
    }
    if (sqcow2_for_each_own_table(c->bs, false, check_own_table, c,
                                  &local_err) < 0) {
        fprintf(stderr, "ERROR could not check L2 entries: %s\n",
                error_get_pretty(local_err));
        error_free(local_err);
        c->check_errors += clean;
    }
}

int sqcow2_index_rebuild(BlockDriverState *bs, bool full, Sqcow2View *truth,
                         Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2View view = {};
    int ret = 0;

    if (s->set) {
        sqcow2_layers_set_direct(s->set->bs, false);
    }
    if (sqcow2_is_flat(bs) && (full || s->mode == SQCOW2_MODE_INDEXED)) {
        if (truth) {
            view = *truth;
            *truth = (Sqcow2View) {};
        } else {
            ret = sqcow2_view_build(bs, NULL, s->layers, s->layer, false,
                                    &view, errp);
        }
        if (ret == 0) {
            /* From here on only standard entries of own tables count */
            sqcow2_view_free(&s->view);
            s->view = view;
            s->mode = SQCOW2_MODE_REBUILT;
            sqcow2_renew_cache(bs);
        }
    }
    if (ret == 0) {
        ret = sqcow2_index_store(bs, errp);
    }
    if (s->set) {
        sqcow2_layers_set_direct(s->set->bs, true);
    }
    return ret;
}

/* An image without layers below, which has no tables but a valid index */
static bool is_base(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    return !bs->auto_backing_file[0] && !has_subclusters(&s->q) &&
           !has_data_file(bs) && !bs->encrypted;
}

/*
 * Make the index right: a new one if the layers are at hand, else none.
 * Returns 0 or a negative errno with @errp set.
 */
static int GRAPH_RDLOCK repair_index(IndexCheck *c, Error **errp)
{
    BlockDriverState *bs = c->bs;
    BDRVSqcow2State *s = c->s;
    Error *local_err = NULL;
    int ret = 0;

    if (!s->has_record) {
        ret = sqcow2_record_create(bs, &(Sqcow2Record) {}, errp);
    }
    if (ret == 0 && (is_base(bs) || sqcow2_is_flat(bs))) {
        ret = sqcow2_index_rebuild(bs, true, c->has_truth ? &c->truth : NULL,
                                   &local_err);
        if (ret == 0) {
            return 0;
        }
        /* It works without, if slower */
        warn_reportf_err(local_err, "No index was stored: ");
        ret = 0;
        if (s->mode == SQCOW2_MODE_INDEXED) {
            error_setg(errp, "The damaged index is still there");
            return -EINVAL;
        }
    }
    if (ret == 0) {
        ret = sqcow2_invalidate_index(bs);
        if (ret == 0) {
            ret = sqcow2_begin_change_locked(bs);
        }
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not update the sQcow2 header");
        }
    }
    if (ret == 0 && c->findings) {
        ret = sqcow2_forget_foreign(bs, NULL, errp);
    }
    return ret;
}

/* Would a repair give the image an index though nothing is wrong? */
static bool lacks_index(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;

    return s->mode == SQCOW2_MODE_REBUILT ||
           (is_base(bs) && !(s->has_record &&
                             s->record.flags & SQCOW2_FLAG_INDEX_VALID));
}

/* Parts two and three; q.lock is not held. */
static int coroutine_fn GRAPH_RDLOCK check_rest(IndexCheck *c,
                                                BdrvCheckResult *result,
                                                BdrvCheckMode fix)
{
    Error *local_err = NULL;
    bool clean;
    int ret;

    /* It reads the list anew, and would leak the one of the check before */
    qemu_co_mutex_lock(&c->s->q.lock);
    qcow2_free_snapshots(c->bs);
    c->s->q.snapshots_unread = true;
    qemu_co_mutex_unlock(&c->s->q.lock);

    ret = bdrv_qcow2.bdrv_co_check(c->bs, result, fix);
    if (ret < 0) {
        return ret;
    }
    clean = !result->corruptions && !result->check_errors;

    qemu_co_mutex_lock(&c->s->q.lock);
    check_entries(c, clean);
    if (c->repair && clean && !c->check_errors &&
        (c->findings || lacks_index(c->bs))) {
        if (repair_index(c, &local_err) < 0) {
            error_report_err(local_err);
            c->check_errors++;
        } else {
            result->corruptions_fixed += c->findings;
            c->findings = 0;
        }
    }
    qemu_co_mutex_unlock(&c->s->q.lock);
    return 0;
}

int coroutine_fn sqcow2_co_check(BlockDriverState *bs, BdrvCheckResult *result,
                                 BdrvCheckMode fix)
{
    BDRVSqcow2State *s = bs->opaque;
    IndexCheck c = {
        .bs = bs,
        .s = s,
        .repair = fix & BDRV_FIX_ERRORS,
    };
    int ret = fix ? sqcow2_begin_change(bs) : 0;

    if (ret < 0 || !sqcow2_has_index_bit(s)) {
        return ret < 0 ? ret : bdrv_qcow2.bdrv_co_check(bs, result, fix);
    }
    c.merged = g_hash_table_new_full(g_int64_hash, g_int64_equal, g_free,
                                     NULL);
    qemu_co_mutex_lock(&s->q.lock);
    check_record(&c);
    if (c.repair && c.findings) {
        ret = sqcow2_record_drop_tables(bs);
    }
    qemu_co_mutex_unlock(&s->q.lock);
    if (ret == 0) {
        ret = check_rest(&c, result, fix);
    }
    result->corruptions += c.findings;
    result->check_errors += c.check_errors;
    g_hash_table_destroy(c.merged);
    sqcow2_view_free(&c.index);
    sqcow2_view_free(&c.truth);
    return ret;
}
