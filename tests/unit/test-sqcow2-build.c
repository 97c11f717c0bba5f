/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Unit tests of sqcow2-build.c and sqcow2-merge.c: the view of a chain whose
 * indexes are true in part, against a model
 *
 * Random chains in memory.  Each layer gets an index as the driver makes it
 * when it is put on the layers below: shared, or merged with a layer table.
 * Then layers in any place are changed, shortened, dropped or swapped.  The
 * model knows for each layer what it owns, and nothing of indexes.
 *
 * SQCOW2_TEST_SEED=N repeats a random run.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qapi/error.h"
#include <setjmp.h>
#include <cmocka.h>
#include "../../block/sqcow2-int.h"

#define DEFAULT_SEED 0x51c0

enum {
    CLUSTER_BITS = 9,
    CLUSTER = 1 << CLUSTER_BITS,
    ENTRIES = CLUSTER / 8,      /* of an L2 table */
    REGION = ENTRIES * CLUSTER,
    REGIONS = 4,
    CLUSTERS = REGIONS * ENTRIES,
    MAX_FILES = 16,
    FILE_CLUSTERS = 32,
    ROUNDS = 3000,
};

/* Where things stand in a file, in clusters */
enum {
    AT_L1 = 1,
    AT_ROOT,
    AT_LAYERS,
    AT_L2,                      /* and the following */
    AT_MERGED = AT_L2 + REGIONS,
};

typedef struct File {
    Sqcow2Layer layer;          /* .fd: index in files[] */
    Sqcow2Record record;
    Sqcow2Cluster owned[CLUSTERS];  /* ABSENT: it is not */
    uint64_t inherited[CLUSTERS];   /* entries, when it was indexed */
    uint8_t bytes[FILE_CLUSTERS * CLUSTER];
} File;

static File *files[MAX_FILES];
static File *chain[MAX_FILES];
static unsigned nb_files, nb_layers;
static Sqcow2Layer layers[MAX_FILES];   /* of chain[] */
static unsigned l2_reads, record_reads;
static GRand *rng;

/*
 * What the files under test call
 */

int sqcow2_layer_pread(const Sqcow2Layer *layer, uint64_t host_offset,
                       uint64_t bytes, void *buf)
{
    File *f = files[layer->fd];

    assert_true(host_offset + bytes <= sizeof(f->bytes));
    l2_reads += host_offset >= AT_L2 * CLUSTER;
    memcpy(buf, f->bytes + host_offset, bytes);
    return 0;
}

bool sqcow2_layer_record(const Sqcow2Layer *layer, Sqcow2Record *record)
{
    record_reads++;
    *record = files[layer->fd]->record;
    return layer->has_stamp;
}

uint8_t *sqcow2_layer_read_table(const Sqcow2Layer *layer,
                                 const Sqcow2Record *record)
{
    uint64_t bytes = record->layer_table.entries * SQCOW2_DESC_SIZE;

    return g_memdup2(files[layer->fd]->bytes + AT_LAYERS * CLUSTER, bytes);
}

Sqcow2LayerCompared sqcow2_compare_layer(const Sqcow2Layer *layer,
                                         const Sqcow2LayerDesc *desc)
{
    return memcmp(layer->stamp, desc->stamp, SQCOW2_STAMP_SIZE) ?
           SQCOW2_LAYER_CHANGED : SQCOW2_LAYER_SAME;
}

/* The active image's file is the last of the chain. */
int coroutine_mixed_fn bdrv_pread(BdrvChild *child, int64_t offset,
                                  int64_t bytes, void *buf,
                                  BdrvRequestFlags flags)
{
    return sqcow2_layer_pread(&chain[nb_layers]->layer, offset, bytes, buf);
}

int64_t coroutine_mixed_fn bdrv_getlength(BlockDriverState *bs)
{
    return FILE_CLUSTERS * CLUSTER;
}

/*
 * The model
 */

/* From @low to @high - 1 */
static int random_int(int low, int high)
{
    return g_rand_int_range(rng, low, high);
}

static bool chance(int percent)
{
    return random_int(0, 100) < percent;
}

static uint64_t get_be(const File *f, unsigned cluster, unsigned i)
{
    return ldq_be_p(f->bytes + cluster * CLUSTER + i * 8);
}

static void put_be(File *f, unsigned cluster, unsigned i, uint64_t value)
{
    stq_be_p(f->bytes + cluster * CLUSTER + i * 8, value);
}

