/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * sQcow2 driver: in-memory state
 *
 * The files, top down; calls point down only:
 *   sqcow2.c         the BlockDriver: callbacks, create, info
 *   sqcow2-fold.c    backing nodes that nobody named back into the layer set
 *   sqcow2-amend.c   turn an image into sqcow2 in place, and back
 *   sqcow2-check.c   check and repair of the index
 *   sqcow2-chain.c   opening flat, and the real backing graph on demand
 *   sqcow2-read.c    read path, block status
 *   sqcow2-write.c   what writing adds to qcow2's
 *   sqcow2-store.c   write an index into an image, new or not
 *   sqcow2-build.c   make an index from what of the chain's is still true
 *   sqcow2-index.c   read an index: share, load
 *   sqcow2-record.c  the record in the header: find, change, write in place
 *   sqcow2-tables.c  all own L2 tables, of internal snapshots too
 *   sqcow2-lookup.c  guest offset -> owner, host offset, kind, run
 *   sqcow2-merge.c   L2 tables merged from those of several layers
 *   sqcow2-idle.c    give the cache's memory back
 *   sqcow2-cache.c   L2 slices of other layers, and of merged tables
 *   sqcow2-layers.c  the layer set: a protocol node over all layers' files
 *   sqcow2-walk.c    follow the backing links, parse headers, verify stamps
 *   sqcow2-descriptors.c  open and lock layers; more layers than descriptors
 *   sqcow2-same-files.c  does a name still lead to the file that is in use
 *   sqcow2-format.c  bytes
 *
 * Locks: qcow2's s->lock (here: s->q.lock) guards the own L1 table, the own
 * L2 cache and, in this driver, the slice cache and the record.  It is held
 * for lookups, never for data I/O.  The lock of a pool of descriptors, where
 * there is one, and that of the idle timer are leaves.  What belongs to a flat
 * node - set, layers, view, cache, mode - comes and goes in the main thread
 * while the node is drained, and, as a resize comes in drained sections, too,
 * in one step with the graph locked for writing, or with the mode last.
 */
#ifndef BLOCK_SQCOW2_INT_H
#define BLOCK_SQCOW2_INT_H

#include "block/block-io.h"
#include "block/block_int.h"
#include "block/sqcow2.h"
#include "block/sqcow2-format.h"
#include "qcow2.h"

/* One layer below the active one; its place in an array is its index. */
typedef struct Sqcow2Layer {
    Sqcow2LayerKind kind;
    int fd;                     /* -1: read through @child or @pooled */
    BdrvChild *child;           /* of the layer set; or NULL */
    struct Sqcow2PooledFile *pooled;    /* too few descriptors; or NULL */
    uint64_t virtual_size;      /* bytes */
    uint64_t clip;              /* S9: bytes visible through the layers above */
    uint64_t file_size;         /* bytes; block devices: the device's */
    uint64_t l1_host_offset;
    uint32_t l1_entries;
    Qcow2CompressionType compression_type;
    bool has_stamp;
    bool writing;               /* a session was begun and not closed */
    uint8_t stamp[SQCOW2_STAMP_SIZE];
    char *filename;             /* full name, for opening and for messages */
} Sqcow2Layer;

/* Does its stamp stand for the state that it is in?  S3 */
static inline bool sqcow2_layer_is_stamped(const Sqcow2Layer *layer)
{
    return layer->kind == SQCOW2_LAYER_SQCOW2 && layer->has_stamp &&
           !layer->writing;
}

/* A whole chain below an active image, as following the links found it. */
typedef struct Sqcow2Chain {
    Sqcow2Layer *layers;        /* [0] is the base */
    uint32_t nb_layers;
    Sqcow2Record top_record;    /* of layers[nb_layers - 1] */
    bool top_has_record;
    char *distrust;             /* why the index does not fit; NULL: it does */
} Sqcow2Chain;

/* A part of the chain in which one file's index tells who owns what */
typedef struct Sqcow2Segment {
    int32_t shift;              /* a layer's place less its number there */
    uint16_t lowest;            /* place of the lowest layer of the segment */
    bool vouched;               /* false: just standard entries count (S1) */
    bool complete;              /* what it names is true and needs no shift */
} Sqcow2Segment;

/* One table for a region.  Its owners count if they are in its segment. */
typedef struct Sqcow2Source {
    uint64_t host_offset;       /* of the L2 table; 0: the layer is raw */
    uint32_t next;              /* below it; or SQCOW2_NO_SOURCE */
    uint16_t layer;             /* in whose file; nb_layers: the active's */
    uint16_t segment;
} Sqcow2Source;
#define SQCOW2_NO_SOURCE UINT32_MAX

