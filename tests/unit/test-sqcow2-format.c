/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2 on-disk format: encoding, decoding, refusal of hostile bytes
 *
 * What is expected here is computed from the byte and bit tables of
 * docs/sqcow2.rst, never with the masks of block/sqcow2-format.c: put_be(),
 * ref_crc32c() and the *_is_legal() predicates are a second reading of them.
 *
 * The random tests print their seed; SQCOW2_TEST_SEED=N repeats one.
 */
#include "qemu/osdep.h"
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

static const uint16_t layers[] = { 0, 1, 254, 255, 256, 65534, 65535 };

static uint64_t rng_state;

/* splitmix64 */
static uint64_t rng(void)
{
    uint64_t z = rng_state += 0x9e3779b97f4a7c15ULL;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

static void rng_bytes(uint8_t *buf, size_t len)
{
    size_t i;

    for (i = 0; i < len; i++) {
        buf[i] = rng();
    }
}

/* Each random test starts from the seed, so that it can be run alone. */
static int seed_rng(void **state)
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
static uint64_t rng_any_size(void)
{
    return rng() >> (rng() & 63);
}

static void put_be(uint8_t *buf, size_t at, size_t size, uint64_t value)
{
    while (size--) {
        buf[at + size] = value;
        value >>= 8;
    }
}

/* Bit by bit; the polynomial is 0x1edc6f41, reflected. */
static uint32_t ref_crc32c(const uint8_t *buf, size_t len)
{
    uint32_t crc = 0xffffffff;
    int bit;

    while (len--) {
        crc ^= *buf++;
        for (bit = 0; bit < 8; bit++) {
            crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
        }
    }
    return ~crc;
}

static void put_record_crc(uint8_t *buf)
{
    put_be(buf, 92, 4, ref_crc32c(buf, 92));
}

/* Field of bits @high to @low, as the bit tables name them */
static uint64_t bits(uint64_t value, int high, int low)
{
    return value >> low & (UINT64_MAX >> (63 - high + low));
}

static uint64_t clusters_in_64tib(int cb)
{
    return TIB64 >> cb;
}

static bool foreign_is_legal(uint64_t entry, uint16_t table_layer, int cb)
{
    uint64_t kind = bits(entry, 60, 59);
    uint64_t owner = bits(entry, 58, 43);
    uint64_t host_cluster = bits(entry, 42, 0);

    if (bits(entry, 63, 61) != 1 || owner >= table_layer ||
        host_cluster >= clusters_in_64tib(cb)) {
        return false;
    }
    switch (kind) {
    case 0:
        return !owner && !host_cluster;
    case 2:
        return !host_cluster;
    case 3:
        return host_cluster; /* 0 is the header's, not an L2 table's */
    default:
        return true;
    }
}

static bool root_is_legal(uint64_t entry, uint16_t own_layer, int cb)
{
    uint64_t layer = bits(entry, 58, 43);
    uint64_t host_cluster = bits(entry, 42, 0);

    if (bits(entry, 61, 59)) {
        return false;
    }
    switch (bits(entry, 63, 62)) {
    case 0:
        return !entry;
    case 1:
        return layer <= own_layer && host_cluster &&
               host_cluster < clusters_in_64tib(cb);
    case 2:
        return layer < own_layer && !host_cluster;
    default:
        return false;
    }
}

static uint64_t make_foreign(uint64_t kind, uint64_t owner,
                             uint64_t host_cluster)
{
    return 1ULL << 61 | kind << 59 | owner << 43 | host_cluster;
}

static uint64_t make_root(uint64_t kind, uint64_t layer,
                          uint64_t host_cluster)
{
    return kind << 62 | layer << 43 | host_cluster;
}

/* Decode a copy that ends where @len says, for valgrind to see beyond. */
static int decode_record(const uint8_t *buf, size_t len, int cb,
                         Sqcow2Record *rec)
{
    g_autofree uint8_t *copy = g_memdup2(buf, len);
    Error *err = NULL;
    int ret = sqcow2_decode_record(copy, len, cb, rec, &err);

    assert_true(ret <= 0);
    assert_int_equal(ret < 0, err != NULL);
    error_free(err);
    return ret;
}

static int decode_desc(const uint8_t *buf, Sqcow2LayerDesc *desc)
{
    g_autofree uint8_t *copy = g_memdup2(buf, SQCOW2_DESC_SIZE);
    Error *err = NULL;
    int ret = sqcow2_decode_desc(copy, desc, &err);

    assert_true(ret == 0 || ret == -EINVAL);
    assert_int_equal(ret < 0, err != NULL);
    error_free(err);
    return ret;
}

static void assert_foreign_refused(uint64_t entry, uint16_t table_layer,
                                   int cb)
{
    Sqcow2Cluster c;
    uint64_t inherited;

    assert_true(sqcow2_entry_is_foreign(entry));
    assert_int_equal(sqcow2_decode_entry(entry, table_layer, cb, &c),
                     -EINVAL);
    assert_int_equal(sqcow2_inherit_entry(entry, table_layer, 1ULL << cb, cb,
                                          &inherited), -EINVAL);
}

static void assert_foreign(uint64_t entry, uint16_t table_layer, int cb,
                           const Sqcow2Cluster *want)
{
    Sqcow2Cluster c;

    assert_true(sqcow2_entry_is_foreign(entry));
    assert_int_equal(sqcow2_decode_entry(entry, table_layer, cb, &c), 0);
    assert_int_equal(c.kind, want->kind);
    assert_int_equal(c.owner, want->owner);
    assert_false(c.own_table);
    assert_true(c.host_offset == want->host_offset);
}

static void assert_standard(uint64_t entry, uint16_t table_layer, int cb,
                            Sqcow2ClusterKind kind, uint64_t host_offset)
{
    Sqcow2Cluster c;

    assert_false(sqcow2_entry_is_foreign(entry));
    assert_int_equal(sqcow2_decode_entry(entry, table_layer, cb, &c), 0);
    assert_int_equal(c.kind, kind);
    assert_int_equal(c.owner, table_layer);
    assert_true(c.own_table);
    assert_true(c.host_offset == host_offset);
}

static void assert_standard_refused(uint64_t entry, int cb)
{
    Sqcow2Cluster c;

    assert_false(sqcow2_entry_is_foreign(entry));
    assert_int_equal(sqcow2_decode_entry(entry, 1, cb, &c), -EINVAL);
}

/*
 * Numbers that are on disks
 */

static void test_constants(void **state)
{
    static const uint8_t check[] = "123456789";

    assert_int_equal(ref_crc32c(check, 9), 0xe3069283);
    assert_true(SQCOW2_INCOMPAT_INDEX == 0x0001000000000000ULL);
    assert_string_equal(SQCOW2_FEATURE_NAME, "sQcow2 ownership index");
    assert_int_equal(SQCOW2_EXT_MAGIC, 0x53514f57);
    assert_int_equal(SQCOW2_RECORD_SIZE, 96);
    assert_int_equal(SQCOW2_DESC_SIZE, 32);
    assert_int_equal(SQCOW2_ROOT_SIZE, 8);
    assert_int_equal(SQCOW2_MAX_LAYERS, 65536);
    assert_true(SQCOW2_MAX_HOST_OFFSET == TIB64);
}

/*
 * Foreign entries
 */

static void check_foreign(Sqcow2ClusterKind kind, uint16_t owner,
                          uint64_t host_cluster, int cb)
{
    Sqcow2Cluster c = {
        .kind = kind,
        .owner = owner,
        .host_offset = host_cluster << cb,
    };
    uint64_t entry = sqcow2_encode_foreign(&c, cb);

    assert_true(entry == make_foreign(kind, owner, host_cluster));
    assert_foreign_refused(entry, owner, cb);
    assert_foreign_refused(entry, 0, cb);
    if (owner < 65535) {
        assert_foreign(entry, owner + 1, cb, &c);
        assert_foreign(entry, 65535, cb, &c);
    } else {
        assert_foreign_refused(entry, 65535, cb);
    }
}

static void test_foreign_boundaries(void **state)
{
    size_t i;
    int cb;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        uint64_t max = clusters_in_64tib(cb) - 1;

        for (i = 0; i < ARRAY_SIZE(layers); i++) {
            check_foreign(SQCOW2_DATA, layers[i], 0, cb);
            check_foreign(SQCOW2_DATA, layers[i], 1, cb);
            check_foreign(SQCOW2_DATA, layers[i], max, cb);
            check_foreign(SQCOW2_COMPRESSED, layers[i], 1, cb);
            check_foreign(SQCOW2_COMPRESSED, layers[i], max, cb);
            check_foreign(SQCOW2_ZERO, layers[i], 0, cb);
        }
        check_foreign(SQCOW2_ABSENT, 0, 0, cb);
    }
}

