/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2 on-disk format: L2 entries, standard and foreign; how they are
 * inherited
 */
#include "qemu/osdep.h"
#include "sqcow2-format-test.h"

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

static uint64_t make_foreign(uint64_t kind, uint64_t owner,
                             uint64_t host_cluster)
{
    return 1ULL << 61 | kind << 59 | owner << 43 | host_cluster;
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_foreign_boundaries),
        cmocka_unit_test(test_foreign_past_limit),
        cmocka_unit_test(test_foreign_rules),
        cmocka_unit_test(test_standard_entries),
        cmocka_unit_test(test_standard_refused),
        cmocka_unit_test(test_compressed_descriptor),
        cmocka_unit_test(test_foreign_tag),
        cmocka_unit_test(test_inherit_standard),
        cmocka_unit_test(test_inherit_foreign),
        cmocka_unit_test(test_inherit_refused),
        cmocka_unit_test_setup(test_random_foreign, seed_rng),
        cmocka_unit_test_setup(test_random_inherit, seed_rng),
    };

    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("sqcow2-format-entries", tests, NULL,
                                       NULL);
}
