/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2 on-disk format: the record, and numbers that are on disks
 */
#include "qemu/osdep.h"
#include "sqcow2-format-test.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_constants),
        cmocka_unit_test(test_record_bytes),
        cmocka_unit_test(test_record_round_trip),
        cmocka_unit_test(test_record_truncated),
        cmocka_unit_test(test_record_bit_flips),
        cmocka_unit_test(test_record_unknown),
        cmocka_unit_test(test_record_tables),
        cmocka_unit_test(test_record_layer_table),
        cmocka_unit_test_setup(test_random_record, seed_rng),
    };

    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("sqcow2-format-record", tests, NULL,
                                       NULL);
}
