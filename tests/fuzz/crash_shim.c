/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Preloaded into QEMU's programs by power_cut.py: writes down what they do to
 * the files of one directory, or lets a request fail.
 *
 *   CRASH_DIR   absolute path of the directory
 *   CRASH_LOG   the log; a record at the start and one at the end of every
 *               request. Each is one write() in append mode, so that records
 *               of several threads and processes have an order.
 *   CRASH_FAIL  KINDS:N:ERRNO:HOW, fail the Nth request of these kinds:
 *               r read, w write and fallocate, t truncate, f flush.
 *               HOW: once, or sticky (all later ones, too), or full (all
 *               later ones that make a file longer)
 *
 * Flushes are written down but not made: power_cut.py decides what they mean.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_IOV 1100            /* IOV_MAX and what stands before the data */

struct Record {
    char type;                  /* S start, E end, X injected failure */
    char kind;                  /* w t f as above, a fallocate, c create, u */
    uint16_t path_length;
    int32_t mode;               /* of fallocate */
    uint32_t pid;
    uint32_t id;                /* the same at start and end */
    uint64_t offset;
    uint64_t length;
    int64_t result;
    int64_t mtime_ns;           /* at the end */
    uint64_t data_length;       /* after the path */
};

static const char *dir;
static size_t dir_length;
static int log_fd = -1;
static atomic_uint last_id;

static char fail_kinds[8];
static unsigned fail_nth;
static int fail_errno;
static char fail_how[8];
static atomic_uint fail_count;

static __typeof__(pwrite64) *real_pwrite;
static __typeof__(pwritev64) *real_pwritev;
static __typeof__(pread64) *real_pread;
static __typeof__(preadv64) *real_preadv;
static __typeof__(preadv64v2) *real_preadv2;
static __typeof__(ftruncate64) *real_ftruncate;
static __typeof__(fallocate64) *real_fallocate;
static __typeof__(posix_fallocate64) *real_posix_fallocate;
static __typeof__(fdatasync) *real_fdatasync;
static __typeof__(fsync) *real_fsync;
static __typeof__(unlink) *real_unlink;
static int (*real_open)(const char *path, int flags, ...);

static void __attribute__((constructor)) init(void)
{
    const char *log = getenv("CRASH_LOG");
    const char *fail = getenv("CRASH_FAIL");

    real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
    real_pwritev = dlsym(RTLD_NEXT, "pwritev64");
    real_pread = dlsym(RTLD_NEXT, "pread64");
    real_preadv = dlsym(RTLD_NEXT, "preadv64");
    real_preadv2 = dlsym(RTLD_NEXT, "preadv64v2");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
    real_fallocate = dlsym(RTLD_NEXT, "fallocate64");
    real_posix_fallocate = dlsym(RTLD_NEXT, "posix_fallocate64");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_unlink = dlsym(RTLD_NEXT, "unlink");
    real_open = dlsym(RTLD_NEXT, "open64");

    dir = getenv("CRASH_DIR");
    dir_length = dir ? strlen(dir) : 0;
    if (log) {
        log_fd = real_open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC,
                           0600);
    }
    if (fail && *fail && sscanf(fail, "%7[rwtf]:%u:%d:%7s", fail_kinds,
                                &fail_nth, &fail_errno, fail_how) != 4) {
        fprintf(stderr, "CRASH_FAIL is wrong: %s\n", fail);
        _exit(99);
    }
}

/* Returns the name below the directory in @path (PATH_MAX bytes), or NULL. */
static const char *watched_fd(int fd, char *path)
{
    char link[64];
    struct stat st;
    ssize_t length;

    if (!dir_length || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        return NULL;
    }
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) {
        return NULL;
    }
    path[length] = 0;
    if (strncmp(path, dir, dir_length) || path[dir_length] != '/') {
        return NULL;
    }
    return path + dir_length + 1;
}

static void write_record(struct Record *rec, const char *name,
                         const struct iovec *data, int nb_data)
{
    struct iovec iov[MAX_IOV];
    int saved = errno;
    size_t total;

    if (log_fd < 0 || nb_data > MAX_IOV - 2) {
        return;
    }
    rec->pid = getpid();
    rec->path_length = strlen(name);
    iov[0] = (struct iovec) { rec, sizeof(*rec) };
    iov[1] = (struct iovec) { (void *)name, rec->path_length };
    for (int i = 0; i < nb_data; i++) {
        iov[i + 2] = data[i];
        rec->data_length += data[i].iov_len;
    }
    total = sizeof(*rec) + rec->path_length + rec->data_length;
    if (writev(log_fd, iov, nb_data + 2) != (ssize_t)total) {
        fprintf(stderr, "the log of requests is not complete\n");
        _exit(99);
    }
    errno = saved;
}

static int is_to_fail(char kind, const char *name, int fd, uint64_t end)
{
    struct Record rec = { .type = 'X', .kind = kind };
    struct stat st;
    unsigned n;

    if (!fail_nth || !strchr(fail_kinds, kind)) {
        return 0;
    }
    n = atomic_fetch_add(&fail_count, 1) + 1;
    if (n < fail_nth || (n > fail_nth && !strcmp(fail_how, "once")) ||
        (!strcmp(fail_how, "full") &&
         (fstat(fd, &st) < 0 || end <= (uint64_t)st.st_size))) {
        return 0;
    }
    write_record(&rec, name, NULL, 0);
    errno = fail_errno;
    return 1;
}

static void start(struct Record *rec, const char *name,
                  const struct iovec *data, int nb_data)
{
    rec->type = 'S';
    rec->id = atomic_fetch_add(&last_id, 1);
    write_record(rec, name, data, nb_data);
}

