# SPDX-License-Identifier: GPL-2.0-or-later
"""Plan and build backing chains whose whole content is known.

A plan says which layer writes what into which cluster; it depends on nothing but
its arguments, so two formats get the very same writes.  Each cluster of the final
content has one owner, chosen by a fixed pseudo-random function, and may have garbage
in layers below its owner: a reader that asks the wrong layer gets wrong bytes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator, Protocol, Sequence

from tools import BenchError, Image, Tools, run, without_backing

SEED = 20260101
GARBAGE_BYTE = 0xdb
# Writes of data per qemu-io.
BATCH = 64
MAX_WRITE = 1 << 20


class Content(Protocol):
    """What a disk shall hold."""

    size: int
    cluster_size: int

    def clusters(self) -> Sequence[int]:
        """Guest cluster numbers that are not zero."""

    def read(self, cluster: int) -> bytes:
        """The bytes of one guest cluster."""


class RandomContent:
    """`count` clusters of random bytes, evenly spaced over a disk of `size` bytes."""

    def __init__(self, size: int, count: int, cluster_size: int = 65536) -> None:
        self.size = size
        self.cluster_size = cluster_size
        self._spacing = size // cluster_size // count
        self._numbers = range(0, count * self._spacing, self._spacing)
        self._pool = random.Random(SEED).randbytes((4 << 20) + cluster_size)

    def clusters(self) -> Sequence[int]:
        return self._numbers

    def read(self, cluster: int) -> bytes:
        if cluster % self._spacing or cluster // self._spacing >= len(self._numbers):
            return bytes(self.cluster_size)
        # Slices of one pool, each with its number in front: new random bytes take too long.
        start = cluster * 4093 % (4 << 20)
        return cluster.to_bytes(8, 'big') + self._pool[start:start + self.cluster_size - 8]


class FileContent:
    """The content of a raw image file."""

    def __init__(self, path: Path, cluster_size: int) -> None:
        self.size = path.stat().st_size
        self.cluster_size = cluster_size
        self._data = path.read_bytes()
        zero = bytes(cluster_size)
        self._numbers = [n for n in range(-(-self.size // cluster_size)) if self.read(n) != zero]

    def clusters(self) -> Sequence[int]:
        return self._numbers

    def read(self, cluster: int) -> bytes:
        start = cluster * self.cluster_size
        return self._data[start:start + self.cluster_size]


@dataclass
class Layer:
    """What one layer writes: cluster numbers by kind."""

    data: list[int] = field(default_factory=list)
    garbage: list[int] = field(default_factory=list)
    zeros: list[int] = field(default_factory=list)


def plan(content: Content, layers: int, garbage: int = 0, zeros: Iterable[int] = ()) -> list[Layer]:
    """Deal the content out to the layers, the same number of clusters to each.

    Each cluster has garbage in up to `garbage` layers below its owner.  `zeros` are
    clusters of the content that are zero: they get garbage too, and an owner that
    writes zeros over it.
    """
    rng = random.Random(SEED + layers)
    result = [Layer() for _ in range(layers)]

    def soil(cluster: int, owner: int) -> None:
        for below in rng.sample(range(owner), min(garbage, owner)):
            result[below].garbage.append(cluster)

    deck = list(content.clusters())
    rng.shuffle(deck)
    for turn, cluster in enumerate(deck):
        owner = turn % layers
        result[owner].data.append(cluster)
        soil(cluster, owner)
    for cluster in zeros:
        owner = rng.randrange(layers // 2, layers)
        result[owner].zeros.append(cluster)
        soil(cluster, owner)
    for layer in result:
        layer.data.sort()
    return result


@dataclass
class Chain:
    """A chain on disk."""

    folder: Path
    fmt: str
    layers: int
    create_seconds: list[float] = field(default_factory=list)
    build_seconds: float = 0

    def name(self, layer: int) -> str:
        """File name of a layer, relative to the folder."""
        return f'{layer:05}.{self.fmt}'

    def image(self, layer: int = -1) -> Image:
        """A layer as an image; the top one by default."""
        return Image(self.folder / self.name(layer % self.layers), self.fmt)


def _runs(numbers: list[int], most: int) -> Iterator[list[int]]:
    """Split sorted cluster numbers into runs of neighbours, none longer than `most`."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if (end == len(numbers) or numbers[end] != numbers[end - 1] + 1
                or end - start == most):
            yield numbers[start:end]
            start = end


