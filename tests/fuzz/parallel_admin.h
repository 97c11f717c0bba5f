/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Test of requests from several threads: what the main thread does meanwhile
 */
#ifndef PARALLEL_ADMIN_H
#define PARALLEL_ADMIN_H

#include "system/iothread.h"
#include "parallel_fuzz.h"

/* Open the active layer, in the first of the threads. */
BlockBackend *admin_open(const Plan *p, IOThread **threads);
void admin_close(void);

/* Do one thing, or nothing for a while. */
void admin_work(void);

/* The names of what is not to be done */
void admin_without(const char *names);

const char *admin_top(void);    /* name of the active layer's file */
void admin_say(FILE *f);        /* what was done */

/* parallel_fuzz.c */
void run_main_loop(void);
void park_workers(bool park);
void expect_filter(bool expected);
BlockBackend *open_image(const char *file, const char *format, int flags);
void create_image(const Plan *p, const char *file, const char *format,
                  const char *base, const char *base_format, uint64_t size);

#endif /* PARALLEL_ADMIN_H */
