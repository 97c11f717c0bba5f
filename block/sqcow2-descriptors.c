/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: the descriptors of layers, also of more than a process may have
 *
 * Every layer that is a local file normally has a descriptor of its own,
 * opened and locked when the chain is walked, and closed with the layer set.
 * Where the limit of open files does not allow that, and nobody writes to the
 * active image, the regular files among the layers share a pool of
 * descriptors instead.
 *
 * A file of the pool is open or closed.  While readers use its descriptor it
 * stays open; an open one without readers stands in the list of idle files,
 * and the one that has been there for longest is closed for another one.  It
 * is opened again on demand, in a worker thread.  A closed file is not
 * locked; so a file that is opened again must be the one that the walk found,
 * untouched: same inode, same size, and same change time, which no user can
 * set.  If it is not, reads fail and say why.
 *
 * The pool's lock guards it against requests of several threads.  It is held
 * for no system call, and taken only by those who use a pool.
 */
#include "qemu/osdep.h"
#include <sys/resource.h>
#include "qemu/coroutine.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qapi/error.h"
#include "block/thread-pool.h"
#include "sqcow2-int.h"

/* For the rest of the process, out of the limit; of small limits a part */
#define SPARE_DESCRIPTORS 64
#define SPARE_PART 4
/* A pool's size, if there is not room for more */
#define MIN_POOL 16

/* qemu's image locking protocol: docs/system/qemu-block-drivers.rst.inc */
enum {
    IMG_LOCK_PERM_BASE = 100,
    IMG_LOCK_SHARED_BASE = 200,
    IMG_LOCK_READ = 0,
    IMG_LOCK_WRITE = 1,
    IMG_LOCK_RESIZE = 3,
    IMG_LOCK_END = 300,
};

/* Allow as many descriptors as the system does; tools do not do so. */
static void raise_descriptor_limit(void)
{
    struct rlimit limit;

    if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static uint64_t descriptor_limit(void)
{
    struct rlimit limit;

    return getrlimit(RLIMIT_NOFILE, &limit) < 0 ||
           limit.rlim_cur == RLIM_INFINITY ? UINT64_MAX : limit.rlim_cur;
}

static bool is_scarce(int fd)
{
    uint64_t limit = descriptor_limit();

    /* The lowest one that is free is always taken: all below are in use */
    return fd >= limit - MIN(SPARE_DESCRIPTORS, limit / SPARE_PART);
}

bool sqcow2_descriptors_are_scarce(int fd)
{
    if (!is_scarce(fd)) {
        return false;
    }
    raise_descriptor_limit();
    return is_scarce(fd);
}

bool sqcow2_have_descriptors(uint32_t n, Error **errp)
{
    int fd = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0);
    bool enough = fd >= 0;

    if (enough) {
        close(fd);
        enough = fd + (uint64_t)n <= descriptor_limit();
    }
    if (!enough) {
        raise_descriptor_limit();
        enough = fd >= 0 && fd + (uint64_t)n <= descriptor_limit();
    }
    if (!enough) {
        error_setg(errp, "%u layers have to be opened, but the limit of open "
                   "files is %" PRIu64 "; raise it (ulimit -n)", n,
                   descriptor_limit());
    }
    return enough;
}

void sqcow2_reserve_descriptors(int fd, uint32_t n)
{
    int last = fcntl(fd, F_DUPFD_CLOEXEC, fd + n);

    if (last < 0) {
        raise_descriptor_limit();
        last = fcntl(fd, F_DUPFD_CLOEXEC, fd + n);
    }
    if (last >= 0) {
        close(last);
    }
}

/*
 * Before main() there are no threads yet (QEMU's first one is made by a
 * constructor too, of no priority), and room for the descriptors of most
 * chains is free.  It takes 32 KiB of the kernel's memory.
 */
static void __attribute__((constructor(101))) reserve_early(void)
{
    struct rlimit before, limit;

    if (getrlimit(RLIMIT_NOFILE, &before) < 0) {
        return;
    }
    limit = before;
    limit.rlim_cur = MAX(before.rlim_cur,
                         MIN(SQCOW2_EARLY_DESCRIPTORS + 64, before.rlim_max));
    setrlimit(RLIMIT_NOFILE, &limit);
    sqcow2_reserve_descriptors(STDERR_FILENO, SQCOW2_EARLY_DESCRIPTORS);
    setrlimit(RLIMIT_NOFILE, &before);
}

