/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What libFuzzer calls, and what the linker puts in place of functions of
 * QEMU's (--wrap)
 */
#ifndef HOSTILE_FUZZER_H
#define HOSTILE_FUZZER_H

#include "block/thread-pool.h"
#include "../../block/qcow2.h"

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size,
                               unsigned int seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *data1, size_t size1,
                                 const uint8_t *data2, size_t size2,
                                 uint8_t *out, size_t max_out_size,
                                 unsigned int seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

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

#endif /* HOSTILE_FUZZER_H */
