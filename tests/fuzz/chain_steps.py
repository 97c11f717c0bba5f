# SPDX-License-Identifier: GPL-2.0-or-later
"""What chain_fuzz.py does: random steps on a tree of images, drawn from a seed."""

import dataclasses
import random
from typing import Callable, Optional

Step = dict[str, object]


@dataclasses.dataclass
class Image:
    """What the generator and the executor know of one image."""

    kind: str  # raw, v2, v3 or sq
    size: int = 0
    cluster: int = 0
    backing: Optional[str] = None
    name: str = ""
    snapshots: list[str] = dataclasses.field(default_factory=list)
    copied: bool = False  # there is a copy of its file as it was once


# Cluster size in bytes: most bytes of a disk. With small clusters these are several L2 tables.
MAX_SIZES = {512: 160 << 10, 1024: 384 << 10, 2048: 1 << 20, 4096: 5 << 20, 8192: 5 << 20,
             16384: 3 << 20, 32768: 3 << 20, 65536: 3 << 20, 131072: 3 << 20, 262144: 3 << 20,
             524288: 4 << 20, 1048576: 6 << 20, 2097152: 10 << 20}


def fmt(kind: str, world: str) -> str:
    """The format name of an image of this kind."""
    if kind == "sq":
        return "sqcow2" if world == "a" else "qcow2"
    return "raw" if kind == "raw" else "qcow2"


def below(tree: dict[str, Image], name: str) -> list[str]:
    """The image and all that its backing links lead to."""
    found: list[str] = []
    link: Optional[str] = name
    while link and link in tree and link not in found:
        found.append(link)
        link = tree[link].backing
    return found


