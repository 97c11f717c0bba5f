/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What QEMU's block layer calls of the sQcow2 driver, and nothing else
 *
 * Each function does nothing, or says no, for nodes of other drivers.
 */
#ifndef BLOCK_SQCOW2_H
#define BLOCK_SQCOW2_H

#include "block/block-common.h"
#include "block/graph-lock.h"

#ifndef CONFIG_SQCOW2
#include "block/sqcow2-disabled.h"
#else

/* qcow2.c: incompatible features that the node's driver adds to qcow2's */
uint64_t sqcow2_incompat_mask(BlockDriverState *bs);

/* qcow2.c: may images of @driver, too, be created by qcow2's code? */
static inline bool sqcow2_is_driver(BlockdevDriver driver)
{
    return driver == BLOCKDEV_DRIVER_SQCOW2;
}

/*
 * block.c: open the layers below @bs without nodes for them.
 *
 * Called after the driver's bdrv_open, in the main thread, without graph
 * lock.  @options are what the user gave and nothing has consumed yet.
 *
 * Returns 1 when @bs needs no backing node; 0 when the backing file is to be
 * opened as ever; a negative errno with @errp set when the chain is broken
 * (a layer missing, locked, no image, in a loop).
 */
int sqcow2_open_flat(BlockDriverState *bs, QDict *options, Error **errp);

/* True when @bs reads its lower layers itself, without a backing node. */
bool sqcow2_is_flat(BlockDriverState *bs);

/* As sqcow2_is_flat(), but false while @bs changes from or to a real graph. */
bool sqcow2_takes_no_backing(BlockDriverState *bs);

/*
 * Open real backing nodes from now on, for tools whose subject is the node
 * graph: for all layers, or just one below each image that is opened.
 */
void sqcow2_disable_flat(bool all);

/*
 * Let qemu-img show the progress of a merge of tables; main thread.  False if
 * there is no such thing in this build.
 */
bool sqcow2_show_progress(void);

/*
 * For qemu-img: after the image that is now @bs has been closed, open it once
 * for writing, which stores an index that fits its chain.  Should that fail,
 * the next to open it will build one.
 */
void sqcow2_refresh_later(BlockDriverState *bs);
void sqcow2_refresh(bool succeeded);

/*
 * qemu-img amend: flags to add for opening an image whose @options, as the
 * user gave them, are for its index and for nothing else
 */
int sqcow2_amend_flags(const char *options);

/*
 * Give @bs a real backing node in place of its flat state, for jobs that
 * work on it; filters on top of it are passed.  @all: and so all nodes below.
 * If no job works on it when the command is over, all is folded again.
 * Main thread, no graph lock held.
 * Returns 0, or a negative errno with @errp set; then @bs is as before.
 */
int sqcow2_open_graph(BlockDriverState *bs, bool all, Error **errp);

/*
 * The same, down to the image @file, named as in block-commit's "base".  If
 * there is none, all nodes get opened, and the caller will not find it either.
 */
int sqcow2_open_graph_to(BlockDriverState *bs, const char *file, Error **errp);

/*
 * nbd/server.c: the same, down to the layer that has the dirty bitmap @name,
 * for as long as it has one.  It is not an error if there is none.
 */
int sqcow2_open_graph_to_bitmap(BlockDriverState *bs, const char *name,
                                Error **errp);

/* nbd/server.c: the same, of the whole chain and for good */
int sqcow2_keep_graph(BlockDriverState *bs, Error **errp);

/*
 * The reverse, from the main loop once the operation at hand is over: make
 * nodes flat again where nobody but they themselves uses their backing nodes.
 * What cannot be made flat stays as it is.  Main thread.
 */
void sqcow2_fold_later(void);

/*
 * qcow2.c: give a new image, which qcow2's code has just created, its index.
 * Returns 0, or a negative errno with @errp set; then the image is of no use.
 */
int coroutine_fn GRAPH_UNLOCKED
sqcow2_index_new_image(BlockDriverState *bs, Error **errp);

/*
 * qcow2-cluster.c: fill @l2_slice, all zeros, of the new L2 table for
 * @l1_index: slice number @slice of it.  qcow2's s->lock is held if called
 * in a coroutine.
 * Returns 0, or a negative errno when the table inherited from the layers
 * below cannot be read or is corrupt, or the header cannot be written.
 */
int GRAPH_RDLOCK sqcow2_init_l2_slice(BlockDriverState *bs, int l1_index,
                                      unsigned slice, uint64_t *l2_slice);

/*
 * qcow2-refcount.c: count the clusters of our tables in @refcount_table, as
 * qcow2_inc_refcounts_imrt() does, and check them.
 * Returns 0 (also for findings, which go to @res) or a negative errno.
 */
int coroutine_fn GRAPH_RDLOCK
sqcow2_count_refcounts(BlockDriverState *bs, BdrvCheckResult *res,
                       void **refcount_table, int64_t *nb_clusters);

/*
 * qcow2.c: @bs loses its driver next, and will not be closed.  Any thread,
 * with a request in flight or in open.
 */
void sqcow2_before_unusable(BlockDriverState *bs);

#endif /* CONFIG_SQCOW2 */

#endif /* BLOCK_SQCOW2_H */
