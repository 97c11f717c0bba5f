# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of the bench: what is promised, measured against qcow2 in the same run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Callable, Iterator

import live
import measure
from chains import Chain, Content, RandomContent, build, first_difference, plan
from measure import MIB, interleave
from report import Figure, Limit
from surgery import surgery
from tools import BenchError, Image, Tools

GIB = 1 << 30
TIB = 1 << 40


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    layers: int = 1000
    size: int = GIB
    rounds: int = 31
    reads: int = 20000
    creates: int = 31
    opens: int = 31
    memory_rounds: int = 7
    counted_reads: int = 5000
    writes: int = 20000
    live_rounds: int = 5
    long_chain: int = 10000
    reindex_size: int = 100 * GIB
    aios: tuple[str, ...] = ('threads', 'io_uring')


QUICK = Scale(rounds=7, reads=8000, creates=15, opens=15, memory_rounds=3, counted_reads=2500,
              writes=5000, live_rounds=1, long_chain=0, reindex_size=0)


class Bench:
    """The chains, and the figures measured on them."""

    def __init__(self, tools: Tools, work: Path, scale: Scale, subject: str,
                 say: Callable[[str], None]) -> None:
        self.tools = tools
        self.work = work
        self.scale = scale
        self.subject = subject
        self.say = say
        self._chains: dict[tuple[str, int, int], Chain] = {}

    def chain(self, fmt: str, layers: int, size: int = 0, clusters: int = 0) -> Chain:
        """A chain of random content, uniformly owned; built when first asked for."""
        size = size or self.scale.size
        key = (fmt, layers, size)
        if key not in self._chains:
            content = RandomContent(size, clusters or min(size // 65536, 16384))
            self.say(f'building: {fmt}, {layers} layers, {size >> 20} MiB')
            built = build(self.tools, self.work / f'{fmt}-{layers}-{size >> 20}', fmt, content,
                          plan(content, layers), self.say)
            self.say(f'  {built.build_seconds:.1f} s')
            measure.warm([built.folder / built.name(i) for i in range(layers)])
            self._chains[key] = built
        return self._chains[key]

    def drop(self, chain: Chain) -> None:
        """Remove a chain that no other figure needs."""
        shutil.rmtree(chain.folder)
        self._chains = {k: v for k, v in self._chains.items() if v is not chain}

    @property
    def deep(self) -> Image:
        """The subject's long chain."""
        return self.chain(self.subject, self.scale.layers).image()

    @property
    def short(self) -> Image:
        """The subject's chain of one."""
        return self.chain(self.subject, 1).image()

    @property
    def reference(self) -> Image:
        """qcow2's chain of one."""
        return self.chain('qcow2', 1).image()

    def _compare(self, key: str, title: str, ours: list[float], theirs: list[float],
                 limit: Limit, names: tuple[str, str], difference: bool = False,
                 unit: str = 'ratio') -> Figure:
        pairs = zip(ours, theirs)
        samples = [a - b if difference else a / b for a, b in pairs]
        return Figure(key, title, unit, samples, limit, {names[0]: ours, names[1]: theirs})

    def _names(self, *others: str) -> tuple[str, ...]:
        return (f'{self.subject} {self.scale.layers}', *others)

    # The figures

    def reads(self) -> Iterator[Figure]:
        """4 KiB random reads: throughput of the long chain, as a share of a chain of one."""
        scale = self.scale
        deep, one, reference = self._names(f'{self.subject} 1', 'qcow2 1')
        images = (self.deep, self.short, self.reference)
        for aio in scale.aios:
            for depth in (1, 16):
                rates = interleave(scale.rounds, *(
                    lambda image=image: measure.random_io(self.tools, image, scale.size,
                                                          scale.reads, depth, aio)
                    for image in images))
                where = f'{aio}, depth {depth}'
                for rate, name in ((rates[1], one), (rates[2], reference)):
                    yield self._compare(
                        f'read-{aio}-{depth}-{name.replace(" ", "-")}',
                        f'4 KiB reads/s, {deep} : {name}, {where}', rates[0], rate,
                        Limit(0.97, at_least=True), (deep, name))

    def cpu(self) -> Iterator[Figure]:
        """Processor time per 4 KiB read."""
        deep, one, reference = self._names(f'{self.subject} 1', 'qcow2 1')
        # Many cached reads one by one overflow the stack of qemu-img bench (upstream's, too)
        for depth, reads in ((1, self.scale.reads // 4), (16, self.scale.reads)):
            costs = interleave(max(5, self.scale.rounds // 3), *(
                lambda image=image: measure.cpu_per_read(self.tools, image, self.scale.size,
                                                         reads, depth)
                for image in (self.deep, self.short, self.reference)))
            for cost, name in ((costs[1], one), (costs[2], reference)):
                yield self._compare(f'cpu-{depth}-{name.replace(" ", "-")}',
                                    f'CPU time per read, {deep} : {name}, depth {depth}',
                                    costs[0], cost, Limit(1 / 0.97), (deep, name))

    def instructions(self) -> Iterator[Figure]:
        """Instructions per 4 KiB read: what the throughput hides in noise."""
        counter = measure.instruction_counter()
        if not counter:
            self.say('neither perf nor valgrind can count instructions here: left out')
            return
        deep, one, reference = self._names(f'{self.subject} 1', 'qcow2 1')
        counts = interleave(5, *(
            lambda image=image: measure.instructions_per_read(
                self.tools, image, self.scale.size, counter, self.scale.counted_reads)
            for image in (self.deep, self.short, self.reference)))
        for count, name in ((counts[1], one), (counts[2], reference)):
            figure = self._compare(f'instructions-{name.replace(" ", "-")}',
                                   f'instructions per read, {deep} : {name}', counts[0], count,
                                   Limit(1 / 0.97), (deep, name))
            figure.note = (f'{median(counts[0]):.0f} to {median(count):.0f} instructions, '
                           f'{counter}, 16 at a time')
            yield figure

    def opening(self) -> Iterator[Figure]:
        """Time to open: long chain less a chain of one; growth from layer to layer."""
        scale = self.scale
        deep, one = self._names(f'{self.subject} 1')
        opens = [[1000 * s for s in samples] for samples in interleave(
            scale.opens, lambda: measure.open_seconds(self.tools, self.deep),
            lambda: measure.open_seconds(self.tools, self.short))]
        yield self._compare('open', f'open, {deep} less {one}', opens[0], opens[1], Limit(30),
                            (deep, one), difference=True, unit='ms')
        layers = scale.long_chain or scale.layers
        chain = self.chain(self.subject, layers, scale.size if not scale.long_chain else GIB // 2,
                           clusters=0 if not scale.long_chain else GIB // 2 // 65536)
        tenth, half, full = (chain.image(int(layers * share) - 1) for share in (.1, .5, 1))
        times = [[1000 * s for s in samples] for samples in interleave(
            max(5, scale.opens // 3),
            *(lambda image=image: measure.open_seconds(self.tools, image)
              for image in (tenth, half, full)))]
        slopes = [((c - b) / (layers * .5)) / ((b - a) / (layers * .4))
                  for a, b, c in zip(*times)]
        yield Figure('open-linear', f'open, growth per layer, second half of {layers} : first',
                     'ratio', slopes, Limit(1.25),
                     {f'{layers // 10} layers, ms': times[0], f'{layers // 2} layers, ms': times[1],
                      f'{layers} layers, ms': times[2]})
        yield Figure('open-longest', f'open, {layers} layers', 'ms', times[2])
        if scale.long_chain:
            yield self._long_reads(chain)
            self.drop(chain)

    def _long_reads(self, chain: Chain) -> Figure:
        rates = interleave(self.scale.rounds, *(
            lambda image=image, size=size: measure.random_io(
                self.tools, image, size, self.scale.reads)
            for image, size in ((chain.image(), GIB // 2), (self.reference, self.scale.size))))
        ours, theirs = f'{self.subject} {chain.layers}', 'qcow2 1'
        return self._compare('read-longest', f'4 KiB reads/s, {ours} : {theirs}, threads, depth 1',
                             rates[0], rates[1], Limit(0.97, at_least=True), (ours, theirs))

    def memory(self) -> Iterator[Figure]:
        """Peak memory after reading all: what the chain costs beyond a chain of one."""
        deep, one = self._names(f'{self.subject} 1')
        peaks = interleave(self.scale.memory_rounds, *(
            lambda image=image: measure.peak_rss(self.tools, image, self.scale.size)
            for image in (self.deep, self.short)))
        yield self._compare('memory', f'memory, {deep} less {one}', peaks[0], peaks[1], Limit(2),
                            (deep, one), difference=True, unit='MiB')

    def snapshots(self) -> Iterator[Figure]:
        """Time and size of a new snapshot on the long chain, on a small and a large disk."""
        small = (self.deep, self.reference, '1 GiB')
        if self.scale.size != GIB:
            small = (self.deep, self.reference, f'{self.scale.size >> 20} MiB')
        # On the large disk every layer owns two clusters, each with an L2 table of its own.
        clusters = 2 * self.scale.layers
        large = (self.chain(self.subject, self.scale.layers, 10 * TIB, clusters).image(),
                 self.chain('qcow2', 1, 10 * TIB, clusters).image(), '10 TiB')
        for ours, theirs, disk in (small, large):
            deep, reference = self._names('qcow2 1')
            times = [[1000 * s for s in samples] for samples in interleave(
                self.scale.creates, *(
                    lambda image=image: measure.snapshot_seconds(self.tools, image, self.work)
                    for image in (ours, theirs)))]
            yield self._compare(f'snapshot-{disk.replace(" ", "")}',
                                f'snapshot on {disk}, {deep} less {reference}', times[0],
                                times[1], Limit(2), (deep, reference), difference=True, unit='ms')
        for ours, theirs, disk in (small, large):
            length, used = measure.snapshot_bytes(self.tools, ours, self.work)
            their_length, their_used = measure.snapshot_bytes(self.tools, theirs, self.work)
            yield Figure(f'snapshot-size-{disk.replace(" ", "")}',
                         f'size of an empty snapshot, {disk}', 'KiB', [length / 1024],
                         limit=Limit(512) if disk == '1 GiB' else None,
                         note=f'{used / 1024:.0f} KiB on the disk; qcow2 on one layer: '
                              f'{their_length / 1024:.0f} KiB, {their_used / 1024:.0f} KiB')

    def writes(self) -> Iterator[Figure]:
        """Writes into a fresh snapshot of the long chain, and of qcow2's chain of one."""
        scale = self.scale
        deep, reference = self._names('qcow2 1')
        mebibytes = min(256, scale.size >> 20)
        kinds: list[tuple[str, str, Callable[[Image], float]]] = [
            ('random-4k', '4 KiB random writes/s',
             lambda image: measure.random_io(self.tools, image, scale.size, scale.writes,
                                             write=True)),
            ('sequential-1m', '1 MiB sequential writes/s',
             lambda image: measure.sequential_write(self.tools, image, mebibytes))]
        for key, title, kind in kinds:
            rates = interleave(scale.rounds, *(
                lambda image=image: measure.on_overlay(self.tools, image, self.work, kind)
                for image in (self.deep, self.reference)))
            yield self._compare(f'write-{key}', f'{title}, {deep} : {reference}', rates[0],
                                rates[1], Limit(0.97, at_least=True), (deep, reference))

    def live(self) -> Iterator[Figure]:
        """Snapshots of a running machine."""
        yield from live.live(self.tools, self.work, self.subject, self.scale.layers,
                             self.scale.size, self.scale.live_rounds, self.say)

    def surgery(self) -> Iterator[Figure]:
        """Commit and stream near the top of the long chain."""
        yield from surgery(self.tools, self.work, self.chain(self.subject, self.scale.layers),
                           self.scale.size, self.scale.opens, self.say)

    def reindex(self) -> Iterator[Figure]:
        """Rebase without a look at the data, and the first open, which stores a new index.

        A large and mostly empty disk: each layer owns clusters in a few regions, with an L2
        table each.  Also what it takes to index a chain that has nothing to start from.
        """
        scale = self.scale
        if not scale.reindex_size:
            return
        clusters = scale.reindex_size // 65536 // 100
        chain = self.chain(self.subject, scale.layers, scale.reindex_size, clusters)
        top = chain.image()
        for number in (scale.layers - 1, scale.layers // 2, 1):
            times = [measure.rebase_seconds(self.tools, chain.image(number),
                                            chain.name(number - 1), top)
                     for _ in range(max(5, scale.creates // 3))]
            yield Figure(f'reindex-{number}', f'rebase -u of layer {number} of '
                         f'{scale.layers - 1}, and re-index of the top', 's',
                         [sum(pair) for pair in times], Limit(1),
                         {'rebase': [a for a, _ in times], 're-index': [b for _, b in times]})
        self.drop(chain)
        plain = self.chain('qcow2', scale.layers, scale.reindex_size, clusters)
        yield Figure('adopt', f'sqcow2 layer on {scale.layers} qcow2 layers, without opening these',
                     's', [measure.adopt_seconds(self.tools, plain.image(), scale.reindex_size,
                                                 self.work) for _ in range(5)])
        self.drop(plain)

    def content(self) -> Iterator[Figure]:
        """Every byte of the chains against what was written; garbage lies below each cluster.

        qcow2 gets the plan of its chain written as sqcow2 does, as far down as it can be read:
        that both equal the model makes them equal to each other.
        """
        checked: list[tuple[Chain, Content]] = [
            (self.chain(self.subject, self.scale.layers),
             RandomContent(self.scale.size, min(self.scale.size // 65536, 16384)))]
        content = RandomContent(256 * MIB, 1024)
        unwritten = [n + 1 for n in content.clusters()[:128]]
        shallow = min(300, self.scale.layers)
        for fmt, layers in ((self.subject, self.scale.layers), ('qcow2', shallow)):
            folder = self.work / f'garbage-{fmt}-{layers}'
            self.say(f'building: {fmt}, {layers} layers, garbage below')
            checked.append((build(self.tools, folder, fmt, content,
                                  plan(content, layers, garbage=2, zeros=unwritten)), content))
        wrong = []
        for chain, expected in checked:
            at = first_difference(self.tools, chain.image(), expected, self.work)
            if at >= 0:
                wrong.append(f'{chain.folder.name} from byte {at}')
        if wrong:
            raise BenchError('WRONG CONTENT: ' + ', '.join(wrong))
        compared = sum(expected.size for _, expected in checked) / MIB
        yield Figure('content', f'wrong bytes in {len(checked)} chains ({compared:.0f} MiB)',
                     'bytes', [0], Limit(0))