/* 64 TiB: the last cluster before it is named, the first behind it is not. */
static void test_foreign_past_limit(void **state)
{
    static const int kinds[] = { SQCOW2_DATA, SQCOW2_COMPRESSED };
    size_t i;
    int cb, bit;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        for (i = 0; i < ARRAY_SIZE(kinds); i++) {
            for (bit = 46 - cb; bit <= 42; bit++) {
                assert_foreign_refused(make_foreign(kinds[i], 3, 1ULL << bit),
                                       7, cb);
            }
            assert_foreign_refused(make_foreign(kinds[i], 3,
                                                (1ULL << 43) - 1), 7, cb);
        }
    }
}

static void test_foreign_rules(void **state)
{
    size_t i;
    int cb, bit;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        /* Absent names neither an owner nor a cluster. */
        for (i = 1; i < ARRAY_SIZE(layers) - 1; i++) {
            assert_foreign_refused(make_foreign(0, layers[i], 0), 65535, cb);
        }
        /* Absent and zero have no place. */
        for (bit = 0; bit <= 42; bit++) {
            assert_foreign_refused(make_foreign(0, 0, 1ULL << bit), 1, cb);
            assert_foreign_refused(make_foreign(2, 0, 1ULL << bit), 1, cb);
        }
        /* No L2 table stands in the header's cluster. */
        assert_foreign_refused(make_foreign(3, 0, 0), 1, cb);
    }
}