class Generator:
    """Draws the steps of one run."""

    def __init__(self, seed: int, nb_steps: int) -> None:
        self.rng = random.Random(seed)
        self.tree: dict[str, Image] = {}
        self.count = 0
        self.pattern = 0
        self.lazy = False       # an image has lazy refcounts
        self.holes = False      # an image may have clusters that are holes of its file
        self.steps: list[Step] = []
        self.cluster = self.rng.choice((512, 512, 512, 4096, 4096, 65536, 65536, *MAX_SIZES))
        self.max_size = MAX_SIZES[self.cluster]
        self.make_chain()
        choices: list[tuple[int, Callable[[], None]]] = [
            (40, self.io), (8, self.overlay), (6, self.resize), (9, self.snapshot),
            (4, self.commit), (4, self.rebase), (2, self.check), (3, self.crash),
            (2, self.amend), (3, self.index), (1, self.bitmap), (2, self.convert),
            (3, self.compressed), (2, self.copy), (2, self.restore)]
        weights = [weight for weight, _ in choices]
        while len(self.steps) < nb_steps:
            self.rng.choices(choices, weights)[0][1]()
            if self.rng.random() < 0.3:
                self.steps.append({"op": "compare", "how": self.rng.choice(
                    ("compare", "compare", "compare", "convert", "dd"))})
        self.steps.append({"op": "compare", "how": "convert"})

    def size(self) -> int:
        return max(1, self.rng.randrange(self.max_size) // 512) * 512

    def new(self, kind: str, backing: Optional[str], size: Optional[int]) -> None:
        cluster = self.cluster
        if self.rng.random() < 0.03:
            cluster = self.rng.choice(list(MAX_SIZES))
        self.count += 1
        image = Image(kind, size or self.size(), cluster, backing, f"l{self.count}")
        if backing and size is None and self.rng.random() < 0.6:
            image.size = self.tree[backing].size
        self.tree[image.name] = image
        # The last sector of a raw layer need not be a whole one
        cut = self.rng.randrange(512) if kind == "raw" and self.rng.random() < 0.4 else 0
        self.steps.append({"op": "create", "image": image.name, "kind": kind, "size": image.size,
                           "cut": cut, "options": self.options(image), "backing": backing})

    def options(self, image: Image) -> list[str]:
        """For qemu-img create."""
        options = [f"cluster_size={image.cluster}"]
        if image.kind == "v2":
            return options + ["compat=0.10"]
        for chance, least_cluster, option in (
                (0.1, 512, "compression_type=zstd"), (0.1, 512, "lazy_refcounts=on"),
                (0.1, 512, "refcount_bits=" + self.rng.choice(("1", "2", "8", "64"))),
                (0.05, 512, "preallocation=metadata"), (0.05, 16384, "extended_l2=on"),
                (0.03, 512, f"data_file={image.name}.data")):
            if self.rng.random() < chance and image.cluster >= least_cluster:
                options.append(option)
        self.lazy = self.lazy or "lazy_refcounts=on" in options
        self.holes = self.holes or "preallocation=metadata" in options
        return options

    def make_chain(self) -> None:
        top: Optional[str] = None
        for kind in self.rng.choice((("raw",), ("raw", "v3"), ("v3",), ("v2", "v3"), (), (),
                                     ("raw", "v2", "v3"))):
            self.new(kind, top, None)
            top = f"l{self.count}"
            self.io(top)
        for _ in range(self.rng.randrange(1, 4)):
            self.new("sq", top, None)
            top = f"l{self.count}"
            self.io(top)

    def pick(self, want: Callable[[Image], bool] = lambda image: True) -> Optional[Image]:
        images = [image for image in self.tree.values() if want(image)]
        if not images:
            return None
        # Mostly the young ones, which lie on top of the others
        return images[max(self.rng.randrange(len(images)), self.rng.randrange(len(images)))]

    def extent(self, image: Image) -> tuple[int, int]:
        """An offset and a length inside of the image."""
        unit = self.rng.choice((1, 512, image.cluster, image.cluster))
        reach = self.rng.choice((image.cluster, 4 * image.cluster, image.size // 2 + 1))
        offset = self.rng.randrange(image.size) // unit * unit
        length = max(unit, self.rng.randrange(reach + 1) // unit * unit)
        if self.rng.random() < 0.15:
            length = image.size
        return offset, min(length, image.size - offset)

    def next_pattern(self) -> int:
        self.pattern = self.pattern % 250 + 1
        return self.pattern

    def command(self, image: Image) -> list[str]:
        offset, length = self.extent(image)
        what = self.rng.randrange(100)
        if what < 40:
            return [f"write -q -P {self.next_pattern()} {offset} {length}"]
        if what < 52:
            return [f"write -q -z {offset} {length}"]
        if what < 60:
            return [f"write -q -z -u {offset} {length}"]
        if what < 72:
            return [f"discard -q {offset} {length}"]
        if what < 76:
            return [f"truncate {self.size()}"]
        if what < 78:
            return ["flush"]
        if what < 80 and not self.lazy:
            # After a crash qcow2 may refuse to reopen a layer below with lazy refcounts
            return ["reopen -r", f"read -v {offset} {min(length, 1024)}", "reopen -w"]
        if what < 86:
            cmds, pos = [], offset
            while pos < image.size and len(cmds) < 8:
                length = min(self.rng.randrange(1, 2 * image.cluster), image.size - pos)
                cmds.append(f"aio_write -q -P {self.next_pattern()} {pos} {length}")
                pos += length + self.rng.randrange(image.cluster)
            return cmds + ["aio_flush"]
        return [f"read -v {offset} {min(length, 1024)}"]

    def io(self, name: Optional[str] = None) -> None:
        image = self.tree[name] if name else self.pick()
        assert image
        cmds: list[str] = []
        for _ in range(self.rng.randrange(1, 9)):
            cmds += self.command(image)
        opts: list[str] = []
        if self.rng.random() < 0.7:
            opts += ["-d", "unmap"]
        if self.rng.random() < 0.2:
            opts += ["-t", "none"]
            if self.rng.random() < 0.5:
                opts += ["-i", self.rng.choice(("native", "threads", "io_uring"))]
        if cmds[-1].startswith("truncate"):
            image.size = int(cmds[-1].split()[1])
        self.steps.append({"op": "io", "image": image.name, "cmds": cmds, "opts": opts,
                           "small_cache": self.rng.random() < 0.2})

    def crash(self) -> None:
        self.io()
        cmds = self.steps[-1]["cmds"]
        assert isinstance(cmds, list)
        cmds += ["flush", "sigraise 9"]

    def compressed(self) -> None:
        image = self.pick(lambda image: image.kind != "raw" and image.size >= image.cluster)
        # Nothing can be compressed over a cluster that has been written.  Of zeros in a part of a
        # cluster qcow2 makes a zero cluster if what is below is a hole; we ask raw layers only.
        if image and not self.holes:
            offset = self.rng.randrange(image.size) // image.cluster * image.cluster
            length = min(self.rng.randrange(1, 5) * image.cluster, image.size - offset)
            self.steps.append({"op": "io", "image": image.name, "opts": [], "small_cache": False,
                               "cmds": [f"write -q -c -P {self.next_pattern()} {offset} {length}"]})

    def overlay(self) -> None:
        backing = self.pick()
        assert backing
        kind = "sq" if self.rng.random() < 0.85 else "v3"
        size = None
        if self.rng.random() < 0.5:
            size = backing.size
        self.new(kind, backing.name, size)

    def resize(self) -> None:
        image = self.pick()
        assert image
        image.size = self.size()
        self.steps.append({"op": "resize", "image": image.name, "size": image.size})

    def snapshot(self) -> None:
        image = self.pick(lambda image: image.kind != "raw")
        if not image:
            return
        what = self.rng.choice("ccadx")
        if what == "c" or not image.snapshots:
            what = "c"
            self.count += 1
            image.snapshots.append(f"s{self.count}")
        name = self.rng.choice(image.snapshots) if what != "c" else image.snapshots[-1]
        if what == "d":
            image.snapshots.remove(name)
        self.steps.append({"op": "snapshot", "image": image.name, "what": what, "name": name})

    def commit(self) -> None:
        image = self.pick(lambda image: image.backing is not None and image.kind != "raw")
        if image:
            base = self.rng.choice(below(self.tree, image.name)[1:])
            self.steps.append({"op": "commit", "image": image.name, "base": base,
                               "keep": self.rng.random() < 0.3})

    def rebase(self) -> None:
        image = self.pick(lambda image: image.kind != "raw")
        if not image:
            return
        others = [name for name in self.tree if image.name not in below(self.tree, name)]
        base = self.rng.choice(others) if others and self.rng.random() < 0.8 else None
        self.steps.append({"op": "rebase", "image": image.name, "base": base,
                           "unsafe": self.rng.random() < 0.4})
        image.backing = base

    def check(self) -> None:
        image = self.pick(lambda image: image.kind != "raw")
        if image:
            self.steps.append({"op": "check", "image": image.name})

    def amend(self) -> None:
        image = self.pick(lambda image: image.kind in ("v3", "sq"))
        if image:
            options = ["lazy_refcounts=on", "lazy_refcounts=off", f"size={self.size()}"]
            if image.cluster <= 16384:      # else qcow2 takes seconds, or minutes
                options.append("refcount_bits=64")
            option = self.rng.choice(options)
            self.lazy = self.lazy or option == "lazy_refcounts=on"
            self.steps.append({"op": "amend", "image": image.name, "option": option})

    def index(self) -> None:
        image = self.pick(lambda image: image.kind == "sq")
        if image:
            self.steps.append({"op": "index", "image": image.name, "options": self.rng.choice(
                (["rebuild"], ["off", "on"], ["off"], ["on"]))})

    def bitmap(self) -> None:
        image = self.pick(lambda image: image.kind in ("v3", "sq"))
        if image:
            self.steps.append({"op": "bitmap", "image": image.name,
                               "what": self.rng.choice(("--add", "--remove"))})

    def convert(self) -> None:
        source = self.pick()
        assert source
        chain = below(self.tree, source.name)
        base = self.rng.choice(chain[1:]) if len(chain) > 1 and self.rng.random() < 0.7 else None
        self.count += 1
        image = Image("sq", source.size, self.cluster, base, f"l{self.count}")
        self.tree[image.name] = image
        self.steps.append({"op": "convert", "image": image.name, "source": source.name,
                           "cluster": self.cluster, "base": base})

    def copy(self) -> None:
        """Of a file, aside."""
        image = self.pick()
        assert image
        image.copied = True
        self.steps.append({"op": "copy", "image": image.name})

    def restore(self) -> None:
        """A copy of a file, in its place."""
        image = self.pick(lambda image: image.copied)
        if image:
            self.steps.append({"op": "restore", "image": image.name})