/* Copy chain[] to layers[] and compute clips. */
static void look_at_chain(void)
{
    for (unsigned i = 0; i < nb_layers; i++) {
        layers[i] = chain[i]->layer;
    }
    sqcow2_set_clips(layers, nb_layers);
}

/* The entry that a table above layers 0 to @top - 1 must have */
static uint64_t true_entry(unsigned top, unsigned c, bool clipped)
{
    for (unsigned i = top; i-- > 0; ) {
        Sqcow2Cluster cluster = chain[i]->owned[c];

        if (clipped && (uint64_t)c * CLUSTER >= chain[i]->layer.virtual_size) {
            return 0;
        }
        if (cluster.kind != SQCOW2_ABSENT) {
            cluster.owner = i;
            return sqcow2_encode_foreign(&cluster, CLUSTER_BITS);
        }
    }
    return 0;
}

static uint64_t standard_entry(const Sqcow2Cluster *cluster)
{
    switch (cluster->kind) {
    case SQCOW2_DATA:
        return 1ULL << 63 | cluster->host_offset;
    case SQCOW2_ZERO:
        return 1;
    case SQCOW2_COMPRESSED:
        return 1ULL << 62 | 12345;
    default:
        return 0;
    }
}

static void new_stamp(File *f)
{
    for (int i = 0; i < SQCOW2_STAMP_SIZE; i++) {
        f->layer.stamp[i] = random_int(0, 256);
    }
    memcpy(f->record.stamp, f->layer.stamp, SQCOW2_STAMP_SIZE);
}

/* Own some clusters, or disown them. */
static void change_owned(File *f, int count)
{
    unsigned c = random_int(0, CLUSTERS);

    while (count-- && (uint64_t)c * CLUSTER < f->layer.virtual_size) {
        Sqcow2Cluster *cluster = &f->owned[c];

        *cluster = (Sqcow2Cluster) {
            .kind = random_int(0, 4),
        };
        if (cluster->kind == SQCOW2_DATA) {
            cluster->host_offset = (uint64_t)random_int(1, 1000)
                                   << CLUSTER_BITS;
        } else if (cluster->kind == SQCOW2_COMPRESSED) {
            cluster->host_offset = (AT_L2 + c / ENTRIES) * CLUSTER;
        }
        c = chance(50) ? (c + 1) % CLUSTERS :
            random_int(0, CLUSTERS);
    }
}

/* Write L1 and L2 tables, as the driver does. */
static void write_tables(File *f)
{
    bool valid = f->record.flags & SQCOW2_FLAG_INDEX_VALID;

    for (unsigned i = 0; i < REGIONS; i++) {
        bool has_table = get_be(f, AT_L1, i);

        for (unsigned j = 0; j < ENTRIES; j++) {
            has_table |= f->owned[i * ENTRIES + j].kind != SQCOW2_ABSENT;
        }
        if (!has_table) {
            continue;
        }
        put_be(f, AT_L1, i, 1ULL << 63 | (AT_L2 + i) * CLUSTER);
        for (unsigned j = 0; j < ENTRIES; j++) {
            unsigned c = i * ENTRIES + j;
            uint64_t entry = standard_entry(&f->owned[c]);

            /* In a file without valid index a stale entry may be there */
            put_be(f, AT_L2 + i, j, entry || (!valid && chance(50)) ? entry
                   : f->layer.kind == SQCOW2_LAYER_SQCOW2 ? f->inherited[c]
                   : 0);
        }
    }
}

static void set_root(File *f)
{
    f->record.root = (Sqcow2TableRef) {
        .host_offset = AT_ROOT * CLUSTER,
        .entries = REGIONS,
        .crc = crc32c(0xffffffff, f->bytes + AT_ROOT * CLUSTER, REGIONS * 8),
    };
}

/* The index of chain[k] by what chain[k - 1] has */
static void index_by_sharing(unsigned k)
{
    File *f = chain[k], *below = chain[k - 1];

    for (unsigned i = 0; i < REGIONS; i++) {
        Sqcow2Root root = {
            .kind = SQCOW2_ROOT_TABLE,
            .layer = k - 1,
            .host_offset = get_be(below, AT_L1, i) & ~(1ULL << 63),
        };

        put_be(f, AT_ROOT, i, root.host_offset ?
               sqcow2_encode_root(&root, CLUSTER_BITS) :
               k - 1 ? get_be(below, AT_ROOT, i) : 0);
    }
    memcpy(f->record.below_stamp, below->layer.stamp, SQCOW2_STAMP_SIZE);
}

