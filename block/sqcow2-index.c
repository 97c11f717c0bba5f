/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: make and load the index
 *
 * A view is a root table, perhaps with tables that are yet to be merged.
 * Three ways lead to one:
 *   share   a new snapshot takes its lower layer's L1 and root tables:
 *           constant work, whatever the length of the chain
 *   build   from what of the chain's indexes is still true (sqcow2-build.c)
 *   load    from the active image's own root table
 * A shared or built view lives in memory; sqcow2-store.c writes it into an
 * image.
 *
 * Regions are what one L2 table covers; the index of one is an L1 index.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qapi/error.h"
#include "sqcow2-int.h"

void sqcow2_view_free(Sqcow2View *view)
{
    g_free(view->root);
    sqcow2_sources_free(view->sources);
    *view = (Sqcow2View) {};
}

int sqcow2_table_in_file(const Sqcow2Layer *layer, uint32_t index,
                         uint64_t host_offset, int cluster_bits, Error **errp)
{
    if (host_offset & ((1ULL << cluster_bits) - 1)) {
        error_setg(errp, "Layer %u, '%s', has an L2 table at the unaligned "
                   "offset 0x%" PRIx64, index, layer->filename, host_offset);
        return -EINVAL;
    }
    if (host_offset + (1ULL << cluster_bits) > layer->file_size) {
        error_setg(errp, "Layer %u, '%s', is truncated: its L2 table at "
                   "offset 0x%" PRIx64 " lies behind the end of the file; "
                   "restore the file", index, layer->filename, host_offset);
        return -EINVAL;
    }
    return 0;
}

/* Validate every entry, so that lookups meet nothing that is not there. */
static int check_root(BlockDriverState *bs, const Sqcow2View *view,
                      uint16_t own_layer, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    const Sqcow2Layer self = {
        .filename = bs->filename,
        .file_size = MAX(bdrv_getlength(bs->file->bs), 0),
    };

    for (uint32_t i = 0; i < view->entries; i++) {
        Sqcow2Root root;
        int ret;

        if (sqcow2_decode_root(view->root[i], own_layer, s->q.cluster_bits,
                               &root) < 0) {
            error_setg(errp, "sQcow2 root table entry %u is invalid "
                       "(0x%" PRIx64 ")", i, view->root[i]);
            return -EINVAL;
        }
        if (root.kind == SQCOW2_ROOT_IDENTITY &&
            s->layers[root.layer].kind != SQCOW2_LAYER_RAW) {
            error_setg(errp, "sQcow2 root table entry %u takes layer %u for "
                       "raw", i, root.layer);
            return -EINVAL;
        }
        if (root.kind == SQCOW2_ROOT_TABLE) {
            const Sqcow2Layer *layer = root.layer < own_layer ?
                                       &s->layers[root.layer] : &self;

            if (layer->kind == SQCOW2_LAYER_RAW) {
                error_setg(errp, "sQcow2 root table entry %u names a table "
                           "in raw layer %u", i, root.layer);
                return -EINVAL;
            }
            ret = sqcow2_table_in_file(layer, root.layer, root.host_offset,
                                       s->q.cluster_bits, errp);
            if (ret < 0) {
                return ret;
            }
        }
    }
    return 0;
}

/* Convert and checksum the root table in @raw; takes it over. */
static int view_from_bytes(uint64_t *raw, const Sqcow2TableRef *ref,
                           Sqcow2View *view, Error **errp)
{
    uint64_t bytes = (uint64_t)ref->entries * SQCOW2_ROOT_SIZE;

    if (crc32c(0xffffffff, (uint8_t *)raw, bytes) != ref->crc) {
        error_setg(errp, "sQcow2 root table has a wrong checksum");
        g_free(raw);
        return -EINVAL;
    }
    for (uint32_t i = 0; i < ref->entries; i++) {
        raw[i] = be64_to_cpu(raw[i]);
    }
    *view = (Sqcow2View) { .root = raw, .entries = ref->entries };
    return 0;
}

int sqcow2_view_read(BlockDriverState *bs, const Sqcow2Record *record,
                     Sqcow2View *view, Error **errp)
{
    uint64_t bytes = (uint64_t)record->root.entries * SQCOW2_ROOT_SIZE;
    uint64_t *raw;
    int ret;

    *view = (Sqcow2View) {};
    if (!bytes) {
        return 0;
    }
    raw = g_try_malloc(bytes);
    if (!raw) {
        error_setg(errp, "sQcow2 root table does not fit in memory");
        return -ENOMEM;
    }
    ret = bdrv_pread(bs->file, record->root.host_offset, bytes, raw, 0);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read sQcow2 root table");
        g_free(raw);
        return ret;
    }
    return view_from_bytes(raw, &record->root, view, errp);
}

