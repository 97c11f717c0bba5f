/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2 on-disk format: entries of the root table
 */
#include "qemu/osdep.h"
#include "sqcow2-format-test.h"

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

static uint64_t make_root(uint64_t kind, uint64_t layer,
                          uint64_t host_cluster)
{
    return kind << 62 | layer << 43 | host_cluster;
}

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_root_boundaries),
        cmocka_unit_test(test_root_rules),
        cmocka_unit_test_setup(test_random_root, seed_rng),
    };

    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("sqcow2-format-root-table", tests, NULL,
                                       NULL);
}