static void end(struct Record *rec, const char *name, int fd, int64_t result)
{
    struct stat st;
    int saved = errno;

    rec->type = 'E';
    rec->result = result < 0 ? -saved : result;
    rec->data_length = 0;
    if (fd >= 0 && fstat(fd, &st) == 0) {
        rec->mtime_ns = st.st_mtim.tv_sec * 1000000000LL + st.st_mtim.tv_nsec;
    }
    write_record(rec, name, NULL, 0);
    errno = saved;
}

ssize_t pwritev64(int fd, const struct iovec *iov, int nb_iov, off64_t offset)
{
    struct Record rec = { .kind = 'w', .offset = offset };
    char path[PATH_MAX];
    const char *name = watched_fd(fd, path);
    ssize_t ret;

    if (!name) {
        return real_pwritev(fd, iov, nb_iov, offset);
    }
    for (int i = 0; i < nb_iov; i++) {
        rec.length += iov[i].iov_len;
    }
    if (is_to_fail('w', name, fd, offset + rec.length)) {
        return -1;
    }
    start(&rec, name, iov, nb_iov);
    ret = real_pwritev(fd, iov, nb_iov, offset);
    end(&rec, name, fd, ret);
    return ret;
}

ssize_t pwrite64(int fd, const void *buf, size_t length, off64_t offset)
{
    struct iovec iov = { (void *)buf, length };

    return pwritev64(fd, &iov, 1, offset);
}

ssize_t pread64(int fd, void *buf, size_t length, off64_t offset)
{
    char path[PATH_MAX];
    const char *name = fail_nth ? watched_fd(fd, path) : NULL;

    return name && is_to_fail('r', name, fd, -1) ? -1 :
           real_pread(fd, buf, length, offset);
}

ssize_t preadv64(int fd, const struct iovec *iov, int nb_iov, off64_t offset)
{
    char path[PATH_MAX];
    const char *name = fail_nth ? watched_fd(fd, path) : NULL;

    return name && is_to_fail('r', name, fd, -1) ? -1 :
           real_preadv(fd, iov, nb_iov, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *iov, int nb_iov, off64_t offset,
                   int flags)
{
    char path[PATH_MAX];
    const char *name = fail_nth ? watched_fd(fd, path) : NULL;

    return name && is_to_fail('r', name, fd, -1) ? -1 :
           real_preadv2(fd, iov, nb_iov, offset, flags);
}

int ftruncate64(int fd, off64_t length)
{
    struct Record rec = { .kind = 't', .length = length };
    char path[PATH_MAX];
    const char *name = watched_fd(fd, path);
    int ret;

    if (!name) {
        return real_ftruncate(fd, length);
    }
    if (is_to_fail('t', name, fd, length)) {
        return -1;
    }
    start(&rec, name, NULL, 0);
    ret = real_ftruncate(fd, length);
    end(&rec, name, fd, ret);
    return ret;
}

int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    struct Record rec = {
        .kind = 'a', .mode = mode, .offset = offset, .length = length,
    };
    char path[PATH_MAX];
    const char *name = watched_fd(fd, path);
    int ret;

    if (!name) {
        return real_fallocate(fd, mode, offset, length);
    }
    if (is_to_fail('w', name, fd, offset + length)) {
        return -1;
    }
    start(&rec, name, NULL, 0);
    ret = real_fallocate(fd, mode, offset, length);
    end(&rec, name, fd, ret);
    return ret;
}

int posix_fallocate64(int fd, off64_t offset, off64_t length)
{
    char path[PATH_MAX];

    if (!watched_fd(fd, path)) {
        return real_posix_fallocate(fd, offset, length);
    }
    return fallocate64(fd, 0, offset, length) < 0 ? errno : 0;
}

static int flush(int fd, int (*real)(int fd))
{
    struct Record rec = { .kind = 'f' };
    char path[PATH_MAX];
    const char *name = watched_fd(fd, path);

    if (!name) {
        return real(fd);
    }
    if (is_to_fail('f', name, fd, 0)) {
        return -1;
    }
    start(&rec, name, NULL, 0);
    end(&rec, name, fd, 0);
    return 0;
}

int fdatasync(int fd)
{
    return flush(fd, real_fdatasync);
}

int fsync(int fd)
{
    return flush(fd, real_fsync);
}

int open64(const char *path, int flags, ...)
{
    struct Record rec = { .kind = 'c' };
    char target[PATH_MAX];
    const char *name;
    struct stat st;
    mode_t mode = 0;
    int existed, fd;
    va_list ap;

    if (flags & (O_CREAT | O_TMPFILE)) {
        va_start(ap, flags);
        mode = va_arg(ap, mode_t);
        va_end(ap);
    }
    existed = stat(path, &st) == 0;
    fd = real_open(path, flags, mode);
    if (fd >= 0 && ((flags & O_CREAT && !existed) || flags & O_TRUNC)) {
        name = watched_fd(fd, target);
        if (name) {
            start(&rec, name, NULL, 0);
            end(&rec, name, fd, 0);
        }
    }
    return fd;
}

int unlink(const char *path)
{
    struct Record rec = { .kind = 'u' };
    char target[PATH_MAX];
    const char *name;
    int fd = real_open(path, O_RDONLY | O_CLOEXEC), ret;

    name = fd >= 0 ? watched_fd(fd, target) : NULL;
    ret = real_unlink(path);
    if (name && ret == 0) {
        start(&rec, name, NULL, 0);
        end(&rec, name, -1, 0);
    }
    if (fd >= 0) {
        close(fd);
    }
    return ret;
}