/*
 * Standard entries
 */

static void test_standard_entries(void **state)
{
    size_t i;
    int cb;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        uint64_t last = TIB64 - (1ULL << cb);

        for (i = 0; i < ARRAY_SIZE(layers); i++) {
            uint16_t layer = layers[i];

            assert_standard(0, layer, cb, SQCOW2_ABSENT, 0);
            assert_standard(1ULL << cb, layer, cb, SQCOW2_DATA, 1ULL << cb);
            assert_standard(1ULL << 63 | 1ULL << cb, layer, cb, SQCOW2_DATA,
                            1ULL << cb);
            assert_standard(last, layer, cb, SQCOW2_DATA, last);
            assert_standard(1, layer, cb, SQCOW2_ZERO, 0);
            /* Zero that keeps a cluster for later writes */
            assert_standard(1ULL << 63 | last | 1, layer, cb, SQCOW2_ZERO, 0);
        }
    }
}

static void test_standard_refused(void **state)
{
    int cb, bit;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        uint64_t data = 1ULL << 63 | 1ULL << 30;

        for (bit = 1; bit <= 8; bit++) {
            assert_standard_refused(data | 1ULL << bit, cb);
            assert_standard_refused(data | 1ULL << bit | 1, cb);
        }
        for (bit = 56; bit <= 61; bit++) {
            assert_standard_refused(data | 1ULL << bit, cb);
            assert_standard_refused(data | 1ULL << bit | 1, cb);
        }
        for (bit = 9; bit < cb; bit++) {
            assert_standard_refused(data | 1ULL << bit, cb);
        }
        for (bit = 46; bit <= 55; bit++) {
            assert_standard_refused(1ULL << bit, cb);
        }
        /* A compressed cluster is never marked as exclusively owned. */
        assert_standard_refused(3ULL << 62 | 1ULL << 30, cb);
    }
}

/* Bit 61 of a compressed descriptor may be part of its number of sectors. */
static void test_compressed_descriptor(void **state)
{
    int cb, bit;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        for (bit = 0; bit <= 61; bit++) {
            uint64_t desc = 1ULL << 62 | 1ULL << bit;

            assert_standard(desc, 5, cb, SQCOW2_COMPRESSED, desc);
        }
        assert_standard(INT64_MAX, 5, cb, SQCOW2_COMPRESSED, INT64_MAX);
    }
}

static void test_foreign_tag(void **state)
{
    uint64_t top;

    for (top = 0; top < 8; top++) {
        assert_int_equal(sqcow2_entry_is_foreign(top << 61), top == 1);
        assert_int_equal(sqcow2_entry_is_foreign(top << 61 |
                                                 ((1ULL << 61) - 1)),
                         top == 1);
    }
}

/*
 * Root entries
 */

static void check_root(Sqcow2RootKind kind, uint16_t layer,
                       uint64_t host_cluster, uint16_t own_layer, int cb)
{
    Sqcow2Root got, root = {
        .kind = kind,
        .layer = layer,
        .host_offset = host_cluster << cb,
    };
    uint64_t entry = sqcow2_encode_root(&root, cb);

    assert_true(entry == make_root(kind, layer, host_cluster));
    assert_int_equal(sqcow2_decode_root(entry, own_layer, cb, &got), 0);
    assert_int_equal(got.kind, kind);
    assert_int_equal(got.layer, layer);
    assert_true(got.host_offset == root.host_offset);
}

static void assert_root_refused(uint64_t entry, uint16_t own_layer, int cb)
{
    Sqcow2Root root;

    assert_int_equal(sqcow2_decode_root(entry, own_layer, cb, &root),
                     -EINVAL);
}

static void test_root_boundaries(void **state)
{
    size_t i;
    int cb;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        uint64_t max = clusters_in_64tib(cb) - 1;

        for (i = 0; i < ARRAY_SIZE(layers); i++) {
            uint16_t layer = layers[i];

            check_root(SQCOW2_ROOT_ABSENT, 0, 0, layer, cb);
            check_root(SQCOW2_ROOT_TABLE, layer, 1, layer, cb);
            check_root(SQCOW2_ROOT_TABLE, layer, max, layer, cb);
            check_root(SQCOW2_ROOT_TABLE, layer, max, 65535, cb);
            assert_root_refused(make_root(2, layer, 0), layer, cb);
            if (layer) {
                assert_root_refused(make_root(1, layer, 1), layer - 1, cb);
            }
            if (layer < 65535) {
                check_root(SQCOW2_ROOT_IDENTITY, layer, 0, layer + 1, cb);
                check_root(SQCOW2_ROOT_IDENTITY, layer, 0, 65535, cb);
            }
        }
    }
}

