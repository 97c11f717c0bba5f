/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Small chains for the fuzzer of hostile images
 *
 * Made by the driver itself, then taken into memory.  What is random in them
 * or depends on the time - stamps, modification times - is given fixed values,
 * so that an input means the same in each process.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qemu/cutils.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "block/qapi.h"
#include "block/snapshot.h"
#include "system/block-backend.h"
#include "hostile_chain.h"

/* Offsets in qcow2's header; docs/interop/qcow2.txt */
enum {
    HEADER_L1_SIZE = 36,
    HEADER_L1_OFFSET = 40,
    HEADER_REFCOUNT_OFFSET = 48,
    HEADER_SNAPSHOTS_OFFSET = 64,
    HEADER_LENGTH = 100,
};

/* Offsets in the record; docs/sqcow2.rst */
enum {
    RECORD_STAMP = 8,
    RECORD_BELOW_STAMP = 24,
    RECORD_ROOT = 40,
    RECORD_LAYER_TABLE = 56,
    RECORD_CRC = 92,
};

const char *file_name(unsigned layer)
{
    static const char *const names[] = {
        "layer0", "layer1", "layer2", "layer3", "layer4", "layer5", "layer6",
    };

    return names[layer];
}

static void set_time(unsigned layer)
{
    const struct timespec ts = {
        .tv_sec = FILE_SECONDS,
        .tv_nsec = FILE_NANOSECONDS,
    };
    const struct timespec times[2] = { ts, ts };

    g_assert(utimensat(AT_FDCWD, file_name(layer), times, 0) == 0);
}

/*
 * Making a chain
 */

static void create(Chain *c, const char *format, uint64_t size)
{
    unsigned layer = c->nb_files++;
    static const char *const formats[] = { NULL, "raw", "qcow2", "sqcow2" };
    File *below = layer ? &c->files[layer - 1] : NULL;
    bool raw = !strcmp(format, "raw");
    g_autofree char *options = g_strdup_printf("cluster_size=%d", CLUSTER);

    bdrv_img_create(file_name(layer), format,
                    below ? file_name(layer - 1) : NULL,
                    below ? formats[below->kind] : NULL, raw ? NULL : options,
                    size, 0, true, &error_abort);
    c->files[layer].kind = raw ? SQCOW2_LAYER_RAW :
        strcmp(format, "qcow2") ? SQCOW2_LAYER_SQCOW2 : SQCOW2_LAYER_QCOW2;
    if (size < DISK) {
        memset(c->truth + size, 0, DISK - size);
    }
}

static BlockBackend *open_layer(const Chain *c, unsigned layer)
{
    static const char *const formats[] = { NULL, "raw", "qcow2", "sqcow2" };
    QDict *options = qdict_new();

    qdict_put_str(options, "driver", formats[c->files[layer].kind]);
    return blk_new_open(file_name(layer), NULL, options, BDRV_O_RDWR,
                        &error_abort);
}

typedef enum How { AS_DATA, AS_ZEROS, COMPRESSED } How;

/* Write clusters from @first to @last of the layer that is open. */
static void fill(Chain *c, BlockBackend *blk, unsigned first, unsigned last,
                 How how)
{
    for (unsigned i = first; i <= last; i++) {
        uint64_t buf[TABLE_ENTRIES] = {};
        int ret;

        if (how == AS_ZEROS) {
            ret = blk_pwrite_zeroes(blk, i * CLUSTER, CLUSTER, 0);
        } else {
            for (int j = 0; j < TABLE_ENTRIES; j++) {
                buf[j] = cpu_to_be64((uint64_t)c->nb_files << 56 |
                                     (uint64_t)how << 48 | i);
            }
            ret = blk_pwrite(blk, i * CLUSTER, CLUSTER, buf,
                             how == COMPRESSED ? BDRV_REQ_WRITE_COMPRESSED : 0);
        }
        g_assert(ret >= 0);
        memcpy(c->truth + i * CLUSTER, buf, CLUSTER);
    }
}

static void snapshot(BlockBackend *blk)
{
    QEMUSnapshotInfo sn = { .name = "s" };

    g_assert(bdrv_snapshot_create(blk_bs(blk), &sn) == 0);
}

