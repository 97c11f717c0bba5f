/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Requests to files that fail: EIO, and nothing was done.  One alone, for after
 * two in a row qcow2 may not know what is on disk.
 *
 * Those of "file" nodes, by functions in place of the driver's, and those by
 * which layers' headers and tables are read.
 */
#include "qemu/osdep.h"
#include "qapi/error.h"
#include "block/block_int.h"
#include "hostile_fuzzer.h"

struct Fault fault;

static BlockDriver real_file;

static bool is_to_fail(void)
{
    if (!fault.armed) {
        return false;
    }
    if (fault.after) {
        fault.after--;
        return false;
    }
    fault.armed = false;
    fault.fired = true;
    return true;
}

static int coroutine_fn GRAPH_RDLOCK
faulty_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
              QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    return is_to_fail() ? -EIO :
        real_file.bdrv_co_preadv(bs, offset, bytes, qiov, flags);
}

static int coroutine_fn GRAPH_RDLOCK
faulty_pwritev(BlockDriverState *bs, int64_t offset, int64_t bytes,
               QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    return is_to_fail() ? -EIO :
        real_file.bdrv_co_pwritev(bs, offset, bytes, qiov, flags);
}

static int coroutine_fn GRAPH_RDLOCK
faulty_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                     BdrvRequestFlags flags)
{
    return is_to_fail() ? -EIO :
        real_file.bdrv_co_pwrite_zeroes(bs, offset, bytes, flags);
}

static int coroutine_fn GRAPH_RDLOCK
faulty_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    return is_to_fail() ? -EIO :
        real_file.bdrv_co_pdiscard(bs, offset, bytes);
}

static int coroutine_fn GRAPH_RDLOCK faulty_flush(BlockDriverState *bs)
{
    return is_to_fail() ? -EIO : real_file.bdrv_co_flush_to_disk(bs);
}

static int coroutine_fn GRAPH_RDLOCK
faulty_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                PreallocMode prealloc, BdrvRequestFlags flags, Error **errp)
{
    if (is_to_fail()) {
        error_setg_errno(errp, EIO, "Told to fail");
        return -EIO;
    }
    return real_file.bdrv_co_truncate(bs, offset, exact, prealloc, flags,
                                      errp);
}

void fault_install(void)
{
    real_file = bdrv_file;
    bdrv_file.bdrv_co_preadv = faulty_preadv;
    bdrv_file.bdrv_co_pwritev = faulty_pwritev;
    bdrv_file.bdrv_co_pwrite_zeroes = faulty_pwrite_zeroes;
    bdrv_file.bdrv_co_pdiscard = faulty_pdiscard;
    bdrv_file.bdrv_co_flush_to_disk = faulty_flush;
    bdrv_file.bdrv_co_truncate = faulty_truncate;
}

int __wrap_sqcow2_layer_pread(const Sqcow2Layer *layer, uint64_t host_offset,
                              uint64_t bytes, void *buf)
{
    return is_to_fail() ? -EIO :
        __real_sqcow2_layer_pread(layer, host_offset, bytes, buf);
}
