# SPDX-License-Identifier: GPL-2.0-or-later
"""Chains of images and the operations on them that power_cut.py interrupts."""

import dataclasses
import json
import os
import random
import struct
import subprocess
import sys
from typing import Callable, Optional, Union

from crash_record import mark

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "qemu-iotests"))
# pylint: disable=wrong-import-position,wrong-import-order
from sqcow2_format import Image  # noqa: E402

TIMEOUT = 120
HOUR = 3600 * 10 ** 9
Qmp = dict[str, object]


@dataclasses.dataclass
class Command:
    """A program to run, with QMP commands and events to wait for if it is qemu."""

    argv: list[str]
    qmp: list[Union[Qmp, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Write:
    """A write that an operation makes, for sectors that it overwrites later on."""

    name: str
    offset: int
    length: int
    pattern: Optional[int]  # None: anything


@dataclasses.dataclass
class Result:
    """How a command ended."""

    status: int
    output: str


class Session:
    """One run of qemu under QMP."""

    def __init__(self, process: "subprocess.Popen[str]", log: str) -> None:
        self.process = process
        self.log = log
        self.output: list[str] = []
        self.failed = False
        self.events: list[str] = []

    def line(self) -> Optional[Qmp]:
        assert self.process.stdout
        text = "\n"
        while text and not text.startswith("{"):    # warnings, output of "qemu-io"
            text = self.process.stdout.readline()
            self.output.append(text)
        if not text:
            return None
        message: Qmp = json.loads(text)
        if "event" in message:
            self.events.append(str(message["event"]))
        self.failed = self.failed or '"error"' in text or "failed: " in text
        return message

    def command(self, command: Qmp) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return
        while True:
            message = self.line()
            if message is None or "return" in message or "error" in message:
                return

    def wait(self, events: str) -> None:
        """Wait for one of the events, names with | in between, unless something has failed."""
        while not self.failed and not set(self.events) & set(events.split("|")):
            if self.line() is None:
                return

    def run(self, steps: list[Union[Qmp, str]]) -> None:
        self.line()
        self.command({"execute": "qmp_capabilities"})
        for step in steps:
            if isinstance(step, str):
                self.wait(step)
                continue
            failed, self.failed = self.failed, False
            self.command(step)
            arguments = step.get("arguments", {})
            assert isinstance(arguments, dict)
            if self.log and not self.failed and "snapshot-file" in arguments:
                mark(self.log, str(arguments["snapshot-file"]))
            self.failed = self.failed or failed
        self.command({"execute": "quit"})


def run(command: Command, directory: str, env: dict[str, str]) -> Result:
    """Run it in the directory. A hang counts as a signal."""
    with subprocess.Popen(command.argv, cwd=directory, env={**os.environ, **env}, text=True,
                          errors="replace", stdout=subprocess.PIPE,
                          stdin=subprocess.PIPE if command.qmp else subprocess.DEVNULL,
                          stderr=subprocess.STDOUT) as process:
        try:
            if command.qmp:
                session = Session(process, env.get("CRASH_LOG", ""))
                session.run(command.qmp)
                rest = process.communicate(timeout=TIMEOUT)[0]
                status = process.returncode or int(session.failed)
                return Result(status, "".join(session.output) + rest)
            output = process.communicate(timeout=TIMEOUT)[0]
            return Result(process.returncode, output)
        except subprocess.TimeoutExpired:
            process.kill()
            return Result(-1, "hangs")


class Scenario:
    """A chain in a directory, made by the real programs, and an operation on it."""
    # pylint: disable=too-many-instance-attributes,too-many-public-methods

    def __init__(self, build: str, directory: str, env: dict[str, str], seed: int, driver: str
                 ) -> None:
        self.build = build
        self.dir = directory
        self.env = env
        self.rng = random.Random(seed)
        self.driver = driver  # of the layers that are sqcow2: qcow2 to compare with
        self.cluster = self.rng.choice((512, 512, 1024, 4096))
        self.region = self.cluster * self.cluster // 8
        self.size = {512: 130 << 10, 1024: 400 << 10, 4096: 5 << 20}[self.cluster]
        self.formats: dict[str, str] = {}
        self.layers: list[str] = []
        self.writes: list[Write] = []
        self.pattern = 0
        self.script: list[str] = []
        self.settled: set[str] = set()  # names of old files

    @property
    def top(self) -> str:
        return self.layers[-1]

    # Commands

    def img(self, *args: str) -> Command:
        return Command([os.path.join(self.build, "qemu-img"), *args])

    def io(self, name: str, cmds: list[str], *opts: str) -> Command:
        argv = [os.path.join(self.build, "qemu-io"), *opts, "-f", self.formats[name]]
        for cmd in cmds:
            argv += ["-c", cmd]
        return Command(argv + [name])

    def qemu(self, steps: list[Union[Qmp, str]]) -> Command:
        return Command([os.path.join(self.build, "qemu-system-x86_64"), "-machine", "none",
                        "-nodefaults", "-display", "none", "-qmp", "stdio", "-drive",
                        f"if=none,id=d0,file={self.top},format={self.formats[self.top]},"
                        "discard=unmap"], steps)

    def do(self, command: Command) -> None:
        """Run a command that must succeed."""
        self.script.append(" ".join(f"'{arg}'" if " " in arg else os.path.basename(arg)
                                    for arg in command.argv))
        result = run(command, self.dir, self.env)
        if result.status:
            raise AssertionError(f"{command.argv}: {result.status}\n{result.output}")

    def next_pattern(self) -> int:
        self.pattern = self.pattern % 250 + 1
        return self.pattern

    def extent(self) -> tuple[int, int]:
        """Offset and length, in sectors; often whole clusters."""
        unit = self.rng.choice((512, self.cluster, self.cluster))
        reach = self.rng.choice((self.cluster, 4 * self.cluster, self.region // 2))
        offset = self.rng.randrange(self.size) // unit * unit
        length = max(unit, self.rng.randrange(reach + 1) // unit * unit)
        return offset, min(length, self.size - offset)

    def write_command(self, name: str, what: str = "") -> str:
        offset, length = self.extent()
        what = what or self.rng.choice(("write", "write", "write", "zero", "unmap", "discard"))
        if what == "discard":
            self.writes.append(Write(name, offset, length, 0))
            return f"discard -q {offset} {length}"
        if what in ("zero", "unmap"):
            self.writes.append(Write(name, offset, length, 0))
            return f"write -q -z {'-u ' if what == 'unmap' else ''}{offset} {length}"
        pattern = self.next_pattern()
        self.writes.append(Write(name, offset, length, pattern))
        return f"{'aio_write' if what == 'aio' else 'write'} -q -P {pattern} {offset} {length}"

    def compressed_command(self, name: str) -> str:
        offset = self.rng.randrange(self.size // self.cluster) * self.cluster
        pattern = self.next_pattern()
        self.writes.append(Write(name, offset, self.cluster, pattern))
        return f"write -q -c -P {pattern} {offset} {self.cluster}"

    # The chain

    def settle(self) -> None:
        """Make all files old, so that their modification times can be relied upon."""
        for name in os.listdir(self.dir):
            path = os.path.join(self.dir, name)
            then = os.stat(path).st_mtime_ns
            if then > HOUR and name not in self.settled:
                os.utime(path, ns=(then - HOUR, then - HOUR))
                self.settled.add(name)

    def add(self, name: str, kind: str, backing: Optional[str]) -> None:
        fmt = {"raw": "raw", "v3": "qcow2", "sq": self.driver}[kind]
        self.formats[name] = fmt
        args = ["create", "-q", "-f", fmt]
        if kind != "raw":
            lazy = ",lazy_refcounts=on" if self.rng.random() < 0.15 else ""
            args += ["-o", f"cluster_size={self.cluster}{lazy}"]
        if backing:
            args += ["-b", backing, "-F", self.formats[backing]]
        size = self.size
        if self.rng.random() < 0.2:
            size -= self.rng.randrange(self.size // 4) // 512 * 512
        self.do(self.img(*args, name, str(size if not name.startswith("side") else self.size)))
        if kind != "raw":
            if self.rng.random() < 0.4:
                self.fill(name, [self.compressed_command(name)])
        self.fill(name, [self.write_command(name) for _ in range(self.rng.randrange(5))])
        if kind != "raw" and self.rng.random() < 0.3:
            self.do(self.img("snapshot", "-q", "-c", "s0", name))
            self.fill(name, [self.write_command(name) for _ in range(self.rng.randrange(3))])
        self.settle()

    def fill(self, name: str, cmds: list[str]) -> None:
        size = self.image_size(name)
        fitting = [cmd for cmd in cmds if sum(map(int, cmd.split()[-2:])) <= size]
        if fitting:
            self.do(self.io(name, fitting, "-d", "unmap"))

    def image_size(self, name: str) -> int:
        size: int = Image(os.path.join(self.dir, name), self.formats[name]).size
        return size

    def make_chain(self) -> None:
        kinds = self.rng.choice((("raw", "v3", "sq", "sq"), ("sq", "sq", "sq"), ("raw", "sq"),
                                 ("v3", "v3", "sq"), ("raw", "v3", "v3", "sq", "sq"),
                                 ("v3", "sq", "sq", "sq"), ("raw", "sq", "sq")))
        for number, kind in enumerate(kinds):
            self.add(f"l{number}", kind, self.layers[-1] if self.layers else None)
            self.layers.append(f"l{number}")
        if self.rng.random() < 0.6:
            self.add("side", "sq", self.rng.choice(self.layers[:-1]))
        self.size = self.image_size(self.top)

    # Operations: each returns the commands to interrupt

    def op_create(self) -> list[Command]:
        backing = self.rng.choice(self.layers)
        self.formats["new"] = self.driver
        return [self.img("create", "-q", "-f", self.driver, "-o", f"cluster_size={self.cluster}",
                         "-b", backing, "-F", self.formats[backing], "new")]

    def op_create_alone(self) -> list[Command]:
        self.formats["new"] = self.driver
        return [self.img("create", "-q", "-f", self.driver, "-o", f"cluster_size={self.cluster}",
                         "new", str(self.size))]

    def op_write(self) -> list[Command]:
        cmds = [self.write_command(self.top) for _ in range(self.rng.randrange(1, 6))]
        if self.rng.random() < 0.4:
            cmds.insert(self.rng.randrange(len(cmds)), "flush")
        return [self.io(self.top, cmds, "-d", "unmap")]

    def op_first_write(self) -> list[Command]:
        """To regions that have no own table yet, of a new overlay."""
        self.formats["l9"] = self.driver
        self.do(self.img("create", "-q", "-f", self.driver, "-o", f"cluster_size={self.cluster}",
                         "-b", self.top, "-F", self.formats[self.top], "l9"))
        self.layers.append("l9")
        return self.op_write()

    def op_aio(self) -> list[Command]:
        cmds = [self.write_command(self.top, "aio") for _ in range(self.rng.randrange(2, 9))]
        return [self.io(self.top, cmds + ["aio_flush"])]

    def op_compressed(self) -> list[Command]:
        return [self.io(self.top, [self.compressed_command(self.top)])
                for _ in range(self.rng.randrange(1, 3))]

    def op_snapshot(self) -> list[Command]:
        what = self.rng.choice("cad")
        if what != "c":
            self.do(self.img("snapshot", "-q", "-c", "s1", self.top))
            self.fill(self.top, [self.write_command(self.top) for _ in range(3)])
        return [self.img("snapshot", "-q", f"-{what}", "s1", self.top)]

    def op_commit(self) -> list[Command]:
        base = self.rng.choice(self.layers[:-1])
        return [self.img("commit", "-q", *(["-d"] if self.rng.random() < 0.3 else []), "-b", base,
                         self.top)]

    def change_below(self) -> None:
        """Change a layer without the knowledge of those above; by whole clusters, for what is
        in them else is undefined."""
        name = self.rng.choice(self.layers[:-1])
        self.fill(name, [self.write_command(name) for _ in range(4)])
        self.settle()

    def op_reindex(self) -> list[Command]:
        self.change_below()
        if self.rng.random() < 0.3:
            return [self.io(self.top, ["flush"])]
        return self.op_write()

    def op_rebase(self) -> list[Command]:
        base = self.rng.choice(self.layers[:-1] + [""])
        unsafe = ["-u"] if self.rng.random() < 0.4 else []
        return [self.img("rebase", "-q", *unsafe, "-f", self.formats[self.top], "-b", base,
                         *(["-F", self.formats[base]] if base else []), self.top)]

    def op_resize(self) -> list[Command]:
        size = max(1, self.rng.randrange(2 * self.size) // 512) * 512
        return [self.img("resize", "-q", "--shrink", "-f", self.formats[self.top], self.top,
                         str(size))]

    def op_amend(self) -> list[Command]:
        option = self.rng.choice(("lazy_refcounts=on", "lazy_refcounts=off", "compat=1.1",
                                  "refcount_bits=64", "refcount_bits=8", f"size={self.size * 2}"))
        return [self.img("amend", "-q", "-f", self.formats[self.top], "-o", option, self.top)]

    def op_check(self) -> list[Command]:
        self.damage()
        return [self.img("check", "-q", "-f", self.formats[self.top], "-r", "all", self.top)]

    def op_check_leaks(self) -> list[Command]:
        self.damage(leaks_only=True)
        return [self.img("check", "-q", "-f", self.formats[self.top], "-r", "leaks", self.top)]

    def op_live_snapshot(self) -> list[Command]:
        steps: list[Union[Qmp, str]] = []
        for number in range(self.rng.randrange(1, 3)):
            if self.rng.random() < 0.6:
                steps.append(self.guest_write(self.top if not number else f"new{number - 1}"))
            steps.append({"execute": "blockdev-snapshot-sync", "arguments": {
                "device": "d0", "snapshot-file": f"new{number}", "format": self.driver}})
            self.formats[f"new{number}"] = self.driver
            if self.rng.random() < 0.8:
                steps.append(self.guest_write(f"new{number}"))
        return [self.qemu(steps)]

    def guest_write(self, name: str) -> Qmp:
        cmd = self.write_command(name)
        return {"execute": "human-monitor-command",
                "arguments": {"command-line": f'qemu-io d0 "{cmd}"'}}

    def op_live_commit(self) -> list[Command]:
        base = self.rng.choice(self.layers[:-1])
        return [self.qemu([
            self.guest_write(self.top),
            {"execute": "block-commit", "arguments": {"job-id": "j", "device": "d0",
                                                      "base": base}},
            "BLOCK_JOB_READY|BLOCK_JOB_COMPLETED",
            {"execute": "block-job-complete", "arguments": {"device": "j"}},
            "BLOCK_JOB_COMPLETED",
            *([self.guest_write(base)] if self.rng.random() < 0.5 else [])])]

    def op_live_commit_below(self) -> list[Command]:
        if len(self.layers) < 3:
            return self.op_live_commit()
        upper = self.rng.randrange(1, len(self.layers) - 1)
        base = self.layers[self.rng.randrange(upper)]
        return [self.qemu([
            self.guest_write(self.top),
            {"execute": "block-commit", "arguments": {
                "job-id": "j", "device": "d0", "top": self.layers[upper], "base": base}},
            "BLOCK_JOB_COMPLETED",
            self.guest_write(self.top)])]

    def op_live_stream(self) -> list[Command]:
        base = self.rng.choice([""] + self.layers[:-2])
        return [self.qemu([
            {"execute": "block-stream", "arguments": {"job-id": "j", "device": "d0",
                                                      **({"base": base} if base else {})}},
            "BLOCK_JOB_COMPLETED",
            *([self.guest_write(self.top)] if self.rng.random() < 0.5 else [])])]

    def damage(self, leaks_only: bool = False) -> None:
        """Wrong refcounts in the top image."""
        path = os.path.join(self.dir, self.top)
        image = Image(path)
        table = image.header["refcount_table_offset"]
        block = image.read_u64s(table, 1)[0]
        assert image.header["refcount_order"] == 4
        clusters = os.path.getsize(path) // self.cluster
        with open(path, "r+b") as file:
            for number in self.rng.sample(range(1, clusters), min(4, clusters - 1)):
                if number >= self.cluster // 2:
                    continue
                count = image.refcount(number * self.cluster)
                if leaks_only and count:
                    continue
                file.seek(block + number * 2)
                file.write(struct.pack(">H", 1 if not count else count - 1))

    def operations(self) -> dict[str, Callable[[], list[Command]]]:
        return {name[3:]: getattr(self, name) for name in sorted(dir(self))
                if name.startswith("op_")}
