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
from tools import BenchError, Image, QemuIo, Tools, describe_status

HEAD = ('layers', 'format', 'open [ms]', 'memory at open [MiB]', '4 KiB read [us]',
        'new snapshot [ms]')
# Measure again, for a median, only what is this fast.
FAST_SECONDS = 0.5


def _repeat(first: float, again: Callable[[], float]) -> float:
    """The median of five, or the first one where it took long."""
    return first if first > FAST_SECONDS else median([first, *(again() for _ in range(4))])


def _why(err: BenchError) -> str:
    """In short, why a cell has no number: how the program ended."""
    return str(err).split(':', maxsplit=2)[1].strip()


def _open(tools: Tools, image: Image) -> tuple[str, str]:
    """Time to open, the start of the program taken off, and its memory then."""
    costs, peaks = [], []
    for _ in range(7):
        try:
            with QemuIo(tools) as nothing, QemuIo(tools, image) as opened:
                costs.append(opened.ready_seconds - nothing.ready_seconds)
                peaks.append(opened.peak_rss() / measure.MIB)
        except BenchError as err:
            return _why(err), '-'
        if costs[-1] > FAST_SECONDS:
            break
    cost = 1000 * median(costs)
    return '< 1' if cost < 1 else number(cost), number(median(peaks))


def _read(tools: Tools, image: Image, size: int, requests: int) -> str:
    seconds, status = measure.try_reads(tools, image, size, requests)
    if status:
        return describe_status(status)

    def again() -> float:
        return requests * measure.try_reads(tools, image, size, requests)[0]

    return number(1e6 * _repeat(requests * seconds, again) / requests)


def _snapshot(tools: Tools, image: Image, work: Path) -> str:
    def create() -> float:
        return measure.snapshot_seconds(tools, image, work)

    try:
        return number(1000 * _repeat(create(), create))
    except BenchError as err:
        return _why(err)


def _row(tools: Tools, image: Image, layers: int, size: int, work: Path) -> tuple[str, ...]:
    # qcow2 needs a millisecond and more per read on a long chain.
    requests = 10000 if image.fmt == 'sqcow2' or layers == 1 else 2000
    return (str(layers), image.fmt, *_open(tools, image), _read(tools, image, size, requests),
            _snapshot(tools, image, work))


def table(tools: Tools, work: Path, depths: list[int], formats: list[str], size: int,
          say: Callable[[str], None]) -> str:
    """Build each chain, measure it, remove it; the table as text."""
    content = RandomContent(size, size // 65536)
    rows: list[tuple[str, ...]] = [HEAD]
    for layers in depths:
        for fmt in formats:
            say(f'{fmt}, {layers} layers')
            chain = build(tools, work / f'table-{fmt}-{layers}', fmt, content,
                          plan(content, layers))
            measure.warm([chain.folder / chain.name(i) for i in range(layers)])
            rows.append(_row(tools, chain.image(), layers, size, work))
            shutil.rmtree(chain.folder)
    return grid(rows, left=0)