/* Of what the tables of a view are to be merged */
typedef struct Sqcow2Sources {
    const Sqcow2Layer *layers;  /* not owned */
    uint32_t nb_layers;
    int cluster_bits;
    GArray *segments;           /* of Sqcow2Segment, from the top down */
    Sqcow2Source *sources;
    uint32_t nb_sources;
    uint32_t nb_allocated;
} Sqcow2Sources;

/*
 * A runtime root table: on-disk entries in host byte order (validated), plus
 * entries of kind SQCOW2_ROOT_MERGE for tables that no file has: their low 32
 * bits are the index of the region's highest source.
 */
#define SQCOW2_ROOT_MERGE 3
typedef struct Sqcow2View {
    uint64_t *root;
    uint32_t entries;
    bool vouched;               /* by the layer directly below, for all (S8) */
    Sqcow2Sources *sources;     /* NULL: nothing is to be merged */
} Sqcow2View;

typedef enum Sqcow2Mode {
    /* As qcow2: backing node or none */
    SQCOW2_MODE_OFF,
    /* Flat; S7 and S8 hold */
    SQCOW2_MODE_INDEXED,
    /*
     * Flat; @view was built in memory, and 0 and foreign entries of own
     * tables mean "ask the layer below"
     */
    SQCOW2_MODE_REBUILT,
} Sqcow2Mode;

extern BlockDriver bdrv_sqcow2;

/*
 * -DSQCOW2_AS_QCOW2, for tests only: this driver takes the place of qcow2's,
 * under its name, and gives an index to every image that it creates and that
 * can have one.  Upstream's tests of qcow2 then run on it as they are.
 */
#ifdef SQCOW2_AS_QCOW2
#define SQCOW2_IS_QCOW2 true
#else
#define SQCOW2_IS_QCOW2 false
#endif

typedef struct Sqcow2Cache Sqcow2Cache;
typedef struct Sqcow2IdleTimer Sqcow2IdleTimer;

typedef struct BDRVSqcow2State {
    BDRVQcow2State q;           /* must be first: upstream's code sees this */

    /*
     * Between OFF and the others: changed at open, in the main thread while
     * the node is drained and the graph locked for writing, and when it is
     * closed.  Between INDEXED and REBUILT: under q.lock.
     */
    Sqcow2Mode mode;
    bool keep_graph;            /* not to be folded: an export looks at it */
    bool two_ways;              /* flat; may have its backing node as well */
    uint16_t layer;             /* own index in the running chain */
    BdrvChild *set;             /* the layer set; NULL when not flat */
    Sqcow2Layer *layers;        /* owned by the layer set's node */
    Sqcow2View view;            /* of the layer below */
    Sqcow2Cache *cache;
    Sqcow2IdleTimer *idle_timer;    /* NULL: not wanted */
    uint64_t cache_bytes;       /* budget from the options; 0: default */
    char *distrust;             /* why the index is not used; NULL: it is */
    bool fits;                  /* S8: the layers are those of the record */

    /* Changed under q.lock, or in the main thread while drained */
    bool has_record;
    Sqcow2Record record;        /* as in the file */
    bool record_unsure;         /* a write failed: the file may have another */
    unsigned nb_resizing;       /* resizes in flight */
    bool revalidate;            /* after them the index is valid again */
    bool changed;               /* S3 is done; fast path reads it unlocked */
} BDRVSqcow2State;

/* What one lookup tells */
typedef struct Sqcow2Extent {
    Sqcow2ClusterKind kind;
    uint16_t owner;
    /* DATA: of the first byte; COMPRESSED: the descriptor, as in qcow2 */
    uint64_t host_offset;
    /* Of the same kind and owner; DATA: and adjacent in the owner's file */
    uint64_t bytes;
} Sqcow2Extent;

static inline bool sqcow2_has_index_bit(BDRVSqcow2State *s)
{
    return s->q.incompatible_features & SQCOW2_INCOMPAT_INDEX;
}

/* Bytes of guest address space that one L2 table covers */
static inline uint64_t sqcow2_region_size(const BDRVQcow2State *q)
{
    return 1ULL << (q->cluster_bits + q->l2_bits);
}

/* sqcow2-walk.c */

/*
 * Follow the backing links from the image @filename, which names @backing
 * with format @backing_fmt, down to the base, or just one hop when @one_hop.
 * Every layer is opened, locked (unless @locking is false), parsed and, when
 * @record is not NULL, verified hop by hop against it.
 * Blocking; any thread.
 *
 * @set: node to attach layers on other protocols than local files to; NULL:
 *       such layers cannot be indexed.  Main thread, no graph lock if given.
 *
 * Returns 0; -ENOTSUP with @errp set when a layer cannot be indexed; another
 * negative errno with @errp set, naming file and index, when the chain is
 * broken.  On success the caller frees @chain.
 */
