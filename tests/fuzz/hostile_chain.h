/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Small chains of images, intact, with a map of what stands where in them;
 * and damage done to them as the bytes of a fuzzer's input say
 *
 * hostile_chain.c makes the chains, hostile_damage.c does the damage,
 * hostile_operations.c works on what comes of it.
 */
#ifndef HOSTILE_CHAIN_H
#define HOSTILE_CHAIN_H

#include "block/sqcow2-format.h"

/*
 * With 512 bytes all that a header or table can name is aligned to clusters,
 * and a table has one slice.  Larger clusters are a build of their own.
 */
#ifndef HOSTILE_CLUSTER_BITS
#define HOSTILE_CLUSTER_BITS 9
#endif

enum {
    CLUSTER_BITS = HOSTILE_CLUSTER_BITS,
    CLUSTER = 1 << CLUSTER_BITS,
    TABLE_ENTRIES = CLUSTER / 8,
    REGION = TABLE_ENTRIES * CLUSTER,
    DISK = 256 * CLUSTER,
    MAX_LAYERS = 4,
    MAX_OVERLAYS = 3,           /* that operations put on top */
    MAX_TABLES = 16,
    MAX_FILE = 512 * CLUSTER,
    SLICE = 512,                /* bytes of an L2 table */
};

/* All files have this modification time, which their layer tables name. */
#define FILE_SECONDS 1700000000
#define FILE_NANOSECONDS 123456789

/* One file.  Offsets are host offsets; 0: there is no such thing. */
typedef struct File {
    Sqcow2LayerKind kind;
    uint32_t size;
    uint8_t *bytes;             /* MAX_FILE of them; zeros behind @size */

    /* Where things stand; of the intact file */
    uint32_t record;
    uint32_t root;
    uint32_t root_entries;
    uint32_t layer_table;
    uint32_t layer_table_entries;
    uint32_t l1;
    uint32_t l1_entries;
    uint32_t refcount_table;
    uint32_t snapshots;
    uint32_t nb_l2, nb_merged, nb_refcount_blocks;
    uint32_t l2[MAX_TABLES];
    uint32_t merged[MAX_TABLES];
    uint32_t refcount_blocks[MAX_TABLES];
} File;

typedef struct Chain {
    unsigned nb_files;          /* file 0 is the base, the last one active */
    File files[MAX_LAYERS];
    bool fits;                  /* the active image's index is trusted */
    uint8_t truth[DISK];        /* what the disk holds */
} Chain;

enum { NB_CHAINS = 4 };

/* Make chain @which in the current folder; needs a block layer. */
Chain *chain_new(unsigned which);

/* Names of files in the current folder */
const char *file_name(unsigned layer);

/* Write all files of the chain into the current folder. */
void chain_write(const Chain *chain);

/* How much damage was done: the greater, the less can be asked for */
typedef enum Damage {
    DAMAGE_NONE,
    /* Checksums tell: all content is right, or there is an error */
    DAMAGE_DETECTABLE,
    /* Of what is not an owner's own (S1): a repair brings all back */
    DAMAGE_INDEX,
    DAMAGE_ANY,
} Damage;

/*
 * An input is a head - which chain, flags - and records of one size, so that a
 * fuzzer can move, copy and drop them, and change one without shifting the
 * others.  The first byte of a record says whether it is damage or an
 * operation.  All damage is done before the first operation.
 */
enum {
    HEAD_BYTES = 2,
    RECORD_BYTES = 18,
    RECORD_IS_OPERATION = 0x80,
    RECORD_HAS_FAULT = 0x40,    /* an operation; only with HOSTILE_FAULTS */
    MAX_RECORDS = 12,
};

/* The rest of an input, or of a record of it; zeros follow */
typedef struct Input {
    const uint8_t *data;
    size_t size;
} Input;

uint8_t input_u8(Input *in);
uint64_t input_u64(Input *in);

/* Take the next record out of @in.  False if there is none. */
bool input_record(Input *in, Input *record);

/*
 * Damage @chain, which is a copy of the intact @whole, as flags and records of
 * @in say.  Bit 0 of the flags: make those checksums right again that stand
 * for what was damaged.
 */
Damage chain_damage(Chain *chain, const Chain *whole, Input in);

#endif /* HOSTILE_CHAIN_H */
