# SPDX-License-Identifier: GPL-2.0-or-later
"""
Make damaged sqcow2 images: every kind of damage in each kind of table

every_damage() looks at an intact image and yields what can be broken in it.
Where there is a choice - which entry, which wrong value - a random number
generator makes it.  Each Damage is to be done to a fresh copy of that image.
"""

import functools
import os
import random
import struct
from typing import (Any, Callable, Dict, Iterator, List, NamedTuple, Optional,
                    Sequence)

from sqcow2_format import (Cluster, EXT_RECORD, Image, OFFSET_MASK, PLAIN,
                           Record, Root, decode_entry, decode_root,
                           encode_foreign, encode_root, is_foreign,
                           patch_record, set_plain, set_root)

BEHIND_EOF = 1 << 40
LAST = (1 << 43) - 1            # host cluster, past 64 TiB


class Damage(NamedTuple):
    what: str
    do: Callable[[str], Any]    # takes the path
    # What "check" must find: 'corruption', 'leak', 'chain': it cannot be told
    # from a change of the layers below, which is a warning; or 'nothing': it
    # is another state, and no damage
    seen: str = 'corruption'


def poke(path: str, offset: int, data: bytes) -> None:
    with open(path, 'r+b') as f:
        f.seek(offset)
        f.write(data)


def poke_u64(path: str, offset: int, value: int) -> None:
    poke(path, offset, struct.pack('>Q', value))


