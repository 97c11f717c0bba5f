/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2 on-disk format: encode, decode, validate
 *
 * Pure functions over bytes and integers.  Whatever is decoded is treated as
 * hostile: a value leaves this file only when every field is in its range.
 * What can only be judged with other files at hand (does that layer exist, is
 * that offset inside its file) is left to the callers.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qemu/cutils.h"
#include "qapi/error.h"
#include "block/sqcow2-format.h"

/* Byte offsets in the record; docs/sqcow2.rst, "The record" */
enum {
    REC_VERSION     = 0,
    REC_LAYER       = 2,
    REC_FLAGS       = 4,
    REC_STAMP       = 8,
    REC_BELOW_STAMP = 24,
    REC_ROOT        = 40,
    REC_LAYER_TABLE       = 56,
    REC_REDIRECT    = 72,
    REC_BELOW_KIND  = 88,
    REC_RESERVED    = 89,
    REC_CRC         = 92,
};
QEMU_BUILD_BUG_ON(REC_CRC + 4 != SQCOW2_RECORD_SIZE);

/* Root entry: kind 63..62, zero 61..59, layer 58..43, host cluster 42..0 */
#define ROOT_KIND_SHIFT     62
#define ROOT_RESERVED_MASK  (7ULL << 59)

/* Foreign entry: tag 63..61, kind 60..59, owner 58..43, host cluster 42..0 */
#define FOREIGN_TAG         (1ULL << 61)
#define FOREIGN_KIND_SHIFT  59
#define LAYER_SHIFT         43
#define HOST_CLUSTER_MASK   ((1ULL << LAYER_SHIFT) - 1)

/* Standard qcow2 L2 entry; docs/interop/qcow2.txt, "Cluster mapping" */
#define STD_COMPRESSED      (1ULL << 62)
#define STD_ZERO            (1ULL << 0)
#define STD_HOST_MASK       0x00fffffffffffe00ULL
#define STD_RESERVED_MASK   0x3f000000000001feULL

static uint32_t crc_of(const uint8_t *buf, size_t len)
{
    return crc32c(0xffffffff, buf, len);
}

static void encode_table_ref(const Sqcow2TableRef *ref, uint8_t *buf)
{
    stq_be_p(buf, ref->host_offset);
    stl_be_p(buf + 8, ref->entries);
    stl_be_p(buf + 12, ref->crc);
}

static int decode_table_ref(const uint8_t *buf, const char *name,
                            uint32_t max_entries, size_t entry_size,
                            int cluster_bits, Sqcow2TableRef *ref,
                            Error **errp)
{
    uint64_t bytes;

    ref->host_offset = ldq_be_p(buf);
    ref->entries = ldl_be_p(buf + 8);
    ref->crc = ldl_be_p(buf + 12);

    if (!ref->host_offset != !ref->entries || ref->entries > max_entries) {
        error_setg(errp, "sQcow2 %s table has a bad length (%" PRIu32
                   " entries)", name, ref->entries);
        return -EINVAL;
    }
    bytes = (uint64_t)ref->entries * entry_size;
    if (ref->host_offset & ((1ULL << cluster_bits) - 1) ||
        ref->host_offset > SQCOW2_MAX_HOST_OFFSET - bytes) {
        error_setg(errp, "sQcow2 %s table has a bad offset (0x%" PRIx64 ")",
                   name, ref->host_offset);
        return -EINVAL;
    }
    return 0;
}

void sqcow2_encode_record(const Sqcow2Record *rec, uint8_t *buf)
{
    memset(buf, 0, SQCOW2_RECORD_SIZE);
    stw_be_p(buf + REC_VERSION, SQCOW2_VERSION);
    stw_be_p(buf + REC_LAYER, rec->layer);
    stl_be_p(buf + REC_FLAGS, rec->flags);
    memcpy(buf + REC_STAMP, rec->stamp, SQCOW2_STAMP_SIZE);
    memcpy(buf + REC_BELOW_STAMP, rec->below_stamp, SQCOW2_STAMP_SIZE);
    encode_table_ref(&rec->root, buf + REC_ROOT);
    encode_table_ref(&rec->layer_table, buf + REC_LAYER_TABLE);
    encode_table_ref(&rec->redirect, buf + REC_REDIRECT);
    buf[REC_BELOW_KIND] = rec->below_kind;
    stl_be_p(buf + REC_CRC, crc_of(buf, REC_CRC));
}

