/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2: follow the backing links of a chain, parse and verify its files
 *
 * The links decide which files are read, and nothing else does: the next
 * file's name comes from the header of the file above it, made absolute by
 * the same function as for qcow2's backing files.  A layer's life: opened,
 * locked as QEMU locks a backing file, its header parsed, compared with what
 * the file above expects, appended; the loop goes on with its own link.  The
 * walk is a loop and its state is of constant size, so that 65,536 layers
 * cost no stack.
 *
 * Metadata is read with plain pread(): the descriptors are not in any event
 * loop yet, and open is allowed to block, as file-posix's is.
 */
#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qemu/cutils.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "sqcow2-int.h"

/* A header with all known extensions and the longest name fits in this. */
#define HEADER_READ_BYTES 4096
#define V2_HEADER_BYTES 72
#define V3_HEADER_BYTES 104
#define EXT_END 0
#define EXT_BACKING_FORMAT 0xe2792aca

#define LOOP_TEXT "stands in the backing chain twice; " \
                  "break the loop with 'qemu-img rebase -u'"

/* Incompatible features that do not change where data lies */
#define INDEXABLE_FEATURES (QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT | \
                            QCOW2_INCOMPAT_COMPRESSION | SQCOW2_INCOMPAT_INDEX)

/* What the header of one layer says */
typedef struct LayerHeader {
    int cluster_bits;
    bool has_record;
    Sqcow2Record record;
    char backing[1024];         /* empty: none */
    char backing_fmt[16];
} LayerHeader;

typedef struct FileId {
    uint64_t device;
    uint64_t inode;
} FileId;

typedef struct Walk {
    const Sqcow2WalkOptions *opts;
    GArray *layers;             /* of Sqcow2Layer, from the top down */
    GHashTable *seen;           /* of FileId */
    GHashTable *seen_names;     /* of layers on other protocols */
    Sqcow2Pool *pool;           /* of all layers so far; NULL: not needed */
    char *distrust;

    /* What is expected of the next layer; S8 */
    bool verifying;
    uint32_t nb_expected;       /* layers to come */
    Sqcow2Record above;         /* of the file that vouches for the next one */
    const uint8_t *layer_table; /* its table; NULL if damaged or none */
    uint8_t *layer_table_buf;
} Walk;

static guint hash_file_id(gconstpointer key)
{
    const FileId *id = key;

    return id->inode ^ id->inode >> 32 ^ id->device;
}

static gboolean same_file_id(gconstpointer a, gconstpointer b)
{
    return !memcmp(a, b, sizeof(FileId));
}

/* True the first time that this file is met. */
static bool note_file(Walk *w, const struct stat *st)
{
    FileId id = { .device = st->st_dev, .inode = st->st_ino };

    return g_hash_table_add(w->seen, g_memdup2(&id, sizeof(id)));
}

/* Too few descriptors: from now on the layers share those that there are. */
static void start_pool(Walk *w)
{
    w->pool = sqcow2_pool_new(w->layers->len + 1, w->opts->locking);
    for (guint i = 0; i < w->layers->len; i++) {
        sqcow2_pool_add(w->pool, &g_array_index(w->layers, Sqcow2Layer, i));
    }
}

