# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the sqcow2 tests share: images beside a model of what a guest sees

A Disk is an image and a bytearray.  Disk.io() changes both alike;
TestCase.check() reads the image in several ways and compares.  Images stand
in a directory of their own below the test directory.
"""

import os
import random
import re
import shutil
import subprocess
import time
from typing import Any, List, Optional, Set, Tuple

import iotests
import sqcow2_format

K = 1024
M = 1024 * K

# (name, offset, bytes, pattern); see Disk.apply()
Op = Tuple[Any, ...]


def directory(*names: str) -> str:
    return os.path.join(iotests.test_dir, 'sqcow2', *names)


def index_state(path: str) -> str:
    """Open the image for reading and return the state of its index."""
    info = iotests.qemu_io('-r', '-f', 'sqcow2', '-c', 'info', path).stdout
    match = re.search(r'index state: (\w+)', info)
    assert match, info
    return match.group(1)


def age(path: str, seconds: int = 10) -> None:
    """Make the file's modification time older than any clock's tick."""
    mtime = os.stat(path).st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(mtime, mtime))


def exported_map(path: str, fmt: str, context: str, *args: str) -> Any:
    """Return the map that a client of qemu-nbd sees in the context."""
    sock, pid_file = (os.path.join(iotests.sock_dir, name)
                      for name in ('export', 'export.pid'))
    # --fork would hang in AddressSanitizer's allocator, if a thread has it
    server = [iotests.qemu_nbd_prog, '-r', '-k', sock, '--pid-file', pid_file,
              '-f', fmt, *args, path]
    # Ends with its last client
    with subprocess.Popen(server) as nbd:
        while not os.path.exists(pid_file) and nbd.poll() is None:
            time.sleep(0.01)
        found = iotests.qemu_img_map(
            '--image-opts', f'driver=nbd,server.type=unix,server.path={sock},'
            f'x-dirty-bitmap={context}')
        assert nbd.wait(timeout=30) == 0
    for name in sock, pid_file:
        if os.path.exists(name):
            os.remove(name)
    return found


class Disk:
    """An image, its chain and what a guest must see in it"""

    def __init__(self, path: str, fmt: str, data: bytearray,
                 below: Optional['Disk'] = None) -> None:
        self.path = path
        self.fmt = fmt
        self.data = data
        self.below = below
        self.written: Set[int] = set()      # kept by random_ops()

    @property
    def chain(self) -> List[str]:
        """The paths, base first"""
        return (self.below.chain if self.below else []) + [self.path]

    @property
    def backing(self) -> 'Disk':
        """The disk below, where there must be one"""
        assert self.below, self.path
        return self.below

    @property
    def size(self) -> int:
        return len(self.data)

    @classmethod
    def create(cls, name: str, fmt: str, size: int, options: str = '') \
            -> 'Disk':
        path = directory(name)
        args = ['-o', options] if options else []
        iotests.qemu_img('create', '-q', '-f', fmt, *args, path, str(size))
        return cls(path, fmt, bytearray(size))

    def overlay(self, name: str, fmt: str = 'sqcow2',
                size: Optional[int] = None, options: str = '') -> 'Disk':
        """Make a layer on top; its view is cut, or extended by zeros."""
        path = directory(name)
        args = ['-o', options] if options else []
        args += [path] + ([] if size is None else [str(size)])
        iotests.qemu_img('create', '-q', '-f', fmt, '-b', self.path,
                         '-F', self.fmt, *args)
        if size is None:
            size = self.size
        return Disk(path, fmt, bytearray(self.data[:size].ljust(size, b'\0')),
                    self)

    @staticmethod
    def command(op: Op) -> str:
        name, offset, length = op[:3]
        if name in ('write', 'compressed'):
            flag = ' -c' if name == 'compressed' else ''
            return f'write -q{flag} -P {op[3]} {offset} {length}'
        flag = {'zero': 'write -q -z', 'unmap': 'write -q -z -u',
                'discard': 'discard -q'}[name]
        return f'{flag} {offset} {length}'

    def apply(self, op: Op) -> None:
        """Do to the model what io() does to the image."""
        name, offset, length = op[:3]
        assert offset + length <= self.size, (op, self.size)
        value = op[3] if name in ('write', 'compressed') else 0
        self.data[offset:offset + length] = bytes([value]) * length

    def io(self, *ops: Op) -> None:
        """
        Write to image and model: ('write' or 'compressed', offset, bytes,
        pattern), ('zero', 'unmap' or 'discard', offset, bytes).  Discards
        must be of whole clusters: others do as they like.
        """
        if not ops:
            return
        args: List[str] = []
        for op in ops:
            args += ['-c', self.command(op)]
            self.apply(op)
        out = iotests.qemu_io('-f', self.fmt, *args, self.path).stdout
        # It may say that it builds an index anew; -q leaves nothing else
        assert not re.sub('^.* warning: .*\n', '', out, flags=re.M), out

    def read(self, chunk: int = 192 * K) -> bytes:
        """Read all of it in plain reads of @chunk bytes."""
        out = directory('read.raw')
        iotests.qemu_img('dd', '-f', self.fmt, '-O', 'raw', f'bs={chunk}',
                         f'if={self.path}', f'of={out}')
        return self._take(out)

    def convert(self, *args: str) -> bytes:
        """Read all that block status calls data."""
        out = directory('convert.raw')
        iotests.qemu_img('convert', '-f', self.fmt, '-O', 'raw', *args,
                         self.path, out)
        return self._take(out)

    @staticmethod
    def _take(path: str) -> bytes:
        with open(path, 'rb') as f:
            data = f.read()
        os.remove(path)
        return data

    def random_ops(self, rng: random.Random, count: int, cluster_size: int,
                   names: Tuple[str, ...]) -> List[Op]:
        """
        Make @count operations; half of them near a cluster's border.  Only
        clusters that no earlier operation of this layer touched are written
        compressed, as qcow2 demands.
        """
        ops: List[Op] = []
        for _ in range(count):
            name = rng.choice(names)
            if name in ('discard', 'compressed'):
                clusters = self.size // cluster_size
                first = rng.randrange(clusters)
                number = 1 if name == 'compressed' else rng.randint(1, 3)
                number = min(number, clusters - first)
                if name == 'compressed' and first in self.written:
                    continue
                offset, length = first * cluster_size, number * cluster_size
            else:
                length = rng.randint(1, min(self.size,
                                            3 * cluster_size + 8 * K))
                offset = rng.randrange(self.size - length + 1)
                if rng.random() < 0.5:
                    border = rng.randrange(0, self.size, cluster_size)
                    offset = max(0, border - rng.randrange(513))
                    length = min(length, self.size - offset)
            self.written.update(range(offset // cluster_size,
                                      (offset + length - 1) // cluster_size
                                      + 1))
            value = ((rng.randint(1, 255),)
                     if name in ('write', 'compressed') else ())
            ops.append((name, offset, length, *value))
        return ops


class TestCase(iotests.QMPTestCase):
    """Images in a fresh directory, and what must hold of each"""

    def setUp(self) -> None:
        shutil.rmtree(directory(), ignore_errors=True)
        os.makedirs(directory())

    def tearDown(self) -> None:
        shutil.rmtree(directory())

    def assert_same(self, got: bytes, want: bytes, what: str) -> None:
        """As assertEqual, but says where they differ and not all bytes."""
        if got == want:
            return
        self.assertEqual(len(got), len(want), f'{what}: size')
        first = next(i for i, (a, b) in enumerate(zip(got, want)) if a != b)
        self.fail(f'{what}: byte {first:#x} is {got[first]}, not'
                  f' {want[first]}')

    def assert_clean(self, disk: Disk) -> None:
        """qemu-img check finds nothing, not even leaks."""
        done = iotests.qemu_img('check', '-f', disk.fmt, disk.path,
                                check=False)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertNotIn('ERROR', done.stdout)

    def assert_verified(self, disk: Disk) -> None:
        """The file, and what its index says, follow the specification."""
        image = sqcow2_format.load_chain(disk.chain)[-1]
        self.assertEqual(image.verify(disk.chain), [], disk.path)

    def assert_state(self, disk: Disk, state: str) -> None:
        self.assertEqual(index_state(disk.path), state, disk.path)

    def check(self, disk: Disk, state: Optional[str] = 'trusted',
              chunk: int = 192 * K) -> None:
        """
        The content is the model's; with state 'trusted' the index is used
        (of a base it is not) and true; with None nothing is asked of it.
        """
        want = bytes(disk.data)
        self.assert_same(disk.read(chunk), want, f'read {disk.path}')
        self.assert_same(disk.convert(), want, f'convert {disk.path}')
        if disk.fmt != 'raw':
            self.assert_clean(disk)
        if state is not None and disk.fmt == 'sqcow2':
            if state == 'trusted':
                self.assert_verified(disk)
                state = 'trusted' if disk.below else 'unused'
            self.assert_state(disk, state)
