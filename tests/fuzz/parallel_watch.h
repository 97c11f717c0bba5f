/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test of requests from several threads: the functions that are replaced, and
 * what replaces them; ld --wrap in meson.build names them, too
 */
#ifndef PARALLEL_WATCH_H
#define PARALLEL_WATCH_H

#include <sys/uio.h>
#include "block/thread-pool.h"
#include "../../block/sqcow2-int.h"

ssize_t __real_preadv64v2(int fd, const struct iovec *iov, int niov, off_t pos,
                          int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *iov, int niov, off_t pos,
                          int flags);
void __real_timer_mod(QEMUTimer *ts, int64_t expire_time);
void __wrap_timer_mod(QEMUTimer *ts, int64_t expire_time);
int coroutine_fn __real_thread_pool_submit_co(ThreadPoolFunc *func, void *arg);
int coroutine_fn __wrap_thread_pool_submit_co(ThreadPoolFunc *func, void *arg);

int __real_sqcow2_lookup(BlockDriverState *bs, uint64_t guest_offset,
                         uint64_t bytes, Sqcow2Extent *extent);
int __wrap_sqcow2_lookup(BlockDriverState *bs, uint64_t guest_offset,
                         uint64_t bytes, Sqcow2Extent *extent);
int __real_sqcow2_init_l2_slice(BlockDriverState *bs, int l1_index,
                                unsigned slice, uint64_t *l2_slice);
int __wrap_sqcow2_init_l2_slice(BlockDriverState *bs, int l1_index,
                                unsigned slice, uint64_t *l2_slice);

uint64_t *__real_sqcow2_cache_find(Sqcow2Cache *c, uint64_t key);
uint64_t *__wrap_sqcow2_cache_find(Sqcow2Cache *c, uint64_t key);
uint64_t *__real_sqcow2_cache_take(Sqcow2Cache *c);
uint64_t *__wrap_sqcow2_cache_take(Sqcow2Cache *c);
void __real_sqcow2_cache_add(Sqcow2Cache *c, uint64_t key, uint64_t *slice);
void __wrap_sqcow2_cache_add(Sqcow2Cache *c, uint64_t key, uint64_t *slice);
void __real_sqcow2_cache_clear(Sqcow2Cache *c);
void __wrap_sqcow2_cache_clear(Sqcow2Cache *c);
void __real_sqcow2_cache_clean(Sqcow2Cache *c);
void __wrap_sqcow2_cache_clean(Sqcow2Cache *c);
void __real_sqcow2_cache_free(Sqcow2Cache *c);
void __wrap_sqcow2_cache_free(Sqcow2Cache *c);

int __real_qcow2_cache_get(BlockDriverState *bs, Qcow2Cache *c, uint64_t offset,
                           void **table);
int __wrap_qcow2_cache_get(BlockDriverState *bs, Qcow2Cache *c, uint64_t offset,
                           void **table);
void __real_qcow2_cache_clean_unused(Qcow2Cache *c);
void __wrap_qcow2_cache_clean_unused(Qcow2Cache *c);
int __real_qcow2_cache_destroy(Qcow2Cache *c);
int __wrap_qcow2_cache_destroy(Qcow2Cache *c);

#endif /* PARALLEL_WATCH_H */
