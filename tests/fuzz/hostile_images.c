/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer of hostile images: damaged chains, opened and worked on as by
 * qemu-img, qemu-io and a guest
 *
 * Input: which chain, flags, up to seven times damage (hostile_damage.c), up
 * to four operations.  Whatever the damage, nothing may crash, hang or grow,
 * which sanitizers and libFuzzer watch over.  Beyond that, here:
 *
 *   - where a checksum can tell of all damage, what is read is the true
 *     content, or there is an error; so also after writes, repairs, amends
 *   - where the index alone is damaged (S1), a check that finds nothing means
 *     that the content is true, and a repair brings it back
 *   - a check that follows a repair finds nothing
 *
 * Runs in the folder that SQCOW2_FUZZ_DIR names; it is best in memory.
 */
#include "qemu/osdep.h"
#include <sys/resource.h>
#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-block-core.h"
#include "qobject/qdict.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "block/qapi.h"
#include "block/snapshot.h"
#include "crypto/init.h"
#include "system/block-backend.h"
#include "../../block/sqcow2-int.h"
#include "hostile_chain.h"
#include "hostile_fuzzer.h"

/* Of what may be a disk of many TiB this much is read. */
#define READ_BYTES (3 * DISK)
#define STEP 4096

typedef struct Run {
    unsigned top;               /* number of the active layer's file */
    bool made;                  /* by us: the file of an overlay */
    Damage damage;
    bool repaired;              /* of damage to the index */
    bool unknown;               /* what the disk should hold */
    uint64_t disk_size;
    uint8_t truth[READ_BYTES];  /* zeros behind the disk's end */
} Run;

static Chain *chains[NB_CHAINS];
static FILE *real_stderr;

static void G_GNUC_PRINTF(1, 2) G_NORETURN failed(const char *fmt, ...)
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

static bool content_is_known(const Run *run)
{
    return !run->unknown && (run->damage <= DAMAGE_DETECTABLE ||
                             (run->damage == DAMAGE_INDEX && run->repaired));
}

static BlockBackend *open_top(const Run *run, int flags)
{
    QDict *options = qdict_new();
    BlockBackend *blk;

    qdict_put_str(options, "driver", "sqcow2");
    blk = blk_new_open(file_name(run->top), NULL, options,
                       flags | BDRV_O_NO_FLUSH, NULL);
    if (!blk && run->damage == DAMAGE_NONE) {
        failed("an intact image does not open");
    }
    return blk;
}

static void compare(const Run *run, uint64_t offset, const uint8_t *buf,
                    uint64_t bytes, const char *when)
{
    for (uint64_t i = 0; i < bytes; i++) {
        if (buf[i] != run->truth[offset + i]) {
            failed("%s: wrong byte 0x%02x instead of 0x%02x at 0x%" PRIx64,
                   when, buf[i], run->truth[offset + i], offset + i);
        }
    }
}

/* Read all that there is, and ask for its status.  @blk: may be NULL */
static void read_all(const Run *run, BlockBackend *blk, bool must_be_true,
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

        if (ret < 0 && run->damage == DAMAGE_NONE) {
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

static bool is_trusted(BlockBackend *blk)
{
    BDRVSqcow2State *s = blk_bs(blk)->opaque;

    return blk_bs(blk)->drv == &bdrv_sqcow2 && s->mode == SQCOW2_MODE_INDEXED;
}

/*
 * When qcow2 does not open an image, or later gives it up, parts of the node's
 * state leak.  The stack has to be unwound through glib to see that.
 */
const char *__lsan_default_suppressions(void)
{
    return "leak:qcow2_do_open\n";
}

const char *__asan_default_options(void)
{
    return "allocator_may_return_null=1:fast_unwind_on_malloc=0";
}

/*
 * Upstream makes a node unusable when its image is too corrupt, and lets what
 * it has leak.  Linked in place of its function; what the node has is kept,
 * so that these leaks are no findings.
 */
void __wrap_qcow2_signal_corruption(BlockDriverState *bs, bool fatal,
                                    int64_t offset, int64_t size,
                                    const char *message_format, ...)
{
    static GPtrArray *kept;

    if (fatal && bs->drv) {
        kept = kept ?: g_ptr_array_new();
        g_ptr_array_add(kept, g_memdup2(bs->opaque, bs->drv->instance_size));
    }
    __real_qcow2_signal_corruption(bs, fatal, offset, size, "%s",
                                   message_format);
}

/*
 * Upstream's cache aborts when it is asked for a table at offset 0, as it is
 * for an L1 entry that has nothing but its flag.  Say that it cannot be read.
 */
int __wrap_qcow2_cache_get(BlockDriverState *bs, Qcow2Cache *c,
                           uint64_t offset, void **table)
{
    return offset ? __real_qcow2_cache_get(bs, c, offset, table) : -EIO;
}

/* In place of worker threads: faster, and the same each time */
int coroutine_fn __wrap_thread_pool_submit_co(ThreadPoolFunc *func, void *arg)
{
    return func(arg);
}

/*
 * The operations
 */

static void do_read(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, 0);

    read_all(run, blk, content_is_known(run), "read");
    blk_unref(blk);
}

static void do_info(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, 0);
    BlockGraphInfo *info = NULL;

    if (blk) {
        bdrv_graph_rdlock_main_loop();
        bdrv_query_block_graph_info(blk_bs(blk), &info, NULL);
        bdrv_graph_rdunlock_main_loop();
        qapi_free_BlockGraphInfo(info);
    }
    blk_unref(blk);
}

