#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Differential fuzzer: sqcow2 chains against the same chains of qcow2 layers.

A run is a list of random steps on a tree of images. Each step runs twice: in directory "a" with
sqcow2 layers, in directory "b" with qcow2 layers in their place, by the binaries of --reference
(those of "make build-upstream" are upstream's, unpatched). Raw and plain qcow2 layers are the same
in both. Exit statuses, what is read during a session, and from time to time the full content of
every image (also those whose lower layers were changed, or replaced by older copies, behind their
back) must be equal, and no image of "a" may be corrupt.

Writes in $TMPDIR, else /var/tmp, only. A run that fails is shrunk and printed as a shell
script. Known to be avoided: a compressed write that is not the first change of its session
(a bug of upstream's, silent corruption of qcow2 images).
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from typing import Callable, Optional

from chain_steps import Generator, Image, Step, below, fmt

KNOWN_CRASHES = (-9,)  # our own "sigraise 9"
TIMEOUT = 60
DUMP_LINE = re.compile(r"^[0-9a-f]{8,}: ", re.M)


Builds = dict[str, str]     # of each world


class Mismatch(Exception):
    """The two worlds differ, or a program crashed."""


class Executor:
    """Runs steps in both worlds; raises Mismatch."""

    def __init__(self, builds: Builds, workdir: str) -> None:
        self.builds = builds
        self.dir = workdir
        self.tree: dict[str, Image] = {}
        self.snapshot_sizes: dict[str, int] = {}    # of the disk, by the snapshot's name
        self.copies: dict[str, Image] = {}
        self.script: list[str] = []
        self.commands = 0
        shutil.rmtree(workdir, ignore_errors=True)
        for world in "ab":
            os.makedirs(os.path.join(workdir, world))

    def run(self, world: str, argv: list[str]) -> subprocess.CompletedProcess[str]:
        self.commands += 1
        if world == "a":
            self.script.append(" ".join(
                f"'{arg}'" if re.search(r"[^\w.,=/:-]", arg) or not arg else arg
                for arg in argv))
        argv = [os.path.join(self.builds[world], argv[0])] + argv[1:]
        try:
            done = subprocess.run(argv, cwd=os.path.join(self.dir, world), text=True,
                                  errors="replace", stdin=subprocess.DEVNULL,
                                  capture_output=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as expired:
            raise Mismatch(f"world {world}: {' '.join(argv)}: hangs") from expired
        if done.returncode < 0 and done.returncode not in KNOWN_CRASHES:
            raise Mismatch(f"world {world}: {' '.join(argv)}: signal {-done.returncode}\n"
                           f"{done.stderr}")
        if "marked as corrupt" in done.stderr or "Image is corrupt" in done.stderr:
            raise Mismatch(f"world {world}: {' '.join(argv)}: {done.stderr}")
        return done

    def both(self, argv: Callable[[str], list[str]]) -> bool:
        """Run in both worlds; the exit status must be the same. True if it was 0."""
        a, b = self.run("a", argv("a")), self.run("b", argv("b"))
        if a.returncode != b.returncode:
            raise Mismatch(f"{' '.join(argv('a'))}\nexit status {a.returncode}, with qcow2 "
                           f"{b.returncode}\nstderr: {a.stderr}\nwith qcow2: {b.stderr}")
        dumps = [DUMP_LINE.split(done.stdout)[1:] for done in (a, b)]
        lines = [[line.split("\n")[0] for line in dump] for dump in dumps]
        if lines[0] != lines[1]:
            raise Mismatch(f"{' '.join(argv('a'))}\nread different data in the session")
        return a.returncode == 0

    def execute(self, step: Step) -> None:
        name = str(step.get("image", ""))
        op = str(step["op"])
        if op not in ("create", "convert", "compare") and name not in self.tree:
            return  # the step that made it was dropped
        getattr(self, f"do_{op}")(name, step)

    def do_create(self, name: str, step: Step) -> None:
        kind, backing = str(step["kind"]), step["backing"]
        if backing and backing not in self.tree:
            return

        def argv(world: str) -> list[str]:
            out = ["qemu-img", "create", "-q", "-f", fmt(kind, world)]
            if kind != "raw":
                options = step["options"]
                assert isinstance(options, list)
                out += ["-o", ",".join(options)]
            if backing:
                out += ["-b", str(backing), "-F", fmt(self.tree[str(backing)].kind, world)]
            return out + [name, str(step["size"])]

        if self.both(argv):
            self.tree[name] = Image(kind, backing=str(backing) if backing else None)
            if step["cut"]:
                for world in "ab":
                    path = os.path.join(self.dir, world, name)
                    os.truncate(path, os.path.getsize(path) - int(str(step["cut"])))
                self.script.append(f"truncate -s -{step['cut']} {name}")

    def do_copy(self, name: str, _step: Step) -> None:
        self.copies[name] = dataclasses.replace(self.tree[name])
        self.copy_file(name, name + ".old")

    def do_restore(self, name: str, _step: Step) -> None:
        """The file as it was once, with the backing link that it had."""
        copy = self.copies.get(name)
        # A file in another format is refused by the images above, which say what they expect
        if copy and self.has_index(name) == self.has_index(name + ".old") and (not copy.backing or copy.backing in self.tree and
                     name not in below(self.tree, copy.backing)):
            self.tree[name] = dataclasses.replace(copy)
            self.copy_file(name + ".old", name)

    def copy_file(self, source: str, target: str) -> None:
        """With its external data file, if it has one."""
        for suffix in ("", ".data"):
            for world in "ab":
                path = os.path.join(self.dir, world, source + suffix)
                if os.path.exists(path):
                    shutil.copyfile(path, os.path.join(self.dir, world, target + suffix))
        self.script.append(f"cp {source} {target}; [ ! -e {source}.data ] || "
                           f"cp {source}.data {target}.data")

    def do_io(self, name: str, step: Step) -> None:
        def argv(world: str) -> list[str]:
            cmds, opts = step["cmds"], step["opts"]
            assert isinstance(cmds, list) and isinstance(opts, list)
            driver = fmt(self.tree[name].kind, world)
            out = ["qemu-io"] + opts
            for cmd in cmds:
                out += ["-c", cmd]
            if step["small_cache"] and driver != "raw":
                return out + ["--image-opts", f"driver={driver},file.filename={name},"
                              "l2-cache-size=4096,l2-cache-entry-size=512"]
            return out + ["-f", driver, name]
        self.both(argv)

    def do_snapshot(self, name: str, step: Step) -> None:
        if step["what"] == "x":
            if self.on_image(name, "convert", "-O", "raw", "-l", str(step["name"]), name,
                             "out.raw"):
                # What the disk had no room for when it was taken has no content
                self.same_bytes(f"snapshot {step['name']} of {name}", "out.raw",
                                self.snapshot_sizes.get(str(step["name"])))
            return
        if step["what"] == "c":
            with open(os.path.join(self.dir, "a", name), "rb") as file:
                self.snapshot_sizes[str(step["name"])] = int.from_bytes(file.read(32)[24:], "big")
        self.both(lambda world: ["qemu-img", "snapshot", "-q", f"-{step['what']}",
                                 str(step["name"]), "--image-opts",
                                 f"driver={fmt(self.tree[name].kind, world)},file.filename={name}"])

    def do_commit(self, name: str, step: Step) -> None:
        if step["base"] not in below(self.tree, name)[1:]:
            return
        if self.is_dirty(str(step["base"])):
            # Unpatched qcow2 writes to it all the same, and overwrites data
            self.do_check(str(step["base"]), step)
        self.on_image(name, "commit", "-q", "-b", str(step["base"]),
                      *(["-d"] if step["keep"] else []), name)

    def do_rebase(self, name: str, step: Step) -> None:
        base = step["base"]
        if base and (base not in self.tree or name in below(self.tree, str(base))):
            return

        def argv(world: str) -> list[str]:
            out = ["qemu-img", "rebase", "-q", "-f", fmt(self.tree[name].kind, world)]
            if step["unsafe"]:
                out.append("-u")
            if base:
                out += ["-F", fmt(self.tree[str(base)].kind, world)]
            return out + ["-b", str(base or ""), name]

        if self.both(argv):
            self.tree[name].backing = str(base) if base else None

    def on_image(self, name: str, *args: str) -> bool:
        """Run a subcommand of qemu-img whose subject is one image."""
        return self.both(lambda world: ["qemu-img", args[0], "-f", fmt(self.tree[name].kind, world),
                                        *args[1:]])

    def do_resize(self, name: str, step: Step) -> None:
        size = int(str(step["size"]))
        self.clear_tail(name, size)
        self.on_image(name, "resize", "-q", "--shrink", name, str(size))

    def clear_tail(self, name: str, start: int) -> None:
        """Unpatched qcow2 keeps what is cut off in a cluster that has data, and shows it when the
        disk grows again; world b must have zeros there, too."""
        if self.tree[name].kind == "raw":
            return
        with open(os.path.join(self.dir, "b", name), "rb") as file:
            header = file.read(64)
        version, cluster_bits, old_size, snapshots = struct.unpack(">4xI12xIQ28xI", header)
        end = min(old_size, -(-start >> cluster_bits << cluster_bits))
        # Version 2 is not resized then
        if start >= end or (version == 2 and snapshots):
            return
        kind = fmt(self.tree[name].kind, "b")
        found = self.run("b", ["qemu-img", "map", "--output=json", "-f", kind,
                               f"--start-offset={start}", f"--max-length={end - start}", name])
        for area in json.loads(found.stdout) if found.returncode == 0 else []:
            if area["depth"] == 0 and area["data"]:
                self.run("b", ["qemu-io", "-f", kind, "-c",
                               f"write -P 0 {area['start']} {area['length']}", name])

    def do_check(self, name: str, _step: Step) -> None:
        self.on_image(name, "check", "-q", "-r", "all", name)

    def do_amend(self, name: str, step: Step) -> None:
        self.on_image(name, "amend", "-q", "-o", str(step["option"]), name)

    def do_index(self, name: str, step: Step) -> None:
        """Of the index alone: the content stays, and qcow2 has none."""
        options = step["options"]
        assert isinstance(options, list)
        if fmt(self.tree[name].kind, "a") == "sqcow2":
            for option in options:
                self.run("a", ["qemu-img", "amend", "-q", "-f", "sqcow2", "-o",
                               f"index={option}", name])
            self.correct_links(name)

    def correct_links(self, name: str) -> None:
        """
        An image above may have been amended when @name was plain, and says so.  That is an
        error, and the user's to correct.
        """
        for upper, image in self.tree.items():
            if image.backing == name and image.kind != "raw" and self.has_index(name):
                info = json.loads(self.run("a", ["qemu-img", "info", "--output=json",
                                                 upper]).stdout)
                if info.get("backing-filename-format") == "qcow2":
                    self.run("a", ["qemu-img", "rebase", "-q", "-u", "-f", fmt(image.kind, "a"),
                                   "-F", "sqcow2", "-b", name, upper])

    def do_bitmap(self, name: str, step: Step) -> None:
        self.on_image(name, "bitmap", str(step["what"]), name, "bits")

    def do_convert(self, name: str, step: Step) -> None:
        source, base = str(step["source"]), step["base"]
        if source not in self.tree or (base and base not in below(self.tree, source)[1:]):
            return

        def argv(world: str) -> list[str]:
            out = ["qemu-img", "convert", "-f", fmt(self.tree[source].kind, world), "-O",
                   fmt("sq", world), "-o", f"cluster_size={step['cluster']}"]
            if base:
                out += ["-B", str(base), "-F", fmt(self.tree[str(base)].kind, world)]
            return out + [source, name]

        if self.both(argv):
            self.tree[name] = Image("sq", backing=str(base) if base else None)

    def same_bytes(self, what: str, filename: str, end: Optional[int] = None) -> None:
        contents = []
        for world in "ab":
            path = os.path.join(self.dir, world, filename)
            with open(path, "rb") as file:
                contents.append(file.read())
            os.unlink(path)
        if len(contents[0]) != len(contents[1]):
            raise Mismatch(f"{what}: {len(contents[0])} bytes, with qcow2 {len(contents[1])}")
        contents = [content[:end] for content in contents]
        if contents[0] == contents[1]:
            return
        first = next(i for i, (x, y) in enumerate(zip(*contents)) if x != y)
        raise Mismatch(f"{what}: first difference at {first:#x}: {contents[0][first]}, "
                       f"with qcow2 {contents[1][first]}")

    def do_compare(self, _name: str, step: Step) -> None:
        for name, image in self.tree.items():
            if image.kind == "raw":
                continue
            if step["how"] == "compare":
                self.compare(name)
            elif step["how"] == "dd":
                if self.on_image(name, "dd", "-O", "raw", "bs=1M", f"if={name}", "of=out.raw"):
                    self.same_bytes(name, "out.raw")
            elif self.on_image(name, "convert", "-O", "raw", name, "out.raw"):
                self.same_bytes(name, "out.raw")
            self.check(name)

    def compare(self, name: str) -> None:
        """All bytes, in one process of world a."""
        kind = self.tree[name].kind
        done = self.run("a", ["qemu-img", "compare", "-q", "-f", fmt(kind, "a"),
                              "-F", fmt(kind, "b"), name, f"../b/{name}"])
        # 2: one of the two cannot be opened; then neither, which converting would show
        if done.returncode == 2:
            self.on_image(name, "convert", "-O", "raw", name, "out.raw")
        elif done.returncode:
            raise Mismatch(f"{name} differs from ../b/{name}: {done.returncode} {done.stdout}")

    def features(self, name: str) -> int:
        """Incompatible features of the image in world a"""
        with open(os.path.join(self.dir, "a", name), "rb") as file:
            header = file.read(80)
        return int.from_bytes(header[72:], "big") if header[:8] == b"QFI\xfb\0\0\0\3" else 0

    def is_dirty(self, name: str) -> bool:
        return bool(self.features(name) & 1)

    def has_index(self, name: str) -> bool:
        return bool(self.features(name) & 1 << 48)

    def check(self, name: str) -> None:
        status = self.run("a", ["qemu-img", "check", "-f", fmt(self.tree[name].kind, "a"), name])
        # A crash leaves leaks behind (3).  Lazy refcounts are wrong then, where the clusters had
        # none before; the next writer makes them right
        if status.returncode in (2, 3) and self.is_dirty(name):
            return
        if status.returncode:
            other = self.run("b", ["qemu-img", "check", "-f", fmt(self.tree[name].kind, "b"), name])
            if status.returncode != other.returncode:
                raise Mismatch(f"check of {name}: {status.returncode}, with qcow2 "
                               f"{other.returncode}\n{status.stdout}{status.stderr}")


def attempt(builds: Builds, workdir: str, steps: list[Step]) -> tuple[Optional[str], Executor]:
    """Run the steps.  Returns what went wrong, or None."""
    executor = Executor(builds, workdir)
    try:
        for step in steps:
            executor.execute(step)
    except Mismatch as mismatch:
        return str(mismatch), executor
    return None, executor


def candidates(steps: list[Step], chunk: int) -> list[list[Step]]:
    """Shorter lists of steps, the last ones dropped first."""
    out = []
    for start in range(len(steps) - chunk, -1, -chunk):
        out.append(steps[:start] + steps[start + chunk:])
    if chunk == 1:
        for i, step in enumerate(steps):
            cmds = step.get("cmds")
            if isinstance(cmds, list) and len(cmds) > 1:
                for j in range(len(cmds)):
                    out.append(steps[:i] + [{**step, "cmds": cmds[:j] + cmds[j + 1:]}] +
                               steps[i + 1:])
    return out


def shrink(builds: Builds, workdir: str, steps: list[Step], seconds: int) -> list[Step]:
    """Drop steps, and commands of qemu-io, while it still fails."""
    end = time.monotonic() + seconds
    chunk = max(1, len(steps) // 2)
    while time.monotonic() < end:
        smaller = None
        for shorter in candidates(steps, chunk):
            if time.monotonic() > end:
                break
            if attempt(builds, workdir, shorter)[0]:
                smaller = shorter
                break
        if smaller is not None:
            steps = smaller
        elif chunk > 1:
            chunk //= 2
        else:
            break
    return steps


def run_seed(args: argparse.Namespace, seed: int) -> tuple[int, str]:
    """One run.  Returns how many commands were run, and what is to be said of a failure."""
    builds = {"a": os.path.abspath(args.build), "b": os.path.abspath(args.reference or args.build)}
    workdir = tempfile.mkdtemp(prefix="sqemu-chain-", dir=os.environ.get("TMPDIR", "/var/tmp"))
    steps = Generator(seed, args.steps).steps
    error, executor = attempt(builds, workdir, steps)
    commands, said = executor.commands, ""
    if error:
        shorter = shrink(builds, workdir, steps, args.shrink)
        again, executor = attempt(builds, workdir, shorter)
        said = f"seed {seed} failed: {error}\nseed {seed}, shrunk: {again}\n" + \
            "\n".join(executor.script)
    shutil.rmtree(workdir, ignore_errors=True)
    return commands, said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--build", default="build", help="directory with qemu-img and qemu-io")
    parser.add_argument("--reference", help="directory with those that run the qcow2 chains")
    parser.add_argument("--seed", type=int, help="of the first run; else it is drawn")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="per run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--shrink", type=int, default=120, help="seconds, per failing run")
    parser.add_argument("--keep-going", action="store_true", help="after a failing run")
    args = parser.parse_args()
    first = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    print(f"seeds {first} to {first + args.runs - 1}", flush=True)

    passed = failed = commands = 0
    with multiprocessing.Pool(args.jobs) as pool:
        for nb_commands, said in pool.imap_unordered(functools.partial(run_seed, args),
                                                        range(first, first + args.runs)):
            commands += nb_commands
            passed += not said
            if (passed + failed) % 500 == 499:
                print(f"{passed} passed so far", flush=True)
            if said:
                failed += 1
                print(said, flush=True)
                if not args.keep_going:
                    break
    print(f"{commands} commands")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
