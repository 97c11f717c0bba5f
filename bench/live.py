# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures of live snapshots: a thousand of them in one process, with writes between them."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Callable, Iterator

from measure import BLOCK, MIB
from monitored import Monitored
from report import Figure, Limit
from tools import BenchError, Tools

FEW = 10                # at the beginning and at the end
WRITES = 2              # between two snapshots


class Machine(Monitored):
    """An emulator without a machine to emulate, whose drive a guest writes."""

    def __init__(self, tools: Tools, fmt: str, path: Path) -> None:
        super().__init__([tools.system(), '-nodefaults', '-display', 'none', '-machine', 'none',
                          '-qmp', 'stdio', '-drive',
                          f'id=drive,if=none,format={fmt},file={path}'])

    def write(self, offset: int, pattern: int) -> None:
        """One block, as the guest does."""
        said = self.command('human-monitor-command',
                            command_line=f'qemu-io drive "write -q -P {pattern} {offset} {BLOCK}"')
        if said.strip():
            raise BenchError(f'qemu-io: {said}')

    def snapshot(self, fmt: str, path: Path) -> float:
        """Seconds that it takes."""
        start = time.perf_counter()
        self.command('blockdev-snapshot-sync', device='drive', snapshot_file=str(path),
                     format=fmt)
        return time.perf_counter() - start

    def format_nodes(self, fmt: str) -> int:
        """How many nodes of this format there are."""
        return sum(node['drv'] == fmt
                   for node in self.command('query-named-block-nodes', flat=True))


@dataclass(frozen=True)
class Run:
    """What one process's snapshots took."""

    milliseconds: list[float]
    growth: float               # MiB, from the tenth snapshot to the last


def snapshots(tools: Tools, work: Path, fmt: str, count: int, size: int) -> Run:
    """Start with an empty image, and put `count` snapshots on it."""
    folder = work / f'live-{fmt}'
    folder.mkdir()
    rng = random.Random(1)
    times = []
    before = 0
    try:
        tools.create(fmt, '0', folder, size=size)
        with Machine(tools, fmt, folder / '0') as machine:
            for i in range(1, count + 1):
                for _ in range(WRITES):
                    machine.write(rng.randrange(size // BLOCK) * BLOCK, i % 255 + 1)
                times.append(1000 * machine.snapshot(fmt, folder / str(i)))
                if i == FEW:
                    before = machine.memory('RssAnon')
            growth = machine.memory('RssAnon') - before
            nodes = machine.format_nodes(fmt)
    finally:
        shutil.rmtree(folder)
    if fmt == 'sqcow2' and nodes != 1:
        raise BenchError(f'{count} live snapshots left {nodes} nodes')
    return Run(times, growth / MIB)


def live(tools: Tools, work: Path, fmt: str, count: int, size: int, rounds: int,
         say: Callable[[str], None]) -> Iterator[Figure]:
    """Growth of the process, and the time of the last snapshots against the first."""
    runs = []
    for i in range(rounds):
        say(f'{count} live snapshots, {i + 1} of {rounds}')
        runs.append(snapshots(tools, work, fmt, count, size))
    yield Figure('live-memory', f'memory, snapshot {FEW} to snapshot {count} in one process',
                 'MiB', [run.growth for run in runs], Limit(2))
    first = [median(run.milliseconds[:FEW]) for run in runs]
    last = [median(run.milliseconds[-FEW:]) for run in runs]
    yield Figure('live-time', f'live snapshot, last {FEW} of {count} : first {FEW}', 'ratio',
                 [b / a for a, b in zip(first, last)], Limit(1.2),
                 {f'first {FEW}, ms': first, f'last {FEW}, ms': last})
