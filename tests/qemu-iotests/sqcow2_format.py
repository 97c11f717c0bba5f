#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
A second decoder of the sQcow2 disk format

Written from docs/sqcow2.rst alone, so that tests compare the driver with the
specification and not with itself.  As a program it dumps an image:

    sqcow2_format.py [--json] FILE
    sqcow2_format.py --verify BASE ... TOP

The second form prints each violated invariant of the top image, and fails if
there is one.  patch_record(), set_root(), set_plain() and set_l2() make
damaged images.  A "chain" is a list of paths, the base (layer 0) first, the
examined image last.  Everything is read when an Image is made: make a new one
after a change.
"""

import argparse
import functools
import json
import os
import struct
import sys
from typing import (Any, Callable, Dict, Iterator, List, NamedTuple, Optional,
                    Sequence, Tuple, Union)

QCOW2_MAGIC = 0x514649fb
EXT_BACKING_FORMAT = 0xe2792aca
EXT_RECORD = 0x53514f57
FEATURE_BIT = 48
INCOMPAT_EXTENDED_L2 = 1 << 4
MAX_HOST_OFFSET = 1 << 46
OFFSET_MASK = 0x00fffffffffffe00

INDEX_VALID = 1
WRITING = 2

BELOW_KINDS = ('none', 'raw', 'qcow2', 'sqcow2')
ROOT_KINDS = ('absent', 'table', 'identity')
CLUSTER_KINDS = ('absent', 'data', 'zero', 'compressed')

HEADER = struct.Struct('>IIQIIQIIQQIIQQQQII')
HEADER_FIELDS = ('magic', 'version', 'backing_file_offset',
                 'backing_file_size', 'cluster_bits', 'size', 'crypt_method',
                 'l1_size', 'l1_table_offset', 'refcount_table_offset',
                 'refcount_table_clusters', 'nb_snapshots',
                 'snapshots_offset', 'incompatible_features',
                 'compatible_features', 'autoclear_features',
                 'refcount_order', 'header_length')
HEADER_V2_SIZE = 72
RECORD = struct.Struct('>HHI16s16sQIIQIIQIIB3sI')
PLAIN = struct.Struct('>B7sQqI4s')


class FormatError(Exception):
    """The bytes do not follow the specification."""


class Record(NamedTuple):
    """The record's fields, in the order of its bytes"""
    version: int
    layer: int
    flags: int
    stamp: bytes
    below_stamp: bytes
    root_offset: int
    root_entries: int
    root_crc: int
    plain_offset: int
    plain_entries: int
    plain_crc: int
    redirect_offset: int
    redirect_entries: int
    redirect_crc: int
    below_kind: int
    reserved: bytes
    crc: int


class Root(NamedTuple):
    kind: str
    layer: int
    host_offset: int


class Plain(NamedTuple):
    kind: str
    virtual_size: int
    mtime_ns: int
    crc: int
    stamp: bytes


class Cluster(NamedTuple):
    """
    An L2 entry, or the result of a lookup.  host_offset of a compressed
    cluster is that of the owner's L2 table.
    """
    kind: str
    owner: int
    host_offset: int


class Violation(NamedTuple):
    invariant: str
    what: str


ABSENT = Cluster('absent', 0, 0)


def _crc_table() -> List[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82f63b78 if value & 1 else 0)
        table.append(value)
    return table


CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xffffffff
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xff] ^ crc >> 8
    return crc ^ 0xffffffff


def decode_record(data: bytes, cluster_bits: int) -> Record:
    """Return the record; FormatError if it does not count (S2)."""
    if len(data) < RECORD.size:
        raise FormatError(f'record has {len(data)} bytes')
    data = data[:RECORD.size]
    rec = Record(*RECORD.unpack(data))
    if rec.version != 1:
        raise FormatError(f'record version {rec.version}')
    if rec.crc != crc32c(data[:-4]):
        raise FormatError('record CRC')
    if rec.flags & ~(INDEX_VALID | WRITING):
        raise FormatError(f'record flags {rec.flags:#x}')
    if rec.below_kind >= len(BELOW_KINDS) or any(rec.reserved):
        raise FormatError('kind of the layer below')
    if rec.redirect_offset or rec.redirect_entries or rec.redirect_crc:
        raise FormatError('redirect table')
    for name, offset, entries, size in (
            ('root', rec.root_offset, rec.root_entries, 8),
            ('layer table', rec.plain_offset, rec.plain_entries, PLAIN.size)):
        if (bool(offset) != bool(entries) or offset % (1 << cluster_bits)
                or offset + entries * size > MAX_HOST_OFFSET):
            raise FormatError(f'place of the {name} table')
    return rec


