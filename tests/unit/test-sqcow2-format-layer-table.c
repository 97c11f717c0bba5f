/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2 on-disk format: entries of the layer table
 */
#include "qemu/osdep.h"
#include "sqcow2-format-test.h"

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
        cmocka_unit_test(test_desc_round_trip),
        cmocka_unit_test(test_desc_refused),
        cmocka_unit_test(test_desc_of_sqcow2),
        cmocka_unit_test_setup(test_random_desc, seed_rng),
    };

    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("sqcow2-format-layer-table", tests, NULL,
                                       NULL);
}
