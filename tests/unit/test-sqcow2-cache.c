/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Unit tests of the slice cache, against a model, and of clip sizes
 *
 * The model knows what every key's slice must hold: the key itself, in every
 * word.  The cache may forget a slice at any take, but must never return the
 * wrong one, nor hold more memory than its budget.
 *
 * SQCOW2_TEST_SEED=N repeats a random run.
 */
#include "qemu/osdep.h"
#include <setjmp.h>
#include <cmocka.h>
#include "../../block/sqcow2-int.h"

#define SLICE_BYTES 512
#define WORDS (SLICE_BYTES / sizeof(uint64_t))
#define DEFAULT_SEED 0x51c0

static uint64_t key_of(uint32_t layer, uint64_t slice)
{
    return sqcow2_set_offset(layer, slice * SLICE_BYTES);
}

static void fill(uint64_t *slice, uint64_t key)
{
    for (int i = 0; i < WORDS; i++) {
        slice[i] = key;
    }
}

/* What a lookup does: find, or take, fill and add.  True if it was a hit. */
static bool get(Sqcow2Cache *c, uint64_t key)
{
    uint64_t *slice = sqcow2_cache_find(c, key);

    if (slice) {
        for (int i = 0; i < WORDS; i++) {
            assert_int_equal(slice[i], key);
        }
        return true;
    }
    slice = sqcow2_cache_take(c);
    assert_non_null(slice);
    fill(slice, key);
    sqcow2_cache_add(c, key, slice);
    return false;
}

static void test_same_offset_in_two_layers(void **state)
{
    Sqcow2Cache *c = sqcow2_cache_new(SLICE_BYTES, 16 * SLICE_BYTES);

    assert_false(get(c, key_of(1, 7)));
    assert_false(get(c, key_of(2, 7)));
    assert_false(get(c, key_of(65535, 7)));
    assert_true(get(c, key_of(1, 7)));
    assert_true(get(c, key_of(2, 7)));
    assert_true(get(c, key_of(65535, 7)));
    assert_null(sqcow2_cache_find(c, key_of(3, 7)));
    sqcow2_cache_free(c);
}

static void test_all_that_fits_stays(void **state)
{
    const int n = 100;
    Sqcow2Cache *c = sqcow2_cache_new(SLICE_BYTES, n * SLICE_BYTES);

    for (int i = 0; i < n; i++) {
        assert_false(get(c, key_of(i, i)));
    }
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < n; i++) {
            assert_true(get(c, key_of(i, i)));
        }
    }
    sqcow2_cache_free(c);
}

/* A slice that could not be read is taken but never added. */
static void test_take_without_add(void **state)
{
    Sqcow2Cache *c = sqcow2_cache_new(SLICE_BYTES, 4 * SLICE_BYTES);

    for (int i = 0; i < 100; i++) {
        uint64_t *slice = sqcow2_cache_take(c);

        assert_non_null(slice);
        fill(slice, -1);
        get(c, key_of(0, i % 6));
    }
    sqcow2_cache_free(c);
}

static void test_a_used_slice_outlives_others(void **state)
{
    Sqcow2Cache *c = sqcow2_cache_new(SLICE_BYTES, 8 * SLICE_BYTES);
    uint64_t hot = key_of(9, 1);

    get(c, hot);
    for (int i = 0; i < 1000; i++) {
        get(c, key_of(0, i));
        assert_true(get(c, hot));
    }
    sqcow2_cache_free(c);
}

static void test_budget(void **state)
{
    const int n = 10;
    Sqcow2Cache *c = sqcow2_cache_new(SLICE_BYTES, n * SLICE_BYTES);
    GHashTable *slices = g_hash_table_new(NULL, NULL);

    for (int i = 0; i < 1000; i++) {
        get(c, key_of(i % 7, i));
        g_hash_table_add(slices, sqcow2_cache_find(c, key_of(i % 7, i)));
    }
    assert_int_equal(g_hash_table_size(slices), n);
    g_hash_table_unref(slices);
    sqcow2_cache_free(c);
}

static void test_clear(void **state)
{
    Sqcow2Cache *c = sqcow2_cache_new(SLICE_BYTES, 16 * SLICE_BYTES);

    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 16; i++) {
            assert_false(get(c, key_of(1, i)));
        }
        for (int i = 0; i < 16; i++) {
            assert_true(get(c, key_of(1, i)));
        }
        sqcow2_cache_clear(c);
    }
    sqcow2_cache_clear(c);
    sqcow2_cache_free(c);
}