def _place(entry: int, cluster_bits: int) -> Tuple[int, int]:
    """Return layer and host offset, bits 58 to 0 of an entry."""
    host_offset = (entry & (1 << 43) - 1) << cluster_bits
    if host_offset >= MAX_HOST_OFFSET:
        raise FormatError(f'{entry:#018x}: past 64 TiB')
    return entry >> 43 & 0xffff, host_offset


def decode_root(entry: int, own_layer: int, cluster_bits: int) -> Root:
    """Return what @entry says; FormatError if it breaks a rule (S4)."""
    kind = entry >> 62
    if kind == 0 and entry or kind == 3 or entry >> 59 & 7:
        raise FormatError(f'{entry:#018x}: kind or reserved bits')
    layer, host_offset = _place(entry, cluster_bits)
    if ROOT_KINDS[kind] == 'table' and layer > own_layer:
        raise FormatError(f'{entry:#018x}: table of a layer above')
    if ROOT_KINDS[kind] == 'identity' and (layer >= own_layer or host_offset):
        raise FormatError(f'{entry:#018x}: identity of a layer not below')
    return Root(ROOT_KINDS[kind], layer, host_offset)


def encode_root(root: Root, cluster_bits: int) -> int:
    return (ROOT_KINDS.index(root.kind) << 62 | root.layer << 43
            | root.host_offset >> cluster_bits)


def decode_plain(data: bytes) -> Plain:
    kind, zero1, size, mtime_ns, crc, zero2 = PLAIN.unpack(data)
    if kind not in (1, 2, 3) or any(zero1 + zero2):
        raise FormatError('layer-table entry: kind or reserved bytes')
    if kind != 2 and crc or kind != 3 and (size | mtime_ns) >> 63:
        raise FormatError('layer-table entry: a value that its kind forbids')
    if kind == 3:
        return Plain('sqcow2', 0, 0, 0, data[8:24])
    return Plain(BELOW_KINDS[kind], size, mtime_ns, crc, b'')


def is_foreign(entry: int) -> bool:
    return entry >> 61 == 1


def decode_entry(entry: int, table_layer: int, table_host_offset: int,
                 cluster_bits: int) -> Cluster:
    """
    Return what @entry of the L2 table at @table_host_offset in the file of
    @table_layer says; FormatError if it breaks a rule (S6).
    """
    if is_foreign(entry):
        kind = CLUSTER_KINDS[entry >> 59 & 3]
        owner, host_offset = _place(entry, cluster_bits)
        if owner >= table_layer:
            raise FormatError(f'{entry:#018x}: owner is not below')
        if kind in ('absent', 'zero') and host_offset:
            raise FormatError(f'{entry:#018x}: {kind} with a host cluster')
        if kind == 'absent' and owner:
            raise FormatError(f'{entry:#018x}: absent with an owner')
        return Cluster(kind, owner, host_offset)
    if entry >> 62 & 1:
        return Cluster('compressed', table_layer, table_host_offset)
    if entry >> 61 & 1:
        raise FormatError(f'{entry:#018x}: standard entry with bit 61')
    if entry & 1:
        return Cluster('zero', table_layer, 0)
    if not entry & OFFSET_MASK:
        return ABSENT
    return Cluster('data', table_layer, entry & OFFSET_MASK)


def encode_foreign(cluster: Cluster, cluster_bits: int) -> int:
    return (1 << 61 | CLUSTER_KINDS.index(cluster.kind) << 59
            | cluster.owner << 43 | cluster.host_offset >> cluster_bits)


