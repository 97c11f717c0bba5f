/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Requests of several threads at once on warm overlays, against a model
 *
 *   parallel-fuzz [--format sqcow2|qcow2] [--seed N] [--rounds N] [--dir DIR]
 *                 [--seconds N] [--layers N] [--without WHAT,...] [--keep]
 *
 * As a guest's queues do that are mapped to several iothreads: coroutines in
 * several threads read, write, zero, discard and flush one disk of several
 * GiB, the active layer of a chain.  Its L2 tables are there already, and the
 * caches have room for a few slices.  Meanwhile the main thread does what
 * management does: parallel_admin.c.  What is read is compared all the time;
 * at the end the image is closed, checked, opened, and read as a whole.
 *
 * Everything is drawn from the seed but the order of what threads do, so a
 * failure may need some rounds to come again.  --rounds N: with this and the
 * following seeds; --seconds N: of a round's work; --without: what the main
 * thread is not to do, see parallel_admin.c, and "compressed".
 */
#include "qemu/osdep.h"
#include <getopt.h>
#include <sys/statvfs.h>
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "block/aio.h"
#include "block/block.h"
#include "block/block_int.h"
#include "crypto/init.h"
#include "qom/object.h"
#include "system/iothread.h"
#include "parallel_admin.h"

#define MAX_BYTES_NEEDED (4ULL * GiB)

typedef struct Worker {
    Random random;
    BlockBackend *blk;
    const Plan *plan;
    uint8_t *buf;
    uint32_t *versions;
    char what[64];              /* that it is doing */
} Worker;

static const char *folder;
static bool keep_files;
static unsigned nb_running, nb_parked;
static bool stopping, parking;
static unsigned nb_unfiltered;
static bool filtered;
static uint64_t nb_done[16];

void failed(const char *fmt, ...)
{
    static QemuMutex once;      /* never unlocked */
    static bool initialized;
    va_list ap;

    if (!qatomic_xchg(&initialized, true)) {
        qemu_mutex_init(&once);
    }
    qemu_mutex_lock(&once);
    va_start(ap, fmt);
    fprintf(stderr, "parallel-fuzz: ");
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, "\nThe files are in %s.  So far the main thread did:\n",
            folder);
    admin_say(stderr);
    fflush(NULL);
    abort();
}

/*
 * What a coroutine does
 */

/* A range of the kind that @whole says: of clusters, or of sectors */
static Range draw_range(Worker *w, bool whole)
{
    const Plan *p = w->plan;
    uint32_t unit = whole ? (1U << p->cluster_bits) / SECTOR : 1;
    uint32_t nb_units = p->window_sectors / unit;
    /* Mostly within one cluster, or of few; sometimes of many */
    uint32_t most = draw_below(&w->random, 8) ? MIN(nb_units, whole ? 2 : 16)
                                              : nb_units;
    uint32_t nb = 1 + draw_below(&w->random, most);
    Range r = {
        /* A part of the disk is used more than the others */
        .window = draw_below(&w->random, draw_below(&w->random, 4) ?
                             p->nb_windows : MIN(p->nb_windows, 4)),
        .first = draw_below(&w->random, nb_units - nb + 1) * unit,
        .nb = nb * unit,
    };

    return r;
}

static void expect(Worker *w, const Range *r, int ret, const char *what)
{
    if (ret < 0) {
        failed("%s of window %u, %u + %u: %s", what, r->window, r->first,
               r->nb, strerror(-ret));
    }
}

static void coroutine_fn do_read(Worker *w, const Range *r)
{
    int ret = blk_co_pread(w->blk, model_offset(r), r->nb * SECTOR, w->buf, 0);

    expect(w, r, ret, "read");
    model_compare(r, w->buf, "read");
}

static void coroutine_fn do_read_beside(Worker *w, const Range *r)
{
    int ret;

    model_begin_race(r, w->versions);
    ret = blk_co_pread(w->blk, model_offset(r), r->nb * SECTOR, w->buf, 0);
    /* What was compressed may be overwritten while it is read */
    if (ret >= 0 || !w->plan->compressed) {
        expect(w, r, ret, "read beside writers");
        model_end_race(r, w->versions, w->buf);
    }
}

