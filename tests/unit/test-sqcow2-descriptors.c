/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Unit tests of the pool of descriptors
 *
 * Each file holds its own number, so that a reader knows whether it got the
 * descriptor of the right one.  Which ones are open is asked of the system.
 */
#include "qemu/osdep.h"
#include <setjmp.h>
#include <cmocka.h>
#include <sys/resource.h>
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/thread.h"
#include "../../block/sqcow2-int.h"

#define POOL 16                 /* the smallest one */
#define FILES 60

static char *dir;
static Sqcow2Layer layers[FILES];

/* Only local files here */
int coroutine_mixed_fn bdrv_pread(BdrvChild *child, int64_t offset,
                                  int64_t bytes, void *buf,
                                  BdrvRequestFlags flags)
{
    abort();
}

static char *path_of(int i)
{
    return g_strdup_printf("%s/%d", dir, i);
}

static void make_file(const char *path, int number)
{
    assert_true(g_file_set_contents(path, (char *)&number, sizeof(number),
                                    NULL));
}

static int set_up(void **state)
{
    Sqcow2Pool *pool = sqcow2_pool_new(POOL, true);

    dir = g_dir_make_tmp("sqcow2-XXXXXX", NULL);
    assert_non_null(dir);
    for (int i = 0; i < FILES; i++) {
        char *path = path_of(i);

        make_file(path, i);
        layers[i] = (Sqcow2Layer) {
            .filename = path,
            .fd = sqcow2_pool_open(pool, path, &error_abort),
        };
        sqcow2_lock_descriptor(layers[i].fd, &error_abort);
        sqcow2_pool_add(pool, &layers[i]);
        assert_non_null(layers[i].pooled);
        assert_int_equal(layers[i].fd, -1);
        sqcow2_pool_set_index(layers[i].pooled, i);
    }
    sqcow2_pool_unref(pool);
    return 0;
}

static int tear_down(void **state)
{
    for (int i = 0; i < FILES; i++) {
        sqcow2_pool_remove(layers[i].pooled);
        unlink(layers[i].filename);
        g_free(layers[i].filename);
    }
    assert_int_equal(rmdir(dir), 0);
    g_free(dir);
    return 0;
}

/* How many descriptors of file @i are there, or of all for -1? */
static int count_open(int i)
{
    g_autofree char *path = i < 0 ? NULL : path_of(i);
    GDir *fds = g_dir_open("/proc/self/fd", 0, NULL);
    const char *name;
    int count = 0;

    while ((name = g_dir_read_name(fds))) {
        g_autofree char *link = g_strdup_printf("/proc/self/fd/%s", name);
        g_autofree char *target = g_file_read_link(link, NULL);

        count += target && (path ? !strcmp(target, path)
                                 : g_str_has_prefix(target, dir));
    }
    g_dir_close(fds);
    return count;
}

static void assert_number(int fd, int number)
{
    int found = -1;

    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &found, sizeof(found), 0), sizeof(found));
    assert_int_equal(found, number);
}

static void read_file(int i)
{
    int found = -1;

    assert_int_equal(sqcow2_layer_pread(&layers[i], 0, sizeof(found), &found),
                     0);
    assert_int_equal(found, i);
}

static void test_reads(void **state)
{
    assert_true(sqcow2_layers_are_pooled(layers, FILES));
    for (int i = 0; i < 5 * FILES; i++) {
        read_file(i * 7 % FILES);
        assert_int_equal(count_open(i * 7 % FILES), 1);
        assert_int_equal(count_open(-1), POOL);
    }
}

static void test_latest_stay_open(void **state)
{
    for (int i = 0; i < FILES; i++) {
        read_file(i);
        read_file(3);
    }
    for (int i = 0; i < FILES; i++) {
        assert_int_equal(count_open(i), i == 3 || i > FILES - POOL);
    }
}

