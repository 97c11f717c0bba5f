/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * How the fuzzer of hostile images makes a new input of an old one
 *
 * Inputs are lists of records (hostile_chain.h).  libFuzzer's own mutations
 * would shift one record's bytes into the next, so that most of what comes of
 * an input has little to do with it.  Here records are added, dropped, copied
 * and moved as a whole; in a record, single bytes are changed, mostly the
 * first ones, which say what is damaged, where, and how; and two inputs are
 * crossed at the border of a record.
 */
#include "qemu/osdep.h"
#include "hostile_chain.h"
#include "hostile_fuzzer.h"

/* One file's damage and one operation must have room at least. */
#define MAX_BYTES (HEAD_BYTES + MAX_RECORDS * RECORD_BYTES)

typedef struct Records {
    uint8_t head[HEAD_BYTES];
    unsigned nb;
    uint8_t record[MAX_RECORDS][RECORD_BYTES];
} Records;

static uint64_t random_state;

/* splitmix64; a seed makes the same mutation each time */
static uint64_t random_u64(void)
{
    uint64_t z = random_state += 0x9e3779b97f4a7c15ULL;

    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
    return z ^ z >> 31;
}

static unsigned random_below(unsigned n)
{
    return random_u64() % n;
}

static void parse(const uint8_t *data, size_t size, Records *r)
{
    *r = (Records) {};
    memcpy(r->head, data, MIN(size, HEAD_BYTES));
    while (size > HEAD_BYTES + r->nb * RECORD_BYTES && r->nb < MAX_RECORDS) {
        size_t pos = HEAD_BYTES + r->nb * RECORD_BYTES;

        memcpy(r->record[r->nb++], data + pos, MIN(size - pos, RECORD_BYTES));
    }
}

static size_t unparse(const Records *r, uint8_t *data, size_t max_size)
{
    size_t size = HEAD_BYTES + r->nb * RECORD_BYTES;

    size = MIN(size, max_size);
    memcpy(data, r->head, HEAD_BYTES);
    memcpy(data + HEAD_BYTES, r->record, size - HEAD_BYTES);
    return size;
}

static void insert(Records *r, unsigned i, const uint8_t *record)
{
    if (r->nb < MAX_RECORDS) {
        memmove(r->record[i + 1], r->record[i], (r->nb - i) * RECORD_BYTES);
        memcpy(r->record[i], record, RECORD_BYTES);
        r->nb++;
    }
}

static void insert_random(Records *r, bool operation)
{
    uint8_t record[RECORD_BYTES];

    for (int i = 0; i < RECORD_BYTES; i++) {
        record[i] = random_u64();
    }
    record[0] = operation ? record[0] | RECORD_IS_OPERATION
                          : record[0] & ~RECORD_IS_OPERATION;
    insert(r, random_below(r->nb + 1), record);
}

/* The first bytes are those that say most. */
static void change_byte(uint8_t *record)
{
    uint8_t *at = &record[random_below(1 + random_below(RECORD_BYTES))];
    uint8_t kind = record[0] & RECORD_IS_OPERATION;

    switch (random_below(4)) {
    case 0:
        *at ^= 1 << random_below(8);
        break;
    case 1:
        *at += random_below(2) ? 1 : -1;
        break;
    default:
        *at = random_u64();
        break;
    }
    /* What was damage seldom makes sense as an operation. */
    record[0] = (record[0] & ~RECORD_IS_OPERATION) | kind;
}

static void mutate_once(Records *r)
{
    unsigned i, j;

    if (!r->nb || random_below(4) == 0) {
        insert_random(r, random_below(2));
        return;
    }
    i = random_below(r->nb);
    j = random_below(r->nb);
    switch (random_below(12)) {
    case 0:
        r->head[0] = random_u64();
        break;
    case 1:
        r->head[1] ^= 1;
        break;
    case 2: case 3:
        memmove(r->record[i], r->record[i + 1],
                (r->nb - i - 1) * RECORD_BYTES);
        r->nb--;
        break;
    case 4: {
        uint8_t copy[RECORD_BYTES];

        memcpy(copy, r->record[i], RECORD_BYTES);
        change_byte(copy);
        insert(r, j, copy);
        break;
    }
    case 5: {
        uint8_t moved[RECORD_BYTES];

        memcpy(moved, r->record[i], RECORD_BYTES);
        memcpy(r->record[i], r->record[j], RECORD_BYTES);
        memcpy(r->record[j], moved, RECORD_BYTES);
        break;
    }
    case 6:
        /* libFuzzer knows what was compared with what */
        LLVMFuzzerMutate(r->record[i], RECORD_BYTES, RECORD_BYTES);
        break;
    default:
        change_byte(r->record[i]);
        break;
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size,
                               unsigned int seed)
{
    static Records r;

    g_assert(max_size >= HEAD_BYTES);
    random_state = seed;
    parse(data, size, &r);
    do {
        mutate_once(&r);
    } while (random_below(3) == 0);
    return unparse(&r, data, MIN(max_size, MAX_BYTES));
}

size_t LLVMFuzzerCustomCrossOver(const uint8_t *data1, size_t size1,
                                 const uint8_t *data2, size_t size2,
                                 uint8_t *out, size_t max_out_size,
                                 unsigned int seed)
{
    static Records a, b;
    unsigned from, nb;

    g_assert(max_out_size >= HEAD_BYTES);
    random_state = seed;
    parse(data1, size1, &a);
    parse(data2, size2, &b);
    from = random_below(b.nb + 1);
    nb = random_below(b.nb - from + 1);
    for (unsigned i = 0; i < nb; i++) {
        insert(&a, random_below(a.nb + 1), b.record[from + i]);
    }
    return unparse(&a, out, MIN(max_out_size, MAX_BYTES));
}
