/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer of hostile images: one run, and what must hold in it
 */
#ifndef HOSTILE_RUN_H
#define HOSTILE_RUN_H

#include "system/block-backend.h"
#include "hostile_chain.h"
#include "hostile_fuzzer.h"

/* Of what may be a disk of many TiB this much is read. */
#define READ_BYTES (3 * DISK)

typedef struct Run {
    unsigned top;               /* number of the active layer's file */
    unsigned nb_made;           /* by us: files of overlays */
    Damage damage;
    bool repaired;              /* of damage to the index */
    bool unknown;               /* what the disk should hold */
    uint64_t disk_size;
    uint8_t truth[READ_BYTES];  /* zeros behind the disk's end */
    bool unsure[READ_BYTES];    /* a write failed there */
} Run;

/* hostile_run.c */

extern FILE *real_stderr;

/* Say what is wrong, and abort. */
void G_GNUC_PRINTF(1, 2) G_NORETURN failed(const char *fmt, ...);

/* Must what is read be run->truth, if it can be read? */
bool content_is_known(const Run *run);

/* Is there no reason why an operation should fail? */
bool must_work(const Run *run);

/* Returns NULL if the active image does not open, which it need not. */
BlockBackend *open_top(const Run *run, int flags);

/* Read all that there is, and ask for its status.  @blk: may be NULL */
void read_all(const Run *run, BlockBackend *blk, bool must_be_true,
              const char *when);

/* Is its index in use? */
bool is_trusted(BlockBackend *blk);

/* hostile_operations.c */

extern const unsigned nb_operations;

/* Do operation @i, with its parameters from @in; then no fault is armed. */
void operate(Run *run, unsigned i, Input *in);

/* The operation that finds nothing in an intact image */
void do_check(Run *run, Input *in);

#endif /* HOSTILE_RUN_H */