static void test_root_rules(void **state)
{
    int cb, bit;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        /* Kind 3 is unknown. */
        assert_root_refused(make_root(3, 0, 0), 9, cb);
        assert_root_refused(make_root(3, 1, 1), 9, cb);
        /* Absent is the whole entry 0. */
        for (bit = 0; bit <= 61; bit++) {
            assert_root_refused(1ULL << bit, 65535, cb);
        }
        for (bit = 59; bit <= 61; bit++) {
            assert_root_refused(make_root(1, 1, 1) | 1ULL << bit, 9, cb);
            assert_root_refused(make_root(2, 1, 0) | 1ULL << bit, 9, cb);
        }
        /* Identity has no table; a table is never at 0 nor past 64 TiB. */
        for (bit = 0; bit <= 42; bit++) {
            assert_root_refused(make_root(2, 1, 1ULL << bit), 9, cb);
        }
        assert_root_refused(make_root(1, 1, 0), 9, cb);
        for (bit = 46 - cb; bit <= 42; bit++) {
            assert_root_refused(make_root(1, 1, 1ULL << bit), 9, cb);
        }
    }
}

/*
 * The record
 */

/* A valid record for cluster sizes up to 2 MiB, every field in use */
static const Sqcow2Record sample = {
    .layer = 0x0102,
    .flags = SQCOW2_FLAG_INDEX_VALID | SQCOW2_FLAG_WRITING,
    .stamp = "\xa0\xa1\xa2\xa3\xa4\xa5\xa6\xa7"
             "\xa8\xa9\xaa\xab\xac\xad\xae\xaf",
    .below_stamp = "\xb0\xb1\xb2\xb3\xb4\xb5\xb6\xb7"
                   "\xb8\xb9\xba\xbb\xbc\xbd\xbe\xbf",
    .root = { 0x123456200000, 0x030201, 0xc0c1c2c3 },
    .below_kind = SQCOW2_LAYER_SQCOW2,
};

static void sample_bytes(uint8_t *buf)
{
    memset(buf, 0, SQCOW2_RECORD_SIZE);
    put_be(buf, 0, 2, 1);
    put_be(buf, 2, 2, 0x0102);
    put_be(buf, 4, 4, 3);
    put_be(buf, 8, 8, 0xa0a1a2a3a4a5a6a7);
    put_be(buf, 16, 8, 0xa8a9aaabacadaeaf);
    put_be(buf, 24, 8, 0xb0b1b2b3b4b5b6b7);
    put_be(buf, 32, 8, 0xb8b9babbbcbdbebf);
    put_be(buf, 40, 8, 0x123456200000);
    put_be(buf, 48, 4, 0x030201);
    put_be(buf, 52, 4, 0xc0c1c2c3);
    put_be(buf, 88, 1, 3);
    put_record_crc(buf);
}

static void test_record_bytes(void **state)
{
    uint8_t got[SQCOW2_RECORD_SIZE], want[SQCOW2_RECORD_SIZE];

    sample_bytes(want);
    memset(got, 0x55, sizeof(got));
    sqcow2_encode_record(&sample, got);
    assert_memory_equal(got, want, sizeof(want));
}

static void check_record(const Sqcow2Record *rec, int cb)
{
    uint8_t buf[SQCOW2_RECORD_SIZE], again[SQCOW2_RECORD_SIZE];
    Sqcow2Record got;

    memset(&got, 0x55, sizeof(got));
    sqcow2_encode_record(rec, buf);
    assert_int_equal(decode_record(buf, sizeof(buf), cb, &got), 0);
    assert_int_equal(got.layer, rec->layer);
    assert_int_equal(got.flags, rec->flags);
    assert_int_equal(got.below_kind, rec->below_kind);
    assert_memory_equal(got.stamp, rec->stamp, 16);
    assert_memory_equal(got.below_stamp, rec->below_stamp, 16);
    assert_true(got.root.host_offset == rec->root.host_offset);
    assert_int_equal(got.root.entries, rec->root.entries);
    assert_int_equal(got.root.crc, rec->root.crc);
    assert_true(got.layer_table.host_offset == rec->layer_table.host_offset);
    assert_int_equal(got.layer_table.entries, rec->layer_table.entries);
    assert_int_equal(got.layer_table.crc, rec->layer_table.crc);
    assert_true(!got.redirect.host_offset && !got.redirect.entries &&
                !got.redirect.crc);
    sqcow2_encode_record(&got, again);
    assert_memory_equal(buf, again, sizeof(buf));
}

static void test_record_round_trip(void **state)
{
    Sqcow2Record base = { .stamp = "base" };
    uint32_t flags;
    size_t i;
    int cb;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        check_record(&sample, cb);
        for (flags = 0; flags < 4; flags++) {
            base.flags = flags;
            check_record(&base, cb);
        }
        for (i = 1; i < ARRAY_SIZE(layers); i++) {
            Sqcow2Record rec = {
                .layer = layers[i],
                .stamp = "stamp",
                .layer_table = { 1ULL << cb, layers[i], 1 },
                .below_kind = i & 1 ? SQCOW2_LAYER_RAW : SQCOW2_LAYER_QCOW2,
            };

            check_record(&rec, cb);
        }
    }
}

static void test_record_truncated(void **state)
{
    uint8_t buf[SQCOW2_RECORD_SIZE];
    Sqcow2Record rec;
    size_t len;

    sample_bytes(buf);
    for (len = 0; len < sizeof(buf); len++) {
        assert_int_equal(decode_record(buf, len, 16, &rec), -EINVAL);
    }
}