int sqcow2_view_load(BlockDriverState *bs, const Sqcow2Record *record,
                     Sqcow2View *view, Error **errp)
{
    int ret = sqcow2_view_read(bs, record, view, errp);

    if (ret == 0) {
        ret = check_root(bs, view, record->layer, errp);
    }
    if (ret < 0) {
        sqcow2_view_free(view);
    }
    return ret;
}

uint8_t *sqcow2_read_layer_table(BlockDriverState *bs,
                                 const Sqcow2Record *record, Error **errp)
{
    uint64_t bytes = (uint64_t)record->layer_table.entries * SQCOW2_DESC_SIZE;
    uint8_t *buf;
    int ret;

    if (!bytes) {
        return NULL;
    }
    buf = g_malloc(bytes);
    ret = bdrv_pread(bs->file, record->layer_table.host_offset, bytes, buf, 0);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read sQcow2 plain-layer "
                         "table");
    } else if (crc32c(0xffffffff, buf, bytes) != record->layer_table.crc) {
        error_setg(errp, "sQcow2 layer table has a wrong checksum");
        ret = -EINVAL;
    }
    if (ret < 0) {
        g_free(buf);
        return NULL;
    }
    return buf;
}

int64_t sqcow2_read_l1(const Sqcow2Layer *layer, uint32_t index,
                       uint64_t region_size, uint64_t **l1, Error **errp)
{
    uint64_t entries = DIV_ROUND_UP(layer->virtual_size, region_size);
    int ret;

    *l1 = NULL;
    if (entries > layer->l1_entries) {
        error_setg(errp, "Layer %u, '%s', has an L1 table that is too small",
                   index, layer->filename);
        return -EINVAL;
    }
    *l1 = g_try_new(uint64_t, MAX(entries, 1));
    if (!*l1) {
        error_setg(errp, "Layer %u, '%s', has an L1 table that does not fit "
                   "in memory", index, layer->filename);
        return -ENOMEM;
    }
    ret = sqcow2_layer_pread(layer, layer->l1_host_offset,
                             entries * L1E_SIZE, *l1);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read the L1 table of layer "
                         "%u, '%s'", index, layer->filename);
        return ret;
    }
    for (uint64_t i = 0; i < entries; i++) {
        (*l1)[i] = be64_to_cpu((*l1)[i]) & L1E_OFFSET_MASK;
    }
    return entries;
}

int sqcow2_layer_read_root(const Sqcow2Layer *layer,
                           const Sqcow2Record *record, Sqcow2View *view,
                           Error **errp)
{
    uint64_t bytes = (uint64_t)record->root.entries * SQCOW2_ROOT_SIZE;
    uint64_t *raw;
    int ret;

    *view = (Sqcow2View) {};
    if (!bytes) {
        return 0;
    }
    raw = g_try_malloc(bytes);
    if (!raw) {
        error_setg(errp, "The root table of '%s' does not fit in memory",
                   layer->filename);
        return -ENOMEM;
    }
    ret = sqcow2_layer_pread(layer, record->root.host_offset, bytes, raw);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not read the root table of '%s'",
                         layer->filename);
        g_free(raw);
        return ret;
    }
    return view_from_bytes(raw, &record->root, view, errp);
}

int sqcow2_view_share(const Sqcow2Layer *lower, const Sqcow2Record *record,
                      int cluster_bits, Sqcow2View *view, Error **errp)
{
    uint64_t region_size = 1ULL << (2 * cluster_bits - 3);
    g_autofree uint64_t *l1 = NULL;
    Sqcow2View below = {};
    int64_t entries;
    int ret;

    *view = (Sqcow2View) {};
    entries = sqcow2_read_l1(lower, record->layer, region_size, &l1, errp);
    if (entries < 0) {
        return entries;
    }
    ret = sqcow2_layer_read_root(lower, record, &below, errp);
    view->root = g_new0(uint64_t, MAX(entries, 1));
    view->entries = entries;
    for (int64_t i = 0; ret == 0 && i < entries; i++) {
        Sqcow2Root root = {};

        if (l1[i]) {
            ret = sqcow2_table_in_file(lower, record->layer, l1[i],
                                       cluster_bits, errp);
            root.kind = SQCOW2_ROOT_TABLE;
            root.layer = record->layer;
            root.host_offset = l1[i];
        } else if (i < below.entries &&
                   sqcow2_decode_root(below.root[i], record->layer,
                                      cluster_bits, &root) < 0) {
            error_setg(errp, "The root table of '%s' is invalid",
                       lower->filename);
            ret = -EINVAL;
        }
        if (ret == 0) {
            view->root[i] = sqcow2_encode_root(&root, cluster_bits);
        }
    }
    sqcow2_view_free(&below);
    if (ret < 0) {
        sqcow2_view_free(view);
    }
    return ret;
}
