/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2 on-disk format: what an image holds beyond qcow2 version 3
 *
 * docs/sqcow2.rst is normative; its sections and its invariants (S1, S2, ...)
 * are cited here.  This header knows no block-layer types, so that the code
 * behind it can be tested and fuzzed alone.
 *
 * Address spaces: a guest_offset is a byte in a virtual disk; a host_offset
 * is a byte in one layer's file; a host cluster is host_offset >> cluster_bits.
 * All layers that one index speaks of have the same cluster size (S5).
 */
#ifndef BLOCK_SQCOW2_FORMAT_H
#define BLOCK_SQCOW2_FORMAT_H

#define SQCOW2_INCOMPAT_BITNR   48
#ifdef CONFIG_SQCOW2
#define SQCOW2_INCOMPAT_INDEX   (1ULL << SQCOW2_INCOMPAT_BITNR)
#else
#define SQCOW2_INCOMPAT_INDEX   0   /* no image with this bit gets opened */
#endif
#define SQCOW2_FEATURE_NAME     "sQcow2 ownership index"

#define SQCOW2_EXT_MAGIC        0x53514f57 /* "SQOW" */
#define SQCOW2_VERSION          1

/* Layer indexes have 16 bits: a chain has at most 65536 layers. */
#define SQCOW2_MAX_LAYERS       65536

/* A file that an index speaks of is at most 64 TiB long. */
#define SQCOW2_HOST_BITS        46
#define SQCOW2_MAX_HOST_OFFSET  (1ULL << SQCOW2_HOST_BITS)

/* One root entry for each entry that qcow2 allows in an L1 table (32 MiB) */
#define SQCOW2_MAX_ROOT_ENTRIES (32 * 1024 * 1024 / 8)
/* The layer table has one entry for each layer below, or none at all */
#define SQCOW2_MAX_DESC_ENTRIES (SQCOW2_MAX_LAYERS - 1)

#define SQCOW2_STAMP_SIZE       16

/* How a layer is stored. */
typedef enum Sqcow2LayerKind {
    SQCOW2_LAYER_NONE   = 0,    /* there is no such layer */
    SQCOW2_LAYER_RAW    = 1,
    SQCOW2_LAYER_QCOW2  = 2,    /* without an ownership index */
    SQCOW2_LAYER_SQCOW2 = 3,
} Sqcow2LayerKind;

/* Flags of the record */
#define SQCOW2_FLAG_INDEX_VALID (1U << 0)
#define SQCOW2_FLAG_WRITING     (1U << 1)
#define SQCOW2_FLAGS_KNOWN      (SQCOW2_FLAG_INDEX_VALID | SQCOW2_FLAG_WRITING)

/* The data of the header extension: 96 bytes, big-endian on disk. */
#define SQCOW2_RECORD_SIZE      96

/* A table in the file: place, number of entries, CRC32C of its bytes. */
typedef struct Sqcow2TableRef {
    uint64_t host_offset;       /* 0: no table; else cluster-aligned */
    uint32_t entries;
    uint32_t crc;
} Sqcow2TableRef;

typedef struct Sqcow2Record {
    uint16_t layer;             /* this file's own layer index */
    uint32_t flags;
    uint8_t stamp[SQCOW2_STAMP_SIZE];
    uint8_t below_stamp[SQCOW2_STAMP_SIZE];
    Sqcow2TableRef root;
    Sqcow2TableRef layer_table;
    Sqcow2TableRef redirect;    /* reserved: must be empty in version 1 */
    Sqcow2LayerKind below_kind;
} Sqcow2Record;

/* One entry of the layer table: 32 bytes on disk. */
#define SQCOW2_DESC_SIZE       ((size_t)32)

typedef struct Sqcow2LayerDesc {
    Sqcow2LayerKind kind;       /* not NONE */
    uint8_t stamp[SQCOW2_STAMP_SIZE];   /* SQCOW2 only; the rest: the others */
    uint64_t virtual_size;      /* bytes */
    int64_t mtime_ns;           /* since the epoch; 0: could not be trusted */
    uint32_t crc;               /* CRC32C of qcow2 header and L1; RAW: 0 */
} Sqcow2LayerDesc;

/* An entry of the root table: 8 bytes on disk. */
#define SQCOW2_ROOT_SIZE       ((size_t)8)

typedef enum Sqcow2RootKind {
    SQCOW2_ROOT_ABSENT   = 0,   /* no layer below owns anything here */
    SQCOW2_ROOT_TABLE    = 1,   /* an L2 table in @layer's file */
    SQCOW2_ROOT_IDENTITY = 2,   /* raw @layer owns all; host == guest offset */
} Sqcow2RootKind;