static void coroutine_fn do_write(Worker *w, const Range *r)
{
    model_write(r, w->buf);
    expect(w, r, blk_co_pwrite(w->blk, model_offset(r), r->nb * SECTOR, w->buf,
                               0), "write");
}

/* Through a vector whose parts end anywhere */
static void coroutine_fn do_write_vector(Worker *w, const Range *r)
{
    QEMUIOVector qiov;
    size_t bytes = r->nb * SECTOR;

    model_write(r, w->buf);
    qemu_iovec_init(&qiov, 8);
    for (size_t done = 0; done < bytes; ) {
        size_t part = MIN(bytes - done, 1 + draw_below(&w->random, bytes));

        qemu_iovec_add(&qiov, w->buf + done, part);
        done += part;
    }
    expect(w, r, blk_co_pwritev(w->blk, model_offset(r), bytes, &qiov, 0),
           "write of a vector");
    qemu_iovec_destroy(&qiov);
}

/*
 * The filters that jobs put on top neither discard nor compress.  So no such
 * request is on its way when a job begins, or comes while it works.
 */
static bool begin_unfiltered(void)
{
    qatomic_inc(&nb_unfiltered);
    if (!qatomic_read(&filtered)) {
        return true;
    }
    qatomic_dec(&nb_unfiltered);
    return false;
}

static void end_unfiltered(void)
{
    qatomic_dec(&nb_unfiltered);
}

void expect_filter(bool expected)
{
    qatomic_set(&filtered, expected);
    smp_mb();                   /* with qatomic_inc() of nb_unfiltered */
    while (expected && qatomic_read(&nb_unfiltered)) {
        run_main_loop();
    }
}

static void coroutine_fn do_compressed(Worker *w, const Range *r)
{
    int ret;

    if (!begin_unfiltered()) {
        do_write(w, r);
        return;
    }
    /* Nothing may be there that was written in the ordinary way. */
    model_zero(r);
    ret = blk_co_pdiscard(w->blk, model_offset(r), r->nb * SECTOR, 0);
    expect(w, r, ret, "discard");
    model_write(r, w->buf);
    ret = blk_co_pwrite(w->blk, model_offset(r), r->nb * SECTOR, w->buf,
                        BDRV_REQ_WRITE_COMPRESSED);
    expect(w, r, ret, "compressed write");
    end_unfiltered();
}

static void coroutine_fn do_zero(Worker *w, const Range *r)
{
    int flags = draw_below(&w->random, 2) ? BDRV_REQ_MAY_UNMAP : 0;

    model_zero(r);
    expect(w, r, blk_co_pwrite_zeroes(w->blk, model_offset(r), r->nb * SECTOR,
                                      flags), "zeroing");
}

static void coroutine_fn do_discard(Worker *w, const Range *r)
{
    uint32_t cluster = (1U << w->plan->cluster_bits) / SECTOR;
    uint32_t from = ROUND_UP(r->first, cluster);
    uint32_t end = QEMU_ALIGN_DOWN(r->first + r->nb, cluster);
    Range whole = { .window = r->window, .first = from, .nb = end - from };

    if (!begin_unfiltered()) {
        return;
    }
    /* Of parts of clusters nothing is discarded */
    if (from < end) {
        model_zero(&whole);
    }
    expect(w, r, blk_co_pdiscard(w->blk, model_offset(r), r->nb * SECTOR, 0),
           "discard");
    end_unfiltered();
}

static void coroutine_fn do_flush(Worker *w, const Range *r)
{
    expect(w, r, blk_co_flush(w->blk), "flush");
}

/*
 * Status is asked of the node, past what keeps a backend's requests away while
 * it is drained.  So this is done here, as an export does it.
 */
static unsigned nb_asking;
static bool quiesced;

static void quiesce(void *opaque)
{
    qatomic_set(&quiesced, true);
    smp_mb();                   /* with qatomic_inc() of nb_asking */
}

static bool is_asking(void *opaque)
{
    return qatomic_read(&nb_asking);
}

static void unquiesce(void *opaque)
{
    qatomic_set(&quiesced, false);
}

static const BlockDevOps drain_ops = {
    .drained_begin = quiesce,
    .drained_poll = is_asking,
    .drained_end = unquiesce,
};

static void end_asking(void)
{
    qatomic_dec(&nb_asking);
    aio_wait_kick();
}