static void test_clean(void **state)
{
    const int n = 50;
    Sqcow2Cache *c = sqcow2_cache_new(SLICE_BYTES, n * SLICE_BYTES);

    for (int i = 0; i < n; i++) {
        get(c, key_of(i, i));
    }
    sqcow2_cache_clean(c);      /* all are new */
    for (int i = 0; i < n; i += 2) {
        assert_true(get(c, key_of(i, i)));
    }
    sqcow2_cache_clean(c);      /* the others were not used */
    for (int i = 0; i < n; i++) {
        assert_int_equal(sqcow2_cache_find(c, key_of(i, i)) == NULL, i % 2);
    }
    sqcow2_cache_clean(c);
    sqcow2_cache_clean(c);
    for (int i = 0; i < n; i++) {
        assert_null(sqcow2_cache_find(c, key_of(i, i)));
    }

    /* It is as good as new */
    for (int i = 0; i < n; i++) {
        assert_false(get(c, key_of(7, i)));
    }
    for (int i = 0; i < n; i++) {
        assert_true(get(c, key_of(7, i)));
    }
    sqcow2_cache_free(c);
}

/* A slice that is being read is not freed. */
static void test_clean_after_take(void **state)
{
    Sqcow2Cache *c = sqcow2_cache_new(SLICE_BYTES, 4 * SLICE_BYTES);

    for (int i = 0; i < 100; i++) {
        uint64_t *slice = sqcow2_cache_take(c);

        sqcow2_cache_clean(c);
        sqcow2_cache_clean(c);
        fill(slice, key_of(1, i));
        sqcow2_cache_add(c, key_of(1, i), slice);
        assert_true(get(c, key_of(1, i)));
        get(c, key_of(0, i % 5));
        sqcow2_cache_take(c);   /* and not added */
    }
    sqcow2_cache_free(c);
}

static void test_random(void **state)
{
    const char *env = getenv("SQCOW2_TEST_SEED");
    uint32_t seed = env ? atoi(env) : DEFAULT_SEED;
    GRand *rand = g_rand_new_with_seed(seed);

    print_message("# seed %u\n", seed);
    for (int run = 0; run < 200; run++) {
        uint32_t slots = g_rand_int_range(rand, 0, 200);
        uint32_t keys = g_rand_int_range(rand, 1, 400);
        Sqcow2Cache *c = sqcow2_cache_new(SLICE_BYTES, slots * SLICE_BYTES);
        int hits = 0;

        for (int i = 0; i < 1000; i++) {
            uint32_t k = g_rand_int_range(rand, 0, keys);

            if (run % 2 && g_rand_int_range(rand, 0, 100) == 0) {
                sqcow2_cache_clean(c);
            }
            hits += get(c, key_of(k % 300 * 218, k / 2));
        }
        if (slots >= keys && run % 2 == 0) {
            assert_true(hits >= 1000 - (int)keys);
        }
        sqcow2_cache_free(c);
    }
    g_rand_free(rand);
}

static void test_clips(void **state)
{
    static const struct {
        uint64_t size[5], clip[5];
        uint32_t n;
    } cases[] = {
        { { 10 }, { 10 }, 1 },
        { { 10, 20, 30 }, { 10, 20, 30 }, 3 },
        { { 30, 20, 10 }, { 10, 10, 10 }, 3 },
        { { 10, 30, 20, 40 }, { 10, 20, 20, 40 }, 4 },
        { { 30, 0, 30, 30, 30 }, { 0, 0, 30, 30, 30 }, 5 },
        { { INT64_MAX, INT64_MAX - 1 }, { INT64_MAX - 1, INT64_MAX - 1 }, 2 },
    };

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        Sqcow2Layer layers[5] = {};

        for (int j = 0; j < cases[i].n; j++) {
            layers[j].virtual_size = cases[i].size[j];
        }
        sqcow2_set_clips(layers, cases[i].n);
        for (int j = 0; j < cases[i].n; j++) {
            assert_int_equal(layers[j].clip, cases[i].clip[j]);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_offset_in_two_layers),
        cmocka_unit_test(test_all_that_fits_stays),
        cmocka_unit_test(test_take_without_add),
        cmocka_unit_test(test_a_used_slice_outlives_others),
        cmocka_unit_test(test_budget),
        cmocka_unit_test(test_clear),
        cmocka_unit_test(test_clean),
        cmocka_unit_test(test_clean_after_take),
        cmocka_unit_test(test_random),
        cmocka_unit_test(test_clips),
    };

    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