typedef struct Sqcow2Root {
    Sqcow2RootKind kind;
    uint16_t layer;
    uint64_t host_offset;       /* of the L2 table; TABLE only */
} Sqcow2Root;

/* What an L2 entry says of its cluster. */
typedef enum Sqcow2ClusterKind {
    SQCOW2_ABSENT     = 0,      /* no layer owns it: reads as zeros */
    SQCOW2_DATA       = 1,
    SQCOW2_ZERO       = 2,      /* owned, reads as zeros */
    SQCOW2_COMPRESSED = 3,
} Sqcow2ClusterKind;

/*
 * A decoded L2 entry.  @host_offset is, by kind:
 *   DATA        where the cluster starts in the owner's file
 *   COMPRESSED  own_table: the descriptor itself, as qcow2 stores it;
 *               else the owner's L2 table that holds the descriptor, at the
 *               same index within the table
 *   ZERO, ABSENT  0
 */
typedef struct Sqcow2Cluster {
    Sqcow2ClusterKind kind;
    uint16_t owner;
    bool own_table;             /* a standard entry: its table's file owns it */
    uint64_t host_offset;
} Sqcow2Cluster;

/*
 * True for an L2 entry that names another file (bits 63, 62, 61 are 0, 0, 1:
 * compressed descriptors may use bit 61, and standard entries must not).
 */
static inline bool sqcow2_entry_is_foreign(uint64_t l2_entry)
{
    return l2_entry >> 61 == 1;
}

/*
 * Encode @rec into @buf, SQCOW2_RECORD_SIZE bytes, with its own CRC32C.
 * All table references must be valid.
 */
void sqcow2_encode_record(const Sqcow2Record *rec, uint8_t *buf);

/*
 * Decode and validate the record in @buf, @len bytes (S2).
 *
 * Returns 0, or a negative errno with @errp set:
 *   -EINVAL   too short, CRC wrong, or a field out of its range
 *   -ENOTSUP  a later version, an unknown flag or a redirect table
 */
int sqcow2_decode_record(const uint8_t *buf, size_t len, int cluster_bits,
                         Sqcow2Record *rec, Error **errp);

void sqcow2_encode_desc(const Sqcow2LayerDesc *desc, uint8_t *buf);

/* Returns 0, or -EINVAL with @errp set when a field is out of its range. */
int sqcow2_decode_desc(const uint8_t *buf, Sqcow2LayerDesc *desc, Error **errp);

/* Returns the entry in host byte order; @root must be valid. */
uint64_t sqcow2_encode_root(const Sqcow2Root *root, int cluster_bits);

/*
 * Decode a root entry, given in host byte order, of the file that is layer
 * @own_layer.  A table may stand in this file itself or in a layer below
 * (S4); identity only in a layer below.
 * Returns 0, or -EINVAL when the entry breaks a rule.
 */
int sqcow2_decode_root(uint64_t entry, uint16_t own_layer, int cluster_bits,
                       Sqcow2Root *root);

/*
 * Returns, in host byte order, the foreign entry for @cluster, which another
 * file than the one it is written to owns.  COMPRESSED takes the host offset
 * of the owner's L2 table.
 */
uint64_t sqcow2_encode_foreign(const Sqcow2Cluster *cluster, int cluster_bits);

/*
 * Decode @l2_entry, in host byte order, of a table that stands in layer
 * @table_layer.  On the read path: pure, no Error.
 * Returns 0, or -EINVAL when the entry breaks a rule: owner not below the
 * table's layer (S6), offset past 64 TiB or not cluster-aligned, reserved
 * bits.
 */
int sqcow2_decode_entry(uint64_t l2_entry, uint16_t table_layer,
                        int cluster_bits, Sqcow2Cluster *cluster);

/*
 * Return the entry to write into a table of another, higher file in place of
 * @l2_entry, which stands in the table at @table_host_offset of layer
 * @table_layer: the same cluster, with its owner named (S6).
 * @table_host_offset is cluster-aligned and below 64 TiB: the caller checks.
 * Returns 0, or -EINVAL as sqcow2_decode_entry().
 */
int sqcow2_inherit_entry(uint64_t l2_entry, uint16_t table_layer,
                         uint64_t table_host_offset, int cluster_bits,
                         uint64_t *inherited);

#endif /* BLOCK_SQCOW2_FORMAT_H */
