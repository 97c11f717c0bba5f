#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Live fuzzer: a running qemu-system-x86_64 takes snapshots and runs jobs, against a byte model.

A run starts the emulator, without a guest, on a chain of random layers, and does random steps: it
writes, discards, resizes, takes live snapshots, commits (the active layer or others), streams,
mirrors, backs up, with writes while a job runs; jobs are let finish, or cancelled; the process is
closed, or killed, and started again.  What is read must be what the model says: block by block
while the process lives; as a whole, with qemu-img check on each layer, when it does not.

Writes in $TMPDIR, else /var/tmp, only.  A run is reproduced by its seed.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tty
from typing import Any, Optional

BLOCK = 4096
TIMEOUT = 60


class Failure(Exception):
    """Wrong content, an unexpected error, or a process that died."""


class Machine:
    """An emulator without a guest, spoken to by QMP.

    Its stdout is a terminal: what "qemu-io" commands say goes there, and not into the answer, and
    would be buffered else.
    """

    def __init__(self, build: str, args: list[str], log: str) -> None:
        outer, inner = os.openpty()
        tty.setraw(inner)
        self.output = os.fdopen(outer, "rb")
        self.said: list[str] = []
        with open(log, "ab") as errors, os.fdopen(inner, "wb") as terminal:
            self.process = subprocess.Popen(
                [os.path.join(build, "qemu-system-x86_64"), "-nodefaults", "-display", "none",
                 "-machine", "none", "-qmp", "stdio", *args],
                stdin=subprocess.PIPE, stdout=terminal, stderr=errors)
        self.events: list[dict[str, Any]] = []
        self._next()
        self.command("qmp_capabilities")

    def _next(self) -> dict[str, Any]:
        try:
            for line in self.output:
                if line.startswith(b"{"):   # and not "Formatting ..."
                    return json.loads(line)     # type: ignore[no-any-return]
                self.said.append(line.decode(errors="replace"))
        except OSError:                     # nobody has the terminal any more
            pass
        raise Failure(f"the emulator ended: {self.process.wait()}")

    def command(self, name: str, /, **arguments: Any) -> Any:
        """Its return value; an error is a dictionary with "desc"."""
        assert self.process.stdin
        request = {"execute": name,
                   "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        while True:
            answer = self._next()
            if "event" in answer:
                self.events.append(answer)
            else:
                return answer.get("return", answer.get("error"))

    def io(self, line: str) -> str:
        """A qemu-io command on the disk; what it says."""
        self.said = []
        answer = self.command("human-monitor-command", command_line=f'qemu-io d0 "{line}"')
        return "".join([str(answer), *self.said])

    def wait_job(self) -> dict[str, Any]:
        """Wait for the job's end, complete it when it is ready."""
        while True:
            event = self.events.pop(0) if self.events else self._next()
            if event.get("event") == "BLOCK_JOB_READY":
                self.command("job-complete", id="job")
            elif event.get("event") in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
                return event["data"]        # type: ignore[no-any-return]

    def close(self, kill: bool) -> None:
        """End the process."""
        if kill:
            self.process.kill()
        else:
            self.command("quit")
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=TIMEOUT)
        self.output.close()