typedef struct Sqcow2WalkOptions {
    const char *filename;       /* NULL: @backing is a full name */
    const char *backing;
    const char *backing_fmt;
    int cluster_bits;           /* of the active image */
    const Sqcow2Record *record; /* what to verify against, or NULL */
    const uint8_t *layer_table; /* encoded, of the active image, or NULL */
    bool one_hop;
    bool locking;
    bool may_pool;              /* layers may be closed and opened again */
    BlockDriverState *set;
} Sqcow2WalkOptions;

int sqcow2_walk(const Sqcow2WalkOptions *opts, Sqcow2Chain *chain,
                Error **errp);
void sqcow2_chain_free(Sqcow2Chain *chain);
void sqcow2_layer_free(Sqcow2Layer *layer);         /* what is in it */
void sqcow2_layers_free(Sqcow2Layer *layers, uint32_t nb_layers);

/* Set every layer's clip (S9) from the virtual sizes. */
static inline void sqcow2_set_clips(Sqcow2Layer *layers, uint32_t nb_layers)
{
    uint64_t clip = UINT64_MAX;

    for (uint32_t i = nb_layers; i-- > 0; ) {
        clip = MIN(clip, layers[i].virtual_size);
        layers[i].clip = clip;
    }
}

/* Read the record of a layer again.  False if it has none that counts. */
bool sqcow2_layer_record(const Sqcow2Layer *layer, Sqcow2Record *record);

/* Read a layer's layer table; NULL if it is damaged or empty. */
uint8_t *sqcow2_layer_read_table(const Sqcow2Layer *layer,
                                 const Sqcow2Record *record);

/* Is @layer as it was when @desc was made? */
typedef enum Sqcow2LayerCompared {
    SQCOW2_LAYER_SAME,
    SQCOW2_LAYER_UNSURE,        /* its modification time does not tell */
    SQCOW2_LAYER_CHANGED,
} Sqcow2LayerCompared;
Sqcow2LayerCompared sqcow2_compare_layer(const Sqcow2Layer *layer,
                                         const Sqcow2LayerDesc *desc);

/*
 * Describe a layer for the layer table.  Waits for up to 50 ms
 * until its modification time can be told from that of a later change.
 * Returns 0 or a negative errno with @errp set.
 */
int sqcow2_describe_layer(const Sqcow2Layer *layer, Sqcow2LayerDesc *desc,
                          Error **errp);

/*
 * Cluster size in bits of the backing file of an image to be created, or 0
 * when it has none or cannot be read.
 */
int sqcow2_peek_cluster_bits(const char *filename, const char *backing,
                             const char *backing_fmt);

/*
 * What the local qcow2 or sqcow2 image @filename is now, whatever is said of
 * it elsewhere; NONE if it is something else or cannot be read.
 */
Sqcow2LayerKind sqcow2_peek_kind(const char *filename);

/* sqcow2-descriptors.c */

/* A file system's clock may tick as slowly as this; if coarse, this */
#define SQCOW2_TICK_NS (50LL * SCALE_MS)
#define SQCOW2_COARSE_TICK_NS (2 * NANOSECONDS_PER_SECOND)

/* There is room for so many descriptors from the start. */
#define SQCOW2_EARLY_DESCRIPTORS 4090

typedef struct Sqcow2Pool Sqcow2Pool;
typedef struct Sqcow2PooledFile Sqcow2PooledFile;

/*
 * Make room for @n more descriptors than @fd at once.  In a process with
 * threads the kernel waits for an RCU grace period, 8 ms and more, each time
 * that it has to enlarge the table.
 */
void sqcow2_reserve_descriptors(int fd, uint32_t n);

/*
 * Open @path for reading, with O_NONBLOCK, raising the soft limit of open
 * files if need be.  Returns a descriptor or a negative errno with @errp set.
 */
int sqcow2_open_descriptor(const char *path, Error **errp);

/*
 * Was @fd, the latest one, among the last few that this process may have?
 * Raises the soft limit if that helps.
 */
bool sqcow2_descriptors_are_scarce(int fd);

/*
 * Can @n more files be opened, raising the soft limit if need be?  If not,
 * @errp is set.
 */
bool sqcow2_have_descriptors(uint32_t n, Error **errp);

/*
 * Take the locks of a reader that lets nobody write or resize, and look for
 * others who do.  OFD locks: closing the descriptor gives them up.
 * Returns 0 or a negative errno with @errp set.
 */
