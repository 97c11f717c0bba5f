/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Damage done to a small chain, as a fuzzer's input says
 *
 * A record of damage has a layer, a place - mostly an entry of some table, by
 * its number - and a way to make a new value of the old one.  So what a fuzzer
 * changes at random is mostly something that means something.  At the end
 * checksums can be made right, so that it gets past them.
 *
 * Each patch is judged: can a checksum tell?  Is it the index alone that is
 * wrong?  docs/sqcow2.rst, S1: the index is all but standard entries.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "hostile_chain.h"

uint8_t input_u8(Input *in)
{
    if (!in->size) {
        return 0;
    }
    in->size--;
    return *in->data++;
}

uint64_t input_u64(Input *in)
{
    uint64_t value = 0;

    for (int i = 0; i < 8; i++) {
        value = value << 8 | input_u8(in);
    }
    return value;
}

bool input_record(Input *in, Input *record)
{
    *record = (Input) { .data = in->data, .size = MIN(in->size, RECORD_BYTES) };
    in->data += record->size;
    in->size -= record->size;
    return record->size;
}

static unsigned input_below(Input *in, unsigned n)
{
    unsigned value = input_u8(in);

    if (n > 256) {
        value = value << 8 | input_u8(in);
    }
    return n ? value % n : 0;
}

/* A value that an entry or a field may have, made of @old */
static uint64_t new_value(Input *in, const File *f, uint64_t old)
{
    static const uint64_t edges[] = {
        0, 1, CLUSTER, CLUSTER - 8, UINT32_MAX, UINT64_MAX, INT64_MAX,
        1ULL << 63, 1ULL << 62, 1ULL << 61, 1ULL << 46, (1ULL << 46) - CLUSTER,
        SQCOW2_MAX_ROOT_ENTRIES, SQCOW2_MAX_ROOT_ENTRIES + 1, 65535, 65536,
        (1ULL << 56) - CLUSTER, 1ULL << 55, MAX_FILE, REGION, DISK,
    };
    uint64_t a, b, c;

    switch (input_u8(in) % 9) {
    case 0:
        return input_u64(in);
    case 1:
        return old ^ 1ULL << input_u8(in) % 64;
    case 2:
        return old + (int8_t)input_u8(in);
    case 3:
        return old + (int64_t)(int8_t)input_u8(in) * CLUSTER;
    case 4:                     /* a place in the file, with or without flag */
        a = input_u8(in);
        b = input_u8(in);
        return a * CLUSTER | (b & 1) << 63 | (b & 2) << 61 | (b & 4) >> 2;
    case 5:                     /* a foreign entry */
        a = input_u8(in);
        b = input_u8(in);
        c = input_u8(in);
        return 1ULL << 61 | (a & 3) << 59 | b << 43 | c;
    case 6:                     /* a root entry */
        a = input_u8(in);
        b = input_u8(in);
        c = input_u8(in);
        return (a & 3) << 62 | b << 43 | c;
    case 7:
        return edges[input_u8(in) % ARRAY_SIZE(edges)];
    default:
        return ldq_be_p(f->bytes + input_below(in, f->size / 8) * 8);
    }
}

/* Change @bytes at @host_offset.  Returns whether they are other ones now. */
static bool patch(Input *in, File *f, uint32_t host_offset, unsigned bytes)
{
    uint8_t *at = f->bytes + host_offset;
    uint64_t old = 0, new;

    g_assert(host_offset + bytes <= MAX_FILE);
    for (unsigned i = 0; i < bytes; i++) {
        old = old << 8 | at[i];
    }
    new = new_value(in, f, old);
    for (unsigned i = bytes; i-- > 0; new >>= 8) {
        at[i] = new;
    }
    for (unsigned i = bytes; i-- > 0; old >>= 8) {
        if (at[i] != (uint8_t)old) {
            return true;
        }
    }
    return false;
}

static Damage damage_record(Input *in, File *f)
{
    static const struct {
        uint8_t pos, bytes;
    } fields[] = {
        { 0, 2 }, { 2, 2 }, { 4, 4 }, { 8, 8 }, { 16, 8 }, { 24, 8 },
        { 32, 8 }, { 40, 8 }, { 48, 4 }, { 52, 4 }, { 56, 8 }, { 64, 4 },
        { 68, 4 }, { 72, 8 }, { 80, 4 }, { 88, 1 }, { 89, 1 }, { 92, 4 },
    };
    unsigned i = input_below(in, ARRAY_SIZE(fields));

    return f->record && patch(in, f, f->record + fields[i].pos,
                              fields[i].bytes) ? DAMAGE_DETECTABLE
                                               : DAMAGE_NONE;
}