static int open_local_layer(Walk *w, Sqcow2Layer *layer, Error **errp)
{
    ERRP_GUARD();
    const char *path = layer->filename;
    struct stat st;
    off_t size;
    int fd, ret;

    strstart(path, "file:", &path);
    if (strstart(path, "/dev/fdset/", NULL)) {
        /* The descriptor and its flags are the user's */
        error_setg(errp, "is a descriptor that was handed over");
        return -ENOTSUP;
    }
    fd = w->pool ? sqcow2_pool_open(w->pool, path, errp)
                 : sqcow2_open_descriptor(path, errp);
    if (fd < 0) {
        if (fd != -EMFILE) {    /* the words that tools look for */
            error_free_or_abort(errp);
            error_setg_file_open(errp, -fd, path);
        }
        return fd;
    }
    layer->fd = fd;
    if (w->layers->len == 0 && w->nb_expected > SQCOW2_EARLY_DESCRIPTORS / 2) {
        sqcow2_reserve_descriptors(fd, w->nb_expected);
    }
    if (w->opts->may_pool && !w->pool && sqcow2_descriptors_are_scarce(fd)) {
        start_pool(w);
    }

    if (fstat(fd, &st) < 0) {
        error_setg_errno(errp, errno, "cannot be examined");
        return -EIO;
    }
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
        error_setg(errp, "is neither a regular file nor a block device");
        return -EINVAL;
    }
    if (!note_file(w, &st)) {
        error_setg(errp, LOOP_TEXT);
        return -ELOOP;
    }
    /* So much for FIFOs; io_uring would not wait for the disk either */
    if (fcntl(fd, F_SETFL, 0) < 0) {
        error_setg_errno(errp, errno, "cannot be set up");
        return -EIO;
    }
    if (w->opts->locking) {
        ret = sqcow2_lock_descriptor(fd, errp);
        if (ret < 0) {
            return ret;
        }
    }
    size = lseek(fd, 0, SEEK_END);
    if (size < 0) {
        error_setg_errno(errp, errno, "has no size");
        return -EIO;
    }
    layer->file_size = size;
    return 0;
}

static int open_protocol_layer(Walk *w, Sqcow2Layer *layer, Error **errp)
{
    g_autofree char *name = g_strdup_printf("layer.%u", w->layers->len);
    BlockDriverState *bs;
    QDict *options;
    int64_t size;

    if (!w->opts->set || strstart(layer->filename, "json:", NULL)) {
        error_setg(errp, "is not a local file");
        return -ENOTSUP;
    }
    options = qdict_new();
    qdict_put_bool(options, BDRV_OPT_READ_ONLY, true);
    bs = bdrv_open(layer->filename, NULL, options, BDRV_O_PROTOCOL, errp);
    if (!bs) {
        return -EIO;
    }
    bdrv_graph_wrlock();
    layer->child = bdrv_attach_child(w->opts->set, bs, name, &child_of_bds,
                                     BDRV_CHILD_DATA | BDRV_CHILD_METADATA,
                                     errp);
    bdrv_graph_wrunlock();
    if (!layer->child) {
        return -EPERM;
    }
    /*
     * What has no inode is known by its name.  A loop of such layers alone
     * comes back to the same name, or to one that is longer each time, which
     * does not fit at last.
     */
    if (!g_hash_table_add(w->seen_names, g_strdup(layer->filename))) {
        error_setg(errp, LOOP_TEXT);
        return -ELOOP;
    }
    size = bdrv_getlength(bs);
    if (size < 0) {
        error_setg_errno(errp, -size, "has no size");
        return size;
    }
    layer->file_size = size;
    return 0;
}

/*
 * Read extensions in @buf from @pos to @end into @hdr.  The last one may stand
 * at the end of the room for them instead of "no more".
 */
static int parse_extensions(const uint8_t *buf, uint64_t pos, uint64_t end,
                            LayerHeader *hdr, Error **errp)
{
    while (pos < end) {
        uint32_t magic, len;

        if (end - pos < 8 || ldl_be_p(buf + pos + 4) > end - pos - 8) {
            goto damaged;
        }
        magic = ldl_be_p(buf + pos);
        len = ldl_be_p(buf + pos + 4);
        pos += 8;
        if (magic == EXT_END) {
            break;
        }
        if (magic == EXT_BACKING_FORMAT) {
            if (len >= sizeof(hdr->backing_fmt)) {
                goto damaged;
            }
            memcpy(hdr->backing_fmt, buf + pos, len);
            hdr->backing_fmt[len] = '\0';
        } else if (magic == SQCOW2_EXT_MAGIC && !hdr->has_record) {
            /* One that does not count is as none: S2 */
            hdr->has_record = !sqcow2_decode_record(buf + pos, len,
                                                    hdr->cluster_bits,
                                                    &hdr->record, NULL);
        }
        pos += ROUND_UP((uint64_t)len, 8);
    }
    return 0;

damaged:
    error_setg(errp, "has a damaged header extension");
    return -EINVAL;
}