/* The index of chain[k] from nothing, with a layer table */
static void index_by_merging(unsigned k)
{
    File *f = chain[k];

    for (unsigned i = 0; i < REGIONS; i++) {
        Sqcow2Root root = {
            .kind = SQCOW2_ROOT_TABLE,
            .layer = k,
            .host_offset = (AT_MERGED + i) * CLUSTER,
        };

        for (unsigned j = 0; j < ENTRIES; j++) {
            put_be(f, AT_MERGED + i, j, f->inherited[i * ENTRIES + j]);
        }
        put_be(f, AT_ROOT, i, sqcow2_encode_root(&root, CLUSTER_BITS));
    }
    for (unsigned i = 0; i < k; i++) {
        Sqcow2LayerDesc desc = { .kind = SQCOW2_LAYER_SQCOW2 };

        memcpy(desc.stamp, chain[i]->layer.stamp, SQCOW2_STAMP_SIZE);
        sqcow2_encode_desc(&desc, f->bytes + AT_LAYERS * CLUSTER +
                           i * SQCOW2_DESC_SIZE);
    }
    f->record.layer_table.entries = k;
    f->record.layer_table.host_offset = AT_LAYERS * CLUSTER;
}

/* Does chain[k] vouch for the whole chain below it? */
static bool is_trusted(unsigned k)
{
    const Sqcow2Record *rec = &chain[k]->record;

    if (chain[k]->layer.kind != SQCOW2_LAYER_SQCOW2 || rec->layer != k ||
        rec->flags != SQCOW2_FLAG_INDEX_VALID) {
        return false;
    }
    if (rec->layer_table.entries) {
        for (unsigned i = 0; i < k; i++) {
            if (memcmp(chain[k]->bytes + AT_LAYERS * CLUSTER +
                       i * SQCOW2_DESC_SIZE + 8, chain[i]->layer.stamp,
                       SQCOW2_STAMP_SIZE)) {
                return false;
            }
        }
        return true;
    }
    return k == 0 || (!memcmp(rec->below_stamp, chain[k - 1]->layer.stamp,
                              SQCOW2_STAMP_SIZE) && is_trusted(k - 1));
}

static void make_index(unsigned k)
{
    File *f = chain[k];

    memset(f->bytes, 0, sizeof(f->bytes));
    f->record = (Sqcow2Record) {
        .layer = k,
        .flags = SQCOW2_FLAG_INDEX_VALID,
    };
    f->layer.writing = false;
    new_stamp(f);
    for (unsigned c = 0; c < CLUSTERS; c++) {
        f->inherited[c] = true_entry(k, c, chance(50));
    }
    if (f->layer.kind == SQCOW2_LAYER_SQCOW2 && k > 0) {
        if (is_trusted(k - 1) && chance(70)) {
            index_by_sharing(k);
        } else {
            index_by_merging(k);
        }
        set_root(f);
    }
    write_tables(f);
}

static uint64_t random_size(void)
{
    return chance(60) ? REGIONS * REGION :
           random_int(1, CLUSTERS) * CLUSTER;
}

/* Make a file; it is chain[place], and not indexed yet. */
static void new_file(unsigned place, Sqcow2LayerKind kind)
{
    File *f = g_new0(File, 1);

    assert_true(nb_files < MAX_FILES);
    f->layer = (Sqcow2Layer) {
        .kind = kind,
        .fd = nb_files,
        .virtual_size = random_size(),
        .file_size = FILE_CLUSTERS * CLUSTER,
        .l1_host_offset = AT_L1 * CLUSTER,
        .l1_entries = REGIONS,
        .has_stamp = kind == SQCOW2_LAYER_SQCOW2,
        .filename = (char *)"file",
    };
    files[nb_files++] = f;
    chain[place] = f;
    if (kind != SQCOW2_LAYER_RAW) {
        change_owned(f, random_int(0, 60));
        return;
    }
    for (unsigned c = 0; c * CLUSTER < f->layer.virtual_size; c++) {
        f->owned[c] = (Sqcow2Cluster) {
            .kind = SQCOW2_DATA,
            .host_offset = c * CLUSTER,
        };
    }
}

static void make_chain(void)
{
    unsigned plain = chance(50) ? random_int(0, 4) : 0;
    bool raw = chance(25);

    nb_layers = random_int(1, 10);
    for (unsigned k = 0; k <= nb_layers; k++) {
        new_file(k, k == 0 && raw ? SQCOW2_LAYER_RAW :
                 k < plain && k < nb_layers ? SQCOW2_LAYER_QCOW2
                 : SQCOW2_LAYER_SQCOW2);
        make_index(k);
    }
}