static void coroutine_fn do_status(Worker *w, const Range *r)
{
    int64_t offset = model_offset(r), nb;

    qatomic_inc(&nb_asking);
    if (qatomic_read(&quiesced)) {
        end_asking();
        return;
    }
    for (int64_t end = offset + r->nb * SECTOR; offset < end; offset += nb) {
        int ret;

        bdrv_graph_co_rdlock();
        ret = bdrv_co_block_status_above(blk_bs(w->blk), NULL, offset,
                                         end - offset, &nb, NULL, NULL);
        bdrv_graph_co_rdunlock();
        expect(w, r, ret, "block status");
        if (nb <= 0) {
            failed("block status of nothing");
        }
    }
    end_asking();
}

static const struct {
    void coroutine_fn (*run)(Worker *w, const Range *r);
    const char *name;
    unsigned weight;
    bool takes;                 /* the sectors; else others may change them */
    int whole;                  /* clusters; -1: sometimes */
} works[] = {
    { do_read, "read", 26, true, -1 },
    { do_read_beside, "read beside writers", 10, false, -1 },
    { do_write, "write", 26, true, -1 },
    { do_write_vector, "write of a vector", 6, true, 0 },
    { do_compressed, "compressed write", 5, true, 1 },
    { do_zero, "zeroing", 10, true, -1 },
    { do_discard, "discard", 8, true, -1 },
    { do_flush, "flush", 1, false, 0 },
    { do_status, "block status", 8, false, -1 },
};

static int draw_work(Worker *w)
{
    unsigned sum = 0, n;
    int i;

    for (i = 0; i < ARRAY_SIZE(works); i++) {
        sum += works[i].weight;
    }
    n = draw_below(&w->random, sum);
    for (i = 0; n >= works[i].weight; i++) {
        n -= works[i].weight;
    }
    if (works[i].run == do_compressed && !w->plan->compressed) {
        i = 0;
    }
    return i;
}

static void coroutine_fn work(Worker *w)
{
    int i = draw_work(w);
    int whole = works[i].whole < 0 ? !draw_below(&w->random, 3)
                                   : works[i].whole;
    Range r = draw_range(w, whole);

    if (works[i].takes) {
        for (int tries = 1; !model_take(&r); tries++) {
            /* Who has all of it may be of this thread, and wait for it */
            if (tries % 16 == 0) {
                qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 100 * SCALE_US);
            }
            r = draw_range(w, whole);
        }
    }
    works[i].run(w, &r);
    if (works[i].takes) {
        model_release(&r);
    }
    qatomic_add(&nb_done[i], 1);
}

static void coroutine_fn worker_entry(void *opaque)
{
    Worker *w = opaque;

    while (!qatomic_read(&stopping)) {
        work(w);
        if (qatomic_read(&parking)) {
            qatomic_inc(&nb_parked);
            while (qatomic_read(&parking)) {
                qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, SCALE_MS);
            }
            qatomic_dec(&nb_parked);
        }
    }
    qemu_vfree(w->buf);
    g_free(w->versions);
    g_free(w);
    qatomic_dec(&nb_running);
}

void run_main_loop(void)
{
    main_loop_wait(true);
    g_usleep(200);
}

void park_workers(bool park)
{
    qatomic_set(&parking, park);
    while (qatomic_read(&nb_parked) != (park ? qatomic_read(&nb_running) : 0)) {
        run_main_loop();
    }
}

static void start_workers(const Plan *p, BlockBackend *blk,
                          IOThread **threads)
{
    stopping = false;
    for (unsigned i = 0; i < p->nb_threads * p->nb_workers; i++) {
        Worker *w = g_new0(Worker, 1);

        w->random.state = p->seed * 1000 + i;
        w->blk = blk;
        w->plan = p;
        w->buf = blk_blockalign(blk, p->window_sectors * SECTOR);
        w->versions = g_new(uint32_t, p->window_sectors);
        qatomic_inc(&nb_running);
        aio_co_schedule(iothread_get_aio_context(threads[i % p->nb_threads]),
                        qemu_coroutine_create(worker_entry, w));
    }
}

static void stop_workers(void)
{
    qatomic_set(&stopping, true);
    while (qatomic_read(&nb_running)) {
        run_main_loop();
    }
}

/*
 * The disk
 */