/* Layers that vouch for those below by stamps, of several sizes */
static void make_stamped(Chain *c)
{
    static const struct {
        uint32_t size;
        uint8_t data[2], zeros[2], compressed[2];
    } layers[MAX_LAYERS] = {
        { 224 * CLUSTER, { 0, 9 }, { 70, 71 }, { 130, 133 } },
        { 160 * CLUSTER, { 4, 6 }, { 8, 8 }, { 72, 74 } },
        { DISK, { 66, 68 }, { 5, 5 }, { 140, 141 } },
        { DISK, { 10, 11 }, { 69, 69 }, { 12, 12 } },
    };

    for (int i = 0; i < MAX_LAYERS; i++) {
        BlockBackend *blk;

        create(c, "sqcow2", layers[i].size);
        blk = open_layer(c, i);
        fill(c, blk, layers[i].data[0], layers[i].data[1], AS_DATA);
        fill(c, blk, layers[i].zeros[0], layers[i].zeros[1], AS_ZEROS);
        fill(c, blk, layers[i].compressed[0], layers[i].compressed[1],
             COMPRESSED);
        blk_unref(blk);
        set_time(i);
    }
    c->fits = true;
}

/* Plain layers at the bottom, so a layer table; internal snapshots */
static void make_described(Chain *c)
{
    BlockBackend *blk;

    create(c, "raw", 99 * CLUSTER);
    blk = open_layer(c, 0);
    fill(c, blk, 0, 40, AS_DATA);
    blk_unref(blk);
    set_time(0);

    create(c, "qcow2", DISK);
    blk = open_layer(c, 1);
    fill(c, blk, 3, 5, AS_DATA);
    fill(c, blk, 20, 22, COMPRESSED);
    fill(c, blk, 30, 30, AS_ZEROS);
    blk_unref(blk);
    set_time(1);

    create(c, "sqcow2", DISK);
    blk = open_layer(c, 2);
    fill(c, blk, 64, 66, AS_DATA);
    fill(c, blk, 200, 201, COMPRESSED);
    blk_unref(blk);
    set_time(2);

    create(c, "sqcow2", DISK);
    blk = open_layer(c, 3);
    fill(c, blk, 1, 4, AS_DATA);
    snapshot(blk);
    fill(c, blk, 2, 2, AS_DATA);
    fill(c, blk, 65, 65, AS_ZEROS);
    blk_unref(blk);
    set_time(3);
    c->fits = true;
}

/* As make_stamped(), but layer 1 was changed since. */
static void make_changed(Chain *c)
{
    BlockBackend *blk;

    make_stamped(c);
    blk = open_layer(c, 1);
    /* None of the layers above has one of these clusters. */
    fill(c, blk, 7, 7, AS_DATA);
    fill(c, blk, 73, 76, AS_DATA);
    blk_unref(blk);
    set_time(1);
    c->fits = false;
}

/* As make_changed(), with merged tables in the active image */
static void make_merged(Chain *c)
{
    make_changed(c);
    blk_unref(open_layer(c, MAX_LAYERS - 1));
    set_time(MAX_LAYERS - 1);
    c->fits = true;
}

/*
 * From files to memory
 */

static void add_table(uint32_t *tables, uint32_t *nb, uint64_t host_offset,
                      uint32_t size)
{
    if (host_offset && host_offset + CLUSTER <= size && *nb < MAX_TABLES) {
        tables[(*nb)++] = host_offset;
    }
}

static void map_record(File *f)
{
    uint32_t pos = ldl_be_p(f->bytes + HEADER_LENGTH);

    while (ldl_be_p(f->bytes + pos) != SQCOW2_EXT_MAGIC) {
        pos += 8 + ROUND_UP(ldl_be_p(f->bytes + pos + 4), 8);
        g_assert(pos < CLUSTER);
    }
    f->record = pos + 8;
    f->root = ldq_be_p(f->bytes + f->record + RECORD_ROOT);
    f->root_entries = ldl_be_p(f->bytes + f->record + RECORD_ROOT + 8);
    f->layer_table = ldq_be_p(f->bytes + f->record + RECORD_LAYER_TABLE);
    f->layer_table_entries = ldl_be_p(f->bytes + f->record +
                                      RECORD_LAYER_TABLE + 8);
}