int sqcow2_open_descriptor(const char *path, Error **errp)
{
    int fd = qemu_open(path, O_RDONLY | O_NONBLOCK, NULL);

    if (fd < 0 && errno == EMFILE) {
        raise_descriptor_limit();
        fd = qemu_open(path, O_RDONLY | O_NONBLOCK, NULL);
    }
    if (fd < 0 && errno == EMFILE) {
        error_setg(errp, "cannot be opened: the limit of %" PRIu64 " open "
                   "files is reached; raise it (ulimit -n) above the number "
                   "of layers, or open the image read-only",
                   descriptor_limit());
        return -EMFILE;
    }
    if (fd < 0) {
        int err = errno;

        error_setg_errno(errp, err, "cannot be opened");
        return -err;
    }
    return fd;
}

/* Of a reader that lets nobody write or resize */
static const int held_locks[] = {
    IMG_LOCK_PERM_BASE + IMG_LOCK_READ,
    IMG_LOCK_SHARED_BASE + IMG_LOCK_WRITE,
    IMG_LOCK_SHARED_BASE + IMG_LOCK_RESIZE,
};

void sqcow2_unlock_descriptor(int fd)
{
    for (int i = 0; i < ARRAY_SIZE(held_locks); i++) {
        qemu_unlock_fd(fd, held_locks[i], 1);
    }
}

int sqcow2_lock_descriptor(int fd, Error **errp)
{
    static const int tested[] = {
        IMG_LOCK_SHARED_BASE + IMG_LOCK_READ,
        IMG_LOCK_PERM_BASE + IMG_LOCK_WRITE,
        IMG_LOCK_PERM_BASE + IMG_LOCK_RESIZE,
    };

    int ret = 0;

    for (int i = 0; ret == 0 && i < ARRAY_SIZE(held_locks); i++) {
        ret = qemu_lock_fd(fd, held_locks[i], 1, false);
    }
    /* Mostly nobody else has any lock: one question instead of three */
    if (ret == 0 && qemu_lock_fd_test(fd, IMG_LOCK_PERM_BASE,
                                      IMG_LOCK_END - IMG_LOCK_PERM_BASE,
                                      true) == 0) {
        return 0;
    }
    for (int i = 0; ret == 0 && i < ARRAY_SIZE(tested); i++) {
        ret = qemu_lock_fd_test(fd, tested[i], 1, true);
    }
    if (ret == -EAGAIN || ret == -EACCES) {
        error_setg(errp, "is being written by another process "
                   "(its \"write\" lock is taken)");
        return -EAGAIN;
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "cannot be locked");
    }
    return ret;
}

/* What changes with every change of a file */
typedef struct FileState {
    dev_t device;
    ino_t inode;
    off_t size;
    struct timespec changed;
} FileState;

struct Sqcow2PooledFile {
    /* Set when it is added, and never changed */
    Sqcow2Pool *pool;
    char *path;                 /* absolute: the process may change directory */
    uint32_t layer;             /* index, for messages */
    FileState state;            /* as the walk found it */
    int64_t settled_us;         /* see wait_until_settled(); monotonic */

    /* Guarded by pool->lock once there are requests */
    int fd;                     /* -1: closed */
    uint32_t users;             /* of @fd */
    bool failed;                /* and that was said */
    QTAILQ_ENTRY(Sqcow2PooledFile) idle;    /* if open and without users */
};

struct Sqcow2Pool {
    /* Set before there are requests */
    uint32_t refs;              /* the files, and the walk */
    uint32_t max_open;
    bool locking;
    bool direct;                /* O_DIRECT */

    QemuMutex lock;
    /* Guarded by it once there are requests */
    uint32_t nb_open;           /* and those that are being opened */
    QTAILQ_HEAD(, Sqcow2PooledFile) idle;   /* least recently used first */
    CoQueue waiting;            /* for a descriptor that becomes idle */
};

/* A place in the pool for a file that is about to be opened */
typedef struct Opening {
    Sqcow2PooledFile *file;
    int victim_fd;              /* to be closed before; or -1 */
    int64_t victim_settled_us;
    Error *err;
} Opening;

Sqcow2Pool *sqcow2_pool_new(uint32_t max_open, bool locking)
{
    Sqcow2Pool *pool = g_new0(Sqcow2Pool, 1);

    pool->refs = 1;
    pool->max_open = MAX(max_open, MIN_POOL);
    pool->locking = locking;
    qemu_mutex_init(&pool->lock);
    QTAILQ_INIT(&pool->idle);
    qemu_co_queue_init(&pool->waiting);
    return pool;
}

