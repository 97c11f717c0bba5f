/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Fuzzer of hostile images: damaged chains, opened and worked on as by
 * qemu-img, qemu-io and a guest
 *
 * Input: which chain, flags, records of damage (hostile_damage.c) and of
 * operations.  Whatever the damage, nothing may crash, hang or grow, which
 * sanitizers and libFuzzer watch over.  Beyond that, here:
 *
 *   - where a checksum can tell of all damage, what is read is the true
 *     content, or there is an error; so also after writes, repairs, amends
 *   - where the index alone is damaged (S1), a check that finds nothing means
 *     that the content is true, and a repair brings it back
 *   - the same through real backing nodes, which use no index, unrepaired
 *   - a check that follows a repair finds nothing
 *
 * With HOSTILE_FAULTS, a request fails in some operations.  Then these may
 * fail, but content and the operations that follow must be right.
 *
 * Runs in the folder that SQCOW2_FUZZ_DIR names; it is best in memory.
 */
#include "qemu/osdep.h"
#include <sys/resource.h>
#include "qemu/coroutine.h"
#include "qemu/main-loop.h"
#include "qapi/error.h"
#include "block/block_int.h"
#include "crypto/init.h"
#include "hostile_run.h"

static Chain *chains[NB_CHAINS];

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

/* In place of worker threads: faster, and the same each time */
int coroutine_fn __wrap_thread_pool_submit_co(ThreadPoolFunc *func, void *arg)
{
    return func(arg);
}

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

    for (int i = 0; i < nb_operations; i++) {
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
    struct rlimit limit = {
        .rlim_cur = 16 * MAX_FILE,
        .rlim_max = RLIM_INFINITY,
    };
    sigset_t on_hang;

    real_stderr = stderr;
    /* The driver has much to say of such images. */
    stderr = fopen("/dev/null", "w");
    if (!dir || chdir(dir) < 0) {
        failed("SQCOW2_FUZZ_DIR is not set, or is not a folder");
    }
    qcrypto_init(&error_abort);
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    if (HOSTILE_FAULTS) {
        fault_install();
    }
    for (unsigned i = 0; i < NB_CHAINS; i++) {
        chains[i] = chain_new(i);
        try_intact(chains[i]);
    }
    /* QEMU's main loop blocks the signal by which libFuzzer notices a hang. */
    sigemptyset(&on_hang);
    sigaddset(&on_hang, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &on_hang, NULL);
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &limit);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static Run run;
    Input in = { .data = data, .size = size };
    const Chain *whole = chains[input_u8(&in) % NB_CHAINS];
    Chain *c = copy_of(whole);
    Input record;

    run = (Run) {
        .top = c->nb_files - 1,
        .disk_size = DISK,
        .damage = chain_damage(c, whole, in),
    };
    memcpy(run.truth, whole->truth, DISK);
    chain_write(c);
    free_copy(c);
    input_u8(&in);              /* the flags */
    while (input_record(&in, &record)) {
        unsigned what = input_u8(&record);

        if (what & RECORD_IS_OPERATION) {
            if (HOSTILE_FAULTS && what & RECORD_HAS_FAULT) {
                fault.after = input_u8(&record);
                fault.armed = true;
            }
            operate(&run, what % RECORD_HAS_FAULT % nb_operations,
                    &record);
        }
    }
    return 0;
}