/* What lies between windows, where nobody has ever written */
static void compare_gap(BlockBackend *blk, int64_t from, int64_t end)
{
    static uint8_t buf[64 * KiB];
    int64_t nb;

    for (; from < end; from += nb) {
        int64_t bytes;
        int ret;

        bdrv_graph_rdlock_main_loop();
        ret = bdrv_block_status_above(blk_bs(blk), NULL, from, end - from, &nb,
                                      NULL, NULL);
        bdrv_graph_rdunlock_main_loop();
        bytes = MIN(nb, sizeof(buf));
        /* A raw layer may say "data"; it is long, look at a part. */
        if (ret >= 0 && !(ret & BDRV_BLOCK_ZERO)) {
            ret = blk_pread(blk, from, bytes, buf, 0);
            if (ret >= 0 && !buffer_is_zero(buf, bytes)) {
                failed("not zero at 0x%" PRIx64, from);
            }
        }
        if (ret < 0) {
            failed("reading at 0x%" PRIx64 ": %s", from, strerror(-ret));
        }
    }
}

static void compare_all(const Plan *p, BlockBackend *blk)
{
    g_autofree uint8_t *buf = g_malloc(p->window_sectors * SECTOR);
    Range r = { .nb = p->window_sectors };
    int64_t end = 0;

    for (; r.window < p->nb_windows; r.window++) {
        int64_t offset = model_offset(&r);
        int ret = blk_pread(blk, offset, r.nb * SECTOR, buf, 0);

        if (ret < 0) {
            failed("window %u cannot be read: %s", r.window, strerror(-ret));
        }
        model_compare(&r, buf, "at the end");
        compare_gap(blk, end, offset);
        end = offset + r.nb * SECTOR;
    }
}

static void check_image(const char *file, const char *format)
{
    BlockBackend *blk = open_image(file, format, BDRV_O_CHECK);
    BdrvCheckResult result = {};
    int ret = bdrv_check(blk_bs(blk), &result, 0);

    if (ret < 0 || result.check_errors || result.corruptions || result.leaks) {
        failed("check of %s: %d, %" PRId64 " corruptions, %" PRId64 " leaks, %"
               PRId64 " errors", file, ret, (int64_t)result.corruptions,
               (int64_t)result.leaks, (int64_t)result.check_errors);
    }
    blk_unref(blk);
}

/* Some content for one layer, by the main thread alone */
static void fill_layer(const Plan *p, Random *random, BlockBackend *blk,
                       bool warm)
{
    uint32_t cluster = (1U << p->cluster_bits) / SECTOR;
    g_autofree uint8_t *buf = g_malloc(p->window_sectors * SECTOR);
    unsigned nb = warm ? p->nb_windows : p->nb_windows / 4 + 1;

    for (unsigned i = 0; i < nb; i++) {
        uint32_t clusters = p->window_sectors / cluster;
        Range r = {
            .window = warm ? i : draw_below(random, p->nb_windows),
            .first = draw_below(random, clusters) * cluster,
            .nb = cluster,
        };
        int kind = draw_below(random, 8), ret = 0, flags = 0;

        if (kind == 0) {
            model_zero(&r);
            ret = blk_pwrite_zeroes(blk, model_offset(&r), r.nb * SECTOR, 0);
        } else {
            if (kind < 3) {
                r.nb = 1;
            } else if (kind < 4) {
                r.nb = MIN(p->window_sectors - r.first, 4 * cluster);
            } else if (kind == 7 && p->compressed &&
                       strcmp(blk_bs(blk)->drv->format_name, "raw")) {
                flags = BDRV_REQ_WRITE_COMPRESSED;
                ret = blk_pdiscard(blk, model_offset(&r), r.nb * SECTOR, 0);
            }
            model_write(&r, buf);
            ret = ret ?: blk_pwrite(blk, model_offset(&r), r.nb * SECTOR, buf,
                                    flags);
        }
        if (ret < 0) {
            failed("layers cannot be made: %s", strerror(-ret));
        }
        model_release(&r);
    }
}

BlockBackend *open_image(const char *file, const char *format, int flags)
{
    QDict *options = qdict_new();
    BlockBackend *blk;

    qdict_put_str(options, "driver", format);
    blk = blk_new_open(file, NULL, options, flags | BDRV_O_NO_FLUSH,
                       &error_fatal);
    blk_set_enable_write_cache(blk, true);
    return blk;
}