/* The type is one that we have, and the feature bit says whether it is zlib. */
static bool compression_fits(Qcow2CompressionType type, uint64_t features)
{
    switch (type) {
    case QCOW2_COMPRESSION_TYPE_ZLIB:
        return !(features & QCOW2_INCOMPAT_COMPRESSION);
#ifdef CONFIG_ZSTD
    case QCOW2_COMPRESSION_TYPE_ZSTD:
        return features & QCOW2_INCOMPAT_COMPRESSION;
#endif
    default:
        return false;
    }
}

/*
 * Check the fixed header fields in @buf (the first HEADER_READ_BYTES of the
 * file) as qcow2 does, as far as reading the tables depends on them.
 */
static int parse_fixed_header(const uint8_t *buf, Sqcow2Layer *layer,
                              LayerHeader *hdr, uint64_t *features,
                              uint32_t *header_bytes, Error **errp)
{
    const QCowHeader *h = (const QCowHeader *)buf;
    uint32_t version = be32_to_cpu(h->version);

    if (be32_to_cpu(h->magic) != QCOW_MAGIC || version < 2 || version > 3) {
        error_setg(errp, "is not a qcow2 image");
        return -EINVAL;
    }
    hdr->cluster_bits = be32_to_cpu(h->cluster_bits);
    layer->virtual_size = QEMU_ALIGN_DOWN(be64_to_cpu(h->size),
                                          BDRV_SECTOR_SIZE);
    layer->l1_host_offset = be64_to_cpu(h->l1_table_offset);
    layer->l1_entries = be32_to_cpu(h->l1_size);
    *features = version == 3 ? be64_to_cpu(h->incompatible_features) : 0;
    *header_bytes = version == 3 ? be32_to_cpu(h->header_length)
                                 : V2_HEADER_BYTES;

    if (hdr->cluster_bits < MIN_CLUSTER_BITS ||
        hdr->cluster_bits > MAX_CLUSTER_BITS ||
        *header_bytes > 1U << hdr->cluster_bits ||
        (version == 3 && *header_bytes < V3_HEADER_BYTES) ||
        layer->virtual_size > INT64_MAX ||
        layer->l1_entries > QCOW_MAX_L1_SIZE / L1E_SIZE ||
        layer->l1_host_offset & ((1ULL << hdr->cluster_bits) - 1) ||
        layer->l1_host_offset > SQCOW2_MAX_HOST_OFFSET) {
        error_setg(errp, "has a damaged qcow2 header");
        return -EINVAL;
    }
    if (*features & ~(uint64_t)INDEXABLE_FEATURES ||
        be32_to_cpu(h->crypt_method) != QCOW_CRYPT_NONE) {
        error_setg(errp, "uses a feature that the index does not cover");
        return -ENOTSUP;
    }
    if (*header_bytes > offsetof(QCowHeader, compression_type)) {
        layer->compression_type = h->compression_type;
    }
    if (!compression_fits(layer->compression_type, *features)) {
        error_setg(errp, "has an unknown compression type");
        return -ENOTSUP;
    }
    return 0;
}