int sqcow2_lock_descriptor(int fd, Error **errp);

/* Give these locks up, if they are held. */
void sqcow2_unlock_descriptor(int fd);

/*
 * Read @bytes at @host_offset of one layer's file, zeros behind its end.
 * Blocking.  Returns 0 or a negative errno.
 */
int sqcow2_layer_pread(const Sqcow2Layer *layer, uint64_t host_offset,
                       uint64_t bytes, void *buf);

/*
 * Is the file of @layer a hole at @host_offset?  Sets *@bytes, which is greater
 * than 0, to the part from there that is alike.  What cannot be told is data:
 * of layers that have no descriptor of their own, and behind the end of a file
 * that has become shorter.  Blocks as lseek() does.  Any thread.
 */
bool sqcow2_layer_is_hole(const Sqcow2Layer *layer, uint64_t host_offset,
                          uint64_t *bytes);

/*
 * A descriptor of the layer, or a negative number if it has none.  Blocking.
 * Good until it is put back, once.
 */
int sqcow2_layer_get(const Sqcow2Layer *layer);
void sqcow2_layer_put(const Sqcow2Layer *layer);

/*
 * A pool of about @max_open descriptors; @locking: lock what is opened again.
 * Its files, and the caller until sqcow2_pool_unref(), keep it alive.  While
 * there are requests only _get, _co_get and _put may be called, from any
 * thread.
 */
Sqcow2Pool *sqcow2_pool_new(uint32_t max_open, bool locking);
void sqcow2_pool_unref(Sqcow2Pool *pool);

/*
 * As sqcow2_open_descriptor(), closing a file of the pool if need be; for a
 * layer that is added next.
 */
int sqcow2_pool_open(Sqcow2Pool *pool, const char *path, Error **errp);

/*
 * Let @pool have the descriptor of @layer, which is locked if locks are
 * wanted; @layer gets a pooled file instead.  A layer that has no descriptor,
 * or is not a regular file, stays as it is.
 */
void sqcow2_pool_add(Sqcow2Pool *pool, Sqcow2Layer *layer);
void sqcow2_pool_remove(Sqcow2PooledFile *file);

/* Has one of the layers no descriptor of its own? */
bool sqcow2_layers_are_pooled(const Sqcow2Layer *layers, uint32_t nb_layers);

/* The layer's index, for messages */
void sqcow2_pool_set_index(Sqcow2PooledFile *file, uint32_t index);

/* Give up the file's lock; from now on nothing of the pool is locked. */
void sqcow2_pool_unlock(Sqcow2PooledFile *file);

/* Set the device and inode in @st to the file's. */
void sqcow2_pool_file_id(const Sqcow2PooledFile *file, struct stat *st);

/* Use O_DIRECT from now on, where it can be used, or not. */
void sqcow2_pool_set_direct(Sqcow2PooledFile *file, bool direct);

/*
 * Returns the file's descriptor, to be put back by sqcow2_pool_put(), or a
 * negative errno; then the reason was reported.  _get blocks, and needs the
 * pool not to be used up by requests; of _co_get's callers each must hold no
 * other descriptor of the pool.
 */
int sqcow2_pool_get(Sqcow2PooledFile *file);
int coroutine_fn sqcow2_pool_co_get(Sqcow2PooledFile *file);
void sqcow2_pool_put(Sqcow2PooledFile *file);

/* sqcow2-layers.c */

/*
 * The user's option @name for the active image's file, or NULL; the layers'
 * files follow it.
 */
const char *GRAPH_RDLOCK
sqcow2_file_option(BlockDriverState *bs, const char *name);

/* Create an empty layer set node.  Main thread, no graph lock held. */
BlockDriverState *sqcow2_layers_new(BlockDriverState *bs, Error **errp);

/*
 * Hand @layers over to the layer set @set, in place of those that it has; no
 * requests are running.
 */
void sqcow2_layers_set(BlockDriverState *set, Sqcow2Layer *layers,
                       uint32_t nb_layers);

/*
 * Add a copy of @layer, whose descriptor and name the set takes over, on top
 * of the others.  No requests are running.  Returns the new array.
 */
Sqcow2Layer *sqcow2_layers_append(BlockDriverState *set,
                                  const Sqcow2Layer *layer);

/* Close and forget the top layer, a local file.  No requests are running. */
void sqcow2_layers_pop(BlockDriverState *set);

/*
 * Set the device and inode in @st to those of the file that is the layer,
 * whatever its name leads to by now.  Returns 0; -ENOTSUP if it is on another
 * protocol; or another negative errno.
 */