static bool check(BlockBackend *blk, BdrvCheckMode fix, BdrvCheckResult *res)
{
    int ret;

    bdrv_graph_rdlock_main_loop();
    ret = bdrv_check(blk_bs(blk), res, fix);
    bdrv_graph_rdunlock_main_loop();
    return ret >= 0 && !res->corruptions && !res->check_errors;
}

static void do_check(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_CHECK);
    BdrvCheckResult res;
    bool clean;

    if (!blk) {
        return;
    }
    clean = check(blk, 0, &res);
    if (!clean && run->damage == DAMAGE_NONE) {
        failed("check finds something in an intact image");
    }
    read_all(run, blk, content_is_known(run) ||
             (run->damage == DAMAGE_INDEX && !run->unknown && clean &&
              is_trusted(blk)), "read after check");
    blk_unref(blk);
}

static void do_repair(Run *run, Input *in)
{
    BdrvCheckMode fix = input_u8(in) % 4 ? BDRV_FIX_ERRORS | BDRV_FIX_LEAKS
                                         : BDRV_FIX_LEAKS;
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_CHECK);
    BdrvCheckResult res;
    bool clean;

    if (!blk) {
        return;
    }
    clean = check(blk, fix, &res);
    blk_unref(blk);
    if (!clean || !(fix & BDRV_FIX_ERRORS)) {
        return;
    }
    if (run->damage == DAMAGE_INDEX) {
        run->repaired = true;
    }
    blk = open_top(run, BDRV_O_CHECK);
    if (!blk) {
        if (content_is_known(run)) {
            failed("a repaired image does not open");
        }
        return;
    }
    if (!check(blk, 0, &res) && content_is_known(run)) {
        failed("check finds something after a repair: %d corruptions, %d "
               "errors", res.corruptions, res.check_errors);
    }
    read_all(run, blk, content_is_known(run), "read after repair");
    blk_unref(blk);
}

static void amend_progress(BlockDriverState *bs, int64_t offset,
                           int64_t total_work_size, void *opaque)
{
}

static void amend(Run *run, const char *options)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_NO_BACKING);
    QemuOptsList *list;
    QemuOpts *opts;
    int ret;

    if (!blk) {
        return;
    }
    list = qemu_opts_append(NULL, blk_bs(blk)->drv->amend_opts);
    opts = qemu_opts_create(list, NULL, 0, &error_abort);
    qemu_opts_do_parse(opts, options, NULL, &error_abort);
    bdrv_graph_rdlock_main_loop();
    ret = bdrv_amend_options(blk_bs(blk), opts, amend_progress, NULL, false,
                             NULL);
    bdrv_graph_rdunlock_main_loop();
    /* ENOTSUP: an internal snapshot is larger than the disk now */
    if (ret < 0 && ret != -ENOTSUP && run->damage == DAMAGE_NONE) {
        failed("'%s' fails with an intact image: %d", options, ret);
    }
    qemu_opts_del(opts);
    qemu_opts_free(list);
    blk_unref(blk);
}