static int parse_qcow2(Sqcow2Layer *layer, bool want_sqcow2, LayerHeader *hdr,
                       Error **errp)
{
    g_autofree uint8_t *buf = g_malloc(HEADER_READ_BYTES);
    uint64_t features, backing_offset, end;
    uint32_t header_bytes, name_bytes;
    int ret;

    ret = sqcow2_layer_pread(layer, 0, HEADER_READ_BYTES, buf);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "cannot be read");
        return ret;
    }
    ret = parse_fixed_header(buf, layer, hdr, &features, &header_bytes, errp);
    if (ret < 0) {
        return ret;
    }
    if (features & SQCOW2_INCOMPAT_INDEX && !want_sqcow2) {
        error_setg(errp, "is an sqcow2 image but the backing format says "
                   "qcow2; correct it with 'qemu-img rebase -u -F sqcow2'");
        return -EINVAL;
    }

    backing_offset = ldq_be_p(buf + offsetof(QCowHeader, backing_file_offset));
    name_bytes = ldl_be_p(buf + offsetof(QCowHeader, backing_file_size));
    end = backing_offset ?: 1ULL << hdr->cluster_bits;
    if (end > 1ULL << hdr->cluster_bits || name_bytes > 1023 ||
        (backing_offset && name_bytes > (1ULL << hdr->cluster_bits) - end)) {
        error_setg(errp, "has a damaged backing file name");
        return -EINVAL;
    }
    if (end + (backing_offset ? name_bytes : 0) > HEADER_READ_BYTES) {
        uint64_t bytes = 1ULL << hdr->cluster_bits;

        buf = g_realloc(buf, bytes);
        ret = sqcow2_layer_pread(layer, 0, bytes, buf);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "cannot be read");
            return ret;
        }
    }
    ret = parse_extensions(buf, header_bytes, end, hdr, errp);
    if (ret < 0) {
        return ret;
    }
    if (backing_offset) {
        memcpy(hdr->backing, buf + backing_offset, name_bytes);
        hdr->backing[name_bytes] = '\0';
    }
    if (features & SQCOW2_INCOMPAT_INDEX) {
        layer->kind = SQCOW2_LAYER_SQCOW2;
    } else {
        layer->kind = SQCOW2_LAYER_QCOW2;
        hdr->has_record = false;
    }
    return 0;
}

bool sqcow2_layer_record(const Sqcow2Layer *layer, Sqcow2Record *record)
{
    g_autofree LayerHeader *hdr = g_new0(LayerHeader, 1);
    Sqcow2Layer again = *layer;

    if (parse_qcow2(&again, true, hdr, NULL) < 0 || !hdr->has_record) {
        return false;
    }
    *record = hdr->record;
    return true;
}

/* Parse a layer that the link above calls @fmt; "" makes us look. */
static int parse_layer(Walk *w, Sqcow2Layer *layer, const char *fmt,
                       LayerHeader *hdr, Error **errp)
{
    uint32_t magic = 0;
    int ret;

    if (!*fmt) {
        ret = sqcow2_layer_pread(layer, 0, sizeof(magic), &magic);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "cannot be read");
            return ret;
        }
    }
    if (!strcmp(fmt, "qcow2") || !strcmp(fmt, "sqcow2") ||
        be32_to_cpu(magic) == QCOW_MAGIC) {
        ret = parse_qcow2(layer, SQCOW2_IS_QCOW2 || strcmp(fmt, "qcow2"), hdr,
                          errp);
        if (ret < 0) {
            return ret;
        }
        if (hdr->cluster_bits != w->opts->cluster_bits) {
            error_setg(errp, "has another cluster size");
            return -ENOTSUP;
        }
    } else if (!strcmp(fmt, "raw")) {
        layer->kind = SQCOW2_LAYER_RAW;
        layer->virtual_size = ROUND_UP(layer->file_size, BDRV_SECTOR_SIZE);
    } else {
        error_setg(errp, "has a format that the index does not cover");
        return -ENOTSUP;
    }
    if (layer->file_size > SQCOW2_MAX_HOST_OFFSET) {
        error_setg(errp, "is longer than 64 TiB");
        return -ENOTSUP;
    }
    return 0;
}

/*
 * 2006-01-01, when there was no qcow2 yet: where all files get the same time,
 * as in some stores of packages, it is often an earlier one, and tells nothing
 */
#define EARLIEST_MTIME_S 1136073600

/* Waits, so that a change from now on gets a later modification time. */
static int64_t settled_mtime(int fd)
{
    struct stat st;
    int64_t mtime, age;

    for (int tries = 0; tries < 2; tries++) {
        if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) ||
            st.st_mtim.tv_sec < EARLIEST_MTIME_S) {
            return 0;
        }
        mtime = st.st_mtim.tv_sec * NANOSECONDS_PER_SECOND +
                st.st_mtim.tv_nsec;
        age = g_get_real_time() * 1000 - mtime;
        if (age > SQCOW2_COARSE_TICK_NS ||
            (age > SQCOW2_TICK_NS && st.st_mtim.tv_nsec)) {
            return mtime;
        }
        if (age < 0 || !st.st_mtim.tv_nsec) {
            return 0;
        }
        g_usleep((SQCOW2_TICK_NS - MIN(age, SQCOW2_TICK_NS)) / 1000 + 1000);
    }
    return 0;
}