/* Change the chain below the active image behind its back. */
static void do_surgery(void)
{
    unsigned k = random_int(0, nb_layers);
    File *f = chain[k];
    bool raw = f->layer.kind == SQCOW2_LAYER_RAW;

    switch (random_int(0, 7)) {
    case 0:                             /* its index is lost */
        f->record.flags = 0;
        break;
    case 1:                             /* or it is being written */
        f->record.flags |= SQCOW2_FLAG_WRITING;
        f->layer.writing = true;
        break;
    case 2:                             /* indexed anew, for what is below */
        make_index(k);
        return;
    case 3:                             /* dropped */
        if (nb_layers > 2 && !raw) {
            memmove(&chain[k], &chain[k + 1],
                    (nb_layers - k) * sizeof(chain[0]));
            nb_layers--;
        }
        return;
    case 4:                             /* one more, above it */
        if (nb_files < MAX_FILES && nb_layers < MAX_FILES - 1) {
            memmove(&chain[k + 2], &chain[k + 1],
                    (nb_layers - k) * sizeof(chain[0]));
            nb_layers++;
            new_file(k + 1, SQCOW2_LAYER_SQCOW2);
            make_index(k + 1);
        }
        return;
    case 5:                             /* its root table is damaged */
        f->record.root.crc ^= 1;
        return;
    default:                            /* shortened */
        if (!raw && chance(50)) {
            unsigned left = random_int(1, CLUSTERS + 1);

            f->layer.virtual_size = MIN(f->layer.virtual_size,
                                        left * CLUSTER);
            for (unsigned c = left; c < CLUSTERS; c++) {
                f->owned[c] = (Sqcow2Cluster) {};
            }
        }
        break;
    }
    if (!raw) {
        change_owned(f, random_int(1, 60));
        write_tables(f);
    }
    new_stamp(f);
}

/*
 * The tests
 */

/* Get the entry for cluster @c as a lookup does, clipped (S9). */
static uint64_t entry_in_view(BlockDriverState *bs, const Sqcow2View *view,
                              unsigned c)
{
    uint64_t merged[ENTRIES], inherited = 0;
    unsigned i = c / ENTRIES, j = c % ENTRIES;
    Sqcow2Cluster cluster;
    Sqcow2Root root;

    if (i >= view->entries) {
        return 0;
    }
    if (view->root[i] >> 62 == SQCOW2_ROOT_MERGE) {
        assert_int_equal(sqcow2_merge(bs, view, i, j, 1, NULL, merged,
                                      &error_abort), 0);
        inherited = be64_to_cpu(merged[0]);
    } else {
        assert_int_equal(sqcow2_decode_root(view->root[i], nb_layers,
                                            CLUSTER_BITS, &root), 0);
        if (root.kind == SQCOW2_ROOT_TABLE) {
            uint64_t entry = ldq_be_p(chain[root.layer]->bytes +
                                      root.host_offset + j * 8);

            assert_int_equal(sqcow2_inherit_entry(entry, root.layer,
                root.host_offset, CLUSTER_BITS, &inherited), 0);
        } else if (root.kind == SQCOW2_ROOT_IDENTITY) {
            cluster = (Sqcow2Cluster) {
                .kind = SQCOW2_DATA,
                .owner = root.layer,
                .host_offset = c * CLUSTER,
            };
            inherited = sqcow2_encode_foreign(&cluster, CLUSTER_BITS);
        }
    }
    if (inherited) {
        assert_int_equal(sqcow2_decode_entry(inherited, nb_layers,
                                             CLUSTER_BITS, &cluster), 0);
        if (c * CLUSTER >= layers[cluster.owner].clip) {
            inherited = 0;
        }
    }
    return inherited;
}

/* Turn what is to be merged into root entries where a file has the same. */
static void share_tables(BlockDriverState *bs, Sqcow2View *view)
{
    for (unsigned i = 0; i < view->entries; i++) {
        uint64_t merged[ENTRIES], entry;

        if (view->root[i] >> 62 == SQCOW2_ROOT_MERGE) {
            assert_int_equal(sqcow2_merge(bs, view, i, 0, ENTRIES, NULL,
                                          merged, &error_abort), 0);
            if (sqcow2_merge_root(bs, view, i, merged, &entry) == 1) {
                view->root[i] = entry;
            }
        }
    }
}

