/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test of requests from several threads: what each sector holds
 *
 * A sector is zero, or is full of one word: its number on the disk, and a
 * generation that no other write has.  The disk is far larger than what is
 * written: sectors are in windows, one in each region of an L2 table.
 *
 * A coroutine takes the sectors of its request first, with one atomic
 * operation each, so that neighbours in one cluster may belong to requests of
 * different threads.  Its version changes before and after each change of a
 * sector: odd while it is changed.
 */
#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "parallel_fuzz.h"

typedef struct Sector {
    uint32_t generation;        /* 0: the sector is zero */
    uint32_t saved;
    uint32_t version;
    uint8_t taken;
} Sector;

static const Plan *plan;
static Sector *sectors;
static uint64_t *windows;       /* their offsets on the disk */
static uint32_t generation;

static Sector *sector_of(const Range *r, uint32_t i)
{
    return &sectors[(uint64_t)r->window * plan->window_sectors + r->first + i];
}

uint64_t model_offset(const Range *r)
{
    return windows[r->window] + (uint64_t)r->first * SECTOR;
}

void model_init(const Plan *p)
{
    Random r = { p->seed ^ 0x77696e646f7773ULL };
    uint64_t bytes = (uint64_t)p->window_sectors * SECTOR;
    uint64_t cluster = 1ULL << p->cluster_bits;

    plan = p;
    generation = 0;
    sectors = g_new0(Sector, (uint64_t)p->nb_windows * p->window_sectors);
    windows = g_new(uint64_t, p->nb_windows);
    for (uint32_t i = 0; i < p->nb_windows; i++) {
        uint64_t room = (p->region - bytes) / cluster;

        windows[i] = i * p->region + draw(&r) % (room + 1) * cluster;
    }
}

void model_free(void)
{
    g_free(sectors);
    g_free(windows);
}

bool model_take(const Range *r)
{
    for (uint32_t i = 0; i < r->nb; i++) {
        if (qatomic_xchg(&sector_of(r, i)->taken, 1)) {
            while (i-- > 0) {
                qatomic_store_release(&sector_of(r, i)->taken, 0);
            }
            return false;
        }
    }
    return true;
}

void model_release(const Range *r)
{
    for (uint32_t i = 0; i < r->nb; i++) {
        Sector *s = sector_of(r, i);

        if (qatomic_read(&s->version) & 1) {
            qatomic_set(&s->version, s->version + 1);
        }
        qatomic_store_release(&s->taken, 0);
    }
}

static uint64_t word_of(const Range *r, uint32_t i, uint32_t gen)
{
    return gen ? (model_offset(r) / SECTOR + i) << 32 | gen : 0;
}

static void change(const Range *r, uint32_t i, uint32_t gen)
{
    Sector *s = sector_of(r, i);

    qatomic_set(&s->version, s->version | 1);
    smp_mb();                   /* with that in model_end_race() */
    qatomic_set(&s->generation, gen);
}

void model_write(const Range *r, uint8_t *buf)
{
    uint32_t gen = qatomic_add_fetch(&generation, 1);

    for (uint32_t i = 0; i < r->nb; i++) {
        uint64_t word = word_of(r, i, gen);

        for (int j = 0; j < SECTOR / sizeof(word); j++) {
            memcpy(buf + i * SECTOR + j * sizeof(word), &word, sizeof(word));
        }
        change(r, i, gen);
    }
}

void model_zero(const Range *r)
{
    for (uint32_t i = 0; i < r->nb; i++) {
        change(r, i, 0);
    }
}

static void compare(const Range *r, uint32_t i, const uint8_t *buf,
                    uint32_t gen, const char *what)
{
    uint64_t wanted = word_of(r, i, gen);

    for (int j = 0; j < SECTOR / sizeof(wanted); j++) {
        uint64_t word;

        memcpy(&word, buf + i * SECTOR + j * sizeof(word), sizeof(word));
        if (word != wanted) {
            failed("%s: sector 0x%" PRIx64 " (window %u, %u + %u of %u): word "
                   "%d is %016" PRIx64 ", not %016" PRIx64, what,
                   model_offset(r) / SECTOR + i, r->window, r->first, i, r->nb,
                   j, word, wanted);
        }
    }
}

void model_compare(const Range *r, const uint8_t *buf, const char *what)
{
    for (uint32_t i = 0; i < r->nb; i++) {
        compare(r, i, buf, sector_of(r, i)->generation, what);
    }
}

void model_begin_race(const Range *r, uint32_t *versions)
{
    for (uint32_t i = 0; i < r->nb; i++) {
        versions[i] = qatomic_read(&sector_of(r, i)->version);
    }
    smp_mb();                   /* the versions before the content */
}

void model_end_race(const Range *r, const uint32_t *versions,
                    const uint8_t *buf)
{
    smp_mb();                   /* the content before the generations */
    for (uint32_t i = 0; i < r->nb; i++) {
        const Sector *s = sector_of(r, i);
        uint32_t gen = qatomic_read(&s->generation);

        smp_mb();               /* with that in change() */
        if (!(versions[i] & 1) && qatomic_read(&s->version) == versions[i]) {
            compare(r, i, buf, gen, "read beside writers");
        }
    }
}

void model_save(void)
{
    uint64_t nb = (uint64_t)plan->nb_windows * plan->window_sectors;

    for (uint64_t i = 0; i < nb; i++) {
        sectors[i].saved = sectors[i].generation;
    }
}

void model_restore(void)
{
    uint64_t nb = (uint64_t)plan->nb_windows * plan->window_sectors;

    for (uint64_t i = 0; i < nb; i++) {
        sectors[i].generation = sectors[i].saved;
    }
}
