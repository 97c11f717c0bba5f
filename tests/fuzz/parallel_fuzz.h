/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test of requests from several threads: what its parts share
 */
#ifndef PARALLEL_FUZZ_H
#define PARALLEL_FUZZ_H

#include "system/block-backend.h"

#define SECTOR 512

/* Of where the guest writes: one place in each region of an L2 table */
typedef struct Range {
    uint32_t window;
    uint32_t first;             /* sectors within the window */
    uint32_t nb;
} Range;

/* What is done at one time: all drawn from the seed */
typedef struct Plan {
    const char *format;
    uint64_t seed;
    unsigned cluster_bits;
    unsigned nb_layers;         /* below the active one, when it begins */
    unsigned nb_threads;
    unsigned nb_workers;        /* coroutines, of each thread */
    uint64_t region;            /* bytes that one L2 table covers */
    uint32_t nb_windows;
    uint32_t window_sectors;
    uint64_t tail;              /* where the part that is resized begins */
    uint64_t disk_size;         /* at first */
    char cache_size[16];        /* l2-cache-size */
    char entry_size[16];        /* l2-cache-entry-size; or empty */
    bool compressed;            /* with compressed writes */
    int open_flags;
} Plan;

/* Numbers from a seed; one for each coroutine */
typedef struct Random {
    uint64_t state;
} Random;

uint64_t draw(Random *r);
static inline uint32_t draw_below(Random *r, uint32_t n)
{
    return (draw(r) >> 32) % n;
}

void G_GNUC_PRINTF(1, 2) G_NORETURN failed(const char *fmt, ...);

/* parallel_model.c: what each sector holds */

void model_init(const Plan *plan);
void model_free(void);
uint64_t model_offset(const Range *r);          /* bytes on the disk */

/*
 * Take all sectors of @r for one coroutine; false if another has one of them.
 */
bool model_take(const Range *r);
void model_release(const Range *r);

/* The range is taken; make @buf new content for it / compare. */
void model_write(const Range *r, uint8_t *buf);
void model_zero(const Range *r);
void model_compare(const Range *r, const uint8_t *buf, const char *what);

/*
 * Of sectors that others may change meanwhile: those that did not change from
 * begin to end must hold what the model says.  @versions: room for r->nb.
 */
void model_begin_race(const Range *r, uint32_t *versions);
void model_end_race(const Range *r, const uint32_t *versions,
                    const uint8_t *buf);

/* Nobody has anything: remember all, and make it the state again. */
void model_save(void);
void model_restore(void);

/* parallel_watch.c: delays, and who is inside of caches */

void watch_start(bool on);

#endif /* PARALLEL_FUZZ_H */
