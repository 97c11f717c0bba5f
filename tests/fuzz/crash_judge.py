# SPDX-License-Identifier: GPL-2.0-or-later
"""Are the images that an interrupted operation left as they may be?"""

import dataclasses
import os
import random
import re
import struct
from typing import Iterable, Optional

from crash_scenarios import Command, Scenario, Write, run
from crash_view import Chain, FormatError

SECTOR = 512


@dataclasses.dataclass
class View:
    """What is seen of one image, and of its internal snapshots by name."""

    disk: bytes
    backing: str
    snapshots: dict[str, bytes] = dataclasses.field(default_factory=dict)


def snapshot_names(chain: Chain) -> list[str]:
    """The names of internal snapshots, in the order of the table."""
    image = chain.top
    names = []
    pos = image.header["snapshots_offset"] if image.kind != "raw" else 0
    for _ in range(image.header["nb_snapshots"] if pos else 0):
        id_size, name_size, extra_size = struct.unpack(">HH20xI", image.read(pos + 12, 28))
        start = pos + 40 + extra_size + id_size
        names.append(image.read(start, name_size).decode())
        pos = start + name_size + 7 & ~7
    return names


def read_view(directory: str, name: str, fmt: str) -> View:
    """Raises FormatError or OSError if there is nothing to see."""
    chain = Chain(directory, name, fmt)
    if chain.top.kind == "raw" and fmt != "raw":
        raise FormatError(f"{name} is not {fmt}")
    view = View(chain.view(), chain.names[-2] if len(chain.names) > 1 else "")
    for index, snapshot in enumerate(snapshot_names(chain)):
        view.snapshots[snapshot] = chain.snapshot(index)
    return view


def read_views(directory: str, formats: dict[str, str]) -> dict[str, View]:
    """All images that exist."""
    return {name: read_view(directory, name, fmt) for name, fmt in formats.items()
            if os.path.exists(os.path.join(directory, name))}


def sectors(data: bytes, number: int) -> bytes:
    return data[number * SECTOR:(number + 1) * SECTOR].ljust(SECTOR, b"\0")