static void map_file(File *f, unsigned layer)
{
    f->l1 = ldq_be_p(f->bytes + HEADER_L1_OFFSET);
    f->l1_entries = ldl_be_p(f->bytes + HEADER_L1_SIZE);
    f->refcount_table = ldq_be_p(f->bytes + HEADER_REFCOUNT_OFFSET);
    f->snapshots = ldq_be_p(f->bytes + HEADER_SNAPSHOTS_OFFSET);
    for (int i = 0; i < f->l1_entries; i++) {
        add_table(f->l2, &f->nb_l2, ldq_be_p(f->bytes + f->l1 + i * 8) &
                  0x00fffffffffffe00ULL, f->size);
    }
    for (int i = 0; i < TABLE_ENTRIES; i++) {
        add_table(f->refcount_blocks, &f->nb_refcount_blocks,
                  ldq_be_p(f->bytes + f->refcount_table + i * 8), f->size);
    }
    if (f->kind != SQCOW2_LAYER_SQCOW2) {
        return;
    }
    map_record(f);
    for (int i = 0; i < f->root_entries; i++) {
        Sqcow2Root root;

        g_assert(sqcow2_decode_root(ldq_be_p(f->bytes + f->root + i * 8),
                                    layer, CLUSTER_BITS, &root) == 0);
        if (root.kind == SQCOW2_ROOT_TABLE && root.layer == layer) {
            add_table(f->merged, &f->nb_merged, root.host_offset, f->size);
        }
    }
}

static void load_file(Chain *c, unsigned layer)
{
    File *f = &c->files[layer];
    g_autofree char *bytes = NULL;
    gsize size;

    g_assert(g_file_get_contents(file_name(layer), &bytes, &size, NULL));
    g_assert(size <= MAX_FILE);
    f->size = size;
    f->bytes = g_malloc0(MAX_FILE);
    memcpy(f->bytes, bytes, size);
    if (f->kind != SQCOW2_LAYER_RAW) {
        map_file(f, layer);
    }
}

/* The random stamp of @layer turns into one that tells nothing of it. */
static void fix_stamp(Chain *c, unsigned layer)
{
    File *f = &c->files[layer];
    uint8_t old[SQCOW2_STAMP_SIZE], new[SQCOW2_STAMP_SIZE];

    memcpy(old, f->bytes + f->record + RECORD_STAMP, sizeof(old));
    memset(new, 0xa0 + layer, sizeof(new));
    for (unsigned i = layer; i < c->nb_files; i++) {
        for (uint32_t pos = 0; pos + sizeof(old) <= c->files[i].size; pos++) {
            uint8_t *at = c->files[i].bytes + pos;

            if (!memcmp(at, old, sizeof(old))) {
                memcpy(at, new, sizeof(new));
            }
        }
    }
}

/* A stamp that the layer below had once */
static void fix_old_stamp(Chain *c, unsigned layer)
{
    uint8_t *rec = c->files[layer].bytes + c->files[layer].record;
    const File *below = &c->files[layer - 1];

    if (!buffer_is_zero(rec + RECORD_BELOW_STAMP, SQCOW2_STAMP_SIZE) &&
        memcmp(rec + RECORD_BELOW_STAMP,
               below->bytes + below->record + RECORD_STAMP,
               SQCOW2_STAMP_SIZE)) {
        memset(rec + RECORD_BELOW_STAMP, 0xee, SQCOW2_STAMP_SIZE);
    }
}

static void fix_checksums(File *f)
{
    uint8_t *rec = f->bytes + f->record;

    stl_be_p(rec + RECORD_LAYER_TABLE + 12,
             f->layer_table ? crc32c(0xffffffff, f->bytes + f->layer_table,
                                     f->layer_table_entries *
                                     SQCOW2_DESC_SIZE) : 0);
    stl_be_p(rec + RECORD_CRC, crc32c(0xffffffff, rec, RECORD_CRC));
}

void chain_write(const Chain *c)
{
    for (unsigned i = 0; i < c->nb_files; i++) {
        const File *f = &c->files[i];
        int fd = open(file_name(i), O_RDWR | O_CREAT | O_TRUNC, 0600);

        g_assert(fd >= 0 && write(fd, f->bytes, f->size) == f->size);
        close(fd);
        set_time(i);
    }
}

Chain *chain_new(unsigned which)
{
    static void (*const make[NB_CHAINS])(Chain *) = {
        make_stamped, make_described, make_changed, make_merged,
    };
    Chain *c = g_new0(Chain, 1);

    make[which](c);
    for (unsigned i = 0; i < c->nb_files; i++) {
        load_file(c, i);
    }
    for (unsigned i = 0; i < c->nb_files; i++) {
        if (c->files[i].record) {
            fix_stamp(c, i);
        }
    }
    for (unsigned i = 0; i < c->nb_files; i++) {
        if (c->files[i].record) {
            if (i) {
                fix_old_stamp(c, i);
            }
            fix_checksums(&c->files[i]);
        }
    }
    return c;
}