static Damage damage_root(Input *in, File *f)
{
    unsigned i = input_below(in, f->root_entries);

    return f->root && patch(in, f, f->root + i * 8, 8) ? DAMAGE_DETECTABLE
                                                       : DAMAGE_NONE;
}

static Damage damage_layer_table(Input *in, File *f)
{
    static const uint8_t pos[] = { 0, 1, 8, 16, 24, 28 };
    static const uint8_t bytes[] = { 1, 1, 8, 8, 4, 4 };
    unsigned i = input_below(in, f->layer_table_entries);
    unsigned j = input_below(in, ARRAY_SIZE(pos));

    return f->layer_table &&
           patch(in, f, f->layer_table + i * SQCOW2_DESC_SIZE + pos[j],
                 bytes[j]) ? DAMAGE_DETECTABLE : DAMAGE_NONE;
}

static Damage damage_merged(Input *in, File *f)
{
    unsigned i = input_below(in, f->nb_merged);
    unsigned j = input_below(in, TABLE_ENTRIES);

    return f->nb_merged && patch(in, f, f->merged[i] + j * 8, 8) ?
           DAMAGE_INDEX : DAMAGE_NONE;
}

/* Owners' own entries, unless both old and new one are none */
static Damage damage_l2(Input *in, File *f)
{
    unsigned i = input_below(in, f->nb_l2);
    unsigned j = input_below(in, TABLE_ENTRIES);
    uint64_t old, new;

    if (!f->nb_l2) {
        return DAMAGE_NONE;
    }
    old = ldq_be_p(f->bytes + f->l2[i] + j * 8);
    if (!patch(in, f, f->l2[i] + j * 8, 8)) {
        return DAMAGE_NONE;
    }
    new = ldq_be_p(f->bytes + f->l2[i] + j * 8);
    return f->kind == SQCOW2_LAYER_SQCOW2 &&
           (!old || sqcow2_entry_is_foreign(old)) &&
           (!new || sqcow2_entry_is_foreign(new)) ? DAMAGE_INDEX : DAMAGE_ANY;
}

static Damage damage_header(Input *in, File *f)
{
    static const uint8_t pos[] = {
        4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104,
        112, 116, 120, 128,
    };
    static const uint8_t bytes[] = {
        4, 8, 4, 4, 8, 4, 4, 8, 8, 4, 4, 8, 8, 8, 8, 4, 4, 1, 4, 4, 8, 8,
    };
    unsigned i = input_below(in, ARRAY_SIZE(pos));

    QEMU_BUILD_BUG_ON(ARRAY_SIZE(pos) != ARRAY_SIZE(bytes));
    return patch(in, f, pos[i], bytes[i]) ? DAMAGE_ANY : DAMAGE_NONE;
}

/* L1 table, refcounts, internal snapshots, anything */
static Damage damage_qcow2(Input *in, File *f, unsigned what)
{
    uint32_t table = 0, pos, bytes = 8;

    switch (what) {
    case 0:
        table = f->l1;
        pos = input_below(in, f->l1_entries) * 8;
        break;
    case 1:
        table = f->refcount_table;
        pos = input_below(in, TABLE_ENTRIES) * 8;
        break;
    case 2:
        table = f->nb_refcount_blocks ? f->refcount_blocks[0] : 0;
        pos = input_below(in, CLUSTER / 2) * 2;
        bytes = 2;
        break;
    case 3:
        table = f->snapshots;
        pos = input_below(in, 64);
        bytes = 4;
        break;
    default:
        table = input_below(in, f->size / 8) * 8;
        pos = input_u8(in) % 8;
        bytes = 1;
        return patch(in, f, table + pos, bytes) ? DAMAGE_ANY : DAMAGE_NONE;
    }
    return table && patch(in, f, table + pos, bytes) ? DAMAGE_ANY
                                                     : DAMAGE_NONE;
}

static Damage damage_size(Input *in, File *f)
{
    uint32_t old = f->size;

    f->size = MIN(input_u8(in) * CLUSTER + input_u8(in) * 2, MAX_FILE);
    memset(f->bytes + f->size, 0, MAX_FILE - f->size);
    return f->size == old ? DAMAGE_NONE : DAMAGE_ANY;
}