class Run:
    """One run: a chain of files, a machine, a model."""

    def __init__(self, args: argparse.Namespace, seed: int, folder: str) -> None:
        self.build = args.build
        self.folder = folder
        self.rng = random.Random(seed)
        self.cluster = self.rng.choice([4096, 65536, 65536])
        self.machine: Optional[Machine] = None
        self.files: list[tuple[str, str]] = []      # (name, format), base first
        self.model = bytearray(self.rng.choice([1, 2, 3]) << 20)
        self.number = 0
        self.steps: list[str] = []
        self.make_chain()

    # Files

    def tool(self, *argv: str) -> str:
        done = subprocess.run([os.path.join(self.build, argv[0]), *argv[1:]], cwd=self.folder,
                              capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            raise Failure(f"{' '.join(argv)}: exit status {done.returncode}\n{done.stdout}"
                          f"{done.stderr}")
        return done.stdout

    def new_name(self) -> str:
        self.number += 1
        return os.path.join(self.folder, f"layer{self.number}")

    def make_chain(self) -> None:
        """Some layers under the active one, the lowest of any kind."""
        fmt = self.rng.choice(["sqcow2", "sqcow2", "qcow2", "raw"])
        for i in range(self.rng.randint(1, 6)):
            name = self.new_name()
            options = [] if fmt == "raw" else ["-o", f"cluster_size={self.cluster}"]
            backing = ["-b", self.files[-1][0], "-F", self.files[-1][1]] if self.files else []
            size = [] if backing else [str(len(self.model))]
            self.tool("qemu-img", "create", "-q", "-f", fmt, *options, *backing, name, *size)
            self.files.append((name, fmt))
            writes: list[str] = []
            for _ in range(self.rng.randint(0, 12)):
                writes += ["-c", self.random_write()]
            self.tool("qemu-io", "-f", fmt, *writes, name)
            if fmt != "qcow2" or self.rng.random() < .6 or i == 3:
                fmt = "sqcow2"
        if self.files[-1][1] != "sqcow2":
            name = self.new_name()
            self.tool("qemu-img", "create", "-q", "-f", "sqcow2", "-b", self.files[-1][0], "-F",
                      self.files[-1][1], name)
            self.files.append((name, "sqcow2"))

    def random_write(self, machine: bool = False) -> str:
        """A qemu-io command that writes; done to the model, too."""
        length = self.rng.choice([512, BLOCK, BLOCK, self.cluster, 3 * self.cluster])
        length = min(length, len(self.model))
        step = self.rng.choice([512, BLOCK, self.cluster])
        offset = self.rng.randrange(0, len(self.model) - length + 1, min(step, len(self.model)))
        if machine and self.rng.random() < .15:
            self.model[offset:offset + length] = bytes(length)
            return f"write -q -z {self.rng.choice(['', '-u '])}{offset} {length}"
        value = self.rng.randint(1, 255)
        self.model[offset:offset + length] = bytes([value]) * length
        return f"write -q -P {value} {offset} {length}"

    # The machine

    def start(self) -> Machine:
        cache = self.rng.choice(["writeback", "writeback", "none"])
        aio = self.rng.choice(["threads", "threads", "io_uring"])
        self.machine = Machine(self.build, ["-drive", f"id=d0,if=none,file={self.files[-1][0]},"
                                            f"format={self.files[-1][1]},cache={cache},aio={aio},"
                                            "discard=unmap"], os.path.join(self.folder, "log"))
        return self.machine

    def write_some(self, most: int = 6) -> None:
        assert self.machine
        for _ in range(self.rng.randint(0, most)):
            said = self.machine.io(self.random_write(True)).strip()
            if said:
                raise Failure(f"write: {said}")

    def check_some(self) -> None:
        """Read blocks, and runs of equal blocks, and compare."""
        assert self.machine
        for _ in range(20):
            offset = self.rng.randrange(0, len(self.model), 512)
            value = self.model[offset]
            end = offset
            while end < len(self.model) and self.model[end] == value and end - offset < 1 << 20:
                end += 512 if self.model[end:end + 512] == bytes([value]) * 512 else 1 << 30
            length = min(end, len(self.model)) - offset
            if end >= 1 << 30 or length < 512:
                continue
            said = self.machine.io(f"read -q -P {value} {offset} {length}").strip()
            if said:
                raise Failure(f"read of {offset}+{length}: {said}")

    def ok(self, answer: Any) -> None:
        if isinstance(answer, dict) and "desc" in answer:
            raise Failure(f"{self.steps[-1]}: {answer['desc']}")

    # Steps

    def step_snapshot(self) -> None:
        assert self.machine
        name = self.new_name()
        self.ok(self.machine.command("blockdev-snapshot-sync", device="d0", snapshot_file=name,
                                     format="sqcow2"))
        self.files.append((name, "sqcow2"))

    def job(self, name: str, **arguments: Any) -> bool:
        """Run a job with writes meanwhile; True if it did its work."""
        assert self.machine
        # A backup of what is overwritten goes on until it is cancelled
        cancel = self.rng.random() < .2 or arguments.get("sync") == "none"
        if cancel:
            arguments["speed"] = 65536
        self.ok(self.machine.command(name, job_id="job", device="d0", **arguments))
        self.write_some(4)
        if cancel:
            self.machine.command("block-job-cancel", device="job", force=True)
        end = self.machine.wait_job()
        self.steps[-1] += f" {end.get('offset')}/{end.get('len')} {end.get('error', '')}"
        if "error" in end and not cancel:
            raise Failure(f"{name}: {end['error']}")
        # A job may have ended before it was cancelled
        return "error" not in end and end["offset"] == end["len"] and not (
            cancel and self.top_file() == self.files[-1][0] and name == "block-commit"
            and "base" in arguments and arguments.get("top") is None)

    def top_file(self) -> str:
        assert self.machine
        info = self.machine.command("query-block")[0]["inserted"]
        return str(info["file"])

    def sizes(self) -> list[tuple[str, int]]:
        """The files of the chain by their headers, base first, and their disks' sizes."""
        out = self.tool("qemu-img", "info", "-U", "--backing-chain", "--output=json",
                        self.top_file())
        return [(image["filename"], image["virtual-size"]) for image in json.loads(out)][::-1]

    def take_chain(self) -> None:
        """After a job: which files are left?"""
        formats = dict(self.files)
        self.files = [(name, formats[name]) for name, _ in self.sizes()]

    def step_commit_active(self) -> None:
        # A longer base would make the disk longer, and show what it has there
        bases = [name for name, size in self.sizes() if size <= len(self.model)][:-1]
        if bases:
            self.job("block-commit", base=self.rng.choice(bases))
            self.take_chain()

    def step_commit(self) -> None:
        if len(self.files) > 2:
            base = self.rng.randrange(len(self.files) - 2)
            top = self.rng.randrange(base + 1, len(self.files) - 1)
            self.job("block-commit", base=self.files[base][0], top=self.files[top][0])
            self.take_chain()

    def step_stream(self) -> None:
        if len(self.files) > 1:
            if self.rng.random() < .3:
                self.job("block-stream")
            else:
                self.job("block-stream", base=self.rng.choice(self.files[:-1])[0])
            self.take_chain()

    def step_backup(self) -> None:
        assert self.machine
        target = self.new_name()
        before = bytes(self.model)
        sync = self.rng.choice(["full", "top", "none"])
        done = self.job("drive-backup", target=target, format="qcow2", sync=sync)
        if done and sync == "full":
            self.compare(target, "qcow2", before)

    def step_mirror(self) -> None:
        """The disk moves to another file, above the same lower layers or above none."""
        target = self.new_name()
        if self.job("drive-mirror", target=target, sync=self.rng.choice(["full", "top"]),
                    format=self.rng.choice(["sqcow2", "sqcow2", "qcow2"])):
            self.files.append((target, self.format_of(target)))
            self.take_chain()

    def format_of(self, name: str) -> str:
        """Of the two formats that a new file may have here."""
        said = subprocess.run([os.path.join(self.build, "qemu-img"), "info", "-U", "-f", "sqcow2",
                               name], capture_output=True, timeout=TIMEOUT, check=False)
        return "qcow2" if said.returncode else "sqcow2"

    def step_resize(self) -> None:
        assert self.machine
        # A raw file that is opened with O_DIRECT ends with a whole block
        unit = BLOCK if self.files[0][1] == "raw" else 512
        size = max(unit, len(self.model) // unit * unit + unit * self.rng.randint(-75, 112))
        if self.rng.random() < .2:
            size = self.rng.randint(1, -(-len(self.model) // unit)) * unit
        self.ok(self.machine.command("block_resize", device="d0", size=size))
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def step_commit_hmp(self) -> None:
        assert self.machine
        if len(self.files) > 1:
            said = self.machine.command("human-monitor-command", command_line="commit d0")
            # A layer below may have been changed by a commit that was cancelled
            errors = [line for line in said.splitlines() if line and "warning: " not in line]
            if errors:
                raise Failure(f"commit: {errors}")

    def step_restart(self) -> None:
        assert self.machine
        kill = self.rng.random() < .5
        if kill:
            self.machine.io("flush")
        self.machine.close(kill)
        if not kill:
            self.look_offline()
        self.start()

    def compare(self, name: str, fmt: str, want: bytes) -> None:
        raw = os.path.join(self.folder, "raw")
        self.tool("qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", name, raw)
        with open(raw, "rb") as file:
            got = file.read()
        os.unlink(raw)
        if got != want:
            first = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), -1)
            raise Failure(f"{name}: wrong from byte {first:#x} on; {len(got)} bytes of {len(want)}")

    def look_offline(self) -> None:
        """The process has ended: all content, and check."""
        name, fmt = self.files[-1]
        self.compare(name, fmt, bytes(self.model))
        info = self.tool("qemu-io", "-r", "-f", fmt, "-c", "info", name)
        if "index state: rebuilt" in info:
            raise Failure(f"{name} was left with an index that does not fit")
        for name, fmt in self.files:
            if fmt != "raw":
                self.tool("qemu-img", "check", "-q", "-f", fmt, name)

    def execute(self, count: int) -> None:
        """The whole run."""
        kinds = ["snapshot"] * 5 + ["commit", "commit_active", "stream"] * 2 + \
            ["backup", "mirror", "resize", "commit_hmp", "restart", "restart"]
        self.start()
        assert self.machine
        for _ in range(count):
            kind = self.rng.choice(kinds)
            self.steps.append(f"{kind} {[os.path.basename(n) for n, _ in self.files]}")
            self.write_some()
            getattr(self, "step_" + kind)()
            self.check_some()
        nodes = self.machine.command("query-named-block-nodes", flat=True)
        # Snapshots have qcow2's default; layers with other clusters keep their nodes
        if len(nodes) > 2 + 2 + 1 and self.cluster == 65536:
            raise Failure(f"{len(nodes)} nodes are left")
        self.machine.close(False)
        self.look_offline()


def run_seed(args: argparse.Namespace, seed: int) -> str:
    """One run.  Returns what is to be said of a failure."""
    said = []
    folder = tempfile.mkdtemp(prefix="sqemu-live-", dir=os.environ.get("TMPDIR", "/var/tmp"))
    run = None
    with open(os.path.join(folder, "log"), "wb"):
        pass
    try:
        run = Run(args, seed, folder)
        run.execute(args.steps)
    except (Failure, subprocess.TimeoutExpired, OSError) as err:
        said.append(f"seed {seed} failed after {len(run.steps) if run else 0} steps: {err}")
        said += [f"    {step}" for step in run.steps[-6:]] if run else []
        with open(os.path.join(folder, "log"), encoding="utf-8", errors="replace") as log:
            said.append(log.read()[-600:])
    finally:
        if run and run.machine and run.machine.process.poll() is None:
            run.machine.process.kill()
    if said and args.keep:
        said.append(f"    kept: {folder}")
    else:
        shutil.rmtree(folder)
    return "\n".join(said)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build", help="build folder")
    parser.add_argument("--seed", type=int, help="of the first run; else it is drawn")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--keep", action="store_true", help="keep the files of a failed run")
    args = parser.parse_args()
    args.build = os.path.abspath(args.build)
    first = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    print(f"seeds {first} to {first + args.runs - 1}", flush=True)
    failed = 0
    with multiprocessing.Pool(args.jobs) as pool:
        for said in pool.imap_unordered(functools.partial(run_seed, args),
                                        range(first, first + args.runs)):
            if said:
                failed += 1
                print(said, flush=True)
    print(f"{args.runs - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