class Judge:
    """Knows the state before and after an operation."""
    # pylint: disable=too-many-instance-attributes

    def __init__(self, scenario: Scenario, before: dict[str, View], after: dict[str, View],
                 changed: set[str]) -> None:
        self.scenario = scenario
        self.before = before
        self.after = after
        self.changed = changed  # files that the operation wrote to
        self.formats = scenario.formats
        self.trusted = 0
        self.leaks = 0
        self.states = 0
        self.damaged = False  # before the operation
        self.failing = False  # requests were made to fail
        self.repaired: list[str] = []
        self.complete: set[str] = set()
        self.rng = random.Random(1)

    def tool(self, directory: str, command: Command) -> tuple[int, str]:
        result = run(command, directory, self.scenario.env)
        return result.status, result.output.strip()

    # Content

    def allowed_before(self, name: str) -> Optional[bytes]:
        """What was seen of an image before; of a new one, what was seen of its backing file."""
        if name in self.before:
            return self.before[name].disk
        backing = self.after[name].backing if name in self.after else ""
        while backing and backing not in self.before and backing in self.after:
            backing = self.after[backing].backing
        return self.before[backing].disk if backing in self.before else b""

    def content_problem(self, name: str, disk: bytes, whole: bool, writes: Iterable[Write]
                        ) -> Optional[str]:
        """The image must show the state before or after, sector by sector; the latter if the
        operation was complete."""
        before = self.allowed_before(name)
        assert before is not None
        after = self.after[name].disk if name in self.after else before
        if disk == after or (disk == before and not whole):
            return None
        lengths = {len(after)} if whole or name not in self.before else {len(before), len(after)}
        if self.formats[name] == "raw" and not whole:
            lengths = set(range(min(lengths), max(lengths) + 1))
        if len(disk) not in lengths and name in self.complete:
            return f"{name} shows {len(disk)} bytes, before {len(before)}, after {len(after)}"
        for number in range(len(disk) // SECTOR):
            now = sectors(disk, number)
            if now == sectors(after, number) or (not whole and now == sectors(before, number)):
                continue
            pos = number * SECTOR
            if not whole and any(
                    write.pattern is None or now == bytes([write.pattern]) * SECTOR
                    for write in writes if write.offset <= pos < write.offset + write.length):
                continue
            # What is being cut off shows the layers below for a while, as with qcow2
            if not whole and name in self.before and len(after) <= pos:
                continue
            if not whole and now == bytes(SECTOR) and (
                    name not in self.complete or pos >= min(len(before), len(after))):
                continue
            return (f"{name} at {pos:#x}: {now[:8].hex()}, before "
                    f"{sectors(before, number)[:8].hex()}, after "
                    f"{sectors(after, number)[:8].hex()}")
        return None

    def snapshot_problem(self, name: str, view: View) -> Optional[str]:
        old = self.before[name].snapshots if name in self.before else {}
        new = self.after[name].snapshots if name in self.after else {}
        for snapshot in set(old) & set(new):
            if snapshot not in view.snapshots:
                return f"{name}: internal snapshot {snapshot} is gone"
        for snapshot, disk in view.snapshots.items():
            allowed = [views[snapshot] for views in (old, new) if snapshot in views]
            if not allowed:
                return f"{name}: internal snapshot {snapshot} from nowhere"
            # The active disk's size is what is compared, and may be the smaller one
            for number in range(min(map(len, allowed + [disk])) // SECTOR):
                if sectors(disk, number) not in [sectors(want, number) for want in allowed]:
                    return f"{name}: internal snapshot {snapshot} has changed"
        return None

    # The state of one directory

    def problems(self, directory: str, whole: bool, complete: Iterable[str] = ()) -> list[str]:
        """
        Everything that is wrong with the images in a directory; changes them. Of new images, those
        named must be complete, or all if the operation is.
        """
        self.states += 1
        self.complete = set(self.before) | set(self.after if whole else complete)
        found: list[str] = []
        views: dict[str, View] = {}
        for name, fmt in self.formats.items():
            if not os.path.exists(os.path.join(directory, name)):
                if name in self.complete:
                    found.append(f"{name} is gone")
                continue
            try:
                views[name] = read_view(directory, name, fmt)
            except (FormatError, OSError, AssertionError, IndexError, struct.error,
                    UnicodeDecodeError) as error:
                if name in self.complete:
                    found.append(f"{name} cannot be read: {error!r}")
                continue
            found += filter(None, (
                self.content_problem(name, views[name].disk, whole,
                                     self.writes_seen_by(name, directory)),
                self.snapshot_problem(name, views[name])))
        for name, view in views.items():
            found += self.driver_problems(directory, name, view)
        for name in sorted(self.changed & set(views)):
            found += self.check_problems(directory, name, views[name])
        if not found:
            found += self.use_problems(directory, views)
        return found

    def writes_seen_by(self, name: str, directory: str) -> list[Write]:
        if self.failing:    # a snapshot was perhaps not made, and all went to the image below
            return self.scenario.writes
        try:
            names = Chain(directory, name, self.formats[name]).names
        except (FormatError, OSError):
            names = [name]
        return [write for write in self.scenario.writes if write.name in names]

    def driver_problems(self, directory: str, name: str, view: View) -> list[str]:
        """What the program reads, and the index if it is trusted, against the files' truth."""
        if self.formats[name] == "raw":
            return []
        chain = Chain(directory, name, self.formats[name])
        if not set(chain.names) & self.changed:
            return []
        found = []
        self.trusted += chain.is_trusted()
        damage = chain.damage()
        if name in self.complete and not self.damaged:
            found += [f"{name}: {item}" for item in damage[:3]]
        if not damage:
            found += [f"{name}: {lie}" for lie in chain.lies()[:3]]
        disk, message = self.driver_view(directory, name)
        if disk is None:
            if name in self.complete:
                found.append(f"{name} cannot be read by the driver: {message}")
        elif disk != view.disk:
            found.append(f"{name}: the driver reads something else than the files say "
                         f"({first_difference(disk, view.disk)})")
        return found

    def driver_view(self, directory: str, name: str) -> tuple[Optional[bytes], str]:
        out = os.path.join(directory, "out.raw")
        status, message = self.tool(directory, self.scenario.img(
            "convert", "-f", self.formats[name], "-O", "raw", name, "out.raw"))
        if status:
            if os.path.exists(out):
                os.unlink(out)
            return None, f"{status} {message}"
        with open(out, "rb") as file:
            data = file.read()
        os.unlink(out)
        return data, message

    def check_problems(self, directory: str, name: str, view: View) -> list[str]:
        """No more than leaks; else it is noted, and must be repairable."""
        if self.formats[name] == "raw":
            return []
        status, message = self.tool(directory, self.scenario.img(
            "check", "-f", self.formats[name], name))
        if status in (0, 3):
            self.leaks += status == 3
            return []
        what = "check"
        if status == 2:
            self.repaired.append(f"{name}: {message}")
            what = "repair"
            status, message = self.tool(directory, self.scenario.img(
                "check", "-f", self.formats[name], "-r", "all", name))
        if status:
            return [f"{what} of {name}: {status} {message}"] if name in self.complete else []
        try:
            now = read_view(directory, name, self.formats[name])
        except (FormatError, OSError) as error:
            return [f"{name} cannot be read after its repair: {error!r}"]
        if now.disk != view.disk:
            return [f"{name} changed in its repair ({first_difference(now.disk, view.disk)})"]
        return []

    def use_problems(self, directory: str, views: dict[str, View]) -> list[str]:
        """Go on with the images: write to the top one, read it and those beside it."""
        tops = [name for name in views if self.formats[name] != "raw" and not any(
            view.backing == name for view in views.values())]
        found = []
        for name in tops:
            if not views[name].disk:
                continue
            want = bytearray(views[name].disk)
            cmds = self.random_writes(want)
            status, message = self.tool(directory, self.scenario.io(name, cmds))
            if status:
                if name in self.complete:
                    found.append(f"write to {name}: {status} {message}")
                continue
            found += self.after_use(directory, name, bytes(want))
        return found

    def random_writes(self, want: bytearray) -> list[str]:
        """Writes of 251 and 252, all over the disk and some that fill a region; changes
        the content that is expected."""
        cmds = []
        size = len(want)
        cluster = self.scenario.cluster
        for number in range(6):
            offset = self.rng.randrange(size) // SECTOR * SECTOR
            length = min(self.rng.choice((SECTOR, cluster, 8 * cluster)), size - offset)
            pattern = 251 + number % 2
            cmds.append(f"write -q -P {pattern} {offset} {length}")
            want[offset:offset + length] = bytes([pattern]) * length
        return cmds

    def after_use(self, directory: str, name: str, want: bytes) -> list[str]:
        found = []
        status, message = self.tool(directory, self.scenario.img(
            "check", "-f", self.formats[name], name))
        if status == 2 and name not in self.complete:
            self.repaired.append(f"{name} after its use: {message}")
        elif status not in (0, 3):
            found.append(f"check of {name} after its use: {status} {message}")
        try:
            view = read_view(directory, name, self.formats[name])
            if view.disk != want:
                found.append(f"{name} after its use ({first_difference(view.disk, want)})")
            chain = Chain(directory, name, self.formats[name])
            if name in self.complete or not chain.damage():
                found += [f"{name} after its use: {lie}"
                          for lie in (chain.damage() + chain.lies())[:3]]
            found += filter(None, [self.snapshot_problem(name, view)])
        except (FormatError, OSError, AssertionError) as error:
            found.append(f"{name} cannot be read after its use: {error!r}")
        disk, message = self.driver_view(directory, name)
        if disk != want:
            found.append(f"{name} after its use: the driver reads something else: {message}")
        return found


def first_difference(have: bytes, want: bytes) -> str:
    if len(have) != len(want):
        return f"{len(have)} bytes, not {len(want)}"
    first = next(i for i, (x, y) in enumerate(zip(have, want)) if x != y)
    return f"at {first:#x}: {have[first]}, not {want[first]}"


def kind_of(problem: str) -> str:
    """The first line of a problem without its numbers, to count alike ones."""
    problem = problem.split("\n", 1)[0]
    return re.sub(r"0x[0-9a-f]+|[0-9a-f]{12,}|\d+", "#", problem)[:160]
