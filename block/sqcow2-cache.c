/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: the cache of L2 slices that other layers own
 *
 * One cache for the whole chain, keyed by (layer, host offset): a hash table
 * of fixed size with chaining, and slots that are allocated as they are
 * first needed.  When the budget is used up a clock hand looks for a slot
 * that was not used since it last came by.  Find, take and add are O(1).
 *
 * A slice's life: taken (in no chain, so nobody finds it), filled by the
 * caller, added; found any number of times; evicted by a later take, or freed
 * by a clean when it was not found since the one before.  Slices are never
 * dirty (the files below do not change), so nothing is written back and
 * nothing is pinned: a pointer is good until the next take or clean.
 *
 * Not done: a lock (q.lock is held).
 */
#include "qemu/osdep.h"
#include "qemu/memalign.h"
#include "sqcow2-int.h"

#define NO_SLOT UINT32_MAX
#define MIN_SLOTS 4

typedef struct Slot {
    uint64_t key;
    uint64_t *slice;
    uint32_t next;              /* in the chain of its bucket */
    bool cached;                /* is in a chain */
    uint8_t used;               /* since when: USED_* */
} Slot;

#define USED_SINCE_HAND 1       /* since the hand came by */
#define USED_SINCE_CLEAN 2

struct Sqcow2Cache {
    size_t slice_bytes;
    uint32_t max_slots;
    uint32_t nb_slots;          /* used so far */
    uint32_t free;              /* chain of those without memory among them */
    uint32_t hand;
    uint32_t bucket_mask;
    uint32_t *buckets;
    Slot *slots;
};

static uint32_t *bucket_of(Sqcow2Cache *c, uint64_t key)
{
    /* The low bits are all zero: a slice is aligned.  Fibonacci hashing. */
    return &c->buckets[(key * 0x9e3779b97f4a7c15ULL) >> 40 & c->bucket_mask];
}

Sqcow2Cache *sqcow2_cache_new(size_t slice_bytes, uint64_t max_bytes)
{
    Sqcow2Cache *c = g_new0(Sqcow2Cache, 1);
    uint32_t nb_buckets;

    c->slice_bytes = slice_bytes;
    c->max_slots = MIN(MAX(max_bytes / slice_bytes, MIN_SLOTS), 1U << 24);
    nb_buckets = pow2ceil(c->max_slots);
    c->bucket_mask = nb_buckets - 1;
    c->buckets = g_new(uint32_t, nb_buckets);
    memset(c->buckets, 0xff, nb_buckets * sizeof(*c->buckets));
    c->slots = g_new0(Slot, c->max_slots);
    c->free = NO_SLOT;
    return c;
}

size_t sqcow2_cache_slice_bytes(const Sqcow2Cache *c)
{
    return c->slice_bytes;
}

void sqcow2_cache_free(Sqcow2Cache *c)
{
    if (!c) {
        return;
    }
    for (uint32_t i = 0; i < c->nb_slots; i++) {
        qemu_vfree(c->slots[i].slice);
    }
    g_free(c->slots);
    g_free(c->buckets);
    g_free(c);
}

void sqcow2_cache_clear(Sqcow2Cache *c)
{
    memset(c->buckets, 0xff, (c->bucket_mask + 1) * sizeof(*c->buckets));
    for (uint32_t i = 0; i < c->nb_slots; i++) {
        c->slots[i].cached = false;
    }
}

uint64_t *sqcow2_cache_find(Sqcow2Cache *c, uint64_t key)
{
    uint32_t i;

    for (i = *bucket_of(c, key); i != NO_SLOT; i = c->slots[i].next) {
        if (c->slots[i].key == key) {
            c->slots[i].used = USED_SINCE_HAND | USED_SINCE_CLEAN;
            return c->slots[i].slice;
        }
    }
    return NULL;
}

static void unlink_slot(Sqcow2Cache *c, uint32_t slot)
{
    uint32_t *link = bucket_of(c, c->slots[slot].key);

    while (*link != slot) {
        link = &c->slots[*link].next;
    }
    *link = c->slots[slot].next;
    c->slots[slot].cached = false;
}

/* Take a slot that has no memory yet, or no longer. */
static uint64_t *take_new(Sqcow2Cache *c)
{
    uint32_t i = c->free != NO_SLOT ? c->free : c->nb_slots;
    Slot *slot = &c->slots[i];

    slot->slice = qemu_try_memalign(MIN(c->slice_bytes, 4096),
                                    c->slice_bytes);
    if (!slot->slice) {
        return NULL;
    }
    if (c->free != NO_SLOT) {
        c->free = slot->next;
    } else {
        c->nb_slots++;
    }
    c->hand = i;
    return slot->slice;
}

uint64_t *sqcow2_cache_take(Sqcow2Cache *c)
{
    Slot *slot;

    if (c->free != NO_SLOT || c->nb_slots < c->max_slots) {
        return take_new(c);
    }
    for (;;) {
        c->hand = c->hand + 1 < c->nb_slots ? c->hand + 1 : 0;
        slot = &c->slots[c->hand];
        if (!slot->cached) {
            return slot->slice;
        }
        if (!(slot->used & USED_SINCE_HAND)) {
            unlink_slot(c, c->hand);
            return slot->slice;
        }
        slot->used &= ~USED_SINCE_HAND;
    }
}

void sqcow2_cache_add(Sqcow2Cache *c, uint64_t key, uint64_t *slice)
{
    Slot *slot = &c->slots[c->hand];
    uint32_t *bucket = bucket_of(c, key);

    assert(slot->slice == slice && !slot->cached);
    slot->key = key;
    slot->next = *bucket;
    slot->cached = true;
    slot->used = USED_SINCE_CLEAN;  /* one read makes it no favourite */
    *bucket = c->hand;
}

void sqcow2_cache_clean(Sqcow2Cache *c)
{
    for (uint32_t i = 0; i < c->nb_slots; i++) {
        Slot *slot = &c->slots[i];

        if (!slot->cached) {
            continue;           /* without memory, or taken */
        }
        if (slot->used & USED_SINCE_CLEAN) {
            slot->used &= ~USED_SINCE_CLEAN;
            continue;
        }
        unlink_slot(c, i);
        qemu_vfree(slot->slice);
        slot->slice = NULL;
        slot->next = c->free;
        c->free = i;
    }
}