static void test_record_bit_flips(void **state)
{
    uint8_t buf[SQCOW2_RECORD_SIZE];
    Sqcow2Record rec;
    int i, cb;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        for (i = 0; i < SQCOW2_RECORD_SIZE * 8; i++) {
            sample_bytes(buf);
            buf[i / 8] ^= 1 << i % 8;
            assert_true(decode_record(buf, sizeof(buf), cb, &rec) < 0);
        }
    }
    memset(buf, 0, sizeof(buf));
    assert_true(decode_record(buf, sizeof(buf), 16, &rec) < 0);
    memset(buf, 0xff, sizeof(buf));
    assert_true(decode_record(buf, sizeof(buf), 16, &rec) < 0);
}

/* Set one field of the sample, with a right CRC, and decode. */
static int decode_changed(size_t at, size_t size, uint64_t value, int cb)
{
    uint8_t buf[SQCOW2_RECORD_SIZE];
    Sqcow2Record rec;

    sample_bytes(buf);
    put_be(buf, at, size, value);
    put_record_crc(buf);
    return decode_record(buf, sizeof(buf), cb, &rec);
}

static void test_record_unknown(void **state)
{
    int i;

    for (i = 0; i < 65536; i++) {
        assert_int_equal(decode_changed(0, 2, i, 16), i == 1 ? 0 : -ENOTSUP);
    }
    for (i = 2; i < 32; i++) {
        assert_int_equal(decode_changed(4, 4, 1U << i, 16), -ENOTSUP);
    }
    for (i = 72; i < 88; i++) {
        assert_int_equal(decode_changed(i, 1, 1, 16), -ENOTSUP);
        assert_int_equal(decode_changed(i, 1, 0x80, 16), -ENOTSUP);
    }
    for (i = 4; i < 256; i++) {
        assert_int_equal(decode_changed(88, 1, i, 16), -EINVAL);
    }
    for (i = 89; i < 92; i++) {
        assert_int_equal(decode_changed(i, 1, 1, 16), -EINVAL);
        assert_int_equal(decode_changed(i, 1, 0x80, 16), -EINVAL);
    }
}

/* @at is where the table's reference stands in the record. */
static int decode_table(size_t at, uint64_t host_offset, uint32_t entries,
                        int cb)
{
    uint8_t buf[SQCOW2_RECORD_SIZE];
    Sqcow2Record rec = {
        /* A layer table describes all layers below. */
        .layer = at == 56 && entries ? MIN(entries, 65535) : 65535,
        .stamp = "stamp",
        .below_kind = SQCOW2_LAYER_QCOW2,
    };

    sqcow2_encode_record(&rec, buf);
    put_be(buf, at, 8, host_offset);
    put_be(buf, at + 8, 4, entries);
    put_record_crc(buf);
    return decode_record(buf, sizeof(buf), cb, &rec);
}

static void test_record_tables(void **state)
{
    static const struct {
        size_t at;
        uint32_t max_entries;
        uint64_t entry_size;
    } tables[] = {
        { 40, SQCOW2_MAX_ROOT_ENTRIES, SQCOW2_ROOT_SIZE },
        { 56, SQCOW2_MAX_DESC_ENTRIES, SQCOW2_DESC_SIZE },
    };
    size_t i;
    int cb, bit;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        uint64_t size = 1ULL << cb;

        for (i = 0; i < ARRAY_SIZE(tables); i++) {
            size_t at = tables[i].at;
            uint32_t max = tables[i].max_entries;
            uint32_t fit = size / tables[i].entry_size;

            assert_int_equal(decode_table(at, 0, 0, cb), 0);
            assert_int_equal(decode_table(at, size, 1, cb), 0);
            assert_int_equal(decode_table(at, size, max, cb), 0);
            assert_int_equal(decode_table(at, size, max + 1, cb), -EINVAL);
            assert_int_equal(decode_table(at, size, UINT32_MAX, cb),
                             -EINVAL);
            assert_int_equal(decode_table(at, size, 0, cb), -EINVAL);
            assert_int_equal(decode_table(at, 0, 1, cb), -EINVAL);
            for (bit = 0; bit < cb; bit++) {
                assert_int_equal(decode_table(at, size | 1ULL << bit, 1, cb),
                                 -EINVAL);
            }
            /* A table may end at 64 TiB, not behind. */
            fit = MIN(fit, max);
            assert_int_equal(decode_table(at, TIB64 - size, fit, cb), 0);
            if (fit < max) {
                assert_int_equal(decode_table(at, TIB64 - size, fit + 1, cb),
                                 -EINVAL);
            }
            for (bit = 46; bit < 64; bit++) {
                assert_int_equal(decode_table(at, 1ULL << bit, 1, cb),
                                 -EINVAL);
            }
            assert_int_equal(decode_table(at, -size, 1, cb), -EINVAL);
        }
    }
}

