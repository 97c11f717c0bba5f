# SPDX-License-Identifier: GPL-2.0-or-later
"""
Power cuts: what a file may hold when the power goes off in the midst of a tool

A tool runs with the image under QEMU's blklogwrites driver, which logs each
write and flush.  Then the states are made that a cut could leave: after each
write all before it; and, as disks reorder, all writes before the last flush
and any of those after it, the last ones perhaps in part.
"""

import os
import random
import struct
from typing import Iterator, List, NamedTuple, Tuple

import iotests
from sqcow2_chains import run_tool

FLUSH = 1
DISCARD = 4
SUPER = struct.Struct('<QQQI')
ENTRY = struct.Struct('<QQQQ')
MAGIC = 0x6a736677736872
SECTOR = 512


class Write(NamedTuple):
    offset: int
    data: bytes


class PowerCut:
    """The states of the image @path during one run of qemu-img"""

    def __init__(self, path: str, fmt: str, *args: str,
                 log: str = '') -> None:
        """
        Run "qemu-img @args" with options in place of the image's name; it
        must succeed, or return a status below 4 if it is "check".
        """
        self.path = path
        log = log or path + '.log'
        with open(path, 'rb') as f:
            self.before = f.read()
        with open(log, 'wb'):
            pass
        options = (f'driver={fmt},file.driver=blklogwrites,file.discard=ignore,'
                   f'file.file.driver=file,file.file.filename={path},'
                   f'file.log.driver=file,file.log.filename={log}')
        self.status, self.out = run_tool(*iotests.qemu_img_args, *args,
                                         '--image-opts', options)
        with open(path, 'rb') as f:
            self.after = f.read()
        self.epochs: List[List[Write]] = [[]]   # between flushes
        self._parse(log)
        os.remove(log)
        state = self._state(self.epochs)
        if len(self.after) < len(self.before):
            # What was cut off the file is in none of the log's entries
            state = state[:len(self.after)]
        assert state.rstrip(b'\0') == self.after.rstrip(b'\0')

    def _parse(self, log: str) -> None:
        with open(log, 'rb') as f:
            magic, _, count, sector_size = SUPER.unpack(f.read(SUPER.size))
            assert (magic, sector_size) == (MAGIC, SECTOR)
            f.seek(SECTOR)
            for _ in range(count):
                sector, number, flags, _ = ENTRY.unpack(
                    f.read(SECTOR)[:ENTRY.size])
                if flags & FLUSH and self.epochs[-1]:
                    self.epochs.append([])
                if number and not flags & DISCARD:
                    data = f.read(number * SECTOR).ljust(number * SECTOR,
                                                         b'\0')
                    self.epochs[-1].append(Write(sector * SECTOR, data))

    def _state(self, epochs: List[List[Write]]) -> bytes:
        state = bytearray(self.before)
        for write in (w for epoch in epochs for w in epoch):
            end = write.offset + len(write.data)
            if len(state) < end:
                state += bytes(end - len(state))
            state[write.offset:end] = write.data
        return bytes(state)

    @property
    def writes(self) -> int:
        return sum(len(epoch) for epoch in self.epochs)

    def prefixes(self) -> Iterator[Tuple[str, bytes]]:
        """After each write, all before it"""
        for i, epoch in enumerate(self.epochs):
            for j in range(len(epoch)):
                yield (f'cut after write {j} behind flush {i}',
                       self._state(self.epochs[:i] + [epoch[:j]]))

    def reordered(self, rng: random.Random, count: int
                  ) -> Iterator[Tuple[str, bytes]]:
        """Any of the writes after a flush; one perhaps in part"""
        many = [i for i, e in enumerate(self.epochs) if e]
        for _ in range(count):
            i = rng.choice(many)
            some = [w for w in self.epochs[i] if rng.random() < 0.5]
            if some and rng.random() < 0.5:
                k = rng.randrange(len(some))
                offset, data = some[k]
                # A header is written as a whole, as qcow2 does it
                if offset >= 4096:
                    some[k] = Write(offset, data[:rng.randrange(
                        0, len(data), SECTOR)])
            yield (f'{len(some)} of {len(self.epochs[i])} writes behind '
                   f'flush {i}', self._state(self.epochs[:i] + [some]))

    def put(self, state: bytes) -> None:
        with open(self.path, 'wb') as f:
            f.write(state)
