/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer of hostile images: open the active image, and read it
 */
#include "qemu/osdep.h"
#include "qobject/qdict.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "../../block/sqcow2-int.h"
#include "hostile_run.h"

#define STEP 4096

FILE *real_stderr;

void failed(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    fprintf(real_stderr, "hostile-images: ");
    vfprintf(real_stderr, fmt, ap);
    fprintf(real_stderr, "\n");
    va_end(ap);
    fflush(real_stderr);
    abort();
}

bool content_is_known(const Run *run)
{
    return !run->unknown && (run->damage <= DAMAGE_DETECTABLE ||
                             (run->damage == DAMAGE_INDEX && run->repaired));
}

bool must_work(const Run *run)
{
    return run->damage == DAMAGE_NONE && !fault.fired;
}

BlockBackend *open_top(const Run *run, int flags)
{
    QDict *options = qdict_new();
    BlockBackend *blk;

    qdict_put_str(options, "driver", "sqcow2");
    qdict_put_int(options, "l2-cache-entry-size", SLICE);
    blk = blk_new_open(file_name(run->top), NULL, options,
                       HOSTILE_FAULTS ? flags : flags | BDRV_O_NO_FLUSH, NULL);
    if (!blk && must_work(run)) {
        failed("an intact image does not open");
    }
    return blk;
}

static void compare(const Run *run, uint64_t offset, const uint8_t *buf,
                    uint64_t bytes, const char *when)
{
    for (uint64_t i = 0; i < bytes; i++) {
        if (buf[i] != run->truth[offset + i] && !run->unsure[offset + i]) {
            failed("%s: wrong byte 0x%02x instead of 0x%02x at 0x%" PRIx64,
                   when, buf[i], run->truth[offset + i], offset + i);
        }
    }
}

void read_all(const Run *run, BlockBackend *blk, bool must_be_true,
              const char *when)
{
    static uint8_t buf[STEP];
    int64_t size = blk ? blk_getlength(blk) : 0;

    if (blk && must_be_true && size >= 0 && size != run->disk_size) {
        failed("%s: the disk has the size %" PRId64, when, size);
    }
    size = MIN(size, READ_BYTES);
    for (int64_t pos = 0; pos < size; pos += STEP) {
        int64_t bytes = MIN(STEP, size - pos);
        int ret = blk_pread(blk, pos, bytes, buf, 0);

        if (ret < 0 && must_work(run)) {
            failed("%s: an intact image cannot be read: %d", when, ret);
        }
        if (ret >= 0 && must_be_true) {
            compare(run, pos, buf, bytes, when);
        }
    }
    bdrv_graph_rdlock_main_loop();
    for (int64_t pos = 0, n; pos < size; pos += n) {
        if (bdrv_block_status(blk_bs(blk), pos, size - pos, &n, NULL,
                              NULL) < 0 || !n) {
            break;
        }
    }
    bdrv_graph_rdunlock_main_loop();
}

bool is_trusted(BlockBackend *blk)
{
    BDRVSqcow2State *s = blk_bs(blk)->opaque;

    return blk_bs(blk)->drv == &bdrv_sqcow2 && s->mode == SQCOW2_MODE_INDEXED;
}