class Image:
    """One file of a chain, as it stands on disk"""
    # pylint: disable=too-many-instance-attributes

    def __init__(self, path: str, fmt: Optional[str] = None) -> None:
        self.path = path
        self.header: Dict[str, int] = {}
        self.extensions: List[Tuple[int, int, bytes]] = []
        self.backing_file: Optional[str] = None
        self.backing_format: Optional[str] = None
        self.record: Optional[Record] = None
        self.record_error: Optional[str] = None
        self.root: List[int] = []
        self.plain: List[bytes] = []
        self.l1: List[int] = []
        self.snapshot_l1: List[List[int]] = []
        self._l2_cache: Dict[int, List[int]] = {}
        self.size = -(-os.path.getsize(path) // 512) * 512

        magic = self.read(0, 4)
        if fmt == 'raw' or magic != QCOW2_MAGIC.to_bytes(4, 'big'):
            self.kind = 'raw'
            return
        self._read_header()
        self.size = self.header['size'] // 512 * 512
        self.cluster_bits = self.header['cluster_bits']
        self.cluster_size = 1 << self.cluster_bits
        self.l1 = self.read_u64s(self.header['l1_table_offset'],
                                 self.header['l1_size'])
        self._read_snapshots()
        self.kind = 'qcow2'
        if self.header['incompatible_features'] >> FEATURE_BIT & 1:
            self.kind = 'sqcow2'
            self._read_record()

    def read(self, offset: int, size: int) -> bytes:
        with open(self.path, 'rb') as f:
            f.seek(offset)
            return f.read(size)

    def read_u64s(self, offset: int, count: int) -> List[int]:
        data = self.read(offset, count * 8).ljust(count * 8, b'\0')
        return list(struct.unpack(f'>{count}Q', data))

    def _read_header(self) -> None:
        data = self.read(0, HEADER.size).ljust(HEADER.size, b'\0')
        version = struct.unpack_from('>I', data, 4)[0]
        if version < 3:
            data = data[:HEADER_V2_SIZE].ljust(HEADER.size, b'\0')
        self.header = dict(zip(HEADER_FIELDS, HEADER.unpack(data)))
        if version < 3:
            self.header.update(refcount_order=4, header_length=HEADER_V2_SIZE)
        name_offset = self.header['backing_file_offset']
        if name_offset:
            self.backing_file = os.fsdecode(
                self.read(name_offset, self.header['backing_file_size']))

        pos = self.header['header_length']
        end = name_offset or 1 << self.header['cluster_bits']
        while pos + 8 <= end:
            magic, size = struct.unpack('>II',
                                        self.read(pos, 8).ljust(8, b'\0'))
            if magic == 0:
                break
            data = self.read(pos + 8, size)
            self.extensions.append((magic, pos + 8, data))
            if magic == EXT_BACKING_FORMAT:
                self.backing_format = data.decode()
            pos += 8 + (size + 7 & ~7)

    def _read_snapshots(self) -> None:
        pos = self.header['snapshots_offset']
        for _ in range(self.header['nb_snapshots']):
            l1_offset, l1_size, id_size, name_size, extra_size = \
                struct.unpack('>QIHH20xI', self.read(pos, 40))
            self.snapshot_l1.append(self.read_u64s(l1_offset, l1_size))
            pos += 40 + extra_size + id_size + name_size + 7 & ~7

    def record_place(self) -> Tuple[int, bytes]:
        """Return where the record's bytes stand, and them; may be damaged."""
        for magic, pos, data in self.extensions:
            if magic == EXT_RECORD:
                return pos, data
        raise FormatError('no record')

    def _read_record(self) -> None:
        try:
            self.record = decode_record(self.record_place()[1],
                                        self.cluster_bits)
        except FormatError as e:
            self.record_error = str(e)
            return
        self.root = self.read_u64s(self.record.root_offset,
                                   self.record.root_entries)
        data = self.read(self.record.plain_offset,
                         self.record.plain_entries * PLAIN.size)
        self.plain = [data[i:i + PLAIN.size]
                      for i in range(0, len(data), PLAIN.size)]

    @property
    def index_valid(self) -> bool:
        return bool(self.record and self.record.flags & INDEX_VALID)

    @property
    def l2_entries(self) -> int:
        return self.cluster_size // 8

    def table(self, host_offset: int) -> List[int]:
        """Return the L2 table at @host_offset."""
        if host_offset not in self._l2_cache:
            self._l2_cache[host_offset] = self.read_u64s(host_offset,
                                                         self.l2_entries)
        return self._l2_cache[host_offset]

    def l2(self, i: int) -> Optional[List[int]]:
        """Return this file's own L2 table of L1 entry @i, if it has one."""
        if i >= len(self.l1) or not self.l1[i] & OFFSET_MASK:
            return None
        return self.table(self.l1[i] & OFFSET_MASK)

    def split(self, guest_offset: int) -> Tuple[int, int]:
        """Return L1 index and L2 index."""
        return divmod(guest_offset // self.cluster_size, self.l2_entries)

    def refcount(self, host_offset: int) -> int:
        order = self.header['refcount_order']
        per_block = self.cluster_size * 8 >> order
        i, j = divmod(host_offset // self.cluster_size, per_block)
        if i * 8 >= (self.header['refcount_table_clusters']
                     * self.cluster_size):
            return 0
        block = self.read_u64s(self.header['refcount_table_offset'] + i * 8,
                               1)[0] & OFFSET_MASK
        if not block:
            return 0
        bit = j << order
        width = max(1 << order, 8) // 8
        value = int.from_bytes(self.read(block + bit // 8, width), 'big')
        return value >> bit % 8 & (1 << (1 << order)) - 1

    def standard(self, guest_offset: int, layer: int) -> Cluster:
        """Return what this file alone says (S1), as layer @layer."""
        if self.kind == 'raw':
            return Cluster('data', layer, guest_offset)
        i, j = self.split(guest_offset)
        table = self.l2(i)
        if table is None or is_foreign(table[j]):
            return ABSENT
        return decode_entry(table[j], layer, self.l1[i] & OFFSET_MASK,
                            self.cluster_bits)

    def lookup(self, guest_offset: int,
               images: Sequence['Image']) -> Cluster:
        """The index's answer; section "Lookup" of the specification."""
        if self.record is None:
            raise FormatError(self.record_error or 'not sqcow2')
        own = self.record.layer
        layer, image, place = own, self, 0
        i, j = self.split(guest_offset)
        if i < len(self.l1):
            place = self.l1[i] & OFFSET_MASK
        cluster = None
        if not place:
            root = Root('absent', 0, 0)
            if i < len(self.root):
                root = decode_root(self.root[i], own, self.cluster_bits)
            if root.kind == 'absent':
                return ABSENT
            layer, place = root.layer, root.host_offset
            image = images[layer]
            if root.kind == 'identity':
                cluster = Cluster('data', layer, guest_offset)
        if cluster is None:
            cluster = decode_entry(image.table(place)[j], layer, place,
                                   self.cluster_bits)
        below = images[cluster.owner:own]
        if below and guest_offset >= min(b.size for b in below):    # S9
            return ABSENT
        return cluster

    def owner(self, guest_offset: int,
              chain: Sequence[Union[str, 'Image']]) -> Cluster:
        """
        Return the owner of a guest cluster in the view of this image, the
        last of @chain.  If the index may not be used (S8), the chain is read
        as lists of standard entries.
        """
        images = load_chain(chain)
        guest_offset -= guest_offset % self.cluster_size
        if self.index_valid and not list(check_chain(images)):
            return self.lookup(guest_offset, images)
        return walk(guest_offset, images)

    def verify(self, chain: Optional[Sequence[str]] = None) -> List[Violation]:
        """
        Return the invariants that this file breaks, as the last of @chain or
        as far as it shows alone.
        """
        if self.kind != 'sqcow2':
            return []
        if self.record is None:
            return [Violation('S2', self.record_error or '')]
        found = list(self._verify_record(self.record))
        found += self._verify_tables(self.record)
        if chain is not None and not found:
            images = load_chain(chain)
            found += check_chain(images)
            if self.index_valid and not found:
                found += check_truth(images)
        return found

    def _verify_record(self, rec: Record) -> Iterator[Violation]:
        kind = BELOW_KINDS[rec.below_kind]
        if kind != 'sqcow2' and any(rec.below_stamp):
            yield Violation('S2', 'expected stamp of a layer without stamp')
        if kind == 'none' and rec.plain_entries:
            yield Violation('S2', f'layer table above {kind}')
        if rec.plain_entries not in (0, rec.layer):
            yield Violation('S2', f'{rec.plain_entries} layers described below'
                            f' layer {rec.layer}')
        if (kind == 'none') != (rec.layer == 0):
            yield Violation('S8', f'layer {rec.layer} above {kind}')
        for name, offset, entries, size, crc in (
                ('root', rec.root_offset, rec.root_entries, 8, rec.root_crc),
                ('layer table', rec.plain_offset, rec.plain_entries,
                 PLAIN.size, rec.plain_crc)):
            used = entries * size
            whole = -(-used // self.cluster_size) * self.cluster_size
            data = self.read(offset, whole)
            if len(data) < used or crc32c(data[:used]) != crc:
                yield Violation('S2', f'CRC of the {name} table')
            if any(data[used:]):
                yield Violation('S2', f'bytes behind the {name} table')
            for cluster in range(offset, offset + whole, self.cluster_size):
                if self.refcount(cluster) != 1:
                    yield Violation('S2', f'refcount of the {name} table')

    def _verify_tables(self, rec: Record) -> Iterator[Violation]:
        if self.header['incompatible_features'] & INCOMPAT_EXTENDED_L2:
            if self.index_valid:
                yield Violation('S5', 'extended L2 entries')
            return
        places = []
        for i, entry in enumerate(self.root):
            try:
                root = decode_root(entry, rec.layer, self.cluster_bits)
            except FormatError as e:
                yield Violation('S4', f'root[{i}]: {e}')
                continue
            if root.kind == 'table' and root.layer == rec.layer:
                places.append(root.host_offset)
                if self.refcount(root.host_offset) != 1:
                    yield Violation('S4', f'root[{i}]: refcount')
        for k, plain in enumerate(self.plain):
            try:
                decode_plain(plain)
            except FormatError as e:
                yield Violation('S2', f'plain[{k}]: {e}')
        for l1 in [self.l1] + self.snapshot_l1 if self.index_valid else []:
            places += [e & OFFSET_MASK for e in l1 if e & OFFSET_MASK]
        for place in places:
            for j, entry in enumerate(self.table(place)):
                try:
                    decode_entry(entry, rec.layer, place, self.cluster_bits)
                except FormatError as e:
                    yield Violation('S6', f'table {place:#x} [{j}]: {e}')


def load_chain(chain: Sequence[Union[str, Image]]) -> List[Image]:
    """Open all layers, each in the format that the one above names."""
    images: List[Image] = []
    fmt: Optional[str] = None
    for item in reversed(chain):
        image = Image(item, fmt) if isinstance(item, str) else item
        fmt = image.backing_format
        images.insert(0, image)
    return images


def walk(guest_offset: int, images: Sequence[Image],
         top: Optional[int] = None) -> Cluster:
    """Read layers 0 to @top as lists of standard entries (S1)."""
    if top is None:
        top = len(images) - 1
    for layer in range(top, -1, -1):
        image = images[layer]
        # Layer @top of a whole chain is the active one: S9
        if layer < len(images) - 1 and guest_offset >= image.size:
            break
        cluster = image.standard(guest_offset, layer)
        if cluster.kind != 'absent':
            return cluster
    return ABSENT


def plain_crc(image: Image) -> int:
    if image.kind == 'raw':
        return 0
    return crc32c(image.read(0, HEADER.size)
                  + image.read(image.header['l1_table_offset'],
                               image.header['l1_size'] * 8))


def check_chain(images: Sequence[Image]) -> Iterator[Violation]:
    """Is the chain the one that the top image's index speaks of?"""
    top = images[-1]
    for layer in range(len(images) - 1, -1, -1):
        image = images[layer]
        if image.kind == 'raw' and layer:
            yield Violation('S5', f'layer {layer}: raw, but not the base')
        elif image.kind != 'raw' and (
                image.cluster_bits != top.cluster_bits
                or image.header['incompatible_features']
                & INCOMPAT_EXTENDED_L2):
            yield Violation('S5', f'layer {layer}: kind of clusters')
        if image.kind != 'sqcow2':
            continue
        if image.record is None or not image.index_valid:
            yield Violation('S8', f'layer {layer}: no valid index')
            return
        rec = image.record
        below = images[layer - 1] if layer else None
        if rec.layer != layer:
            yield Violation('S8', f'layer {layer} says it is {rec.layer}')
        if BELOW_KINDS[rec.below_kind] != (below.kind if below else 'none'):
            yield Violation('S8', f'layer {layer}: kind of the layer below')
        elif below and (image.plain or below.kind != 'sqcow2'):
            # It vouches for all layers below
            yield from _check_plain(images[:layer], image)
            return
        elif below and (not below.record
                        or below.record.stamp != rec.below_stamp):
            yield Violation('S8', f'layer {layer}: stamp of the layer below')


def _check_plain(below: Sequence[Image], image: Image) -> Iterator[Violation]:
    if len(image.plain) != len(below):
        yield Violation('S8', f'{len(below)} layers below,'
                        f' {len(image.plain)} described')
        return
    for k, layer in enumerate(below):
        try:
            plain = decode_plain(image.plain[k])
        except FormatError as e:
            yield Violation('S2', f'plain[{k}]: {e}')
            continue
        kind = layer.kind
        if kind == 'sqcow2' and (not layer.record
                                 or layer.record.flags & WRITING):
            kind = 'qcow2'      # no stamp stands for it
        same = plain.kind == kind
        if plain.kind == 'sqcow2':
            same = same and bool(layer.record
                                 and layer.record.stamp == plain.stamp)
        else:
            same = same and plain.virtual_size == layer.size
        if plain.kind == 'qcow2':
            same = (same and plain.mtime_ns != 0 and plain.mtime_ns
                    == os.stat(layer.path).st_mtime_ns
                    and plain.crc == plain_crc(layer))
        if not same:
            yield Violation('S8', f'layer {k} has changed')


def check_truth(images: Sequence[Image]) -> Iterator[Violation]:
    """Does the index of the top image say what the files say (S1)?"""
    top = images[-1]
    for guest_offset in range(0, top.size, top.cluster_size):
        i, j = top.split(guest_offset)
        want = walk(guest_offset, images)
        try:
            got = top.lookup(guest_offset, images)
        except (FormatError, IndexError) as e:
            yield Violation('S8', f'guest {guest_offset:#x}: {e}')
            continue
        if got != want:
            table = top.l2(i)
            number = 'S7' if table and not table[j] else 'S8'
            yield Violation(number, f'guest {guest_offset:#x}: index says'
                            f' {tuple(got)}, files say {tuple(want)}')
        for l1 in top.snapshot_l1:
            place = l1[i] & OFFSET_MASK if i < len(l1) else 0
            if place and not top.table(place)[j]:
                want = walk(guest_offset, images, len(images) - 2)
                if want.kind != 'absent':
                    yield Violation('S7', f'guest {guest_offset:#x}: internal'
                                    f' snapshot lacks {tuple(want)}')


#
# Damage
#

def _write(path: str, offset: int, data: bytes) -> None:
    with open(path, 'r+b') as f:
        f.seek(offset)
        f.write(data)


def patch_record(path: str, **fields: Any) -> None:
    """Change fields of Record; the CRC is made right unless it is given."""
    pos, data = Image(path).record_place()
    rec = Record(*RECORD.unpack(data[:RECORD.size]))._replace(**fields)
    new = RECORD.pack(*rec)
    if 'crc' not in fields:
        new = new[:-4] + struct.pack('>I', crc32c(new[:-4]))
    _write(path, pos, new)


def _counting(path: str) -> Tuple[Image, Record]:
    image = Image(path)
    if image.record is None:
        raise FormatError(image.record_error or 'not sqcow2')
    return image, image.record


def set_root(path: str, i: int, value: int, fix_crc: bool = True) -> None:
    image, rec = _counting(path)
    image.root[i] = value
    _write(path, rec.root_offset + i * 8, struct.pack('>Q', value))
    if fix_crc:
        data = struct.pack(f'>{len(image.root)}Q', *image.root)
        patch_record(path, root_crc=crc32c(data))


def set_plain(path: str, k: int, data: bytes, fix_crc: bool = True) -> None:
    """Put the 32 bytes @data in place of layer-table entry @k."""
    image, rec = _counting(path)
    image.plain[k] = data
    _write(path, rec.plain_offset + k * PLAIN.size, data)
    if fix_crc:
        patch_record(path, plain_crc=crc32c(b''.join(image.plain)))


def set_l2(path: str, guest_offset: int, value: int) -> None:
    """Set an entry in the file's own or merged L2 table; it has no CRC."""
    image = Image(path)
    i, j = image.split(guest_offset)
    place = image.l1[i] & OFFSET_MASK if i < len(image.l1) else 0
    if not place and image.record and i < len(image.root):
        root = decode_root(image.root[i], image.record.layer,
                           image.cluster_bits)
        if root.kind == 'table' and root.layer == image.record.layer:
            place = root.host_offset
    if not place:
        raise FormatError(f'{path} has no L2 table for {guest_offset:#x}')
    _write(path, place + j * 8, struct.pack('>Q', value))


#
# Dump
#

def _describe(decode: Callable[[], Any], **desc: Any) -> Dict[str, Any]:
    """Return @desc and the fields of what is decoded, or the error."""
    try:
        desc.update(decode()._asdict())
    except FormatError as e:
        desc['error'] = str(e)
    return desc


def _table(image: Image, place: int) -> Dict[str, Any]:
    # Without a record the layer is unknown: let any owner be below it.
    layer = image.record.layer if image.record else 1 << 16
    entries = {}
    for j, entry in enumerate(image.table(place)):
        if entry:
            entries[j] = _describe(
                functools.partial(decode_entry, entry, layer, place,
                                  image.cluster_bits),
                entry=f'{entry:#018x}', foreign=is_foreign(entry))
    return {'host_offset': place, 'entries': entries}


def _root(image: Image, entry: int, layer: int) -> Dict[str, Any]:
    desc = _describe(lambda: decode_root(entry, layer, image.cluster_bits),
                     entry=f'{entry:#018x}')
    if (desc.get('kind'), desc.get('layer')) == ('table', layer):
        desc['merged'] = _table(image, desc['host_offset'])
    return desc


def dump(image: Image) -> Dict[str, Any]:
    """Return all that is in the image; entries that are 0 are left out."""
    if image.kind == 'raw':
        return {'kind': 'raw', 'size': image.size}
    out: Dict[str, Any] = {'kind': image.kind, 'header': image.header,
                           'backing_file': image.backing_file,
                           'backing_format': image.backing_format}
    if image.kind == 'sqcow2':
        out['record_error'] = image.record_error
    if image.record:
        rec = image.record
        out['record'] = {name: value.hex() if isinstance(value, bytes)
                         else value for name, value in rec._asdict().items()}
        out['root'] = {i: _root(image, entry, rec.layer)
                       for i, entry in enumerate(image.root) if entry}
        out['plain'] = {k: _describe(functools.partial(decode_plain, data))
                        for k, data in enumerate(image.plain)}
    out['l1'] = {i: f'{e:#018x}' for i, e in enumerate(image.l1) if e}
    if not image.header['incompatible_features'] & INCOMPAT_EXTENDED_L2:
        out['l2'] = {i: _table(image, e & OFFSET_MASK)
                     for i, e in enumerate(image.l1) if e & OFFSET_MASK}
    return out


def print_human(value: Dict[Any, Any], indent: int = 0) -> None:
    for name, item in value.items():
        words = ''
        if isinstance(item, dict) and 'kind' in item:
            words = ' '.join(f'{k}={v}' for k, v in item.items()
                             if not isinstance(v, dict))
            item = {k: v for k, v in item.items() if isinstance(v, dict)}
        elif not isinstance(item, dict):
            words = str(item)
        print(f'{" " * indent}{name}: {words}'.rstrip())
        if isinstance(item, dict):
            print_human(item, indent + 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Dump or verify an sQcow2 image.')
    parser.add_argument('--json', action='store_true',
                        help='dump as JSON')
    parser.add_argument('--verify', action='store_true',
                        help='print violated invariants of the last FILE')
    parser.add_argument('files', metavar='FILE', nargs='+',
                        help='with --verify: all layers, base first')
    args = parser.parse_args()

    if args.verify:
        images = load_chain(args.files)
        found = images[-1].verify(args.files if len(args.files) > 1
                                  else None)
        for violation in found:
            print(f'{violation.invariant}: {violation.what}')
        sys.exit(1 if found else 0)
    for path in args.files:
        out = dump(Image(path))
        if args.json:
            print(json.dumps(out, indent=4))
        else:
            print_human(out)


if __name__ == '__main__':
    main()
