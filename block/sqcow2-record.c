/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: the record in the header
 *
 * The record lives in three places: s->record, the header extension that
 * upstream keeps in memory and writes with every header update, and the
 * file.  Whoever changes s->record calls sqcow2_record_write(), which brings
 * all three into line: the file's by writing 96 bytes in place, so that no
 * other byte of the header is at risk at each start of a writing session.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "qapi/error.h"
#include "crypto/random.h"
#include "sqcow2-int.h"

static Qcow2UnknownHeaderExtension *find_extension(BDRVSqcow2State *s)
{
    Qcow2UnknownHeaderExtension *ext;

    QLIST_FOREACH(ext, &s->q.unknown_header_ext, next) {
        if (ext->magic == SQCOW2_EXT_MAGIC) {
            return ext;
        }
    }
    return NULL;
}

void sqcow2_record_load(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    Qcow2UnknownHeaderExtension *ext = find_extension(s);
    Error *local_err = NULL;

    s->has_record = false;
    if (!sqcow2_has_index_bit(s) || !ext) {
        return;
    }
    if (sqcow2_decode_record(ext->data, ext->len, s->q.cluster_bits,
                             &s->record, &local_err) < 0) {
        warn_report("%s: %s; the image is used without its index",
                    bs->filename, error_get_pretty(local_err));
        error_free(local_err);
        return;
    }
    s->has_record = true;
}

/* Put s->record into the extensions in memory, adding ours if needed. */
static void record_store(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    Qcow2UnknownHeaderExtension *ext = find_extension(s);

    if (ext && ext->len < SQCOW2_RECORD_SIZE) {
        QLIST_REMOVE(ext, next);
        g_free(ext);
        ext = NULL;
    }
    if (!ext) {
        ext = g_malloc0(sizeof(*ext) + SQCOW2_RECORD_SIZE);
        ext->magic = SQCOW2_EXT_MAGIC;
        ext->len = SQCOW2_RECORD_SIZE;
        QLIST_INSERT_HEAD(&s->q.unknown_header_ext, ext, next);
    }
    sqcow2_encode_record(&s->record, ext->data);
}

/* Returns the record's offset in the file, or a negative errno. */
static int64_t GRAPH_RDLOCK find_record(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree uint8_t *buf = g_malloc(s->q.cluster_size);
    uint64_t pos;
    int ret;

    ret = bdrv_pread(bs->file, 0, s->q.cluster_size, buf, 0);
    if (ret < 0) {
        return ret;
    }
    pos = ldl_be_p(buf + offsetof(QCowHeader, header_length));
    while (pos + 8 <= s->q.cluster_size) {
        uint32_t magic = ldl_be_p(buf + pos);
        uint64_t len = ldl_be_p(buf + pos + 4);

        if (magic == SQCOW2_EXT_MAGIC && len >= SQCOW2_RECORD_SIZE &&
            pos + 8 + SQCOW2_RECORD_SIZE <= s->q.cluster_size) {
            return pos + 8;
        }
        if (magic == 0) {
            break;
        }
        pos += 8 + ROUND_UP(len, 8);
    }
    return -ENOENT;
}

int sqcow2_record_write(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    uint8_t buf[SQCOW2_RECORD_SIZE];
    int64_t host_offset;
    int ret;

    host_offset = find_record(bs);
    if (host_offset < 0) {
        return host_offset;
    }
    sqcow2_encode_record(&s->record, buf);
    ret = bdrv_pwrite_sync(bs->file, host_offset, sizeof(buf), buf, 0);
    /* What failed may have been the flush alone */
    s->record_unsure = ret < 0;
    if (ret == 0) {
        record_store(bs);
    }
    return ret;
}

int sqcow2_record_new_stamp(BDRVSqcow2State *s, Error **errp)
{
    return qcrypto_random_bytes(s->record.stamp, SQCOW2_STAMP_SIZE, errp) < 0 ?
           -EIO : 0;
}