void create_image(const Plan *p, const char *file, const char *format,
                  const char *base, const char *base_format, uint64_t size)
{
    g_autofree char *options = strcmp(format, "raw") ?
        g_strdup_printf("cluster_size=%u", 1U << p->cluster_bits) : NULL;

    bdrv_img_create(file, format, base, base_format, options, size,
                    BDRV_O_NO_FLUSH, true, &error_fatal);
}

static void make_chain(const Plan *p)
{
    Random random = { p->seed ^ 0x6c6179657273ULL };
    unsigned nb_plain = draw_below(&random, 3);
    g_autofree char *below = NULL;
    const char *below_format = NULL;

    for (unsigned i = 0; i <= p->nb_layers; i++) {
        bool top = i == p->nb_layers;
        const char *format = i >= nb_plain || top ? p->format :
                             i == 0 && nb_plain == 2 ? "raw" : "qcow2";
        char *file = g_strdup_printf("layer-%u", i);
        BlockBackend *blk;

        create_image(p, file, format, below, below_format, p->disk_size);
        blk = open_image(file, format, BDRV_O_RDWR | BDRV_O_UNMAP);
        fill_layer(p, &random, blk, top);
        blk_unref(blk);
        g_free(below);
        below = file;
        below_format = format;
    }
}

static void remove_files(void)
{
    g_autoptr(GDir) dir = g_dir_open(".", 0, NULL);
    const char *name;

    while ((name = g_dir_read_name(dir))) {
        unlink(name);
    }
}

static Plan draw_plan(const char *format, uint64_t seed, unsigned nb_layers)
{
    Random random = { seed };
    static const unsigned bits[] = { 9, 12, 12, 14, 16, 16 };
    static const char *const sizes[] = {
        "1", "8192", "64k", "256k", "1M",
    };
    Plan p = {
        .format = format,
        .seed = seed,
        .cluster_bits = bits[draw_below(&random, ARRAY_SIZE(bits))],
        .nb_layers = nb_layers ?: 1 + draw_below(&random, 1 +
                                                 draw_below(&random, 30)),
        .nb_threads = 3 + draw_below(&random, 2),
        .nb_workers = 2 + draw_below(&random, 14),
        .compressed = draw_below(&random, 2),
        .open_flags = BDRV_O_RDWR | BDRV_O_UNMAP,
    };

    /* 32 MiB; 2, 8, 8 GiB */
    p.region = 1ULL << (2 * p.cluster_bits - 3);
    p.nb_windows = p.cluster_bits == 16 ? 16 : p.cluster_bits == 14 ? 256 :
                   1024;
    p.window_sectors = MIN(MAX(32 << (p.cluster_bits - 9), 64),
                           p.cluster_bits == 9 ? 32 : 1024);
    p.tail = p.nb_windows * p.region;
    p.disk_size = p.tail + p.region;
    pstrcpy(p.cache_size, sizeof(p.cache_size),
            sizes[draw_below(&random, ARRAY_SIZE(sizes))]);
    if (draw_below(&random, 2)) {
        snprintf(p.entry_size, sizeof(p.entry_size), "%u",
                 512U << draw_below(&random, p.cluster_bits - 8));
    }
    if (draw_below(&random, 4) == 0) {
        p.open_flags |= BDRV_O_NOCACHE;
    }
    return p;
}

static void say_plan(const Plan *p)
{
    printf("seed %" PRIu64 ": %s, %u layers, clusters of %u, %u windows of %u "
           "sectors, %u threads of %u, cache %s (%s)%s%s\n", p->seed,
           p->format, p->nb_layers + 1, 1 << p->cluster_bits, p->nb_windows,
           p->window_sectors, p->nb_threads, p->nb_workers, p->cache_size,
           *p->entry_size ? p->entry_size : "-",
           p->compressed ? ", compressed" : "",
           p->open_flags & BDRV_O_NOCACHE ? ", direct" : "");
    fflush(stdout);
}

