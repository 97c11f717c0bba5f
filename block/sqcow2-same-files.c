/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: does a name still lead to the file that is in use?
 *
 * A layer is opened by its name when the real graph is opened or folded, while
 * another descriptor of it is in use already.  The guest must not see the
 * content of a file that has got the name since.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "block/raw-aio.h"
#include "sqcow2-int.h"

/* Of a node or layer on another protocol nobody can tell: it counts as same */
static bool same_file_id(int ret_a, const struct stat *a,
                         int ret_b, const struct stat *b)
{
    if (ret_a == -ENOTSUP || ret_b == -ENOTSUP) {
        return true;
    }
    return !ret_a && !ret_b && a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

static bool is_file_of(const Sqcow2Layer *layer, BlockDriverState *file)
{
    struct stat a, b;
    int ret_a = sqcow2_layer_file_id(layer, &a);
    int ret_b = raw_posix_fstat(file, &b);

    return same_file_id(ret_a, &a, ret_b, &b);
}

static bool is_same_layer(const Sqcow2Layer *layer, const Sqcow2Layer *other)
{
    struct stat a, b;
    int ret_a = sqcow2_layer_file_id(layer, &a);
    int ret_b = sqcow2_layer_file_id(other, &b);

    return same_file_id(ret_a, &a, ret_b, &b);
}

static int replaced(const Sqcow2Layer *layer, uint32_t index, Error **errp)
{
    error_setg(errp, "The name of layer %" PRIu32 ", '%s', leads to another "
               "file than the one that is in use; put that back, or use "
               "absolute names", index, layer->filename);
    return -EINVAL;
}

int sqcow2_check_is_file(const Sqcow2Layer *layer, uint32_t index,
                         BlockDriverState *bs, Error **errp)
{
    return bs->file && is_file_of(layer, bs->file->bs) ?
           0 : replaced(layer, index, errp);
}

int sqcow2_check_same_files(BlockDriverState *bs, const Sqcow2Layer *layers,
                            uint32_t nb_layers, Error **errp)
{
    for (uint32_t i = nb_layers; i-- > 0; bs = bdrv_cow_bs(bs)) {
        BDRVSqcow2State *s;
        int ret = bs ? sqcow2_check_is_file(&layers[i], i, bs, errp)
                     : replaced(&layers[i], i, errp);

        if (ret < 0) {
            return ret;
        }
        if (!sqcow2_is_flat(bs)) {
            continue;
        }
        s = bs->opaque;
        if (s->layers == layers) {
            return 0;           /* taken over as they are */
        }
        while (i-- > 0) {
            if (s->layer <= i || !is_same_layer(&layers[i], &s->layers[i])) {
                return replaced(&layers[i], i, errp);
            }
        }
        return 0;
    }
    return 0;
}