/* It describes all layers below this one, or none. */
static void test_record_layer_table(void **state)
{
    Sqcow2Record got, rec = {
        .stamp = "stamp",
        .layer_table = { 1ULL << 16, 1, 0 },
        .below_kind = SQCOW2_LAYER_RAW,
    };
    uint8_t buf[SQCOW2_RECORD_SIZE];
    size_t i;

    for (i = 0; i < ARRAY_SIZE(layers) - 1; i++) {
        rec.layer = layers[i];
        rec.layer_table.entries = layers[i] + 1;
        sqcow2_encode_record(&rec, buf);
        assert_int_equal(decode_record(buf, sizeof(buf), 16, &got), -EINVAL);
        if (layers[i] > 1) {
            rec.layer_table.entries = layers[i] - 1;
            sqcow2_encode_record(&rec, buf);
            assert_int_equal(decode_record(buf, sizeof(buf), 16, &got),
                             -EINVAL);
        }
    }
}

/*
 * The layer table
 */

static void test_desc_round_trip(void **state)
{
    static const uint64_t numbers[] = { 0, 1, 512, TIB64, INT64_MAX };
    static const uint32_t crcs[] = { 0, 1, 0x80000000, UINT32_MAX };
    uint8_t buf[SQCOW2_DESC_SIZE], want[SQCOW2_DESC_SIZE];
    Sqcow2LayerDesc got, desc;
    size_t i, j, k;

    for (i = 0; i < ARRAY_SIZE(numbers); i++) {
        for (j = 0; j < ARRAY_SIZE(numbers); j++) {
            for (k = 0; k < ARRAY_SIZE(crcs); k++) {
                desc = (Sqcow2LayerDesc) {
                    .kind = k ? SQCOW2_LAYER_QCOW2 : SQCOW2_LAYER_RAW,
                    .virtual_size = numbers[i],
                    .mtime_ns = numbers[j],
                    .crc = crcs[k],
                };

                memset(want, 0, sizeof(want));
                put_be(want, 0, 1, k ? 2 : 1);
                put_be(want, 8, 8, numbers[i]);
                put_be(want, 16, 8, numbers[j]);
                put_be(want, 24, 4, crcs[k]);

                memset(buf, 0x55, sizeof(buf));
                sqcow2_encode_desc(&desc, buf);
                assert_memory_equal(buf, want, sizeof(want));
                assert_int_equal(decode_desc(buf, &got), 0);
                assert_int_equal(got.kind, desc.kind);
                assert_true(got.virtual_size == numbers[i]);
                assert_true(got.mtime_ns == (int64_t)numbers[j]);
                assert_int_equal(got.crc, crcs[k]);
            }
        }
    }
}

static int decode_desc_changed(Sqcow2LayerKind kind, size_t at, size_t size,
                                uint64_t value)
{
    Sqcow2LayerDesc desc = {
        .kind = kind,
        .virtual_size = 1 << 20,
        .mtime_ns = 1000,
    };
    uint8_t buf[SQCOW2_DESC_SIZE];

    sqcow2_encode_desc(&desc, buf);
    put_be(buf, at, size, value);
    return decode_desc(buf, &desc);
}

static void test_desc_refused(void **state)
{
    int i;

    for (i = 0; i < 256; i++) {
        assert_int_equal(decode_desc_changed(SQCOW2_LAYER_RAW, 0, 1, i),
                         i >= 1 && i <= 3 ? 0 : -EINVAL);
    }
    for (i = 1; i < 32; i = i == 7 ? 28 : i + 1) {
        assert_int_equal(decode_desc_changed(SQCOW2_LAYER_QCOW2, i, 1, 1),
                         -EINVAL);
        assert_int_equal(decode_desc_changed(SQCOW2_LAYER_QCOW2, i, 1, 0x80),
                         -EINVAL);
    }
    /* A size and a time must fit QEMU's signed types. */
    assert_int_equal(decode_desc_changed(SQCOW2_LAYER_RAW, 8, 8,
                                          1ULL << 63), -EINVAL);
    assert_int_equal(decode_desc_changed(SQCOW2_LAYER_RAW, 16, 8,
                                          1ULL << 63), -EINVAL);
    /* A raw layer has neither header nor L1 table. */
    for (i = 0; i < 32; i++) {
        assert_int_equal(decode_desc_changed(SQCOW2_LAYER_RAW, 24, 4,
                                              1U << i), -EINVAL);
        assert_int_equal(decode_desc_changed(SQCOW2_LAYER_QCOW2, 24, 4,
                                              1U << i), 0);
    }
}

static void test_desc_of_sqcow2(void **state)
{
    Sqcow2LayerDesc got, desc = {
        .kind = SQCOW2_LAYER_SQCOW2,
        .stamp = { 0xff, [15] = 0xee },
    };
    uint8_t buf[SQCOW2_DESC_SIZE], want[SQCOW2_DESC_SIZE] = {
        3, [8] = 0xff, [23] = 0xee
    };
    int i;

    memset(buf, 0x55, sizeof(buf));
    sqcow2_encode_desc(&desc, buf);
    assert_memory_equal(buf, want, sizeof(want));
    assert_int_equal(decode_desc(buf, &got), 0);
    assert_int_equal(got.kind, SQCOW2_LAYER_SQCOW2);
    assert_memory_equal(got.stamp, desc.stamp, SQCOW2_STAMP_SIZE);

    /* A stamp may be anything; all around it is zero. */
    for (i = 1; i < SQCOW2_DESC_SIZE; i++) {
        memcpy(buf, want, sizeof(buf));
        buf[i] ^= 0x80;
        assert_int_equal(decode_desc(buf, &got),
                         i >= 8 && i < 24 ? 0 : -EINVAL);
    }
}

