# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest sees of an image, read from the files by their own tables alone (invariant S1).

Slow and simple, and not made from QEMU's code: what the driver reads is compared with it.
"""

import os
import sys
import zlib
from typing import Optional

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "qemu-iotests"))
# pylint: disable=wrong-import-position
from sqcow2_format import (ABSENT, Cluster, FormatError, Image, check_chain,  # noqa: E402
                           check_truth, decode_entry, is_foreign, walk)

__all__ = ["Chain", "FormatError"]

OFFSET_MASK = 0x00fffffffffffe00
MAX_LAYERS = 50


class Chain:
    """An image and its backing files, as their headers name them."""

    def __init__(self, directory: str, name: str, fmt: Optional[str] = None) -> None:
        self.images: list[Image] = []
        self.names: list[str] = []
        link: Optional[str] = name
        while link:
            image = Image(os.path.join(directory, link), fmt)
            self.images.insert(0, image)
            self.names.insert(0, link)
            if len(self.images) > MAX_LAYERS:
                raise FormatError("a cycle of backing files")
            link, fmt = image.backing_file, image.backing_format
            if fmt and fmt != "raw" and Image(os.path.join(directory, str(link))).kind == "raw":
                raise FormatError(f"{link} is not {fmt}")
        self.top = self.images[-1]
        # Layers may differ in their cluster size; so small a piece has one owner
        self.granule = min((image.cluster_size for image in self.images if image.kind != "raw"),
                           default=512)

    def piece(self, cluster: Cluster, guest_offset: int, entry: int, size: int) -> bytes:
        """A part of a guest cluster, at most a granule."""
        if cluster.kind in ("absent", "zero"):
            return bytes(size)
        image = self.images[cluster.owner]
        if image.kind == "raw":
            return image.read(guest_offset, size).ljust(size, b"\0")
        inside = guest_offset % image.cluster_size
        if cluster.kind == "data":
            return image.read(cluster.host_offset + inside, size).ljust(size, b"\0")
        if not entry:
            i, j = image.split(guest_offset)
            table = image.l2(i)
            assert table
            entry = table[j]
        bits = 62 - (image.cluster_bits - 8)
        place = entry & ((1 << bits) - 1)
        length = ((entry >> bits & ((1 << (62 - bits)) - 1)) + 1) * 512 - place % 512
        try:
            data = zlib.decompressobj(-15).decompress(image.read(place, length))
        except zlib.error as error:
            raise FormatError(f"compressed cluster: {error}") from error
        return data[inside:inside + size].ljust(size, b"\0")

    def view(self) -> bytes:
        """All bytes of the active disk."""
        if self.top.kind == "raw":
            return self.top.read(0, self.top.size).ljust(self.top.size, b"\0")
        out = []
        for offset in range(0, self.top.size, self.granule):
            cluster = walk(offset, self.images)
            size = min(self.granule, self.top.size - offset)
            out.append(self.clip(cluster, offset, self.piece(cluster, offset, 0, size)))
        return b"".join(out)

    def clip(self, cluster: Cluster, offset: int, data: bytes) -> bytes:
        """What lies behind the end of a layer is not seen through it (S9)."""
        for image in self.images[cluster.owner:-1]:
            if image.size < offset + len(data):
                data = data[:max(0, image.size - offset)].ljust(len(data), b"\0")
        return data

    def snapshot(self, index: int) -> bytes:
        """All bytes of an internal snapshot; as long as the active disk at most."""
        l1 = self.top.snapshot_l1[index]
        out = []
        own = len(self.images) - 1
        for offset in range(0, self.top.size, self.granule):
            i, j = self.top.split(offset)
            place = l1[i] & OFFSET_MASK if i < len(l1) else 0
            entry = self.top.table(place)[j] if place else 0
            cluster = ABSENT
            if entry and not is_foreign(entry):
                cluster = decode_entry(entry, own, place, self.top.cluster_bits)
            if cluster.kind == "absent" and own:
                entry = 0
                cluster = walk(offset, self.images, own - 1)
            size = min(self.granule, self.top.size - offset)
            out.append(self.clip(cluster, offset, self.piece(cluster, offset, entry, size)))
        return b"".join(out)

    def is_trusted(self) -> bool:
        """Will a reader use the index?"""
        return (self.top.kind == "sqcow2" and self.top.index_valid
                and not list(check_chain(self.images)))

    def damage(self) -> list[str]:
        """What is wrong with the record and its tables."""
        return [f"{item.invariant}: {item.what}" for item in self.top.verify()]

    def lies(self) -> list[str]:
        """What an index that is used says and should not."""
        if not self.is_trusted():
            return []
        return [f"{item.invariant}: {item.what}" for item in check_truth(self.images)]