static int64_t mtime_now(int fd)
{
    struct stat st;

    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        return 0;
    }
    return st.st_mtim.tv_sec * NANOSECONDS_PER_SECOND + st.st_mtim.tv_nsec;
}

static int crc_of_header_and_l1(const Sqcow2Layer *layer, uint32_t *crc,
                                Error **errp)
{
    uint64_t l1_bytes = (uint64_t)layer->l1_entries * L1E_SIZE;
    g_autofree uint8_t *buf = g_try_malloc(V3_HEADER_BYTES + l1_bytes);
    int ret;

    if (!buf) {
        error_setg(errp, "has an L1 table that does not fit in memory");
        return -ENOMEM;
    }
    ret = sqcow2_layer_pread(layer, 0, V3_HEADER_BYTES, buf);
    if (ret == 0) {
        ret = sqcow2_layer_pread(layer, layer->l1_host_offset, l1_bytes,
                                 buf + V3_HEADER_BYTES);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "cannot be read");
        return ret;
    }
    *crc = crc32c(0xffffffff, buf, V3_HEADER_BYTES + l1_bytes);
    return 0;
}

/* A file that no stamp stands for is described as qcow2 is. */
static Sqcow2LayerKind desc_kind(const Sqcow2Layer *layer)
{
    return layer->kind == SQCOW2_LAYER_SQCOW2 &&
           !sqcow2_layer_is_stamped(layer) ? SQCOW2_LAYER_QCOW2 : layer->kind;
}

int sqcow2_describe_layer(const Sqcow2Layer *layer, Sqcow2LayerDesc *desc,
                          Error **errp)
{
    int fd;

    *desc = (Sqcow2LayerDesc) { .kind = desc_kind(layer) };
    if (desc->kind == SQCOW2_LAYER_SQCOW2) {
        memcpy(desc->stamp, layer->stamp, SQCOW2_STAMP_SIZE);
        return 0;
    }
    desc->virtual_size = layer->virtual_size;
    if (layer->kind == SQCOW2_LAYER_RAW) {
        return 0;
    }
    /* The time first: a change during our reading makes a later one */
    fd = sqcow2_layer_get(layer);
    if (fd >= 0) {
        desc->mtime_ns = settled_mtime(fd);
        sqcow2_layer_put(layer);
    }
    return crc_of_header_and_l1(layer, &desc->crc, errp);
}

Sqcow2LayerCompared sqcow2_compare_layer(const Sqcow2Layer *layer,
                                         const Sqcow2LayerDesc *desc)
{
    uint32_t crc;

    if (desc->kind != desc_kind(layer)) {
        return SQCOW2_LAYER_CHANGED;
    }
    if (desc->kind == SQCOW2_LAYER_SQCOW2) {
        return memcmp(desc->stamp, layer->stamp, SQCOW2_STAMP_SIZE) ?
               SQCOW2_LAYER_CHANGED : SQCOW2_LAYER_SAME;
    }
    if (desc->virtual_size != layer->virtual_size) {
        return SQCOW2_LAYER_CHANGED;
    }
    if (desc->kind == SQCOW2_LAYER_RAW) {
        return SQCOW2_LAYER_SAME;
    }
    if (!desc->mtime_ns || desc->mtime_ns != mtime_now(layer->fd)) {
        return SQCOW2_LAYER_UNSURE;
    }
    return crc_of_header_and_l1(layer, &crc, NULL) < 0 || crc != desc->crc ?
           SQCOW2_LAYER_CHANGED : SQCOW2_LAYER_SAME;
}