int sqcow2_record_create(BlockDriverState *bs, const Sqcow2Record *rec,
                         Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    uint64_t old_features = s->q.incompatible_features;
    int ret;

    s->record = *rec;
    ret = sqcow2_record_new_stamp(s, errp);
    if (ret < 0) {
        return ret;
    }
    s->q.incompatible_features |= SQCOW2_INCOMPAT_INDEX;
    record_store(bs);
    ret = qcow2_update_header(bs);
    if (ret < 0 && !(old_features & SQCOW2_INCOMPAT_INDEX)) {
        Qcow2UnknownHeaderExtension *ext = find_extension(s);

        s->q.incompatible_features = old_features;
        QLIST_REMOVE(ext, next);
        g_free(ext);
    }
    if (ret == 0) {
        ret = bdrv_flush(bs->file->bs);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write the sQcow2 header%s",
                         ret == -ENOSPC ? " (does the backing file name fit "
                         "into the first cluster?)" : "");
        return ret;
    }
    s->has_record = true;
    return 0;
}

int sqcow2_record_remove(BlockDriverState *bs, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    Qcow2UnknownHeaderExtension *ext = find_extension(s);
    int ret;

    if (ext) {
        QLIST_REMOVE(ext, next);
    }
    s->q.incompatible_features &= ~SQCOW2_INCOMPAT_INDEX;
    ret = qcow2_update_header(bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not write the header");
        s->q.incompatible_features |= SQCOW2_INCOMPAT_INDEX;
        if (ext) {
            QLIST_INSERT_HEAD(&s->q.unknown_header_ext, ext, next);
        }
        return ret;
    }
    g_free(ext);
    s->has_record = false;
    s->changed = false;
    ret = bdrv_flush(bs->file->bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not flush the header");
    }
    return ret;
}

int sqcow2_begin_change_locked(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record old = s->record;
    int ret;

    /* A file without a record has no stamp that somebody could rely on (S2) */
    if (s->changed || !s->has_record) {
        return 0;
    }
    ret = sqcow2_record_new_stamp(s, NULL);
    if (ret == 0) {
        s->record.flags |= SQCOW2_FLAG_WRITING;
        ret = sqcow2_record_write(bs);
    }
    if (ret < 0) {
        s->record = old;
        return ret;
    }
    qatomic_set(&s->changed, true);
    return 0;
}

int coroutine_fn sqcow2_begin_change(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    int ret;

    if (likely(qatomic_read(&s->changed)) || !s->has_record) {
        return 0;
    }
    qemu_co_mutex_lock(&s->q.lock);
    ret = sqcow2_begin_change_locked(bs);
    qemu_co_mutex_unlock(&s->q.lock);
    return ret;
}

int sqcow2_invalidate_index(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    uint32_t old_flags = s->record.flags;
    int ret;

    s->revalidate = false;
    if (!s->has_record || (!(old_flags & SQCOW2_FLAG_INDEX_VALID) &&
                           !s->record_unsure)) {
        return 0;
    }
    s->record.flags &= ~SQCOW2_FLAG_INDEX_VALID;
    /* At the start of a session one write does both */
    ret = s->changed ? sqcow2_record_write(bs)
                     : sqcow2_begin_change_locked(bs);
    if (ret < 0) {
        s->record.flags = old_flags;
    }
    return ret;
}

int sqcow2_record_drop_tables(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    Sqcow2Record old = s->record;
    int ret;

    if (!s->has_record) {
        return 0;
    }
    s->revalidate = false;
    s->record.flags &= ~SQCOW2_FLAG_INDEX_VALID;
    s->record.root = s->record.layer_table = (Sqcow2TableRef) {};
    /* At the start of a session one write does both */
    ret = s->changed ? sqcow2_record_write(bs)
                     : sqcow2_begin_change_locked(bs);
    if (ret < 0) {
        s->record = old;
    }
    return ret;
}