/*
 * Inheriting
 */

static void assert_inherits(uint64_t entry, uint16_t layer, int cb,
                            uint64_t want)
{
    uint64_t table_host_offset = 5ULL << cb;
    uint64_t inherited = ~want;

    assert_int_equal(sqcow2_inherit_entry(entry, layer, table_host_offset,
                                          cb, &inherited), 0);
    assert_true(inherited == want);
}

static void test_inherit_standard(void **state)
{
    uint64_t max;
    size_t i;
    int cb;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        max = clusters_in_64tib(cb) - 1;
        for (i = 0; i < ARRAY_SIZE(layers); i++) {
            uint16_t layer = layers[i];

            assert_inherits(0, layer, cb, 0);
            assert_inherits(1ULL << cb, layer, cb,
                            make_foreign(1, layer, 1));
            assert_inherits(1ULL << 63 | max << cb, layer, cb,
                            make_foreign(1, layer, max));
            assert_inherits(1, layer, cb, make_foreign(2, layer, 0));
            assert_inherits(1ULL << 63 | max << cb | 1, layer, cb,
                            make_foreign(2, layer, 0));
            /* The owner's table is named, not the descriptor. */
            assert_inherits(1ULL << 62 | 12345, layer, cb,
                            make_foreign(3, layer, 5));
            assert_inherits(3ULL << 61 | 12345, layer, cb,
                            make_foreign(3, layer, 5));
        }
    }
}

/* However often a foreign entry is inherited, its owner stays the same. */
static void test_inherit_foreign(void **state)
{
    size_t i;
    int cb, kind;

    for (cb = MIN_CLUSTER_BITS; cb <= MAX_CLUSTER_BITS; cb++) {
        for (i = 0; i < ARRAY_SIZE(layers) - 1; i++) {
            for (kind = 1; kind <= 3; kind++) {
                uint64_t entry = make_foreign(kind, layers[i],
                                              kind == 2 ? 0 : 9);

                assert_inherits(entry, layers[i] + 1, cb, entry);
                assert_inherits(entry, 65535, cb, entry);
            }
        }
        /* Writers use the entry 0 for absent. */
        assert_inherits(make_foreign(0, 0, 0), 1, cb, 0);
    }
}

static void test_inherit_refused(void **state)
{
    static const uint64_t bad[] = {
        0x2000000000000001, /* foreign absent with a place */
        0x3ffff80000000000, /* owner 65535: above any table */
        0x0000400000000000, /* data at 64 TiB */
        0x0000000000010002, /* reserved bit 1 */
        0xc000000000010000, /* compressed and exclusively owned */
    };
    uint64_t inherited;
    size_t i;

    for (i = 0; i < ARRAY_SIZE(bad); i++) {
        assert_int_equal(sqcow2_inherit_entry(bad[i], 65535, 1 << 16, 16,
                                              &inherited), -EINVAL);
    }
}

/*
 * Random input: it is refused or it means exactly its own bits
 */

static int random_cluster_bits(void)
{
    return MIN_CLUSTER_BITS + rng() % (MAX_CLUSTER_BITS -
                                       MIN_CLUSTER_BITS + 1);
}

static void test_random_foreign(void **state)
{
    int i, cb, legal = 0;
    uint16_t table_layer;
    Sqcow2Cluster c;
    uint64_t entry;

    for (i = 0; i < RANDOM_ROUNDS; i++) {
        cb = random_cluster_bits();
        table_layer = rng_any_size();
        entry = make_foreign(rng() & 3, (uint16_t)rng_any_size(),
                             rng() & 1 ? 0 : rng_any_size() >> 21);
        if (foreign_is_legal(entry, table_layer, cb)) {
            legal++;
            assert_int_equal(sqcow2_decode_entry(entry, table_layer, cb, &c),
                             0);
            assert_true(sqcow2_encode_foreign(&c, cb) == entry);
        } else {
            assert_foreign_refused(entry, table_layer, cb);
        }
    }
    /* Else the numbers above are badly chosen. */
    assert_in_range(legal, RANDOM_ROUNDS / 50, RANDOM_ROUNDS * 49 / 50);
}

static void test_random_root(void **state)
{
    int i, cb, legal = 0;
    uint16_t own_layer;
    Sqcow2Root root;
    uint64_t entry;

    for (i = 0; i < RANDOM_ROUNDS; i++) {
        cb = random_cluster_bits();
        own_layer = rng_any_size();
        entry = rng() % 8 ? make_root(rng() & 3, (uint16_t)rng_any_size(),
                                      rng() & 1 ? 0 : rng_any_size() >> 21)
                          : rng();
        if (root_is_legal(entry, own_layer, cb)) {
            legal++;
            assert_int_equal(sqcow2_decode_root(entry, own_layer, cb, &root),
                             0);
            assert_true(sqcow2_encode_root(&root, cb) == entry);
        } else {
            assert_root_refused(entry, own_layer, cb);
        }
    }
    assert_in_range(legal, RANDOM_ROUNDS / 50, RANDOM_ROUNDS * 49 / 50);
}

