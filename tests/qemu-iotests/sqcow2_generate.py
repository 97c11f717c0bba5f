#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
Chains of very many sQcow2 layers, written straight to files

Written from docs/sqcow2.rst and the qcow2 specification alone.  Creating
65,536 layers with qemu-img takes a quarter of an hour; this takes seconds.
The files are what qemu-img and writes would make: refcounts are exact, own L2
tables complete, root tables share the tables of the layers below.  As a
program it makes a chain for a measurement:

    sqcow2_generate.py DIR LAYERS CLUSTERS [CLUSTER_BITS]
"""

import os
import random
import struct
import sys
from typing import Dict, List, Optional

from sqcow2_format import (EXT_BACKING_FORMAT, EXT_RECORD, FEATURE_BIT, HEADER,
                           INDEX_VALID, QCOW2_MAGIC, RECORD, Cluster, Root,
                           crc32c, encode_foreign, encode_root)

COPIED = 1 << 63        # in L1 and L2 entries: refcount is exactly one
ZERO_FLAG = 1
ZERO = -1               # in place of a byte: a zero cluster


class Generator:
    """
    A chain that grows by add(), and the bytes that its top must show.  Layer
    k is the file "k" of the directory.
    """
    # pylint: disable=too-many-instance-attributes

    def __init__(self, directory: str, clusters: int, cluster_bits: int = 9
                 ) -> None:
        self.directory = directory
        self.cluster_bits = cluster_bits
        self.cluster_size = 1 << cluster_bits
        self.l2_entries = self.cluster_size // 8
        self.size = clusters * self.cluster_size
        self.model = bytearray(self.size)
        self.count = 0
        self._regions = -(-clusters // self.l2_entries)
        self._l1_clusters = -(-self._regions * 8 // self.cluster_size)
        # Of the view of the top layer
        self._foreign = [0] * (self._regions * self.l2_entries)
        self._root = [0] * self._regions
        self._root_bytes = b''
        self._root_crc = 0
        self._stamp = bytes(16)
        os.makedirs(directory, exist_ok=True)

    def path(self, layer: int) -> str:
        return os.path.join(self.directory, str(layer))

    @property
    def top(self) -> str:
        return self.path(self.count - 1)

    def add(self, writes: Dict[int, int]) -> None:
        """Add a layer that owns the clusters in @writes, of one byte each."""
        layer = self.count
        l1_place = 3
        root_place = l1_place + self._l1_clusters
        body: List[bytes] = []
        place = root_place
        root_clusters = -(-len(self._root_bytes) // self.cluster_size)
        if root_clusters:
            body.append(self._pad(self._root_bytes))
            place += root_clusters

        regions = sorted({g // self.l2_entries for g in writes})
        tables = {r: place + n for n, r in enumerate(regions)}
        place += len(regions)
        entries: Dict[int, int] = {}    # for this layer's tables
        above: Dict[int, int] = {}      # for those of the layers above
        data: List[bytes] = []
        for guest, byte in sorted(writes.items()):
            if byte == ZERO:
                entries[guest] = ZERO_FLAG
                cluster = Cluster('zero', layer, 0)
            else:
                offset = place << self.cluster_bits
                place += 1
                entries[guest] = COPIED | offset
                cluster = Cluster('data', layer, offset)
                data.append(bytes([byte]) * self.cluster_size)
            above[guest] = encode_foreign(cluster, self.cluster_bits)
            first = guest * self.cluster_size
            self.model[first:first + self.cluster_size] = \
                bytes([max(byte, 0)]) * self.cluster_size
        for r in regions:
            body.append(self._table(r, entries))
        body += data

        l1 = [0] * self._regions
        for r, table in tables.items():
            l1[r] = COPIED | table << self.cluster_bits
        head = [self._header(layer, l1_place, root_place if root_clusters
                             else 0),
                self._pad(struct.pack('>Q', 2 << self.cluster_bits)),
                self._refcounts(place),
                self._pad(struct.pack(f'>{self._regions}Q', *l1))]
        with open(self.path(layer), 'wb') as f:
            f.write(b''.join(head + body))

        for guest, entry in above.items():
            self._foreign[guest] = entry
        if tables:
            for r, table in tables.items():
                self._root[r] = encode_root(
                    Root('table', layer, table << self.cluster_bits),
                    self.cluster_bits)
            self._root_bytes = struct.pack(f'>{self._regions}Q', *self._root)
            self._root_crc = crc32c(self._root_bytes)
        self.count += 1

    def _pad(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.cluster_size)

    def _table(self, region: int, own: Dict[int, int]) -> bytes:
        first = region * self.l2_entries
        entries = self._foreign[first:first + self.l2_entries]
        for i in range(self.l2_entries):
            if first + i in own:
                entries[i] = own[first + i]
        return struct.pack(f'>{self.l2_entries}Q', *entries)

    def _refcounts(self, clusters: int) -> bytes:
        assert clusters * 2 <= self.cluster_size, 'one refcount block only'
        return self._pad(struct.pack(f'>{clusters}H', *[1] * clusters))

    def _header(self, layer: int, l1_place: int, root_place: int) -> bytes:
        below = self._stamp
        self._stamp = os.urandom(16)
        root = (root_place << self.cluster_bits, self._regions,
                self._root_crc) if root_place else (0, 0, 0)
        record = RECORD.pack(1, layer, INDEX_VALID, self._stamp, below, *root,
                             0, 0, 0, 0, 0, 0, 3 if layer else 0, bytes(3), 0)
        record = record[:-4] + struct.pack('>I', crc32c(record[:-4]))
        extensions = struct.pack('>II', EXT_RECORD, len(record)) + record
        name = b''
        if layer:
            extensions = struct.pack('>II8s', EXT_BACKING_FORMAT, 6,
                                     b'sqcow2') + extensions
            name = str(layer - 1).encode()
        extensions += bytes(8)
        header = HEADER.pack(
            QCOW2_MAGIC, 3, HEADER.size + len(extensions) if layer else 0,
            len(name), self.cluster_bits, self.size, 0, self._regions,
            l1_place << self.cluster_bits, 1 << self.cluster_bits, 1, 0, 0,
            1 << FEATURE_BIT, 0, 0, 4, HEADER.size)
        return self._pad(header + extensions + name)


def spread(gen: Generator, layers: int, writers: int, per_writer: int = 1,
           seed: Optional[int] = None) -> None:
    """
    Add @layers layers, of which @writers, evenly spread and the last one
    among them, own clusters.  About half of what they write is written again
    by a layer above.
    """
    rng = random.Random(seed)
    clusters = gen.size // gen.cluster_size
    for i in range(layers):
        writes = {}
        if (i + 1) * writers // layers != i * writers // layers:
            for _ in range(per_writer):
                byte = ZERO if rng.random() < 0.05 else rng.randint(1, 255)
                writes[rng.randrange(clusters)] = byte
        gen.add(writes)


def main() -> None:
    directory, layers, clusters = sys.argv[1], int(sys.argv[2]), \
        int(sys.argv[3])
    gen = Generator(directory, clusters,
                    int(sys.argv[4]) if len(sys.argv) > 4 else 9)
    spread(gen, layers, layers, seed=0)
    with open(os.path.join(directory, 'content'), 'wb') as f:
        f.write(gen.model)


if __name__ == '__main__':
    main()
