/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A build without the sQcow2 driver (-Dsqcow2=disabled)
 *
 * What the hooks call does what it does for nodes of other drivers: nothing.
 * Included by sqcow2.h alone, which says what the functions are for.
 */
#ifndef BLOCK_SQCOW2_DISABLED_H
#define BLOCK_SQCOW2_DISABLED_H

static inline uint64_t sqcow2_incompat_mask(BlockDriverState *bs)
{
    return 0;
}

static inline bool sqcow2_is_driver(BlockdevDriver driver)
{
    return false;
}

static inline int sqcow2_open_flat(BlockDriverState *bs, QDict *options,
                                   Error **errp)
{
    return 0;
}

static inline bool sqcow2_is_flat(BlockDriverState *bs)
{
    return false;
}

static inline bool sqcow2_takes_no_backing(BlockDriverState *bs)
{
    return false;
}

static inline void sqcow2_disable_flat(bool all)
{
}

static inline bool sqcow2_show_progress(void)
{
    return false;
}

static inline void sqcow2_refresh_later(BlockDriverState *bs)
{
}

static inline void sqcow2_refresh(bool succeeded)
{
}

static inline int sqcow2_amend_flags(const char *options)
{
    return 0;
}

static inline int sqcow2_open_graph(BlockDriverState *bs, bool all,
                                    Error **errp)
{
    return 0;
}

static inline int sqcow2_open_graph_to(BlockDriverState *bs, const char *file,
                                       Error **errp)
{
    return 0;
}

static inline int sqcow2_open_graph_to_bitmap(BlockDriverState *bs,
                                              const char *name, Error **errp)
{
    return 0;
}

static inline int sqcow2_keep_graph(BlockDriverState *bs, Error **errp)
{
    return 0;
}

static inline void sqcow2_fold_later(void)
{
}

static inline int coroutine_fn GRAPH_UNLOCKED
sqcow2_index_new_image(BlockDriverState *bs, Error **errp)
{
    return 0;
}

static inline int GRAPH_RDLOCK
sqcow2_init_l2_slice(BlockDriverState *bs, int l1_index, unsigned slice,
                     uint64_t *l2_slice)
{
    return 0;
}

static inline int coroutine_fn GRAPH_RDLOCK
sqcow2_count_refcounts(BlockDriverState *bs, BdrvCheckResult *res,
                       void **refcount_table, int64_t *nb_clusters)
{
    return 0;
}

static inline void sqcow2_before_unusable(BlockDriverState *bs)
{
}

#endif /* BLOCK_SQCOW2_DISABLED_H */