static void G_GNUC_PRINTF(2, 3) distrust(Walk *w, const char *fmt, ...)
{
    va_list ap;

    w->verifying = false;
    if (!w->distrust) {
        va_start(ap, fmt);
        w->distrust = g_strdup_vprintf(fmt, ap);
        va_end(ap);
    }
}

static void distrust_modified(Walk *w, const Sqcow2Layer *layer,
                              uint32_t index)
{
    distrust(w, "layer %u '%s' was modified since a layer above it was "
             "indexed", index, layer->filename);
}

/* Compare a layer with its entry in the layer table of w->above; S8. */
static void verify_by_table(Walk *w, const Sqcow2Layer *layer, uint32_t index)
{
    Sqcow2LayerDesc desc;

    if (!w->layer_table ||
        sqcow2_decode_desc(w->layer_table + index * SQCOW2_DESC_SIZE, &desc,
                           NULL) < 0) {
        distrust(w, "the layer table above layer %u '%s' is damaged", index,
                 layer->filename);
        return;
    }
    switch (sqcow2_compare_layer(layer, &desc)) {
    case SQCOW2_LAYER_SAME:
        break;
    case SQCOW2_LAYER_UNSURE:
        distrust(w, "layer %u '%s' may have been modified since a layer above "
                 "it was indexed", index, layer->filename);
        break;
    case SQCOW2_LAYER_CHANGED:
        distrust_modified(w, layer, index);
        break;
    }
}

uint8_t *sqcow2_layer_read_table(const Sqcow2Layer *layer,
                                 const Sqcow2Record *record)
{
    uint64_t bytes = (uint64_t)record->layer_table.entries * SQCOW2_DESC_SIZE;
    g_autofree uint8_t *buf = bytes ? g_try_malloc(bytes) : NULL;

    if (!buf ||
        sqcow2_layer_pread(layer, record->layer_table.host_offset, bytes,
                           buf) < 0 ||
        crc32c(0xffffffff, buf, bytes) != record->layer_table.crc) {
        return NULL;
    }
    return g_steal_pointer(&buf);
}

/* Compare @layer with the stamp that w->above expects directly below; S8. */
static void verify_by_stamp(Walk *w, const Sqcow2Layer *layer,
                            const LayerHeader *hdr, uint32_t index)
{
    if (layer->kind != SQCOW2_LAYER_SQCOW2) {
        distrust(w, "layer %u '%s' has another format than when the layer "
                 "above it was indexed", index, layer->filename);
    } else if (!sqcow2_layer_is_stamped(layer) ||
               memcmp(layer->stamp, w->above.below_stamp,
                      SQCOW2_STAMP_SIZE)) {
        /* Not stamped: perhaps a copy made in the midst of that session */
        distrust_modified(w, layer, index);
    } else if (hdr->record.layer != index) {
        distrust(w, "layer '%s' has index %u instead of %u", layer->filename,
                 hdr->record.layer, index);
    } else {
        w->above = hdr->record;
        g_free(w->layer_table_buf);
        w->layer_table_buf = sqcow2_layer_read_table(layer, &hdr->record);
        w->layer_table = w->layer_table_buf;
    }
}

/* Compare the layer that was just found with what is expected; S8. */
static void verify_layer(Walk *w, const Sqcow2Layer *layer,
                         const LayerHeader *hdr)
{
    if (!w->verifying) {
        return;
    }
    if (w->nb_expected == 0) {
        distrust(w, "there is a layer '%s' below the one that was the base",
                 layer->filename);
        return;
    }
    w->nb_expected--;
    if (w->above.layer_table.entries) {
        verify_by_table(w, layer, w->nb_expected);
    } else {
        verify_by_stamp(w, layer, hdr, w->nb_expected);
    }
}

void sqcow2_layer_free(Sqcow2Layer *layer)
{
    if (layer->fd >= 0) {
        qemu_close(layer->fd);      /* it may be from an fd set */
    }
    if (layer->pooled) {
        sqcow2_pool_remove(layer->pooled);
    }
    g_free(layer->filename);
}

void sqcow2_layers_free(Sqcow2Layer *layers, uint32_t nb_layers)
{
    for (uint32_t i = 0; i < nb_layers; i++) {
        sqcow2_layer_free(&layers[i]);
    }
    g_free(layers);
}

