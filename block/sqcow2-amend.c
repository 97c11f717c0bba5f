/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: turn an image into sqcow2 in place, and back; amend options
 *
 * Only metadata of this one file changes, and what a guest sees does not: the
 * index is a memo of what the chain says (S1).
 *
 * index=off, order on disk:
 *   1. a new stamp and "index valid" cleared, flushed: foreign entries mean
 *      "ask the layer below" now, as 0 does in every qcow2 image
 *   2. all foreign entries become 0; flushed.  So at each moment in between
 *      every table is right
 *   3. one header write takes feature bit and record away; flushed
 *   4. the tables that the record named are freed: a cut before leaks them
 *
 * index=on:
 *   1. the chain is walked and its view built in memory; what cannot be
 *      indexed is refused before anything is written
 *   2. one header write sets the feature bit and adds a record that says "no
 *      index"; flushed.  The image is an sqcow2 image without an index
 *   3. the index is stored; sqcow2-store.c has the order
 *
 * index=rebuild is its third step.
 *
 * The image is opened without its backing chain (sqcow2_amend_flags()), as
 * off must not need it, and on follows the links itself: they may give a
 * layer the format that it had before it was amended.  That format is
 * corrected in the header of the image that is amended.  So whole chains are
 * turned from the base upwards.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/option.h"
#include "qemu/option_int.h"
#include "qobject/qdict.h"
#include "sqcow2-int.h"

#define OPT_INDEX "index"

static QemuOptsList index_opts = {
    .name = "sqcow2-index-opts",
    .head = QTAILQ_HEAD_INITIALIZER(index_opts.head),
    .desc = {
        {
            .name = OPT_INDEX,
            .type = QEMU_OPT_STRING,
            .help = "Ownership index: off (makes a plain qcow2 image), on, or "
                    "rebuild",
        },
        { /* end of list */ }
    }
};

QemuOptsList *sqcow2_amend_opts(void)
{
    return qemu_opts_append(qemu_opts_append(NULL, bdrv_qcow2.amend_opts),
                            &index_opts);
}

int sqcow2_amend_flags(const char *options)
{
    g_auto(GStrv) words = g_strsplit(options, ",", -1);

    for (int i = 0; words[i]; i++) {
        if (!g_str_has_prefix(words[i], OPT_INDEX "=")) {
            return 0;
        }
    }
    return BDRV_O_NO_BACKING;
}

/*
 * Give the layer below the format that it has now.  In memory: the next
 * header update writes it.  Returns whether that is a change.
 */
static bool GRAPH_RDLOCK correct_backing_format(BlockDriverState *bs)
{
    BDRVSqcow2State *s = bs->opaque;
    g_autofree char *backing = bdrv_get_full_backing_filename(bs, NULL);
    const char *format;

    if (!backing || (strcmp(bs->backing_format, "qcow2") &&
                     strcmp(bs->backing_format, "sqcow2"))) {
        return false;
    }
    switch (sqcow2_peek_kind(backing)) {
    case SQCOW2_LAYER_QCOW2:
        format = "qcow2";
        break;
    case SQCOW2_LAYER_SQCOW2:
        format = bdrv_sqcow2.format_name;
        break;
    default:
        return false;
    }
    if (!strcmp(bs->backing_format, format)) {
        return false;
    }
    pstrcpy(bs->backing_format, sizeof(bs->backing_format), format);
    g_free(s->q.image_backing_format);
    s->q.image_backing_format = g_strdup(format);
    return true;
}

static int GRAPH_RDLOCK index_off(BlockDriverState *bs,
                                  Sqcow2Progress *progress, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    bool had_record = s->has_record;
    Sqcow2Record old;
    int ret;

    if (!sqcow2_has_index_bit(s)) {
        return 0;
    }
    if (sqcow2_is_flat(bs)) {
        error_setg(errp, "The index is in use");
        return -EBUSY;
    }
    ret = sqcow2_invalidate_index(bs);
    if (ret == 0) {
        ret = sqcow2_begin_change_locked(bs);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not update the sQcow2 header");
        return ret;
    }
    old = s->record;
    ret = sqcow2_forget_foreign(bs, progress, errp);
    if (ret < 0) {
        return ret;
    }
    ret = qcow2_flush_caches(bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not flush L2 tables");
        return ret;
    }
    correct_backing_format(bs);
    ret = sqcow2_record_remove(bs, errp);
    if (ret == 0 && had_record) {
        sqcow2_free_tables(bs, &old, NULL);
    }
    return ret;
}

/* Can this image, regarded alone, have an index? */
static int check_indexable(BlockDriverState *bs, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;

    if (s->q.qcow_version < 3) {
        error_setg(errp, "'%s' has compat=0.10, which has no index; upgrade "
                   "it first with 'qemu-img amend -o compat=1.1'",
                   bs->filename);
    } else if (has_subclusters(&s->q)) {
        error_setg(errp, "'%s' has extended L2 entries, which cannot be "
                   "indexed; copy it with 'qemu-img convert -O sqcow2'",
                   bs->filename);
    } else if (has_data_file(bs)) {
        error_setg(errp, "'%s' has an external data file, which cannot be "
                   "indexed; copy it with 'qemu-img convert -O sqcow2'",
                   bs->filename);
    } else if (bs->encrypted) {
        error_setg(errp, "'%s' is encrypted and cannot be indexed; copy it "
                   "with 'qemu-img convert -O sqcow2'", bs->filename);
    } else {
        return 0;
    }
    return -ENOTSUP;
}