static void do_rebuild(Run *run, Input *in)
{
    amend(run, "index=rebuild");
    do_read(run, in);
}

/* Off, and on again.  What is read in between goes through real nodes. */
static void do_amend(Run *run, Input *in)
{
    amend(run, "index=off");
    do_read(run, in);
    amend(run, "index=on");
    do_read(run, in);
}

/* What a guest does: write, zeroes, discard, flush */
static void do_write(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_UNMAP);
    uint8_t buf[3 * CLUSTER];

    if (!blk) {
        return;
    }
    for (int i = 0; i < 4; i++) {
        unsigned how = input_u8(in) % 4;
        uint32_t offset = (uint32_t)input_u8(in) * CLUSTER +
                          (how ? 0 : input_u8(in));
        uint32_t bytes = how ? (1 + input_u8(in) % 3) * CLUSTER
                             : 1 + input_u8(in);
        int ret;

        memset(buf, how < 2 ? 0xd0 + i : 0, sizeof(buf));
        if (offset + bytes > run->disk_size) {
            continue;
        }
        if (how == 3) {
            ret = blk_pdiscard(blk, offset, bytes, 0);
        } else if (how == 2) {
            ret = blk_pwrite_zeroes(blk, offset, bytes, BDRV_REQ_MAY_UNMAP);
        } else {
            ret = blk_pwrite(blk, offset, bytes, buf, 0);
        }
        if (ret < 0 && run->damage == DAMAGE_NONE) {
            failed("write to an intact image: %d", ret);
        }
        if (ret < 0) {
            run->unknown = true;
        }
        memcpy(run->truth + offset, buf, bytes);
    }
    if (blk_flush(blk) < 0) {
        run->unknown = true;
    }
    read_all(run, blk, content_is_known(run), "read after write");
    blk_unref(blk);
    do_read(run, in);
}

static void do_resize(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR | BDRV_O_RESIZE);
    uint64_t size = input_u8(in) * 2 * CLUSTER;
    int ret;

    if (!blk) {
        return;
    }
    ret = blk_truncate(blk, size, false, PREALLOC_MODE_OFF, 0, NULL);
    if (ret == 0) {
        if (size < run->disk_size) {
            memset(run->truth + size, 0, READ_BYTES - size);
        }
        run->disk_size = size;
    } else {
        /* Cut off in part; or there are internal snapshots */
        run->unknown = run->damage != DAMAGE_NONE;
    }
    blk_unref(blk);
    do_read(run, in);
}

/* Internal snapshots: go back, and delete; make a new one */
static void do_snapshots(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR);
    QEMUSnapshotInfo sn = { .name = "new" };
    QEMUSnapshotInfo *list = NULL;
    int nb;

    if (!blk) {
        return;
    }
    bdrv_graph_rdlock_main_loop();
    bdrv_snapshot_create(blk_bs(blk), &sn);
    nb = bdrv_snapshot_list(blk_bs(blk), &list);
    bdrv_graph_rdunlock_main_loop();
    if (nb > 0 && list) {
        unsigned i = input_u8(in) % nb;

        if (bdrv_snapshot_goto(blk_bs(blk), list[i].id_str, NULL) < 0 ||
            strcmp(list[i].name, "new")) {
            run->unknown = true;
        }
        read_all(run, blk, content_is_known(run), "read after revert");
        bdrv_graph_rdlock_main_loop();
        bdrv_snapshot_delete(blk_bs(blk), list[i].id_str, list[i].name, NULL);
        bdrv_graph_rdunlock_main_loop();
    }
    g_free(list);
    blk_unref(blk);
    do_read(run, in);
}

/* A snapshot: another image on top of it all */
static void do_overlay(Run *run, Input *in)
{
    g_autofree char *options = g_strdup_printf("cluster_size=%d", CLUSTER);
    Error *local_err = NULL;

    if (run->made) {
        return;
    }
    bdrv_img_create(file_name(run->top + 1), "sqcow2", file_name(run->top),
                    "sqcow2", options, run->disk_size, 0, true, &local_err);
    if (local_err) {
        if (run->damage == DAMAGE_NONE) {
            failed("%s", error_get_pretty(local_err));
        }
        error_free(local_err);
        return;
    }
    run->top++;
    run->made = true;
    do_read(run, in);
}