int sqcow2_decode_record(const uint8_t *buf, size_t len, int cluster_bits,
                         Sqcow2Record *rec, Error **errp)
{
    int ret;

    if (len < SQCOW2_RECORD_SIZE) {
        error_setg(errp, "sQcow2 record is too short (%zu bytes)", len);
        return -EINVAL;
    }
    if (lduw_be_p(buf + REC_VERSION) != SQCOW2_VERSION) {
        error_setg(errp, "sQcow2 record has unsupported version %d",
                   lduw_be_p(buf + REC_VERSION));
        return -ENOTSUP;
    }
    if (ldl_be_p(buf + REC_CRC) != crc_of(buf, REC_CRC)) {
        error_setg(errp, "sQcow2 record has a wrong checksum");
        return -EINVAL;
    }

    rec->layer = lduw_be_p(buf + REC_LAYER);
    rec->flags = ldl_be_p(buf + REC_FLAGS);
    rec->below_kind = buf[REC_BELOW_KIND];
    memcpy(rec->stamp, buf + REC_STAMP, SQCOW2_STAMP_SIZE);
    memcpy(rec->below_stamp, buf + REC_BELOW_STAMP, SQCOW2_STAMP_SIZE);

    if (rec->flags & ~SQCOW2_FLAGS_KNOWN) {
        error_setg(errp, "sQcow2 record has unknown flags (0x%" PRIx32 ")",
                   rec->flags);
        return -ENOTSUP;
    }
    if (rec->below_kind > SQCOW2_LAYER_SQCOW2 ||
        (buf[REC_RESERVED] | buf[REC_RESERVED + 1] | buf[REC_RESERVED + 2])) {
        error_setg(errp, "sQcow2 record has a bad kind of layer below");
        return -EINVAL;
    }

    ret = decode_table_ref(buf + REC_ROOT, "root", SQCOW2_MAX_ROOT_ENTRIES,
                           SQCOW2_ROOT_SIZE, cluster_bits, &rec->root, errp);
    if (ret < 0) {
        return ret;
    }
    ret = decode_table_ref(buf + REC_LAYER_TABLE, "layer",
                           SQCOW2_MAX_DESC_ENTRIES, SQCOW2_DESC_SIZE,
                           cluster_bits, &rec->layer_table, errp);
    if (ret < 0) {
        return ret;
    }
    if (rec->layer_table.entries &&
        rec->layer_table.entries != rec->layer) {
        error_setg(errp, "sQcow2 layer table describes %" PRIu32
                   " layers below layer %d", rec->layer_table.entries,
                   rec->layer);
        return -EINVAL;
    }
    if (!buffer_is_zero(buf + REC_REDIRECT, REC_BELOW_KIND - REC_REDIRECT)) {
        error_setg(errp, "sQcow2 redirect table is not supported");
        return -ENOTSUP;
    }
    rec->redirect = (Sqcow2TableRef) {};
    return 0;
}

void sqcow2_encode_desc(const Sqcow2LayerDesc *desc, uint8_t *buf)
{
    memset(buf, 0, SQCOW2_DESC_SIZE);
    buf[0] = desc->kind;
    if (desc->kind == SQCOW2_LAYER_SQCOW2) {
        memcpy(buf + 8, desc->stamp, SQCOW2_STAMP_SIZE);
        return;
    }
    stq_be_p(buf + 8, desc->virtual_size);
    stq_be_p(buf + 16, desc->mtime_ns);
    stl_be_p(buf + 24, desc->crc);
}

static bool desc_is_valid(const Sqcow2LayerDesc *desc)
{
    switch (desc->kind) {
    case SQCOW2_LAYER_SQCOW2:
        return !desc->crc;
    case SQCOW2_LAYER_RAW:
        return !desc->crc && desc->virtual_size <= INT64_MAX &&
               desc->mtime_ns >= 0;
    case SQCOW2_LAYER_QCOW2:
        return desc->virtual_size <= INT64_MAX && desc->mtime_ns >= 0;
    default:
        return false;
    }
}

int sqcow2_decode_desc(const uint8_t *buf, Sqcow2LayerDesc *desc, Error **errp)
{
    *desc = (Sqcow2LayerDesc) {
        .kind = buf[0],
        .virtual_size = ldq_be_p(buf + 8),
        .mtime_ns = ldq_be_p(buf + 16),
        .crc = ldl_be_p(buf + 24),
    };
    memcpy(desc->stamp, buf + 8, SQCOW2_STAMP_SIZE);

    if (!desc_is_valid(desc) || !buffer_is_zero(buf + 1, 7) ||
        !buffer_is_zero(buf + 28, 4)) {
        error_setg(errp, "sQcow2 layer table has a bad entry");
        return -EINVAL;
    }
    return 0;
}

static uint64_t encode_place(uint16_t layer, uint64_t host_offset,
                             int cluster_bits)
{
    assert(!(host_offset & ((1ULL << cluster_bits) - 1)));
    assert(host_offset < SQCOW2_MAX_HOST_OFFSET);
    return (uint64_t)layer << LAYER_SHIFT | host_offset >> cluster_bits;
}