int sqcow2_layer_file_id(const Sqcow2Layer *layer, struct stat *st);

/*
 * Use O_DIRECT from now on if the image does, or not: sqcow2_layer_pread()
 * needs no alignment.
 */
void sqcow2_layers_set_direct(BlockDriverState *set, bool direct);

static inline uint64_t sqcow2_set_offset(uint16_t layer, uint64_t host_offset)
{
    return (uint64_t)layer << SQCOW2_HOST_BITS | host_offset;
}

/* sqcow2-cache.c; all with q.lock held */

Sqcow2Cache *sqcow2_cache_new(size_t slice_bytes, uint64_t max_bytes);
void sqcow2_cache_free(Sqcow2Cache *c);
size_t sqcow2_cache_slice_bytes(const Sqcow2Cache *c);

/* Forget all slices. */
void sqcow2_cache_clear(Sqcow2Cache *c);

/* Returns the slice with this key, or NULL. */
uint64_t *sqcow2_cache_find(Sqcow2Cache *c, uint64_t key);

/*
 * Returns memory for the slice with this key, which is not in the cache,
 * evicting another one if the budget is used up; NULL: out of memory.  The
 * caller fills it, then calls sqcow2_cache_add() - or not, on error.
 */
uint64_t *sqcow2_cache_take(Sqcow2Cache *c);
void sqcow2_cache_add(Sqcow2Cache *c, uint64_t key, uint64_t *slice);

/* sqcow2-merge.c */

Sqcow2Sources *sqcow2_sources_new(const Sqcow2Layer *layers,
                                  uint32_t nb_layers, int cluster_bits);
void sqcow2_sources_free(Sqcow2Sources *s);

/* Returns the index of a new source in the last segment, or NO_SOURCE. */
uint32_t sqcow2_sources_add(Sqcow2Sources *s, uint16_t layer,
                            uint64_t host_offset);

/*
 * Merge @nb_entries entries, from @first on, of the L2 table for region
 * @l1_index, a MERGE entry of @view; big-endian, as in a file.  Reads through
 * the layer set @set, or blocking if that is NULL.  q.lock held in coroutines.
 * Returns 0 or a negative errno with @errp set: -EINVAL for an entry that
 * breaks a rule.
 */
int GRAPH_RDLOCK sqcow2_merge(BlockDriverState *bs, const Sqcow2View *view,
                              uint32_t l1_index, uint32_t first,
                              uint32_t nb_entries, BdrvChild *set,
                              uint64_t *merged, Error **errp);

/*
 * Is there a root entry that says the same as the whole table @merged of
 * region @l1_index?  Blocking.
 * Returns 1 and sets @root_entry, 0, or a negative errno.
 */
int GRAPH_RDLOCK sqcow2_merge_root(BlockDriverState *bs,
                                   const Sqcow2View *view, uint32_t l1_index,
                                   const uint64_t *merged,
                                   uint64_t *root_entry);
/*
 * Free the memory of slices that were neither found nor added since the last
 * call.  One that is taken and not added yet stays.
 */
void sqcow2_cache_clean(Sqcow2Cache *c);

/* sqcow2-idle.c */

/*
 * Clean the cache every "cache-clean-interval", from now on until it is
 * stopped; starting once more is starting anew.  The node has no requests.
 */
void sqcow2_idle_start(BlockDriverState *bs);
void sqcow2_idle_stop(BlockDriverState *bs);

/* sqcow2-lookup.c */

/*
 * Who owns the cluster at @guest_offset, and where?  For up to @bytes, which
 * must be greater than 0.  Called with q.lock held; the node is flat.
 * Returns 0, or -EIO when a table cannot be read or breaks a rule (reported
 * once as corruption).
 */
int GRAPH_RDLOCK sqcow2_lookup(BlockDriverState *bs, uint64_t guest_offset,
                               uint64_t bytes, Sqcow2Extent *extent);

/* An empty cache for the current slice size; q.lock held, or no requests. */
void sqcow2_new_cache(BDRVSqcow2State *s);

/* Fill a new own L2 table's slice from the view below; q.lock held. */
int GRAPH_RDLOCK sqcow2_inherit_slice(BlockDriverState *bs, int l1_index,
                                      unsigned slice, uint64_t *l2_slice);

/* sqcow2-record.c */

/*
 * Take the record from the header extension that upstream's code has read.
 * Without one, or with one that does not count (S2), has_record is false.
 */
void sqcow2_record_load(BlockDriverState *bs);

/*
 * Write s->record in place and flush it.  q.lock held in coroutines.
 * Returns 0 or a negative errno.
 */
int GRAPH_RDLOCK sqcow2_record_write(BlockDriverState *bs);

