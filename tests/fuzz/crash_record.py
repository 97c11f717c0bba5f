# SPDX-License-Identifier: GPL-2.0-or-later
"""What a program did to the files of a directory, and what a power cut leaves of it.

The record is made by crash_shim.c. The model of the disk: a request is durable once a flush of
its file ended that started after the request had ended. Of all other requests that had started
when the power went, any subset may be there, each whole or torn into sectors, whatever the order
in which they were made; files are independent of each other. New names and removed names are
durable at once.
"""

import dataclasses
import os
import random
import struct
import subprocess
from typing import Iterator, Optional

RECORD = struct.Struct("=ccHiIIQQqqQ")
SECTOR = 512
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
NEVER = 1 << 60


def build_shim(workdir: str) -> str:
    """Compile crash_shim.c; returns the library's path."""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "crash_shim.c")
    library = os.path.join(workdir, "crash_shim.so")
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-Wall", "-fPIC", "-shared", "-o", library,
                    source, "-ldl"], check=True)
    return library


@dataclasses.dataclass
class Request:
    """One request, or the creation or removal of a file. Times count the log's records."""
    # pylint: disable=too-many-instance-attributes

    kind: str  # w write, t truncate, a fallocate, f flush, c create, u unlink
    name: str
    mode: int
    offset: int
    length: int
    data: bytes
    start: int
    end: int = NEVER
    result: int = 0
    mtime_ns: int = 0


@dataclasses.dataclass
class Log:
    """The requests of one or more programs, in the order in which they started."""

    requests: list[Request]
    length: int  # in records
    failures: int  # that were injected
    marks: dict[str, int]  # names that were marked, and when


def read_log(path: str) -> Log:
    """Decode what the shim wrote."""
    # pylint: disable=too-many-locals
    by_id: dict[tuple[int, int], Request] = {}
    log = Log([], 0, 0, {})
    data, pos = b"", 0
    if os.path.exists(path):
        with open(path, "rb") as file:
            data = file.read()
    while pos + RECORD.size <= len(data):
        (kind, what, path_length, mode, pid, number, offset, length, result, mtime_ns,
         data_length) = RECORD.unpack_from(data, pos)
        pos += RECORD.size
        name = data[pos:pos + path_length].decode()
        pos += path_length
        if kind == b"S":
            request = Request(what.decode(), name, mode, offset, length,
                              data[pos:pos + data_length], log.length)
            by_id[pid, number] = request
            log.requests.append(request)
        elif kind == b"E":
            request = by_id.pop((pid, number))
            request.end, request.result, request.mtime_ns = log.length, result, mtime_ns
        elif kind == b"M":
            log.marks[name] = log.length
        else:
            log.failures += 1
        pos += data_length
        log.length += 1
    return log


def mark(path: str, name: str) -> None:
    """Write down that from now on the file of that name has to be complete."""
    with open(path, "ab", buffering=0) as file:
        file.write(RECORD.pack(b"M", b" ", len(name), 0, 0, 0, 0, 0, 0, 0, 0) + name.encode())


@dataclasses.dataclass
class File:
    """The bytes of a file and its modification time."""

    data: bytearray
    mtime_ns: int

    def resize(self, length: int) -> None:
        if length < len(self.data):
            del self.data[length:]
        else:
            self.data += bytes(length - len(self.data))

    def apply(self, request: Request, sectors: Optional[set[int]] = None) -> None:
        """Do what the request did; of a torn write only these sectors of the file."""
        self.mtime_ns = request.mtime_ns or self.mtime_ns
        if request.kind == "t":
            self.resize(request.length)
        elif request.kind == "a":
            end = request.offset + request.length
            if not request.mode & KEEP_SIZE and end > len(self.data):
                self.resize(end)
            if request.mode & (PUNCH_HOLE | ZERO_RANGE):
                end = min(end, len(self.data))
                if end > request.offset:
                    self.data[request.offset:end] = bytes(end - request.offset)
        elif request.kind == "w":
            data = request.data if request.end == NEVER else request.data[:request.result]
            pos = request.offset
            while data:
                piece = data[:SECTOR - pos % SECTOR]
                if sectors is None or pos // SECTOR in sectors:
                    if len(self.data) < pos:
                        self.resize(pos)
                    self.data[pos:pos + len(piece)] = piece
                data = data[len(piece):]
                pos += len(piece)


Files = dict[str, File]


def read_files(directory: str) -> Files:
    """All files of the directory."""
    files = {}
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        with open(path, "rb") as file:
            files[name] = File(bytearray(file.read()), os.stat(path).st_mtime_ns)
    return files


def write_files(directory: str, files: Files) -> None:
    """Make the directory's files, and no others."""
    os.makedirs(directory, exist_ok=True)
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    for name, file in files.items():
        path = os.path.join(directory, name)
        with open(path, "wb") as out:
            out.write(file.data)
        os.utime(path, ns=(file.mtime_ns, file.mtime_ns))


