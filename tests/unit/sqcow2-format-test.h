/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2 on-disk format: what its unit tests share
 *
 * What is expected there is computed from the byte and bit tables of
 * docs/sqcow2.rst, never with the masks of block/sqcow2-format.c: put_be()
 * here, ref_crc32c() and the *_is_legal() predicates are a second reading of
 * them.
 *
 * The random tests print their seed; SQCOW2_TEST_SEED=N repeats one.
 */
#ifndef SQCOW2_FORMAT_TEST_H
#define SQCOW2_FORMAT_TEST_H

#include "qemu/cutils.h"
#include "qapi/error.h"
#include "block/sqcow2-format.h"
#include <setjmp.h>
#include <cmocka.h>

#define MIN_CLUSTER_BITS    9
#define MAX_CLUSTER_BITS    21
#define RANDOM_ROUNDS       200000
#define DEFAULT_SEED        0x5c0e2026ULL
#define TIB64               (1ULL << 46)

/* Layer numbers to try */
static const uint16_t layers[] = { 0, 1, 254, 255, 256, 65534, 65535 };

static uint64_t rng_state;

/* splitmix64 */
static inline uint64_t rng(void)
{
    uint64_t z = rng_state += 0x9e3779b97f4a7c15ULL;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

static inline void rng_bytes(uint8_t *buf, size_t len)
{
    size_t i;

    for (i = 0; i < len; i++) {
        buf[i] = rng();
    }
}

/* Each random test starts from the seed, so that it can be run alone. */
static inline int seed_rng(void **state)
{
    const char *env = getenv("SQCOW2_TEST_SEED");

    rng_state = DEFAULT_SEED;
    if (env && qemu_strtou64(env, NULL, 0, &rng_state) < 0) {
        return -1;
    }
    printf("# SQCOW2_TEST_SEED=0x%" PRIx64 "\n", rng_state);
    return 0;
}

/* A random number of at most 64 bits, small, large and in between alike. */
static inline uint64_t rng_any_size(void)
{
    return rng() >> (rng() & 63);
}

static inline void put_be(uint8_t *buf, size_t at, size_t size, uint64_t value)
{
    while (size--) {
        buf[at + size] = value;
        value >>= 8;
    }
}

/* Field of bits @high to @low, as the bit tables name them */
static inline uint64_t bits(uint64_t value, int high, int low)
{
    return value >> low & (UINT64_MAX >> (63 - high + low));
}

static inline uint64_t clusters_in_64tib(int cb)
{
    return TIB64 >> cb;
}

static inline int random_cluster_bits(void)
{
    return MIN_CLUSTER_BITS + rng() % (MAX_CLUSTER_BITS -
                                       MIN_CLUSTER_BITS + 1);
}

#endif /* SQCOW2_FORMAT_TEST_H */