/*
 * Give the image its feature bit and the record @rec with a new stamp, in one
 * header write, and flush it.  Not for an image with a record that counts.
 * Returns 0, or a negative errno with @errp set; a plain image is still one
 * then if the header could not be written.
 */
int GRAPH_RDLOCK sqcow2_record_create(BlockDriverState *bs,
                                      const Sqcow2Record *rec, Error **errp);

/*
 * Take feature bit and record away, in one header write, and flush it.
 * Returns 0, or a negative errno with @errp set.
 */
int GRAPH_RDLOCK sqcow2_record_remove(BlockDriverState *bs, Error **errp);

/*
 * Make the record say "no index, no tables", on stable storage: what they
 * name is leaked.  q.lock held in coroutines.  Returns 0 or a negative errno.
 */
int GRAPH_RDLOCK sqcow2_record_drop_tables(BlockDriverState *bs);

/* Draw a new stamp into s->record.  Returns 0 or -errno with @errp set. */
int sqcow2_record_new_stamp(BDRVSqcow2State *s, Error **errp);

/* S3: to be called before any change.  _locked: with q.lock held. */
int coroutine_fn GRAPH_RDLOCK sqcow2_begin_change(BlockDriverState *bs);
int GRAPH_RDLOCK sqcow2_begin_change_locked(BlockDriverState *bs);

/* S7: the index is wrong from now on; q.lock held in coroutines. */
int GRAPH_RDLOCK sqcow2_invalidate_index(BlockDriverState *bs);

/* sqcow2-tables.c */

/* An L2 table of the own file */
typedef struct Sqcow2OwnTable {
    int64_t host_offset;
    uint32_t l1_index;
    uint32_t nb_users;          /* L1 tables that name it */
    uint64_t disk_end;          /* size of its largest disk; 0: VM state */
    uint64_t *entries;          /* q.l2_size, big-endian; during the visit */
    uint32_t progress;          /* this is table @progress of @total */
    uint32_t total;
} Sqcow2OwnTable;

/* Returns 1 if it changed table->entries, 0, or a negative errno. */
typedef int Sqcow2OwnTableFunc(BlockDriverState *bs, Sqcow2OwnTable *table,
                               void *opaque);

typedef struct Sqcow2Progress {
    BlockDriverAmendStatusCB *func;
    void *opaque;
} Sqcow2Progress;

/*
 * Call @func for every L2 table of the active disk and of internal snapshots,
 * once for each; write those that it changes if @write, else it must change
 * none.  No table is flushed.  q.lock held in coroutines.
 * Returns 0, or a negative errno with @errp set: -EINVAL when L1 tables or
 * refcounts are damaged.
 */
int GRAPH_RDLOCK sqcow2_for_each_own_table(BlockDriverState *bs, bool write,
                                           Sqcow2OwnTableFunc *func,
                                           void *opaque, Error **errp);

/*
 * Write the L1 table of the active disk as it is in memory, not flushed, if
 * that on disk differs.
 * q.lock held in coroutines.  Returns 0 or a negative errno.
 */
int GRAPH_RDLOCK sqcow2_write_l1(BlockDriverState *bs);

/*
 * Turn all foreign entries into 0, which means "ask the layer below" too
 * while the index is not valid: it must not be.  q.lock held in coroutines.
 * @progress: may be NULL.  Returns 0, or a negative errno with @errp set.
 */
int GRAPH_RDLOCK sqcow2_forget_foreign(BlockDriverState *bs,
                                       Sqcow2Progress *progress, Error **errp);

/* sqcow2-index.c */

void sqcow2_view_free(Sqcow2View *view);

/* Read the root table that @record names; its entries are not validated. */
int sqcow2_view_read(BlockDriverState *bs, const Sqcow2Record *record,
                     Sqcow2View *view, Error **errp);

/*
 * Load and validate the root table that the record names; s->layers holds
 * the chain that the record is for.
 * Returns 0, or a negative errno with @errp set.
 */
int sqcow2_view_load(BlockDriverState *bs, const Sqcow2Record *record,
                     Sqcow2View *view, Error **errp);

/* Read the root table of @layer; its entries are not validated. */
int sqcow2_layer_read_root(const Sqcow2Layer *layer,
                           const Sqcow2Record *record, Sqcow2View *view,
                           Error **errp);

/*
 * Read the L1 table of @layer, without VM state, in host byte order.
 * Returns its number of entries or a negative errno with @errp set.
 */
int64_t sqcow2_read_l1(const Sqcow2Layer *layer, uint32_t index,
                       uint64_t region_size, uint64_t **l1, Error **errp);