@dataclasses.dataclass
class Cut:
    """What a power cut left."""

    time: int
    what: str  # which requests that were not durable are there
    files: Files


class Disk:
    """Files as they were before the requests of a log; makes cuts."""

    def __init__(self, before: Files, log: Log, rng: random.Random) -> None:
        self.before = before
        self.log = log
        self.rng = rng
        # With lazy refcounts nothing orders data and the L2 entry that names it, in qcow2 neither:
        # let the requests to such a file become durable in their order
        self.ordered = {name for name, file in before.items() if file.data[:4] == b"QFI\xfb" and
                        file.data[4:8] == b"\0\0\0\3" and file.data[87] & 1}

    def durable(self, time: int) -> tuple[list[Request], list[Request]]:
        """The requests that have to be there at that time, and those that may be."""
        flushed: dict[str, int] = {}
        for request in self.log.requests:
            if request.kind == "f" and request.end < time:
                flushed[request.name] = max(flushed.get(request.name, -1), request.start)
        sure, unsure = [], []
        for request in self.log.requests:
            if request.kind == "f" or request.start >= time:
                continue
            if request.end < time and request.result < 0:
                continue
            if request.kind in "cu" or request.end < flushed.get(request.name, -1):
                sure.append(request)
            else:
                unsure.append(request)
        return sure, unsure

    def make(self, time: int, what: str, chosen: list[tuple[Request, Optional[set[int]]]]) -> Cut:
        files = {name: File(bytearray(file.data), file.mtime_ns)
                 for name, file in self.before.items()}
        for request, sectors in sorted(chosen, key=lambda pair: (pair[0].end, pair[0].start)):
            if request.kind == "c":
                files[request.name] = File(bytearray(), request.mtime_ns)
            elif request.kind == "u":
                files.pop(request.name, None)
            elif request.name in files:
                files[request.name].apply(request, sectors)
        return Cut(time, what, files)

    def tear(self, request: Request) -> Optional[set[int]]:
        """Some sectors of a write, or None: it is there as a whole."""
        if request.kind != "w" or request.length <= SECTOR or self.rng.random() < 0.6:
            return None
        first, last = request.offset // SECTOR, (request.offset + request.length - 1) // SECTOR
        return {sector for sector in range(first, last + 1) if self.rng.random() < 0.5}

    def some(self, time: int) -> Cut:
        """A cut at that time with a random part of what was not durable."""
        sure, unsure = self.durable(time)
        style = self.rng.randrange(4)
        if style == 0:
            picked = []
        elif style == 1 and unsure:
            picked = [self.rng.choice(unsure)]
        elif style == 2 and unsure:
            lost = self.rng.choice(unsure)
            picked = [request for request in unsure if request is not lost]
        else:
            chance = self.rng.random()
            picked = [request for request in unsure if self.rng.random() < chance]
        for name in self.ordered:
            own = [request for request in unsure if request.name == name]
            kept = own[:self.rng.randrange(len(own) + 1)]
            picked = [request for request in picked if request.name != name] + kept
        torn = [(request, None if request.name in self.ordered else self.tear(request))
                for request in picked]
        what = f"{len(picked)} of {len(unsure)} requests that were not flushed: " + ", ".join(
            f"{request.name} {request.kind}{request.offset:#x}+{request.length:#x}" +
            ("" if sectors is None else f" sectors {sorted(sectors)}")
            for request, sectors in torn)
        return self.make(time, what, [(request, None) for request in sure] + torn)

    def prefix(self, time: int) -> Cut:
        """A cut at that time at which all that had ended is there, as after SIGKILL."""
        sure, unsure = self.durable(time)
        ended = [request for request in unsure if request.end < time]
        return self.make(time, "all that had ended", [(request, None) for request in sure + ended])

    def cuts(self, number: int) -> Iterator[Cut]:
        """Different cuts: prefixes and random ones, up to the number; the last ones are at the
        end of it all."""
        times = sorted({request.end + 1 for request in self.log.requests if request.end != NEVER})
        plan = [(time, style) for time in times for style in ("prefix", "some", "some")]
        if times and len(plan) < number:
            plan += [(time, "some") for time in self.rng.choices(times, k=number - len(plan))]
        if len(plan) > number:
            plan = self.rng.sample(plan, number)
        plan += [(self.log.length, "some")] * 2
        seen = set()
        for time, style in plan:
            cut = self.prefix(time) if style == "prefix" else self.some(time)
            key = hash(tuple((name, bytes(file.data)) for name, file in sorted(cut.files.items())))
            if (time, key) not in seen and key not in seen:
                seen.add(key)
                yield cut