static void test_used_are_kept(void **state)
{
    int fds[POOL];

    for (int i = 0; i < POOL - 1; i++) {
        fds[i] = sqcow2_layer_get(&layers[i]);
    }
    for (int i = 0; i < FILES; i++) {
        read_file(i);           /* of the first ones a second user */
    }
    for (int i = 0; i < POOL - 1; i++) {
        assert_number(fds[i], i);
    }
    fds[POOL - 1] = sqcow2_layer_get(&layers[POOL - 1]);
    assert_number(fds[POOL - 1], POOL - 1);
    /* Nothing is left, and this one does not wait */
    assert_int_equal(sqcow2_layer_get(&layers[POOL]), -EMFILE);
    for (int i = 0; i < POOL; i++) {
        assert_number(fds[i], i);
        sqcow2_layer_put(&layers[i]);
    }
    read_file(POOL);
}

static void expect_failure(int i)
{
    int number;

    for (int n = 0; n < 2 * POOL; n++) {
        assert_int_equal(sqcow2_layer_pread(&layers[i], 0, sizeof(number),
                                            &number), -EIO);
    }
}

static void close_all_but(int first, int n)
{
    for (int i = first; i < first + n; i++) {
        read_file(i);
    }
}

static void test_changed_files(void **state)
{
    g_autofree char *away = g_strconcat(dir, ".away", NULL);
    g_autofree char *copy = path_of(FILES);
    struct timespec times[2] = {};
    int fd, number = 1;
    struct stat st;

    close_all_but(20, POOL);
    assert_int_equal(count_open(1), 0);

    /* Changed, with its modification time set back */
    stat(layers[1].filename, &st);
    times[0] = st.st_atim;
    times[1] = st.st_mtim;
    fd = open(layers[1].filename, O_WRONLY);
    assert_int_equal(pwrite(fd, &number, sizeof(number), 0), sizeof(number));
    futimens(fd, times);
    close(fd);
    expect_failure(1);

    /* Another file of the same content */
    make_file(copy, 2);
    rename(copy, layers[2].filename);
    expect_failure(2);

    /* Gone, as all the others are for now */
    rename(dir, away);
    expect_failure(4);
    rename(away, dir);
    read_file(4);

    /* Locked by a writer */
    fd = open(layers[5].filename, O_RDWR);
    assert_int_equal(qemu_lock_fd(fd, 101, 1, false), 0);
    expect_failure(5);
    close(fd);
    read_file(5);

    for (int i = 6; i < FILES; i++) {
        read_file(i);
    }
    assert_int_equal(count_open(-1), POOL);
}

static void test_what_is_open_is_locked(void **state)
{
    int fd = open(layers[9].filename, O_RDWR);

    read_file(9);
    assert_int_equal(qemu_lock_fd_test(fd, 201, 1, true), -EAGAIN);
    close_all_but(20, POOL);
    assert_int_equal(qemu_lock_fd_test(fd, 201, 1, true), 0);
    close(fd);
}

static void *reader_thread(void *opaque)
{
    GRand *rand = g_rand_new_with_seed((uintptr_t)opaque);

    for (int n = 0; n < 5000; n++) {
        read_file(g_rand_int_range(rand, 0, FILES));
    }
    g_rand_free(rand);
    return NULL;
}

static void test_threads(void **state)
{
    QemuThread threads[POOL / 2];

    for (int i = 0; i < ARRAY_SIZE(threads); i++) {
        qemu_thread_create(&threads[i], "reader", reader_thread,
                           (void *)(uintptr_t)(i + 1), QEMU_THREAD_JOINABLE);
    }
    for (int i = 0; i < ARRAY_SIZE(threads); i++) {
        qemu_thread_join(&threads[i]);
    }
    assert_in_range(count_open(-1), POOL / 2, POOL);
}

static int running;