/* Returns 0, or -EINVAL with @errp set if no L2 table can stand there. */
int sqcow2_table_in_file(const Sqcow2Layer *layer, uint32_t index,
                         uint64_t host_offset, int cluster_bits, Error **errp);

/*
 * The view of @lower, whose own index is valid: its L1 table where set, its
 * root table elsewhere.  Blocking; constant work, whatever the chain's length.
 * Returns 0 or a negative errno with @errp set.
 */
int sqcow2_view_share(const Sqcow2Layer *lower, const Sqcow2Record *record,
                      int cluster_bits, Sqcow2View *view, Error **errp);

/* sqcow2-build.c */

/*
 * Build the view of layers[nb_layers - 1] for the image @bs above, whose
 * record is @record if its index is valid, else NULL.  Without @trust no
 * index is believed, just standard entries (S1).
 * Reads L1 and root tables, blocking; @layers must outlive the view.
 * Returns 0 or a negative errno with @errp set.
 */
int sqcow2_view_build(BlockDriverState *bs, const Sqcow2Record *record,
                      const Sqcow2Layer *layers, uint32_t nb_layers,
                      bool trust, Sqcow2View *view, Error **errp);

/* sqcow2-same-files.c */

/*
 * Has each of @layers the same file open as the node for it, which is @bs for
 * the top one, and so on downwards?  A name may lead to another file than it
 * did when the other one opened it, and the guest must not see that one's
 * content.  Of what is on other protocols nobody can tell.  _is_file: of one
 * layer; @index is its number, for the message.
 * Returns 0, or -EINVAL with @errp set.
 */
int GRAPH_RDLOCK sqcow2_check_is_file(const Sqcow2Layer *layer, uint32_t index,
                                      BlockDriverState *bs, Error **errp);
int GRAPH_RDLOCK sqcow2_check_same_files(BlockDriverState *bs,
                                         const Sqcow2Layer *layers,
                                         uint32_t nb_layers, Error **errp);

/* sqcow2-store.c */

/*
 * Store the view that was built in memory, complete the own L2 tables, and
 * make the index valid: REBUILT turns into INDEXED.  Or make a base of an
 * image that has no layers below.  The image is writable; q.lock held in
 * coroutines, and taken, polling, elsewhere.
 * Returns 0, or a negative errno with @errp set; then all goes on as before:
 * -ENOTSUP if an internal snapshot is larger than the disk, -EBUSY if the image
 * is being resized, -ENOMEDIUM if it turned out to be too corrupt.
 */
int GRAPH_RDLOCK sqcow2_index_store(BlockDriverState *bs, Error **errp);

/*
 * Give a freshly created image its feature bit, record and, when the layers
 * below can be indexed, its index.  In all other cases the record says "no
 * index", and opening the image builds one in memory.
 */
int coroutine_fn GRAPH_RDLOCK
sqcow2_index_create(BlockDriverState *bs, Error **errp);

/*
 * Store an index in an image that has no own L2 tables and no valid index, as
 * in a new one: by looking at the layer directly below.  The image is
 * writable and has no requests; it was opened without its layers.
 * Returns 0, -ENOTSUP if the image is not like that, or another negative errno
 * with @errp set.
 */
int GRAPH_RDLOCK sqcow2_index_empty(BlockDriverState *bs, Error **errp);

/*
 * Free what @old, which the header does not hold any more, names: its root
 * and layer tables, and merged tables.  Only a table whose checksum is right
 * is certainly still ours; better leak the clusters of another than free
 * somebody's data.  q.lock held in coroutines.
 * @kept: what is named now; merged tables that are in it, too, stay.  Or NULL
 */
void GRAPH_RDLOCK sqcow2_free_tables(BlockDriverState *bs,
                                     const Sqcow2Record *old,
                                     const Sqcow2View *kept);

/*
 * S10 keeps us from telling what lies behind the active disk's end.
 * Returns 0, or -ENOTSUP with @errp set: no index can be stored.
 */
int sqcow2_snapshots_fit(BDRVSqcow2State *s, Error **errp);

/* Read the layer table; NULL with @errp set on error, or if empty. */
uint8_t *sqcow2_read_layer_table(BlockDriverState *bs,
                                 const Sqcow2Record *record, Error **errp);

/* sqcow2-amend.c */
int GRAPH_RDLOCK
sqcow2_amend_options(BlockDriverState *bs, QemuOpts *opts,
                     BlockDriverAmendStatusCB *status_cb, void *cb_opaque,
                     bool force, Error **errp);
QemuOptsList *sqcow2_amend_opts(void);