void sqcow2_chain_free(Sqcow2Chain *chain)
{
    sqcow2_layers_free(chain->layers, chain->nb_layers);
    g_free(chain->distrust);
    *chain = (Sqcow2Chain) {};
}

/*
 * One hop: open the layer that @backing in the header of @above names.  On
 * success it is appended and @hdr holds its own link.
 */
static int walk_hop(Walk *w, const char *above, const char *backing,
                    const char *fmt, LayerHeader *hdr, Error **errp)
{
    ERRP_GUARD();
    Sqcow2Layer layer = { .fd = -1 };
    const char *path;
    bool opened;
    int ret;

    layer.filename = above ?
        bdrv_get_full_backing_filename_from_filename(above, backing, errp) :
        g_strdup(backing);
    if (!layer.filename) {
        return -ENOTSUP;
    }
    if (strstart(layer.filename, "file:", &path) ||
        !path_has_protocol(layer.filename)) {
        ret = open_local_layer(w, &layer, errp);
    } else {
        ret = open_protocol_layer(w, &layer, errp);
    }
    /* If not, the error is a sentence of its own */
    opened = layer.fd >= 0 || layer.child || ret == -ENOTSUP || ret == -EMFILE;
    *hdr = (LayerHeader) {};
    if (ret == 0) {
        ret = parse_layer(w, &layer, fmt, hdr, errp);
    }
    if (ret < 0) {
        if (opened) {
            error_prepend(errp, "Layer %u below the active image, '%s', ",
                          w->layers->len + 1, layer.filename);
        } else {
            if (w->layers->len) {
                error_prepend(errp, "Layer %u below the active image, '%s': ",
                              w->layers->len + 1, layer.filename);
            }
            error_prepend(errp, "Could not open backing file: ");
        }
        sqcow2_layer_free(&layer);
        return ret;
    }
    layer.has_stamp = hdr->has_record;
    layer.writing = hdr->record.flags & SQCOW2_FLAG_WRITING;
    memcpy(layer.stamp, hdr->record.stamp, SQCOW2_STAMP_SIZE);
    verify_layer(w, &layer, hdr);
    if (w->pool) {
        sqcow2_pool_add(w->pool, &layer);
    }
    g_array_append_val(w->layers, layer);
    return 0;
}

static int walk_down(Walk *w, LayerHeader *top, Error **errp)
{
    const Sqcow2WalkOptions *opts = w->opts;
    g_autofree LayerHeader *hdr = g_new0(LayerHeader, 1);
    const char *above = opts->filename;
    int ret;

    pstrcpy(hdr->backing_fmt, sizeof(hdr->backing_fmt), opts->backing_fmt);

    do {
        bool first = !w->layers->len;
        g_autofree char *backing = g_strdup(first ? opts->backing
                                                  : hdr->backing);
        g_autofree char *fmt = g_strdup(hdr->backing_fmt);

        if (w->layers->len == SQCOW2_MAX_LAYERS - 1) {
            error_setg(errp, "The backing chain has more than %d layers; "
                       "shorten it with 'qemu-img commit' or 'qemu-img "
                       "convert'", SQCOW2_MAX_LAYERS);
            return -EFBIG;
        }
        ret = walk_hop(w, above, backing, fmt, hdr, errp);
        if (ret < 0) {
            return ret;
        }
        above = g_array_index(w->layers, Sqcow2Layer,
                              w->layers->len - 1).filename;
        if (w->layers->len == 1) {
            *top = *hdr;
        }
    } while (hdr->backing[0] && !opts->one_hop);

    if (w->verifying && w->nb_expected) {
        distrust(w, "layer %u is missing below '%s'", w->nb_expected - 1,
                 above);
    }
    return 0;
}