/* Returns false when the place is past 64 TiB. */
static bool decode_place(uint64_t entry, int cluster_bits, uint16_t *layer,
                         uint64_t *host_offset)
{
    uint64_t host_cluster = entry & HOST_CLUSTER_MASK;

    *layer = entry >> LAYER_SHIFT;
    if (host_cluster >= SQCOW2_MAX_HOST_OFFSET >> cluster_bits) {
        return false;
    }
    *host_offset = host_cluster << cluster_bits;
    return true;
}

uint64_t sqcow2_encode_root(const Sqcow2Root *root, int cluster_bits)
{
    if (root->kind == SQCOW2_ROOT_ABSENT) {
        return 0;
    }
    return (uint64_t)root->kind << ROOT_KIND_SHIFT |
           encode_place(root->layer, root->host_offset, cluster_bits);
}

int sqcow2_decode_root(uint64_t entry, uint16_t own_layer, int cluster_bits,
                       Sqcow2Root *root)
{
    root->kind = entry >> ROOT_KIND_SHIFT;
    if (entry & ROOT_RESERVED_MASK ||
        !decode_place(entry, cluster_bits, &root->layer, &root->host_offset)) {
        return -EINVAL;
    }
    switch (root->kind) {
    case SQCOW2_ROOT_ABSENT:
        return entry ? -EINVAL : 0;
    case SQCOW2_ROOT_TABLE:
        /* No L2 table stands in a header cluster. */
        return root->host_offset && root->layer <= own_layer ? 0 : -EINVAL;
    case SQCOW2_ROOT_IDENTITY:
        return !root->host_offset && root->layer < own_layer ? 0 : -EINVAL;
    default:
        return -EINVAL;
    }
}

uint64_t sqcow2_encode_foreign(const Sqcow2Cluster *cluster, int cluster_bits)
{
    return FOREIGN_TAG | (uint64_t)cluster->kind << FOREIGN_KIND_SHIFT |
           encode_place(cluster->owner, cluster->host_offset, cluster_bits);
}

static int decode_foreign(uint64_t l2_entry, uint16_t table_layer,
                          int cluster_bits, Sqcow2Cluster *cluster)
{
    cluster->kind = l2_entry >> FOREIGN_KIND_SHIFT & 3;
    cluster->own_table = false;
    if (!decode_place(l2_entry, cluster_bits, &cluster->owner,
                      &cluster->host_offset) ||
        cluster->owner >= table_layer) {
        return -EINVAL;
    }
    if (cluster->kind == SQCOW2_ABSENT) {
        return cluster->owner || cluster->host_offset ? -EINVAL : 0;
    }
    if (cluster->kind == SQCOW2_COMPRESSED) {
        return cluster->host_offset ? 0 : -EINVAL;
    }
    if (cluster->kind == SQCOW2_ZERO) {
        return cluster->host_offset ? -EINVAL : 0;
    }
    return 0;
}

int sqcow2_decode_entry(uint64_t l2_entry, uint16_t table_layer,
                        int cluster_bits, Sqcow2Cluster *cluster)
{
    if (sqcow2_entry_is_foreign(l2_entry)) {
        return decode_foreign(l2_entry, table_layer, cluster_bits, cluster);
    }

    cluster->owner = table_layer;
    cluster->own_table = true;
    cluster->host_offset = 0;
    if (l2_entry & STD_COMPRESSED) {
        cluster->kind = SQCOW2_COMPRESSED;
        cluster->host_offset = l2_entry;
        return l2_entry >> 63 ? -EINVAL : 0;
    }
    if (l2_entry & STD_RESERVED_MASK) {
        return -EINVAL;
    }
    if (l2_entry & STD_ZERO) {
        cluster->kind = SQCOW2_ZERO;
        return 0;
    }
    cluster->host_offset = l2_entry & STD_HOST_MASK;
    if (cluster->host_offset & ((1ULL << cluster_bits) - 1) ||
        cluster->host_offset >= SQCOW2_MAX_HOST_OFFSET) {
        return -EINVAL;
    }
    cluster->kind = cluster->host_offset ? SQCOW2_DATA : SQCOW2_ABSENT;
    return 0;
}

int sqcow2_inherit_entry(uint64_t l2_entry, uint16_t table_layer,
                         uint64_t table_host_offset, int cluster_bits,
                         uint64_t *inherited)
{
    Sqcow2Cluster cluster;
    int ret;

    ret = sqcow2_decode_entry(l2_entry, table_layer, cluster_bits, &cluster);
    if (ret < 0) {
        return ret;
    }
    if (cluster.kind == SQCOW2_ABSENT) {
        *inherited = 0;
        return 0;
    }
    if (!cluster.own_table) {
        *inherited = l2_entry;
        return 0;
    }
    if (cluster.kind == SQCOW2_COMPRESSED) {
        cluster.host_offset = table_host_offset;
    }
    *inherited = sqcow2_encode_foreign(&cluster, cluster_bits);
    return 0;
}
