/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What libFuzzer calls, and what the linker puts in place of functions of
 * QEMU's (--wrap)
 */
#ifndef HOSTILE_FUZZER_H
#define HOSTILE_FUZZER_H

#include "block/thread-pool.h"
#include "../../block/sqcow2-int.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size,
                               unsigned int seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *data1, size_t size1,
                                 const uint8_t *data2, size_t size2,
                                 uint8_t *out, size_t max_out_size,
                                 unsigned int seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

/* hostile_faults.c: when armed, some requests succeed, and then one fails */
#ifndef HOSTILE_FAULTS
#define HOSTILE_FAULTS 0
#endif

extern struct Fault {
    unsigned after;
    bool armed;
    bool fired;                 /* to be reset by who looks at it */
} fault;

/* From now on requests of "file" nodes do as they are told. */
void fault_install(void);

/* What sanitizers ask for */
const char *__lsan_default_suppressions(void);
const char *__asan_default_options(void);

void __real_qcow2_signal_corruption(BlockDriverState *bs, bool fatal,
                                    int64_t offset, int64_t size,
                                    const char *message_format, ...)
    G_GNUC_PRINTF(5, 6);
void __wrap_qcow2_signal_corruption(BlockDriverState *bs, bool fatal,
                                    int64_t offset, int64_t size,
                                    const char *message_format, ...)
    G_GNUC_PRINTF(5, 6);
int coroutine_fn __wrap_thread_pool_submit_co(ThreadPoolFunc *func, void *arg);
int __real_sqcow2_layer_pread(const Sqcow2Layer *layer, uint64_t host_offset,
                              uint64_t bytes, void *buf);
int __wrap_sqcow2_layer_pread(const Sqcow2Layer *layer, uint64_t host_offset,
                              uint64_t bytes, void *buf);

#endif /* HOSTILE_FUZZER_H */
