# SPDX-License-Identifier: GPL-2.0-or-later
#
# Short cuts. Each does the set-up that it needs and has not been done: packages, configure, build.
#
#   make demo              what sqcow2 does, seen on a running system
#   make check             every test; the last line says "N passed, N failed"
#   make check SANITIZE=address,undefined
#                          unit tests, iotests, power cuts and parallel requests on a build with
#                          sanitizers, in build-sanitize; each of their findings is a failure
#   make check-iotests     upstream's iotests of qcow2, on qcow2 and on sqcow2 in its place; half
#                          an hour;  ARGS="..." goes to scripts/upstream-iotests
#   make check-disabled    that a build with -Dsqcow2=disabled behaves as upstream's
#   make coverage          which lines of our files the tests run; half an hour
#   make bench             all measurements;  make bench-quick: a few minutes
#   make fuzz              random chains against the same chains of qcow2 and a QEMU without our
#                          patches, in build-upstream;  ARGS="..." goes to tests/fuzz/chain_fuzz.py
#   make fuzz-hostile      damaged images and tables, guided by coverage, with clang and its
#                          sanitizers, in build-fuzz;  ARGS="..." goes to tests/fuzz/hostile
#   make fuzz-parallel     requests of several threads at once on warm overlays, some minutes;
#                          ARGS="..." goes to build/tests/fuzz/parallel-fuzz
#   make fork-tree DIR=d   the whole patched QEMU, our files copied in, to read as one tree
#
# To build by hand: ./configure && ninja -C build

all: build

deps-%:
	@scripts/install-deps build $*

build: deps-build
	@./configure --update
	@ninja -C build

prepare-%: deps-%
	@$(MAKE) --no-print-directory build

demo: prepare-test
	@tests/demo/run

# What iotests run, and our own tests in C; ninja makes upstream's unit tests and qtests, too.
programs := qemu-img qemu-io qemu-nbd storage-daemon/qemu-storage-daemon qemu-system-x86_64
our_tests := $(patsubst tests/unit/%.c,sqemu/%,$(wildcard tests/unit/test-sqcow2-*.c)) \
    $(addprefix tests/fuzz/,$(addprefix replay-hostile-,images images-1k images-faults tables) parallel-fuzz)

ifeq ($(SANITIZE),)
check: deps-test
	@./configure --update
	@ninja -C build $(programs) $(our_tests)
	@scripts/check
else
check: build-sanitize
	@BUILD=build-sanitize scripts/check
endif

comma := ,
sanitizers := $(subst $(comma), ,$(SANITIZE))

build-sanitize: deps-test
	$(if $(filter-out address undefined,$(sanitizers)),$(error SANITIZE: address, undefined or both))
	@mkdir -p $@
	@cd $@ && ../configure $(if $(filter address,$(sanitizers)),--enable-asan) \
	    $(if $(filter undefined,$(sanitizers)),--enable-ubsan)
	@ninja -C $@ $(programs) $(our_tests)

build-as-qcow2: deps-test
	@mkdir -p $@
	@cd $@ && ../configure --extra-cflags=-DSQCOW2_AS_QCOW2
	@ninja -C $@ $(programs)

check-iotests: prepare-test build-as-qcow2
	@scripts/upstream-iotests $(ARGS)

# What random chains need: programs that start fast, ours and upstream's without the queue.
tools_options := --static --disable-pie --target-list= --disable-system --without-default-features \
    --enable-tools --enable-linux-aio --enable-linux-io-uring --enable-zstd

build-tools: deps-test
	@mkdir -p $@
	@cd $@ && ../configure $(tools_options) --enable-sqcow2
	@ninja -C $@ qemu-img qemu-io

build-upstream: deps-build
	@mkdir -p $@
	@cd $@ && ../configure --unpatched $(tools_options)
	@ninja -C $@ qemu-img qemu-io

build-disabled: deps-test
	@mkdir -p $@
	@cd $@ && ../configure --disable-sqcow2
	@ninja -C $@ $(programs)

check-disabled: prepare-test build-disabled
	@scripts/check disabled

build-coverage: deps-test
	@mkdir -p $@
	@cd $@ && ../configure --cc=$(CURDIR)/scripts/coverage-cc
	@ninja -C $@

coverage: build-coverage
	@scripts/coverage clear
	@scripts/coverage run
	@scripts/coverage table

bench: prepare-bench
	@bench/run

bench-quick: prepare-bench
	@bench/run --quick

fuzz: build-tools build-upstream
	@tests/fuzz/chain_fuzz.py --build build-tools --reference build-upstream $(ARGS)

build-fuzz: deps-test
	@mkdir -p $@
	@cd $@ && ../tests/fuzz/hostile --configure
	@ninja -C $@ $(addprefix sqemu/fuzz-hostile-,images images-1k images-faults tables)

fuzz-hostile: build-fuzz
	@tests/fuzz/hostile --build build-fuzz $(ARGS)

fuzz-parallel: prepare-test
	@build/tests/fuzz/parallel-fuzz $(or $(ARGS),--rounds 40)

fork-tree:
	@test -n "$(DIR)" || { echo 'make fork-tree DIR=folder (which must not exist)' >&2; exit 2; }
	@COMPLETE=1 scripts/upstream unpack "$(DIR)"
	@scripts/upstream apply "$(DIR)"
	@scripts/upstream overlay "$(DIR)" copy
	@echo "$(DIR): QEMU with the patch queue applied and our files copied in"

.PHONY: all build build-as-qcow2 build-coverage build-disabled build-fuzz build-sanitize \
        build-tools build-upstream demo check check-disabled check-iotests \
        coverage bench bench-quick fuzz fuzz-hostile fuzz-parallel fork-tree
.NOTPARALLEL:
