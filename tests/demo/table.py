# SPDX-License-Identifier: GPL-2.0-or-later
"""sqcow2 beside qcow2 of the same build, at growing depth, measured now."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from typing import Callable

import measure
from chains import RandomContent, build, plan
from report import grid, number
from tools import BenchError, Image, Tools, describe_status

HEAD = ('layers', 'format', 'open [ms]', 'memory at open [MiB]', '4 KiB read [us]',
        'new snapshot [ms]')
# Measure again, for a median, only what is this fast.
FAST_SECONDS = 0.5


def _repeat(first: float, again: Callable[[], float]) -> float:
    """The median of five, or the first one where it took long."""
    return first if first > FAST_SECONDS else median([first, *(again() for _ in range(4))])


def _open(tools: Tools, image: Image, start: float) -> str:
    first = measure.try_open(tools, image)
    if first.status:
        return describe_status(first.status)
    seconds = _repeat(first.seconds, lambda: measure.open_seconds(tools, image))
    return number(1000 * max(0.0, seconds - start))


def _or_error(call: Callable[[], str]) -> str:
    """A cell: a number, or in short why there is none."""
    try:
        return call()
    except BenchError as err:
        return str(err).split(':', maxsplit=2)[1].strip()


def _read(tools: Tools, image: Image, size: int, requests: int) -> str:
    seconds, status = measure.try_reads(tools, image, size, requests)
    if status:
        return describe_status(status)

    def again() -> float:
        return requests * measure.try_reads(tools, image, size, requests)[0]

    return number(1e6 * _repeat(requests * seconds, again) / requests)


def _row(tools: Tools, image: Image, layers: int, size: int, work: Path, start: float
         ) -> tuple[str, ...]:
    # qcow2 needs a millisecond and more per read on a long chain.
    requests = 10000 if image.fmt == 'sqcow2' or layers == 1 else 2000

    def snapshot() -> str:
        first = measure.snapshot_seconds(tools, image, work)
        return number(1000 * _repeat(
            first, lambda: measure.snapshot_seconds(tools, image, work)))

    return (str(layers), image.fmt, _open(tools, image, start),
            _or_error(lambda: number(measure.peak_rss(tools, image))),
            _read(tools, image, size, requests), _or_error(snapshot))


def table(tools: Tools, work: Path, depths: list[int], formats: list[str], size: int,
          say: Callable[[str], None]) -> str:
    """Build each chain, measure it, remove it; the table as text."""
    content = RandomContent(size, size // 65536)
    start = median(measure.start_seconds(tools) for _ in range(5))
    rows: list[tuple[str, ...]] = [HEAD]
    for layers in depths:
        for fmt in formats:
            say(f'{fmt}, {layers} layers')
            chain = build(tools, work / f'table-{fmt}-{layers}', fmt, content,
                          plan(content, layers))
            measure.warm([chain.folder / chain.name(i) for i in range(layers)])
            rows.append(_row(tools, chain.image(), layers, size, work, start))
            shutil.rmtree(chain.folder)
    return grid(rows, left=0)