/* Any 64 bits, as an L2 entry: never crashes, inherits to something legal. */
static void test_random_inherit(void **state)
{
    uint64_t entry, inherited;
    uint16_t table_layer;
    Sqcow2Cluster c, i_c;
    int i, cb, ret;

    for (i = 0; i < RANDOM_ROUNDS; i++) {
        cb = random_cluster_bits();
        table_layer = rng_any_size() % 65535;
        entry = rng_any_size() << (rng() & 1 ? cb : 0);
        ret = sqcow2_decode_entry(entry, table_layer, cb, &c);
        assert_int_equal(sqcow2_inherit_entry(entry, table_layer, 7ULL << cb,
                                              cb, &inherited), ret);
        if (ret < 0) {
            continue;
        }
        if (c.kind == SQCOW2_ABSENT) {
            assert_true(inherited == 0);
            continue;
        }
        assert_true(foreign_is_legal(inherited, table_layer + 1, cb));
        assert_int_equal(sqcow2_decode_entry(inherited, table_layer + 1, cb,
                                             &i_c), 0);
        assert_int_equal(i_c.kind, c.kind);
        assert_int_equal(i_c.owner, c.owner);
        if (c.kind != SQCOW2_COMPRESSED || !c.own_table) {
            assert_true(i_c.host_offset == c.host_offset);
        }
    }
}

/* Damage with a right CRC */
static void test_random_record(void **state)
{
    uint8_t buf[SQCOW2_RECORD_SIZE], again[SQCOW2_RECORD_SIZE];
    int i, changes, ret, accepted = 0;
    Sqcow2Record rec;

    for (i = 0; i < RANDOM_ROUNDS; i++) {
        if (rng() % 16) {
            sample_bytes(buf);
            for (changes = rng() % 4; changes >= 0; changes--) {
                buf[rng() % 92] ^= 1 << (rng() & 7);
            }
        } else {
            rng_bytes(buf, sizeof(buf));
            put_be(buf, 0, 2, 1);
        }
        put_record_crc(buf);
        ret = decode_record(buf, sizeof(buf), random_cluster_bits(), &rec);
        if (ret == 0) {
            accepted++;
            sqcow2_encode_record(&rec, again);
            assert_memory_equal(buf, again, sizeof(buf));
        }
    }
    assert_in_range(accepted, 1, RANDOM_ROUNDS * 49 / 50);
}

static void test_random_desc(void **state)
{
    uint8_t buf[SQCOW2_DESC_SIZE], again[SQCOW2_DESC_SIZE];
    int i, accepted = 0;
    Sqcow2LayerDesc desc;

    for (i = 0; i < RANDOM_ROUNDS; i++) {
        rng_bytes(buf, sizeof(buf));
        put_be(buf, 0, 8, (rng() & 3) << 56 | (rng() % 8 ? 0 : rng() & 0xff));
        put_be(buf, 28, 4, rng() % 8 ? 0 : rng());
        if (decode_desc(buf, &desc) == 0) {
            accepted++;
            sqcow2_encode_desc(&desc, again);
            assert_memory_equal(buf, again, sizeof(buf));
        }
    }
    assert_in_range(accepted, RANDOM_ROUNDS / 50, RANDOM_ROUNDS * 49 / 50);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_constants),
        cmocka_unit_test(test_foreign_boundaries),
        cmocka_unit_test(test_foreign_past_limit),
        cmocka_unit_test(test_foreign_rules),
        cmocka_unit_test(test_standard_entries),
        cmocka_unit_test(test_standard_refused),
        cmocka_unit_test(test_compressed_descriptor),
        cmocka_unit_test(test_foreign_tag),
        cmocka_unit_test(test_root_boundaries),
        cmocka_unit_test(test_root_rules),
        cmocka_unit_test(test_record_bytes),
        cmocka_unit_test(test_record_round_trip),
        cmocka_unit_test(test_record_truncated),
        cmocka_unit_test(test_record_bit_flips),
        cmocka_unit_test(test_record_unknown),
        cmocka_unit_test(test_record_tables),
        cmocka_unit_test(test_record_layer_table),
        cmocka_unit_test(test_desc_round_trip),
        cmocka_unit_test(test_desc_refused),
        cmocka_unit_test(test_desc_of_sqcow2),
        cmocka_unit_test(test_inherit_standard),
        cmocka_unit_test(test_inherit_foreign),
        cmocka_unit_test(test_inherit_refused),
        cmocka_unit_test_setup(test_random_foreign, seed_rng),
        cmocka_unit_test_setup(test_random_root, seed_rng),
        cmocka_unit_test_setup(test_random_inherit, seed_rng),
        cmocka_unit_test_setup(test_random_record, seed_rng),
        cmocka_unit_test_setup(test_random_desc, seed_rng),
    };

    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("sqcow2-format", tests, NULL, NULL);
}