def _overwrite(path: Path, data: bytes) -> None:
    """Put data at a file's start.  Its pages stay: new ones cost more than the copy."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), 'wb', buffering=0) as file:
        file.write(data)


def _write_layer(tools: Tools, chain: Chain, number: int, layer: Layer, content: Content,
                 alone: bool) -> None:
    size = content.cluster_size
    name = chain.name(number)
    target = [without_backing(name, chain.fmt)] if alone else ['-f', chain.fmt, name]
    commands = [f'write -q -P {GARBAGE_BYTE} {cluster * size} {size}' for cluster in layer.garbage]
    commands += [f'write -q -z {cluster * size} {size}' for cluster in layer.zeros]

    def flush() -> None:
        words = [word for line in commands for word in ('-c', line)]
        if words:
            # Builds only: nothing is measured here, and a crash of the host loses nothing.
            run([tools.io, '-t', 'unsafe', *words, *target], cwd=chain.folder)
        commands.clear()

    # qemu-io writes from a file's start, so each write of a batch has a file of its own.
    # One set of files per thread, reused.
    prefix = f'source-{threading.get_ident()}'
    for turn, numbers in enumerate(_runs(layer.data, MAX_WRITE // size)):
        source = f'{prefix}-{turn % BATCH}'
        _overwrite(chain.folder / source, b''.join(content.read(n) for n in numbers))
        commands.append(f'write -q -s {source} {numbers[0] * size} {len(numbers) * size}')
        if turn % BATCH == BATCH - 1:
            flush()
    flush()


def build(tools: Tools, folder: Path, fmt: str, content: Content, layers: list[Layer],
          progress: Callable[[str], None] = lambda _: None) -> Chain:
    """Build a chain, or take the finished one of the same plan that is there already.

    sqcow2 layers are made as a user makes them: `qemu-img create` on the layer below,
    then writes through the whole chain.  Both would take minutes to hours with a format
    that opens the chain layer by layer, so such layers are created with -u and written
    alone; every write is of whole clusters, so the result is the same.
    """
    folder = folder.resolve()
    chain = Chain(folder, fmt, len(layers))
    done = folder / 'done.json'
    facts = {'format': fmt, 'layers': [vars(layer) for layer in layers],
             'size': content.size, 'cluster_size': content.cluster_size}
    if done.exists():
        saved = json.loads(done.read_text(encoding='ascii'))
        if saved['facts'] == facts:
            chain.create_seconds = saved['create_seconds']
            chain.build_seconds = saved['build_seconds']
            return chain
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.perf_counter()
    alone = fmt != 'sqcow2'

    def make(number: int) -> None:
        start = time.perf_counter()
        tools.create(fmt, chain.name(number), folder,
                     backing=chain.name(number - 1) if number else '',
                     size=content.size if alone or not number else 0,
                     cluster_size=content.cluster_size, unsafe=alone)
        chain.create_seconds.append(time.perf_counter() - start)
        _write_layer(tools, chain, number, layers[number], content, alone)
        if number % 1000 == 999:
            progress(f'{fmt}: {number + 1} layers')

    with ThreadPoolExecutor(2 if alone else 1) as pool:
        for _ in pool.map(make, range(len(layers))):
            pass
    for source in folder.glob('source-*'):
        source.unlink()
    chain.build_seconds = time.perf_counter() - began
    done.write_text(json.dumps({'facts': facts, 'create_seconds': chain.create_seconds,
                                'build_seconds': chain.build_seconds}), encoding='ascii')
    return chain


def first_difference(tools: Tools, image: Image, content: Content, scratch: Path) -> int:
    """Convert an image to raw; return the first byte that is not the content's, or -1."""
    raw = scratch / 'converted.raw'
    run([tools.img, 'convert', '-f', image.fmt, '-O', 'raw', str(image.path), str(raw)])
    try:
        if raw.stat().st_size != content.size:
            raise BenchError(f'{image.path}: {raw.stat().st_size} bytes, not {content.size}')
        with raw.open('rb') as file:
            for cluster in range(-(-content.size // content.cluster_size)):
                got, want = file.read(content.cluster_size), content.read(cluster)
                if got != want:
                    inside = next(i for i, (a, b) in enumerate(zip(got, want)) if a != b)
                    return cluster * content.cluster_size + inside
    finally:
        raw.unlink(missing_ok=True)
    return -1