def refcount_place(path: str, host_offset: int) -> int:
    """Return where the refcount of a cluster stands; 0: nowhere."""
    image = Image(path)
    assert image.header['refcount_order'] == 4
    i, j = divmod(host_offset // image.cluster_size, image.cluster_size // 2)
    block = image.read_u64s(image.header['refcount_table_offset'] + i * 8,
                            1)[0] & OFFSET_MASK
    return block + j * 2 if block else 0


def set_refcount(path: str, host_offset: int, value: int) -> None:
    place = refcount_place(path, host_offset)
    assert place
    poke(path, place, struct.pack('>H', value))


class Generator:
    """The kinds of damage that are possible in one image"""

    def __init__(self, path: str, rng: random.Random) -> None:
        self.rng = rng
        self.image = Image(path)
        assert self.image.record
        self.rec: Record = self.image.record
        self.bits = self.image.cluster_bits
        self.cluster = self.image.cluster_size
        self.end = -(-os.path.getsize(path) // self.cluster) * self.cluster

    def part(self, name: str) -> Iterator[Damage]:
        if name == 'entries':
            for kind, places in self.tables().items():
                if places:
                    yield from self.entries(kind, places)
            return
        yield from {'record': self.record, 'references': self.references,
                    'root': self.root, 'layer table': self.layer_table,
                    'refcounts': self.refcounts}[name]()

    # The record

    @staticmethod
    def field(what: str, seen: str = 'corruption', /, **fields: Any
              ) -> Damage:
        return Damage(f'record: {what}',
                      functools.partial(patch_record, **fields), seen)

    def record(self) -> Iterator[Damage]:
        rec = self.rec
        yield self.field('checksum', crc=rec.crc ^ 1 << self.rng.randrange(32))
        yield self.field('version', version=self.rng.choice((0, 2, 0xffff)))
        yield self.field('unknown flag',
                         flags=rec.flags | 1 << self.rng.randint(2, 31))
        yield self.field('reserved bytes', reserved=b'\0\1\0')
        yield self.field('redirect table', redirect_offset=self.cluster,
                         redirect_entries=1)
        yield self.field('layer index too high', 'corruption' if
                         rec.plain_entries else 'chain', layer=rec.layer + 1)
        yield self.field('layer index 0', layer=0)
        yield self.field('kind of layer 7', below_kind=7)
        for kind in set(range(4)) - {rec.below_kind}:
            yield self.field(f'kind of layer {kind}', below_kind=kind)
        yield self.field('stamp below', 'corruption' if rec.plain_entries
                         else 'chain', below_stamp=self.rng.randbytes(16))
        yield self.field('flag "valid" lost', 'nothing', flags=0)
        yield Damage('record: too short', self.shorten)
        yield Damage('record: lost', lambda path: poke(
            path, self.place() - 8, struct.pack('>I', 0x12345678)),
            'leak' if rec.root_entries else 'nothing')

    def shorten(self, path: str) -> None:
        """Leave 40 bytes of it, and make an unknown extension of the rest."""
        poke(path, self.place() - 4, struct.pack('>I', 40))
        poke(path, self.place() + 40, struct.pack('>II', 0x12345678, 48))

    def place(self) -> int:
        return next(pos for magic, pos, _ in self.image.extensions
                    if magic == EXT_RECORD)

    def references(self) -> Iterator[Damage]:
        """Where the record says that its tables are"""
        names = []
        if self.rec.root_entries:
            names.append(('root', self.rec.root_entries,
                          self.rec.root_offset))
        if self.rec.plain_entries:
            names.append(('plain', self.rec.plain_entries,
                          self.rec.plain_offset))
        l2_table = [e & OFFSET_MASK for e in self.image.l1
                    if e & OFFSET_MASK][0]
        for name, entries, offset in names:
            for what, value in (('0', 0), ('unaligned', offset + 8),
                                ('behind the end', BEHIND_EOF),
                                ('past 64 TiB', 1 << 62),
                                ('in the header', self.cluster // 2),
                                ('an L2 table', l2_table),
                                ('leaked cluster', self.end)):
                yield self.field(f'{name} table: offset {what}',
                                 **{f'{name}_offset': value})
            for what, value in (('0', 0), ('one more', entries + 1),
                                ('2^32 - 1', 0xffffffff)):
                yield self.field(f'{name} table: entries {what}',
                                 **{f'{name}_entries': value})
            yield self.field(f'{name} table: checksum',
                             **{f'{name}_crc': self.rng.getrandbits(32)})
            size = entries * (8 if name == 'root' else PLAIN.size)
            if size % self.cluster:
                yield Damage(f'{name} table: garbage behind it',
                             lambda path, o=offset + size:  # type: ignore
                             poke(path, o, b'\1'))

    # Root and layer table

    def root(self) -> Iterator[Damage]:
        rec, rng = self.rec, self.rng

        def value(what: str, i: int, entry: int, fix_crc: bool = True
                  ) -> Damage:
            return Damage(f'root: {what}',
                          lambda path: set_root(path, i, entry, fix_crc))

        def entry(kind: str, layer: int, host_offset: int) -> int:
            return encode_root(Root(kind, layer, host_offset), self.bits)

        roots = [decode_root(e, rec.layer, self.bits) for e in self.image.root]
        used = [i for i, r in enumerate(roots) if r.kind != 'absent']
        if not used:
            return
        i = rng.choice(used)
        for what, number in (
                ('layer too high', entry('table', rec.layer + 1,
                                         6 * self.cluster)),
                ('layer 65535', entry('table', 65535, 6 * self.cluster)),
                ('table in the header', entry('table', 0, 0)),
                ('own table behind the end', entry('table', rec.layer,
                                                   BEHIND_EOF)),
                ('table behind the end', entry('table', rec.layer - 1,
                                               BEHIND_EOF)),
                ('table past 64 TiB', 2 << 61 | LAST),
                ('identity of the own layer', entry('identity', rec.layer,
                                                    0)),
                ('kind 3', 3 << 62 | rng.getrandbits(62)),
                ('reserved bits', self.image.root[i] | 1 << rng.randint(59,
                                                                        61)),
                ('absent with garbage', rng.getrandbits(59) or 1)):
            yield value(what, i, number)
        yield value('a bit without checksum', i, self.image.root[i] ^ 1, False)
        # Valid, but not what the layers say
        yield value('absent', i, 0)
        for j in used:
            if roots[j] != roots[i]:
                yield value('that of another region', i, self.image.root[j])
                break
        if roots[i].kind == 'table':
            yield value('a table in a cluster of data', i,
                        self.image.root[i] + 1)
        if roots[0].kind == 'identity':
            yield value('identity with an offset', 0,
                        entry('identity', roots[0].layer, self.cluster))
            yield value('table in a raw layer', 0,
                        entry('table', roots[0].layer, self.cluster))
        else:
            yield value('identity of a layer that is not raw', i,
                        entry('identity', 0, 0))

    def layer_table(self) -> Iterator[Damage]:
        def change(what: str, seen: str, k: int, fix_crc: bool = True,
                   **fields: Any) -> Damage:
            kind, _, size, mtime, crc, _ = PLAIN.unpack(self.image.plain[k])
            values = {'kind': kind, 'zero1': bytes(7), 'size': size,
                      'mtime': mtime, 'crc': crc, 'zero2': bytes(4)}
            values.update(fields)
            data = PLAIN.pack(*values.values())
            return Damage(f'layer table: {what}',
                          lambda path: set_plain(path, k, data, fix_crc), seen)

        if not self.image.plain:
            return
        k = self.rng.randrange(len(self.image.plain))
        yield change('kind 0', 'corruption', k, kind=0)
        yield change('reserved bytes', 'corruption', k, zero1=b'\1' * 7)
        yield change('without checksum', 'corruption', k, False, size=1)
        yield change('negative size', 'corruption', k, size=1 << 63)
        yield change('size', 'chain', k, size=512)
        yield change('another kind', 'chain', k, kind=3, crc=0)
        if PLAIN.unpack(self.image.plain[k])[0] == 2:
            yield change('time', 'chain', k, mtime=1)
            yield change('checksum of a layer', 'chain', k, crc=1)

    # L2 tables

    def tables(self) -> Dict[str, List[int]]:
        """Return the places of each kind of table."""
        image, rec = self.image, self.rec
        active = [e & OFFSET_MASK for e in image.l1 if e & OFFSET_MASK]
        saved = [e & OFFSET_MASK for l1 in image.snapshot_l1 for e in l1
                 if e & OFFSET_MASK]
        merged = [r.host_offset for r in
                  (decode_root(e, rec.layer, self.bits) for e in image.root)
                  if r.kind == 'table' and r.layer == rec.layer]
        return {'own table': sorted(set(active) - set(saved)),
                'shared table': sorted(set(active) & set(saved)),
                'table of a snapshot': sorted(set(saved) - set(active)),
                'merged table': merged}

    def entries(self, name: str, places: List[int]) -> Iterator[Damage]:
        rec, rng = self.rec, self.rng
        found: Dict[Optional[str], List[int]] = {}
        for place in places:
            for j, number in enumerate(self.image.table(place)):
                if not number or is_foreign(number):
                    kind = decode_entry(number, rec.layer, place,
                                        self.bits).kind if number else None
                    found.setdefault(kind, []).append(place + j * 8)

        def value(what: str, offset: int, number: int) -> Damage:
            return Damage(f'{name}: {what}',
                          lambda path: poke_u64(path, offset, number))

        def foreign(kind: str, owner: int, host_offset: int) -> int:
            return encode_foreign(Cluster(kind, owner, host_offset),
                                  self.bits)

        some = [o for offsets in found.values() for o in offsets]
        below = max(rec.layer - 1, 0)
        for what, number in (
                ('owner is the own layer', foreign('data', rec.layer,
                                                   9 * self.cluster)),
                ('owner 65535', foreign('zero', 65535, 0)),
                ('past 64 TiB', 1 << 61 | 1 << 59 | below << 43 | LAST),
                ('absent with a cluster', foreign('absent', 0,
                                                  9 * self.cluster)),
                ('zero with a cluster', foreign('zero', below,
                                                9 * self.cluster)),
                ('compressed without table', foreign('compressed', below, 0)),
                ('behind the end', foreign('data', below, BEHIND_EOF))):
            yield value(what, rng.choice(some), number)
        if below:
            yield value('absent with an owner', rng.choice(some),
                        foreign('absent', 1, 0))
        if name == 'merged table':
            yield value('standard entry', rng.choice(some),
                        1 << 63 | 5 * self.cluster)
        # Valid, but not what the layers say
        for kind, offsets in sorted(found.items(), key=str):
            offset = rng.choice(offsets)
            old = struct.unpack('>Q', self.image.read(offset, 8))[0]
            other = 'zero' if kind != 'zero' else 'data'
            yield value(f'{kind} said to be {other}', offset, foreign(
                other, below, 0 if other == 'zero' else 9 * self.cluster))
            if kind:
                yield value(f'{kind} said to be nowhere', offset, 0)
            if kind in ('data', 'compressed'):
                yield value(f'{kind}: another host cluster', offset, old + 1)
                yield value(f'{kind}: said to be the other', offset,
                            old ^ 2 << 59)
            if kind and below:
                owner = old >> 43 & 0xffff
                yield value(f'{kind}: another owner', offset,
                            old ^ (owner ^ (0 if owner else 1)) << 43)

    def refcounts(self) -> Iterator[Damage]:
        rec = self.rec
        places = []
        if rec.root_entries:
            places.append(('root table', rec.root_offset))
        if rec.plain_entries:
            places.append(('layer table', rec.plain_offset))
        tables = self.tables()
        for name in ('own table', 'merged table'):
            if tables[name]:
                places.append((name, self.rng.choice(tables[name])))
        for name, place in places:
            for value in (0, 2):
                yield Damage(f'refcount {value} of a {name}',
                             lambda path, p=place, v=value:  # type: ignore
                             set_refcount(path, p, v),
                             'leak' if value else 'corruption')

        def leak(path: str) -> None:
            poke(path, self.end, b'\1' * self.cluster)
            set_refcount(path, self.end, 1)
        if refcount_place(self.image.path, self.end):
            yield Damage('a leaked cluster', leak, 'leak')


PARTS = ('record', 'references', 'root', 'layer table', 'entries',
         'refcounts')


def every_damage(path: str, rng: random.Random,
                 parts: Sequence[str] = PARTS) -> Iterator[Damage]:
    generator = Generator(path, rng)
    for name in parts:
        yield from generator.part(name)