static void run(const Plan *p, unsigned seconds, IOThread **threads)
{
    int64_t end;
    BlockBackend *blk;

    say_plan(p);
    memset(nb_done, 0, sizeof(nb_done));
    model_init(p);
    make_chain(p);
    blk = admin_open(p, threads);
    blk_set_dev_ops(blk, &drain_ops, NULL);
    watch_start(true);
    start_workers(p, blk, threads);
    end = qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + seconds * 1000;
    while (qemu_clock_get_ms(QEMU_CLOCK_REALTIME) < end) {
        admin_work();
    }
    stop_workers();
    watch_start(false);
    if (draw_below(&(Random) { p->seed }, 2)) {
        compare_all(p, blk);
    }
    admin_close();

    check_image(admin_top(), p->format);
    blk = open_image(admin_top(), p->format, 0);
    compare_all(p, blk);
    blk_unref(blk);
    for (int i = 0; i < ARRAY_SIZE(works); i++) {
        printf("  %s: %" PRIu64 "\n", works[i].name, nb_done[i]);
    }
    admin_say(stdout);
    model_free();
    if (!keep_files) {
        remove_files();
    }
}

static void check_space(void)
{
    struct statvfs st;

    if (!statvfs(".", &st) &&
        (uint64_t)st.f_bavail * st.f_frsize < MAX_BYTES_NEEDED) {
        fprintf(stderr, "parallel-fuzz: less than 4 GiB free\n");
        exit(1);
    }
}

static void G_NORETURN usage(void)
{
    fprintf(stderr, "usage: parallel-fuzz [--format sqcow2|qcow2] [--seed N] "
            "[--rounds N]\n    [--seconds N] [--layers N] [--without "
            "WHAT,...] [--dir DIR] [--keep]\n");
    exit(2);
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {
        { "dir", required_argument, NULL, 'd' },
        { "format", required_argument, NULL, 'f' },
        { "keep", no_argument, NULL, 'k' },
        { "layers", required_argument, NULL, 'l' },
        { "rounds", required_argument, NULL, 'n' },
        { "seconds", required_argument, NULL, 't' },
        { "seed", required_argument, NULL, 's' },
        { "without", required_argument, NULL, 'w' },
        {},
    };
    const char *format = "sqcow2", *without = "";
    unsigned long seed = 1, rounds = 1, seconds = 5, nb_layers = 0;
    g_autofree char *made = NULL;
    IOThread *threads[4];
    int c;

    while ((c = getopt_long(argc, argv, "", longs, NULL)) >= 0) {
        unsigned long *number = c == 'l' ? &nb_layers : c == 'n' ? &rounds :
                                c == 't' ? &seconds : c == 's' ? &seed : NULL;

        if (number && qemu_strtoul(optarg, NULL, 0, number) < 0) {
            usage();
        }
        switch (c) {
        case 'd':
            folder = optarg;
            break;
        case 'f':
            format = optarg;
            break;
        case 'k':
            keep_files = true;
            break;
        case 'w':
            without = optarg;
            break;
        case '?':
            usage();
        }
    }
    if (optind != argc) {
        usage();
    }
    error_init(argv[0]);
    module_call_init(MODULE_INIT_QOM);
    qcrypto_init(&error_fatal);
    bdrv_init();
    qemu_init_main_loop(&error_fatal);
    /* As a guest that runs: a timer of qcow2's is of this clock */
    qemu_clock_enable(QEMU_CLOCK_VIRTUAL, true);

    if (!folder) {
        folder = made = g_build_filename(g_get_tmp_dir(),
                                         "parallel-fuzz-XXXXXX", NULL);
        g_assert(g_mkdtemp(made));
    }
    if (chdir(folder) < 0) {
        fprintf(stderr, "parallel-fuzz: %s: %s\n", folder, strerror(errno));
        return 1;
    }
    check_space();
    for (int i = 0; i < ARRAY_SIZE(threads); i++) {
        g_autofree char *id = g_strdup_printf("iothread%d", i);

        threads[i] = iothread_create(id, &error_fatal);
    }
    for (unsigned long i = 0; i < rounds; i++) {
        Plan p = draw_plan(format, seed + i, nb_layers);

        if (strstr(without, "compressed")) {
            p.compressed = false;
        }
        admin_without(without);
        run(&p, seconds, threads);
    }
    if (made && !keep_files && chdir("/") == 0) {
        rmdir(made);
    }
    printf("%lu rounds passed\n", rounds);
    return 0;
}