static void coroutine_fn reader_co(void *opaque)
{
    int first = (uintptr_t)opaque;

    for (int n = 0; n < 20; n++) {
        int i = (first * 31 + n * 7) % FILES;
        int fd = sqcow2_pool_co_get(layers[i].pooled);

        assert_number(fd, i);
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, (first + n) % 5 * 100000);
        assert_number(fd, i);
        sqcow2_pool_put(layers[i].pooled);
    }
    running--;
}

static void run_readers(int n)
{
    running = n;
    for (int i = 0; i < n; i++) {
        qemu_coroutine_enter(qemu_coroutine_create(reader_co,
                                                   (void *)(uintptr_t)i));
    }
    while (running) {
        aio_poll(qemu_get_aio_context(), true);
    }
    /* Fewer if two of them opened the same file, and one gave its own up */
    assert_in_range(count_open(-1), POOL / 2, POOL);
    for (int i = 0; i < FILES; i++) {
        read_file(i);
    }
    assert_int_equal(count_open(-1), POOL);
}

static void test_coroutines(void **state)
{
    run_readers(1);
    run_readers(POOL);
    run_readers(10 * POOL);     /* most of them wait */
}

static int failures;

static void coroutine_fn failing_co(void *opaque)
{
    int i = (uintptr_t)opaque;
    int fd = sqcow2_pool_co_get(layers[i].pooled);

    if (i < FILES / 2) {
        assert_int_equal(fd, -EIO);
        failures++;
    } else {
        assert_number(fd, i);
        qemu_co_sleep_ns(QEMU_CLOCK_REALTIME, 1000000);
        sqcow2_pool_put(layers[i].pooled);
    }
    running--;
}

/* Those who fail make room for those who wait. */
static void test_coroutines_that_fail(void **state)
{
    close_all_but(FILES / 2, POOL);
    for (int i = 0; i < FILES / 2; i++) {
        make_file(layers[i].filename, i);
    }
    failures = 0;
    running = FILES;
    for (int i = FILES; i-- > 0; ) {
        qemu_coroutine_enter(qemu_coroutine_create(failing_co,
                                                   (void *)(uintptr_t)i));
    }
    while (running) {
        aio_poll(qemu_get_aio_context(), true);
    }
    assert_int_equal(failures, FILES / 2);
    close_all_but(FILES / 2, POOL);
    assert_int_equal(count_open(-1), POOL);
}

/* Others may have taken what the pool counts on.  Must be the last test. */
static void test_limit(void **state)
{
    struct rlimit limit;
    int spare[2 * FILES];

    /* A place in the pool that is not used */
    make_file(layers[0].filename, 0);
    expect_failure(0);
    assert_int_equal(count_open(-1), POOL - 1);

    /* It cannot be used, for no number below the limit is free */
    for (int i = 0; i < ARRAY_SIZE(spare); i++) {
        spare[i] = open("/dev/null", O_RDONLY);
        limit.rlim_cur = limit.rlim_max = spare[i] + 1;
    }
    if (setrlimit(RLIMIT_NOFILE, &limit) < 0) {
        /* Only valgrind lets nobody lower the hard limit */
        assert_int_equal(errno, EPERM);
        for (int i = 0; i < ARRAY_SIZE(spare); i++) {
            close(spare[i]);
        }
        skip();
    }
    assert_int_equal(open("/dev/null", O_RDONLY), -1);
    for (int i = 1; i < 2 * FILES; i++) {
        if (i != FILES) {
            read_file(i % FILES);
        }
    }
    for (int i = 0; i < ARRAY_SIZE(spare); i++) {
        close(spare[i]);
    }
    assert_int_equal(count_open(-1), POOL - 1);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(test_reads),
        TEST(test_latest_stay_open),
        TEST(test_used_are_kept),
        TEST(test_changed_files),
        TEST(test_what_is_open_is_locked),
        TEST(test_threads),
        TEST(test_coroutines),
        TEST(test_coroutines_that_fail),
        TEST(test_limit),
    };

    error_init("test-sqcow2-descriptors");
    qemu_init_main_loop(&error_abort);
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