/* Into the layer below; needs the real graph */
static void do_commit(Run *run, Input *in)
{
    BlockBackend *blk = open_top(run, BDRV_O_RDWR);
    int ret;

    if (!blk) {
        return;
    }
    ret = sqcow2_open_graph(blk_bs(blk), false, NULL);
    if (ret == 0) {
        read_all(run, blk, content_is_known(run), "read through the graph");
        ret = bdrv_commit(blk_bs(blk));
    }
    if (ret < 0 && run->damage == DAMAGE_NONE) {
        failed("commit of an intact image: %d", ret);
    }
    run->unknown |= ret < 0;
    blk_unref(blk);
    do_read(run, in);
}

/*
 * Where upstream's code aborts on damage that is not of the index: shrinking
 * when a refcount block's own refcount is wrong; a commit when qcow2 finds
 * meanwhile that the image is too corrupt.
 */
static const struct {
    void (*run)(Run *, Input *);
    bool writes;
    bool upstream_aborts;
} operations[] = {
    { do_read }, { do_info }, { do_check }, { do_repair },
    { do_rebuild, true }, { do_amend, true }, { do_write, true },
    { do_resize, true, true }, { do_snapshots, true },
    { do_overlay, true }, { do_commit, true, true },
};

static void operate(Run *run, unsigned i, Input *in)
{
    /* An index that lies costs content if it is not repaired first. */
    if (operations[i].writes && run->damage == DAMAGE_INDEX &&
        !run->repaired) {
        run->unknown = true;
    }
    if (operations[i].upstream_aborts && run->damage == DAMAGE_ANY) {
        return;
    }
    operations[i].run(run, in);
}

/*
 * The fuzzer
 */

static Chain *copy_of(const Chain *whole)
{
    Chain *c = g_memdup2(whole, sizeof(*whole));

    for (unsigned i = 0; i < c->nb_files; i++) {
        c->files[i].bytes = g_memdup2(c->files[i].bytes, MAX_FILE);
    }
    return c;
}

static void free_copy(Chain *c)
{
    for (unsigned i = 0; i < c->nb_files; i++) {
        g_free(c->files[i].bytes);
    }
    g_free(c);
}

/* All operations on an intact chain; where it fits, its index is used. */
static void try_intact(const Chain *c)
{
    static Run run;

    for (int i = 0; i < ARRAY_SIZE(operations); i++) {
        Input in = {};
        BlockBackend *blk;

        run = (Run) {
            .top = c->nb_files - 1,
            .disk_size = DISK,
        };
        memcpy(run.truth, c->truth, DISK);
        chain_write(c);
        blk = open_top(&run, 0);
        if (is_trusted(blk) != c->fits) {
            failed("an intact chain is not as it should be");
        }
        blk_unref(blk);
        operate(&run, i, &in);
        do_check(&run, &in);
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    const char *dir = getenv("SQCOW2_FUZZ_DIR");
    /* A hostile offset is not to make a file of many TiB. */
    struct rlimit limit = { .rlim_cur = 4 * MiB, .rlim_max = RLIM_INFINITY };

    real_stderr = stderr;
    /* The driver has much to say of such images. */
    stderr = fopen("/dev/null", "w");
    if (!dir || chdir(dir) < 0) {
        failed("SQCOW2_FUZZ_DIR is not set, or is not a folder");
    }
    qcrypto_init(&error_abort);
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    for (unsigned i = 0; i < NB_CHAINS; i++) {
        chains[i] = chain_new(i);
        try_intact(chains[i]);
    }
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static Run run;
    Input in = { .data = data, .size = size };
    const Chain *whole = chains[input_u8(&in) % NB_CHAINS];
    unsigned flags = input_u8(&in);
    Chain *c = copy_of(whole);

    run = (Run) {
        .top = c->nb_files - 1,
        .disk_size = DISK,
        .damage = chain_damage(c, whole, &in, (flags >> 3) % 8, flags & 1),
    };
    memcpy(run.truth, whole->truth, DISK);
    chain_write(c);
    free_copy(c);
    for (int i = 0; i < 1 + (flags >> 1) % 4; i++) {
        operate(&run, input_u8(&in) % ARRAY_SIZE(operations), &in);
    }
    return 0;
}