static void check_view(bool trust)
{
    BDRVSqcow2State *s = g_new0(BDRVSqcow2State, 1);
    BlockDriverState *bs = g_new0(BlockDriverState, 1);
    BdrvChild file = { .bs = bs };
    Sqcow2Record *rec = &chain[nb_layers]->record;
    Sqcow2View view;

    s->q.cluster_bits = CLUSTER_BITS;
    s->q.l2_bits = CLUSTER_BITS - 3;
    bs->opaque = s;
    bs->file = &file;
    look_at_chain();
    assert_int_equal(sqcow2_view_build(bs, rec->flags &
                                       SQCOW2_FLAG_INDEX_VALID ? rec : NULL,
                                       layers, nb_layers, trust, &view,
                                       &error_abort), 0);
    for (int pass = 0; pass < 2; pass++) {
        for (unsigned c = 0; c < CLUSTERS; c++) {
            assert_int_equal(entry_in_view(bs, &view, c),
                             true_entry(nb_layers, c, true));
        }
        share_tables(bs, &view);
    }
    if (view.vouched) {
        assert_true(trust && is_trusted(nb_layers - 1));
    }
    sqcow2_view_free(&view);
    g_free(bs);
    g_free(s);
}

static void free_chain(void)
{
    while (nb_files) {
        g_free(files[--nb_files]);
    }
}

static void test_random_chains(void **state)
{
    for (int round = 0; round < ROUNDS; round++) {
        make_chain();
        check_view(true);
        for (int i = random_int(1, 6); i > 0; i--) {
            do_surgery();
            check_view(chance(80));
        }
        free_chain();
    }
}

/*
 * All layers have tables everywhere, and their indexes are right, but for one
 * layer that has changed, and for all root tables if @damaged.  How many L2
 * tables are read, and records?
 */
static void count_reads(unsigned changed, bool damaged)
{
    BDRVSqcow2State s = {
        .q.cluster_bits = CLUSTER_BITS,
        .q.l2_bits = CLUSTER_BITS - 3,
    };
    BlockDriverState *bs = g_new0(BlockDriverState, 1);
    BdrvChild file = { .bs = bs };
    Sqcow2View view;

    nb_layers = 12;
    for (unsigned k = 0; k <= nb_layers; k++) {
        new_file(k, SQCOW2_LAYER_SQCOW2);
        chain[k]->layer.virtual_size = REGIONS * REGION;
        for (unsigned i = 0; i < REGIONS; i++) {
            chain[k]->owned[i * ENTRIES + k] = (Sqcow2Cluster) {
                .kind = SQCOW2_ZERO,
            };
        }
        make_index(k);
    }
    new_stamp(chain[changed]);
    for (unsigned k = 0; k <= nb_layers && damaged; k++) {
        chain[k]->record.root.crc ^= 1;
    }
    look_at_chain();
    bs->opaque = &s;
    bs->file = &file;
    l2_reads = record_reads = 0;
    assert_int_equal(sqcow2_view_build(bs, &chain[nb_layers]->record, layers,
                                       nb_layers, true, &view, &error_abort),
                     0);
    assert_int_equal(l2_reads, 0);
    for (unsigned i = 0; i < REGIONS; i++) {
        uint64_t merged[ENTRIES];

        if (view.root[i] >> 62 == SQCOW2_ROOT_MERGE) {
            assert_int_equal(sqcow2_merge(bs, &view, i, 0, ENTRIES, NULL,
                                          merged, &error_abort), 0);
        }
    }
    sqcow2_view_free(&view);
    g_free(bs);
    free_chain();
}

static void test_number_of_reads(void **state)
{
    for (unsigned changed = 0; changed < 12; changed++) {
        count_reads(changed, false);
        /*
         * The active image's index, and that of the changed layer; if that is
         * the top one, it vouches for all, and its tables are shared
         */
        assert_int_equal(l2_reads, changed == 11 ? 0 : 2 * REGIONS);
        assert_true(record_reads <= 2 * 12);
        /* Each layer is a segment, and a walk over all of them is made once */
        count_reads(changed, true);
        assert_true(record_reads <= 3 * 12);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_chains),
        cmocka_unit_test(test_number_of_reads),
    };
    const char *env = getenv("SQCOW2_TEST_SEED");

    rng = g_rand_new_with_seed(env ? atoi(env) : DEFAULT_SEED);
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