/*
 * Follow the links and make a view of the layers below; nothing is written
 * to an image that has no record.
 */
static int GRAPH_RDLOCK attach_layers(BlockDriverState *bs, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    uint64_t features = s->q.incompatible_features;
    QDict *options = qdict_new();
    int ret;

    s->q.incompatible_features |= SQCOW2_INCOMPAT_INDEX;
    bdrv_graph_rdunlock_main_loop();
    ret = sqcow2_open_flat(bs, options, errp);
    bdrv_graph_rdlock_main_loop();
    qobject_unref(options);
    s->q.incompatible_features = features;
    if (ret == 0) {
        error_setg(errp, "The backing chain of '%s' cannot be indexed%s%s",
                   bs->filename, s->distrust ? ": " : "", s->distrust ?: "");
        return -ENOTSUP;
    }
    return MIN(ret, 0);
}

/* On @rebuild a new index is made even if the old one is trusted. */
static int GRAPH_RDLOCK index_on(BlockDriverState *bs, bool rebuild,
                                 Sqcow2Progress *progress, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    bool corrected;
    int ret;

    ret = check_indexable(bs, errp);
    if (ret == 0) {
        ret = sqcow2_snapshots_fit(s, errp);
    }
    if (ret < 0) {
        return ret;
    }
    if (rebuild && !sqcow2_has_index_bit(s)) {
        error_setg(errp, "'%s' has no index; make one with index=on",
                   bs->filename);
        return -EINVAL;
    }
    if (bs->backing) {
        error_setg(errp, "'%s' is in use with its backing node", bs->filename);
        return -EBUSY;
    }
    corrected = correct_backing_format(bs);
    if (bs->auto_backing_file[0] && !sqcow2_is_flat(bs)) {
        ret = attach_layers(bs, errp);
        if (ret < 0) {
            return ret;
        }
    }
    if (!s->has_record) {
        ret = sqcow2_record_create(bs, &(Sqcow2Record) {}, errp);
    } else if (corrected) {
        ret = sqcow2_begin_change_locked(bs);
        if (ret == 0) {
            ret = qcow2_update_header(bs);
        }
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Could not write the header");
        }
    }
    if (ret < 0) {
        return ret;
    }
    if (!rebuild && s->record.flags & SQCOW2_FLAG_INDEX_VALID &&
        s->mode != SQCOW2_MODE_REBUILT) {
        return 0;
    }
    progress->func(bs, 1, 2, progress->opaque);
    return sqcow2_index_rebuild(bs, false, NULL, errp);
}

static int GRAPH_RDLOCK
amend_index(BlockDriverState *bs, QemuOpts *opts, const char *index,
            BlockDriverAmendStatusCB *status_cb, void *cb_opaque, Error **errp)
{
    Sqcow2Progress progress = { .func = status_cb, .opaque = cb_opaque };

    for (const QemuOptDesc *desc = opts->list->desc; desc->name; desc++) {
        if (strcmp(desc->name, OPT_INDEX) && qemu_opt_find(opts, desc->name)) {
            error_setg(errp, "'index' cannot be amended together with '%s'",
                       desc->name);
            return -EINVAL;
        }
    }
    if (!strcmp(index, "off")) {
        return index_off(bs, &progress, errp);
    } else if (!strcmp(index, "on")) {
        return index_on(bs, false, &progress, errp);
    } else if (!strcmp(index, "rebuild")) {
        return index_on(bs, true, &progress, errp);
    }
    error_setg(errp, "Invalid value '%s' for 'index': not off, on or rebuild",
               index);
    return -EINVAL;
}

int sqcow2_amend_options(BlockDriverState *bs, QemuOpts *opts,
                         BlockDriverAmendStatusCB *status_cb, void *cb_opaque,
                         bool force, Error **errp)
{
    BDRVSqcow2State *s = bs->opaque;
    const char *compat = qemu_opt_get(opts, BLOCK_OPT_COMPAT_LEVEL);
    const char *index = qemu_opt_get(opts, OPT_INDEX);
    int ret;

    if (index) {
        return amend_index(bs, opts, index, status_cb, cb_opaque, errp);
    }
    if (sqcow2_has_index_bit(s) && compat && strcmp(compat, "1.1") &&
        strcmp(compat, "v3")) {
        if (SQCOW2_IS_QCOW2) {
            ret = index_off(bs, NULL, errp);
            return ret < 0 ? ret :
                bdrv_qcow2.bdrv_amend_options(bs, opts, status_cb, cb_opaque,
                                              force, errp);
        }
        error_setg(errp, "An sqcow2 image needs compat=1.1; 'qemu-img amend "
                   "-o index=off' makes it a qcow2 image");
        return -ENOTSUP;
    }
    ret = sqcow2_begin_change_locked(bs);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Could not update the sQcow2 header");
        return ret;
    }
    return bdrv_qcow2.bdrv_amend_options(bs, opts, status_cb, cb_opaque,
                                         force, errp);
}
