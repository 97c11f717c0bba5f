/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Run the fuzzers' corpus, without a fuzzer
 *
 *   replay FILE    one input on each line, in hex; lines with # are comments
 *
 * An input with records (hostile_chain.h) has its head and each record as a
 * word; zeros at a record's end are left out.
 *
 * A line is shown before it is run, so that the last one is that which failed.
 *
 * With HOSTILE_FAULTS, then each request of each operation fails in turn.
 */
#include "qemu/osdep.h"
#include "hostile_chain.h"
#include "hostile_fuzzer.h"

static char *make_folder(void)
{
    const char *parent = access("/dev/shm", W_OK) ? g_get_tmp_dir()
                                                  : "/dev/shm";
    char *folder = g_build_filename(parent, "sqcow2-hostile-XXXXXX", NULL);

    g_assert(g_mkdtemp(folder));
    g_setenv("SQCOW2_FUZZ_DIR", folder, true);
    return folder;
}

static void remove_folder(char *folder)
{
    g_autoptr(GDir) dir = g_dir_open(folder, 0, NULL);
    const char *name;

    while ((name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(folder, name, NULL);

        unlink(path);
    }
    rmdir(folder);
    g_free(folder);
}

static void run_line(const char *line)
{
    g_auto(GStrv) words = g_strsplit(line, " ", -1);
    g_autoptr(GByteArray) data = g_byte_array_new();

    for (int i = 0; words[i]; i++) {
        guint end = data->len + RECORD_BYTES;

        for (const char *c = words[i]; *c; c += 2) {
            uint8_t byte = g_ascii_xdigit_value(c[0]) << 4 |
                           g_ascii_xdigit_value(c[1]);

            g_assert(g_ascii_isxdigit(c[0]) && g_ascii_isxdigit(c[1]));
            g_byte_array_append(data, &byte, 1);
        }
        while (i && data->len < end) {
            g_byte_array_append(data, (const uint8_t *)"", 1);
        }
    }
    LLVMFuzzerTestOneInput(data->data, data->len);
}

/*
 * On each chain each operation, with a fault at the n-th request; something is
 * written before and after, and the image is checked and indexed anew.
 */
#define NB_OPERATIONS 17
#define NB_REQUESTS 64

static int run_faults(void)
{
    int nb = 0;

    for (unsigned chain = 0; chain < NB_CHAINS; chain++) {
        for (unsigned i = 0; i < NB_OPERATIONS * NB_REQUESTS; i++) {
            g_autofree char *line = g_strdup_printf(
                "%02x00 86010302002803030701 %02x%02x010502000908031401023c02 "
                "86010602014603020901 82 84 82",
                chain, RECORD_IS_OPERATION | RECORD_HAS_FAULT |
                i / NB_REQUESTS, i % NB_REQUESTS);

            printf("fault: %s\n", line);
            fflush(stdout);
            run_line(line);
            nb++;
        }
    }
    return nb;
}

int main(int argc, char **argv)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    char *folder;
    int nb = 0;

    if (argc != 2 || !g_file_get_contents(argv[1], &text, NULL, NULL)) {
        fprintf(stderr, "usage: %s FILE\n", argv[0]);
        return 1;
    }
    lines = g_strsplit(text, "\n", -1);
    folder = make_folder();
    LLVMFuzzerInitialize(&argc, &argv);
    for (int i = 0; lines[i]; i++) {
        if (*lines[i] && *lines[i] != '#') {
            printf("line %d\n", i + 1);
            fflush(stdout);
            run_line(lines[i]);
            nb++;
        }
    }
    if (HOSTILE_FAULTS) {
        nb += run_faults();
    }
    remove_folder(folder);
    printf("%d inputs\n", nb);
    return nb ? 0 : 1;
}