/* The file of another layer, or of another time */
static Damage damage_swap(Input *in, Chain *c, const Chain *whole,
                          unsigned layer)
{
    unsigned other = input_below(in, c->nb_files);
    File *f = &c->files[layer];
    const File *from = &whole->files[other];

    if (other == layer) {
        return DAMAGE_NONE;
    }
    memcpy(f->bytes, from->bytes, MAX_FILE);
    f->size = from->size;
    return DAMAGE_ANY;
}

static Damage damage_once(Input *in, Chain *c, const Chain *whole)
{
    unsigned what = input_u8(in) % 16;
    unsigned layer = input_u8(in) % c->nb_files;
    File *f = &c->files[layer];

    switch (what) {
    case 0: case 1:
        return damage_record(in, f);
    case 2: case 3:
        return damage_root(in, f);
    case 4:
        return damage_layer_table(in, f);
    case 5:
        return damage_merged(in, f);
    case 6: case 7: case 8:
        return damage_l2(in, f);
    case 9:
        return damage_header(in, f);
    case 10:
        return damage_qcow2(in, f, 0);
    case 11:
        return damage_qcow2(in, f, 1 + input_u8(in) % 2);
    case 12:
        return damage_qcow2(in, f, 3);
    case 13:
        return damage_qcow2(in, f, 4);
    case 14:
        return damage_size(in, f);
    default:
        return damage_swap(in, c, whole, layer);
    }
}

/*
 * Checksums
 */

static bool table_in_file(const File *f, const uint8_t *ref,
                          unsigned entry_size)
{
    uint64_t bytes = (uint64_t)ldl_be_p(ref + 8) * entry_size;

    return ldq_be_p(ref) <= MAX_FILE && bytes <= MAX_FILE - ldq_be_p(ref);
}

/* CRC32C of what @ref names, put into @ref */
static void fix_ref(File *f, uint8_t *ref, unsigned entry_size)
{
    uint32_t entries = ldl_be_p(ref + 8);

    if (entries && table_in_file(f, ref, entry_size)) {
        stl_be_p(ref + 12, crc32c(0xffffffff, f->bytes + ldq_be_p(ref),
                                  entries * entry_size));
    }
}

/* What the layer tables above say of a layer that has no stamp */
static void fix_descriptions(Chain *c, unsigned layer)
{
    const File *f = &c->files[layer];
    uint32_t l1_bytes = ldl_be_p(f->bytes + 36) * 8;
    uint64_t l1 = ldq_be_p(f->bytes + 40);
    g_autofree uint8_t *buf = NULL;

    if (l1_bytes > MAX_FILE || l1 > MAX_FILE - l1_bytes) {
        return;
    }
    buf = g_malloc(104 + l1_bytes);
    memcpy(buf, f->bytes, 104);
    memcpy(buf + 104, f->bytes + l1, l1_bytes);
    for (unsigned i = layer + 1; i < c->nb_files; i++) {
        File *above = &c->files[i];

        if (above->layer_table && layer < above->layer_table_entries) {
            uint8_t *desc = above->bytes + above->layer_table +
                            layer * SQCOW2_DESC_SIZE;

            if (desc[0] == SQCOW2_LAYER_QCOW2) {
                memcpy(desc + 8, f->bytes + 24, 8);
                stl_be_p(desc + 24, crc32c(0xffffffff, buf, 104 + l1_bytes));
            }
        }
    }
}

static void fix_checksums(Chain *c)
{
    for (unsigned i = 0; i < c->nb_files; i++) {
        if (c->files[i].kind == SQCOW2_LAYER_QCOW2) {
            fix_descriptions(c, i);
        }
    }
    for (unsigned i = 0; i < c->nb_files; i++) {
        File *f = &c->files[i];
        uint8_t *rec = f->bytes + f->record;

        if (f->record) {
            fix_ref(f, rec + 40, SQCOW2_ROOT_SIZE);
            fix_ref(f, rec + 56, SQCOW2_DESC_SIZE);
            stl_be_p(rec + 92, crc32c(0xffffffff, rec, 92));
        }
    }
}

Damage chain_damage(Chain *chain, const Chain *whole, Input in)
{
    bool fix = input_u8(&in) & 1;
    Damage most = DAMAGE_NONE;
    Input record;

    while (input_record(&in, &record)) {
        if (!(record.data[0] & RECORD_IS_OPERATION)) {
            Damage damage = damage_once(&record, chain, whole);

            most = MAX(most, damage);
        }
    }
    if (fix) {
        fix_checksums(chain);
        if (most == DAMAGE_DETECTABLE) {
            most = DAMAGE_INDEX;
        }
    }
    return most;
}