int sqcow2_walk(const Sqcow2WalkOptions *opts, Sqcow2Chain *chain,
                Error **errp)
{
    g_autofree LayerHeader *top = g_new0(LayerHeader, 1);
    Walk w = {
        .opts = opts,
        .layers = g_array_new(false, false, sizeof(Sqcow2Layer)),
        .seen = g_hash_table_new_full(hash_file_id, same_file_id, g_free, NULL),
        .seen_names = g_hash_table_new_full(g_str_hash, g_str_equal, g_free,
                                            NULL),
        .verifying = opts->record,
        .layer_table = opts->layer_table,
    };
    int ret;

    if (opts->record) {
        w.above = *opts->record;
        w.nb_expected = opts->record->layer;
    }
    ret = walk_down(&w, top, errp);

    *chain = (Sqcow2Chain) {
        .nb_layers = w.layers->len,
        .top_record = top->record,
        .top_has_record = top->has_record,
        .distrust = w.distrust,
    };
    chain->layers = (Sqcow2Layer *)g_array_free(w.layers, false);
    for (uint32_t i = 0; i < chain->nb_layers / 2; i++) {
        Sqcow2Layer tmp = chain->layers[i];

        chain->layers[i] = chain->layers[chain->nb_layers - 1 - i];
        chain->layers[chain->nb_layers - 1 - i] = tmp;
    }
    sqcow2_pool_unref(w.pool);
    for (uint32_t i = 0; i < chain->nb_layers; i++) {
        if (chain->layers[i].pooled) {
            sqcow2_pool_set_index(chain->layers[i].pooled, i);
        }
    }
    g_hash_table_unref(w.seen);
    g_hash_table_unref(w.seen_names);
    g_free(w.layer_table_buf);

    for (uint32_t i = 1; ret == 0 && i < chain->nb_layers; i++) {
        if (chain->layers[i].kind == SQCOW2_LAYER_RAW) {
            error_setg(errp, "Layer %u, '%s', is raw but not the base",
                       i, chain->layers[i].filename);
            ret = -ENOTSUP;
        }
    }
    if (ret < 0) {
        sqcow2_chain_free(chain);
        return ret;
    }
    sqcow2_set_clips(chain->layers, chain->nb_layers);
    return 0;
}

Sqcow2LayerKind sqcow2_peek_kind(const char *filename)
{
    Sqcow2Layer layer = { .fd = -1 };
    const char *path = filename;
    QCowHeader h = {};
    int ret;

    strstart(path, "file:", &path);
    if (!path_has_protocol(path)) {
        layer.fd = sqcow2_open_descriptor(path, NULL);
    }
    if (layer.fd < 0) {
        return SQCOW2_LAYER_NONE;
    }
    ret = sqcow2_layer_pread(&layer, 0, V3_HEADER_BYTES, &h);
    qemu_close(layer.fd);
    if (ret < 0 || be32_to_cpu(h.magic) != QCOW_MAGIC) {
        return SQCOW2_LAYER_NONE;
    }
    return be32_to_cpu(h.version) >= 3 &&
           be64_to_cpu(h.incompatible_features) & SQCOW2_INCOMPAT_INDEX ?
           SQCOW2_LAYER_SQCOW2 : SQCOW2_LAYER_QCOW2;
}

int sqcow2_peek_cluster_bits(const char *filename, const char *backing,
                             const char *backing_fmt)
{
    g_autofree LayerHeader *hdr = g_new0(LayerHeader, 1);
    Sqcow2Layer layer = { .fd = -1 };
    const char *path;
    int bits = 0;

    if (!backing_fmt ||
        (strcmp(backing_fmt, "qcow2") && strcmp(backing_fmt, "sqcow2"))) {
        return 0;
    }
    layer.filename = bdrv_get_full_backing_filename_from_filename(filename,
                                                                  backing,
                                                                  NULL);
    if (layer.filename) {
        path = layer.filename;
        strstart(path, "file:", &path);
        layer.fd = path_has_protocol(path) ? -1 :
                   sqcow2_open_descriptor(path, NULL);
    }
    if (layer.fd >= 0 && parse_qcow2(&layer, true, hdr, NULL) == 0) {
        bits = hdr->cluster_bits;
    }
    sqcow2_layer_free(&layer);
    return bits;
}
