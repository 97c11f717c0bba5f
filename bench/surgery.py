# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures of operations on a long chain: commit and stream of a layer near its top.

qcow2 does the same on a chain of ten layers: once on one whose upper layers hold the same data, so
that as much is moved, and once on one that spreads the same disk over its ten layers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

from chains import Chain, Layer, RandomContent, build, plan
from measure import MIB, interleave
from monitored import Monitored
from report import Figure, Limit
from tools import BenchError, Image, Tools, describe_status, shorten

SHORT_CHAIN = 10


def shortened(layers: list[Layer], count: int) -> list[Layer]:
    """The same layers, but the lowest ones taken together, so that `count` are left."""
    bottom = [cluster for layer in layers[:1 - count] for cluster in layer.data]
    return [Layer(data=sorted(bottom))] + layers[1 - count:]


@contextmanager
def restored(chain: Chain, upper: int) -> Iterator[list[str]]:
    """Names of the upper layers, top first; afterwards the files are as before."""
    names = [chain.name(chain.layers - 1 - i) for i in range(upper)]
    for name in names:
        shutil.copy(chain.folder / name, chain.folder / f'{name}.kept')
    os.sync()
    try:
        yield names
    finally:
        for name in names:
            os.replace(chain.folder / f'{name}.kept', chain.folder / name)


class Daemon(Monitored):
    """A qemu-storage-daemon with one image open."""

    def __init__(self, tools: Tools, image: Image) -> None:
        binary = tools.build_dir / 'storage-daemon' / 'qemu-storage-daemon'
        super().__init__([
            str(binary), '--chardev', 'stdio,id=qmp', '--monitor', 'chardev=qmp', '--blockdev',
            f'driver={image.fmt},node-name=top,file.driver=file,file.filename={image.path}'])

    def job(self, name: str, **arguments: Any) -> None:
        """Run a block job to its end."""
        self.command(name, job_id='job', device='top', **arguments)
        while True:
            event = self.answer('event')
            if event['event'] == 'BLOCK_JOB_COMPLETED':
                if 'error' in event['data']:
                    raise BenchError(f'{name}: {event["data"]["error"]}')
                break
        self.command('query-block-jobs')


@dataclass(frozen=True)
class Cost:
    """What an operation takes."""

    milliseconds: float
    mebibytes: float


def live(tools: Tools, chain: Chain, job: str) -> Cost:
    """Commit the layer below the top into the next, or stream it into the top."""
    with restored(chain, 3) as names, Daemon(tools, chain.image()) as daemon:
        start = time.perf_counter()
        if job == 'block-commit':
            daemon.job(job, top=str(chain.folder / names[1]), base=str(chain.folder / names[2]))
        else:
            daemon.job(job, base=str(chain.folder / names[2]))
        return Cost(1000 * (time.perf_counter() - start), daemon.memory('VmHWM') / MIB)


def commit_active(tools: Tools, chain: Chain) -> Cost:
    """qemu-img commit of the top layer."""
    command = [tools.img, 'commit', '-q', '-f', chain.fmt, str(chain.image().path)]
    with restored(chain, 2):
        start = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise BenchError(f'{describe_status(process.returncode)}: {shorten(command)}')
        return Cost(1000 * (time.perf_counter() - start), usage.ru_maxrss / 1024)


def surgery(tools: Tools, work: Path, chain: Chain, size: int, rounds: int,
            say: Callable[[str], None]) -> Iterator[Figure]:
    """Time and memory of each operation, long chain : short qcow2 chain."""
    content = RandomContent(size, min(size // 65536, 16384))
    layers = plan(content, chain.layers)
    for key, what, short_layers in (
            ('', 'as much moved', shortened(layers, SHORT_CHAIN)),
            ('disk-', 'the same disk', plan(content, SHORT_CHAIN))):
        say(f'building: qcow2, {SHORT_CHAIN} layers, {what}')
        short = build(tools, work / f'qcow2-{SHORT_CHAIN}-{key}of-{chain.layers}', 'qcow2', content,
                      short_layers)
        yield from compared(tools, chain, short, key, what, rounds)


def compared(tools: Tools, chain: Chain, short: Chain, prefix: str, condition: str, rounds: int
             ) -> Iterator[Figure]:
    """The figures of each operation, long chain : short chain."""
    names = f'{chain.fmt} {chain.layers}', f'qcow2 {SHORT_CHAIN}'
    kinds: list[tuple[str, str, Callable[[Chain], Cost]]] = [
        ('commit', 'block-commit of one layer', lambda c: live(tools, c, 'block-commit')),
        ('stream', 'block-stream of one layer', lambda c: live(tools, c, 'block-stream')),
        ('commit-active', 'qemu-img commit', lambda c: commit_active(tools, c))]
    for key, title, kind in kinds:
        ours: list[Cost] = []
        theirs: list[Cost] = []

        def sample(costs: list[Cost], c: Chain, kind: Callable[[Chain], Cost] = kind) -> float:
            costs.append(kind(c))
            return 0

        interleave(rounds, lambda: sample(ours, chain), lambda: sample(theirs, short))
        for what, unit in (('time', 'milliseconds'), ('memory', 'mebibytes')):
            parts = [[getattr(cost, unit) for cost in costs] for costs in (ours, theirs)]
            yield Figure(f'{prefix}{key}-{what}',
                         f'{title}, {condition}, {what}, {names[0]} : {names[1]}', 'ratio',
                         [a / b for a, b in zip(*parts)], Limit(1.2), dict(zip(names, parts)))