/* sqcow2-check.c */
int coroutine_fn GRAPH_RDLOCK sqcow2_co_check(BlockDriverState *bs,
                                              BdrvCheckResult *result,
                                              BdrvCheckMode fix);

/*
 * Store an index that is made anew, even if that of the image is trusted.  The
 * image is writable and has a record, and is flat or a base; q.lock held in
 * coroutines.
 * @full: from standard entries alone (S1); it is, too, if that of the image
 *        is trusted.  Else from what of the chain's indexes is still true.
 * @truth: the view from standard entries alone, taken over; NULL: build it.
 * Returns 0, or a negative errno with @errp set as sqcow2_index_store().
 */
int GRAPH_RDLOCK sqcow2_index_rebuild(BlockDriverState *bs, bool full,
                                      Sqcow2View *truth, Error **errp);

/* sqcow2-chain.c; in the main thread, without graph lock if not said */

/*
 * Drop all that makes @bs flat; it is drained.  _locked: with the graph locked
 * for writing, as by those who need that no request of any thread, a resize
 * either, sees the node before it has other means to read.
 */
void sqcow2_drop_flat(BlockDriverState *bs);
void GRAPH_WRLOCK sqcow2_drop_flat_locked(BlockDriverState *bs);

/* Can this image have an index? */
bool sqcow2_is_indexable(BlockDriverState *bs);

/* Does the user say something of the backing file? */
bool sqcow2_has_backing_options(QDict *options);

/* Are the layers below @bs to be locked? */
bool GRAPH_RDLOCK sqcow2_locking_wanted(BlockDriverState *bs);

/*
 * @bs, which qcow2's code has just read anew, was inactive, and another
 * process may have written to the image and its layers: lock and look at them
 * again.  @old: the record that @bs had before; NULL: none.
 * Returns 0, or a negative errno with @errp set.  Then @bs is as before and
 * must stay inactive, or bs->drv is NULL.
 */
int coroutine_fn GRAPH_RDLOCK
sqcow2_reactivate(BlockDriverState *bs, const Sqcow2Record *old, Error **errp);

/*
 * Should an index be stored in @bs?  So it is in a writable base, one that lost
 * its layers to a stream or rebase as well, whose index is not valid; and in a
 * flat node that became writable after its index was rebuilt in memory.
 */
bool GRAPH_RDLOCK sqcow2_wants_index(BlockDriverState *bs);

/* If so, store it.  On failure what is in memory serves on.  Main thread. */
void sqcow2_index_wanted(BlockDriverState *bs);

/*
 * Take the backing node away.  A resize in another thread may find the image
 * too corrupt until the graph is locked for this; then the node has no driver,
 * nobody reads from it, and the backing node stays.  @bs is drained.
 */
void sqcow2_drop_backing(BlockDriverState *bs);

/* As sqcow2_open_graph() and sqcow2_open_graph_to(), but for good */
int sqcow2_make_real(BlockDriverState *bs, bool all, Error **errp);
int sqcow2_make_real_to(BlockDriverState *bs, const char *file, Error **errp);

/* Was sqcow2_disable_flat() called? */
bool sqcow2_flat_is_disabled(void);

/*
 * Attach a layer set; takes the reference over, also on failure.  _locked: the
 * graph is locked for writing.
 * Returns 0, or a negative errno with @errp set: -ENOMEDIUM if @bs has lost its
 * driver, as a resize in another thread found the image too corrupt.
 */
int sqcow2_attach_set(BlockDriverState *bs, BlockDriverState *set_bs,
                      Error **errp);
int GRAPH_WRLOCK
sqcow2_attach_set_locked(BlockDriverState *bs, BlockDriverState *set_bs,
                         Error **errp);

/* Start with an empty cache for the current slice size and interval. */
void sqcow2_renew_cache(BlockDriverState *bs);

/* sqcow2-read.c */
int coroutine_fn GRAPH_RDLOCK
sqcow2_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset,
                      BdrvRequestFlags flags);
int coroutine_fn GRAPH_RDLOCK
sqcow2_co_block_status(BlockDriverState *bs, bool want_zero, int64_t offset,
                       int64_t bytes, int64_t *pnum, int64_t *map,
                       BlockDriverState **file);
int coroutine_fn GRAPH_RDLOCK
sqcow2_co_copy_range_from(BlockDriverState *bs, BdrvChild *src,
                          int64_t src_offset, BdrvChild *dst,
                          int64_t dst_offset, int64_t bytes,
                          BdrvRequestFlags read_flags,
                          BdrvRequestFlags write_flags);

/* sqcow2-write.c: install the callbacks that write */
void sqcow2_write_init(BlockDriver *drv);

#endif /* BLOCK_SQCOW2_INT_H */