void sqcow2_pool_unref(Sqcow2Pool *pool)
{
    if (pool && --pool->refs == 0) {
        assert(!pool->nb_open);
        qemu_mutex_destroy(&pool->lock);
        g_free(pool);
    }
}

/*
 * From when on does a change of the file get another change time than the
 * one it has?  The clock of its file system ticks slowly, and may be wrong.
 */
static int64_t settled_at(const struct timespec *changed)
{
    int64_t tick = changed->tv_nsec ? SQCOW2_TICK_NS : SQCOW2_COARSE_TICK_NS;
    int64_t age = g_get_real_time() * 1000 - changed->tv_nsec -
                  changed->tv_sec * NANOSECONDS_PER_SECOND;

    return g_get_monotonic_time() + (tick - MIN(MAX(age, 0), tick)) / 1000;
}

/* Until then its lock protects the file.  Later no change goes unnoticed. */
static void wait_until_settled(int64_t settled_us)
{
    int64_t wait = settled_us - g_get_monotonic_time();

    if (wait > 0) {
        g_usleep(wait);
    }
}

static FileState state_of(const struct stat *st)
{
    return (FileState) {
        .device = st->st_dev,
        .inode = st->st_ino,
        .size = st->st_size,
        .changed = st->st_ctim,
    };
}

static bool is_same_state(const FileState *a, const FileState *b)
{
    return a->device == b->device && a->inode == b->inode &&
           a->size == b->size && a->changed.tv_sec == b->changed.tv_sec &&
           a->changed.tv_nsec == b->changed.tv_nsec;
}

/* No ".." is resolved: it may follow a symbolic link. */
static char *absolute_path(const char *path)
{
    g_autofree char *dir = g_get_current_dir();

    return g_path_is_absolute(path) ? g_strdup(path)
                                    : g_build_filename(dir, path, NULL);
}

void sqcow2_pool_add(Sqcow2Pool *pool, Sqcow2Layer *layer)
{
    const char *path = layer->filename;
    Sqcow2PooledFile *file;
    struct stat st;

    /* The times of a block device do not tell of changes: it stays open */
    if (layer->fd < 0 || fstat(layer->fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        return;
    }
    strstart(path, "file:", &path);
    file = g_new0(Sqcow2PooledFile, 1);
    file->pool = pool;
    file->path = absolute_path(path);
    file->state = state_of(&st);
    file->settled_us = settled_at(&st.st_ctim);
    file->fd = layer->fd;
    pool->refs++;
    pool->nb_open++;
    QTAILQ_INSERT_TAIL(&pool->idle, file, idle);
    layer->fd = -1;
    layer->pooled = file;
}

bool sqcow2_layers_are_pooled(const Sqcow2Layer *layers, uint32_t nb_layers)
{
    for (uint32_t i = 0; i < nb_layers; i++) {
        if (layers[i].pooled) {
            return true;
        }
    }
    return false;
}

void sqcow2_pool_set_index(Sqcow2PooledFile *file, uint32_t index)
{
    file->layer = index;
}

void sqcow2_pool_remove(Sqcow2PooledFile *file)
{
    Sqcow2Pool *pool = file->pool;

    assert(!file->users);
    if (file->fd >= 0) {
        QTAILQ_REMOVE(&pool->idle, file, idle);
        pool->nb_open--;
        close(file->fd);
    }
    sqcow2_pool_unref(pool);
    g_free(file->path);
    g_free(file);
}

void sqcow2_pool_unlock(Sqcow2PooledFile *file)
{
    file->pool->locking = false;
    if (file->fd >= 0) {
        sqcow2_unlock_descriptor(file->fd);
    }
}

void sqcow2_pool_file_id(const Sqcow2PooledFile *file, struct stat *st)
{
    st->st_dev = file->state.device;
    st->st_ino = file->state.inode;
}

void sqcow2_pool_set_direct(Sqcow2PooledFile *file, bool direct)
{
    file->pool->direct = direct;
    if (file->fd >= 0) {
        fcntl(file->fd, F_SETFL, direct ? O_DIRECT : 0);
    }
}

/* Take the descriptor of an idle file, or -1.  pool->lock is held. */
static int take_idle(Sqcow2Pool *pool, int64_t *settled_us)
{
    Sqcow2PooledFile *file = QTAILQ_FIRST(&pool->idle);
    int fd;

    if (!file) {
        return -1;
    }
    QTAILQ_REMOVE(&pool->idle, file, idle);
    pool->nb_open--;
    *settled_us = file->settled_us;
    fd = file->fd;
    file->fd = -1;
    return fd;
}

/* Close an idle file.  False if there is none. */
static bool close_one(Sqcow2Pool *pool)
{
    int64_t settled_us;
    int fd;

    qemu_mutex_lock(&pool->lock);
    fd = take_idle(pool, &settled_us);
    qemu_mutex_unlock(&pool->lock);
    if (fd < 0) {
        return false;
    }
    wait_until_settled(settled_us);
    close(fd);
    return true;
}

/*
 * Should the rest of the process have used up what was left for it, the pool
 * does with less.
 */
static int open_closing(Sqcow2Pool *pool, const char *path, Error **errp)
{
    for (;;) {
        Error *local_err = NULL;
        int fd = sqcow2_open_descriptor(path, &local_err);

        if ((fd != -EMFILE && fd != -ENFILE) || !close_one(pool)) {
            error_propagate(errp, local_err);
            return fd;
        }
        error_free(local_err);
    }
}

int sqcow2_pool_open(Sqcow2Pool *pool, const char *path, Error **errp)
{
    if (pool->nb_open >= pool->max_open) {
        close_one(pool);
    }
    return open_closing(pool, path, errp);
}

/* Make an opened file what it was when it was closed. */
static int set_up(const Sqcow2PooledFile *file, int fd, Error **errp)
{
    const Sqcow2Pool *pool = file->pool;
    FileState state;
    struct stat st;
    int ret;

    /* Lock before looking: what is seen then stays */
    if (pool->locking) {
        ret = sqcow2_lock_descriptor(fd, errp);
        if (ret < 0) {
            return ret;
        }
    }
    if (fstat(fd, &st) < 0) {
        error_setg_errno(errp, errno, "cannot be examined");
        return -EIO;
    }
    state = state_of(&st);
    if (!is_same_state(&state, &file->state)) {
        error_setg(errp, "was modified or replaced while it was closed");
        return -ESTALE;
    }
    /* Where O_DIRECT does not take, reads work all the same */
    if (!(pool->direct && fcntl(fd, F_SETFL, O_DIRECT) == 0) &&
        fcntl(fd, F_SETFL, 0) < 0) {
        error_setg_errno(errp, errno, "cannot be set up");
        return -EIO;
    }
    return 0;
}

/* Blocking; in a worker thread.  Returns a descriptor or a negative errno. */
static int open_again(void *opaque)
{
    Opening *o = opaque;
    int fd, ret;

    if (o->victim_fd >= 0) {
        wait_until_settled(o->victim_settled_us);
        close(o->victim_fd);
    }
    fd = open_closing(o->file->pool, o->file->path, &o->err);
    if (fd < 0) {
        return fd;
    }
    ret = set_up(o->file, fd, &o->err);
    if (ret < 0) {
        close(fd);
        return ret;
    }
    return fd;
}

/* Get a place for o->file.  False: all are in use.  pool->lock is held. */
static bool get_place(Sqcow2Pool *pool, Opening *o)
{
    o->victim_fd = -1;
    if (pool->nb_open >= pool->max_open) {
        o->victim_fd = take_idle(pool, &o->victim_settled_us);
        if (o->victim_fd < 0) {
            return false;
        }
    }
    pool->nb_open++;
    return true;
}

/* Use the descriptor of an open file.  pool->lock is held. */
static int use(Sqcow2PooledFile *file)
{
    if (!file->users++) {
        QTAILQ_REMOVE(&file->pool->idle, file, idle);
    }
    return file->fd;
}

static void report_failure(Sqcow2PooledFile *file, Error *err)
{
    error_report("Layer %u, '%s', %s; reads of it fail. Restore the file, or "
                 "open the image again; to keep all layers open and locked, "
                 "raise the limit of open files (ulimit -n) above their "
                 "number.",
                 file->layer, file->path, error_get_pretty(err));
}

/*
 * Use the descriptor @fd that open_again() returned, or the one that somebody
 * else opened meanwhile.
 */
static int finish_opening(Opening *o, int fd)
{
    Sqcow2PooledFile *file = o->file;
    Sqcow2Pool *pool = file->pool;
    int spare_fd = -1;
    bool report;

    qemu_mutex_lock(&pool->lock);
    report = fd < 0 && !file->failed;
    file->failed = fd < 0;
    if (fd >= 0 && file->fd < 0) {
        file->fd = fd;
        file->users = 1;
    } else {
        pool->nb_open--;
        if (fd >= 0) {
            spare_fd = fd;
            fd = use(file);
        }
        qemu_co_enter_next(&pool->waiting, &pool->lock);
    }
    qemu_mutex_unlock(&pool->lock);

    if (spare_fd >= 0) {
        close(spare_fd);
    }
    if (report) {
        report_failure(file, o->err);
    }
    error_free(o->err);
    return fd < 0 ? -EIO : fd;
}

int sqcow2_pool_get(Sqcow2PooledFile *file)
{
    Sqcow2Pool *pool = file->pool;
    Opening o = { .file = file };
    int fd = -1;
    bool placed = false;

    qemu_mutex_lock(&pool->lock);
    if (file->fd >= 0) {
        fd = use(file);
    } else {
        placed = get_place(pool, &o);
    }
    qemu_mutex_unlock(&pool->lock);
    if (placed) {
        fd = finish_opening(&o, open_again(&o));
    }
    return fd >= 0 || placed ? fd : -EMFILE;
}

int coroutine_fn sqcow2_pool_co_get(Sqcow2PooledFile *file)
{
    Sqcow2Pool *pool = file->pool;
    Opening o = { .file = file };
    int fd = -1;

    qemu_mutex_lock(&pool->lock);
    /* Those who use one do not wait for another: they will put it back */
    while (file->fd < 0 && !get_place(pool, &o)) {
        qemu_co_queue_wait(&pool->waiting, &pool->lock);
    }
    if (file->fd >= 0) {
        fd = use(file);
    }
    qemu_mutex_unlock(&pool->lock);
    if (fd < 0) {
        fd = finish_opening(&o, thread_pool_submit_co(open_again, &o));
    }
    return fd;
}

void sqcow2_pool_put(Sqcow2PooledFile *file)
{
    Sqcow2Pool *pool = file->pool;

    qemu_mutex_lock(&pool->lock);
    if (--file->users == 0) {
        QTAILQ_INSERT_TAIL(&pool->idle, file, idle);
        qemu_co_enter_next(&pool->waiting, &pool->lock);
    }
    qemu_mutex_unlock(&pool->lock);
}

static int fd_pread(int fd, uint64_t host_offset, uint64_t bytes, void *buf)
{
    uint8_t *p = buf;

    while (bytes) {
        ssize_t ret = RETRY_ON_EINTR(pread(fd, p, bytes, host_offset));

        if (ret < 0) {
            return -errno;
        }
        if (ret == 0) {
            memset(p, 0, bytes);
            return 0;
        }
        p += ret;
        host_offset += ret;
        bytes -= ret;
    }
    return 0;
}

int sqcow2_layer_get(const Sqcow2Layer *layer)
{
    return layer->pooled ? sqcow2_pool_get(layer->pooled) : layer->fd;
}

void sqcow2_layer_put(const Sqcow2Layer *layer)
{
    if (layer->pooled) {
        sqcow2_pool_put(layer->pooled);
    }
}

int sqcow2_layer_pread(const Sqcow2Layer *layer, uint64_t host_offset,
                       uint64_t bytes, void *buf)
{
    int fd, ret;

    if (layer->child) {
        return bdrv_pread(layer->child, host_offset, bytes, buf, 0);
    }
    fd = sqcow2_layer_get(layer);
    if (fd < 0) {
        return fd;
    }
    ret = fd_pread(fd, host_offset, bytes, buf);
    sqcow2_layer_put(layer);
    return ret;
}

bool sqcow2_layer_is_hole(const Sqcow2Layer *layer, uint64_t host_offset,
                          uint64_t *bytes)
{
    off_t data, hole;

    if (layer->fd < 0) {
        return false;
    }
    data = lseek(layer->fd, host_offset, SEEK_DATA);
    if (data < 0 && errno == ENXIO) {
        /* No data up to the end; where has that got to? */
        return lseek(layer->fd, 0, SEEK_END) >= (off_t)layer->file_size;
    }
    if (data < 0) {
        return false;
    }
    if (data > (off_t)host_offset) {
        *bytes = MIN(*bytes, data - host_offset);
        return true;
    }
    hole = lseek(layer->fd, host_offset, SEEK_HOLE);
    if (hole > (off_t)host_offset) {
        *bytes = MIN(*bytes, hole - host_offset);
    }
    return false;
}
