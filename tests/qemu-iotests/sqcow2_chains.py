# SPDX-License-Identifier: GPL-2.0-or-later
"""
For sqcow2 tests of whole chains, faults and damage: long chains with a model
of their content, and tools that must neither crash nor hang
"""

import json
import os
import re
import resource
import struct
import subprocess
from typing import List, Optional, Sequence, Tuple

import iotests
from sqcow2_format import Image, patch_record

TOOL_TIMEOUT = 120  # seconds; far above what any call needs
if 'SQCOW2_SLOW_BUILD' in os.environ:
    TOOL_TIMEOUT *= 6


def run_tool(*args: str, nofile: Optional[Tuple[int, int]] = None
             ) -> Tuple[int, str]:
    """
    Run a tool and return its exit status and output.  A signal or a hang
    fails the test.  @nofile: soft and hard limit of open files.
    """
    def limit() -> None:
        if nofile:
            resource.setrlimit(resource.RLIMIT_NOFILE, nofile)

    # pylint: disable=subprocess-popen-preexec-fn
    res = subprocess.run(args, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, timeout=TOOL_TIMEOUT,
                         universal_newlines=True, check=False,
                         errors='backslashreplace', preexec_fn=limit)
    assert res.returncode >= 0, \
        f'signal {-res.returncode}: {" ".join(args)}\n{res.stdout}'
    return res.returncode, res.stdout


def run_io(*args: str, nofile: Optional[Tuple[int, int]] = None
           ) -> Tuple[int, str]:
    return run_tool(*iotests.qemu_io_wrap_args(args), nofile=nofile)


def run_img(*args: str, nofile: Optional[Tuple[int, int]] = None
            ) -> Tuple[int, str]:
    return run_tool(*iotests.qemu_img_args, *args, nofile=nofile)


def read_bytes(requests: Sequence[Tuple[int, int]], *args: str,
               nofile: Optional[Tuple[int, int]] = None) -> List[bytes]:
    """
    Read each (offset, length) with one request of qemu-io; @args say of what
    and how.
    """
    commands: List[str] = []
    for offset, length in requests:
        commands += ['-c', f'read -v {offset} {length}']
    status, out = run_io(*commands, *args, nofile=nofile)
    messages = re.findall(r'^(?![0-9a-f]{8,}:).*', out, re.M)
    assert status == 0, messages
    dumps = re.split(r'^read \d+/\d+ bytes .*$', out, flags=re.M)[:-1]
    pieces = [bytes.fromhex(''.join(re.findall(
        r'^[0-9a-f]{8,}:  ((?:[0-9a-f]{2} )+)', dump, re.M)))
              for dump in dumps]
    assert [len(p) for p in pieces] == [r[1] for r in requests], messages
    return pieces


def try_content(path: str, fmt: str = iotests.imgfmt,
                image_opts: str = '') -> Tuple[int, str, bytes]:
    """Return status and messages of reading it all, and what was read."""
    raw = path + '.content'
    image = ['-f', fmt, path] if not image_opts else \
        ['--image-opts', f'driver={fmt},file.driver=file,'
         f'file.filename={path},{image_opts}']
    status, out = run_img('convert', '-O', 'raw', *image, raw)
    data = b''
    if os.path.exists(raw):
        with open(raw, 'rb') as f:
            data = f.read()
        os.remove(raw)
    return status, out, data


def content(path: str, fmt: str = iotests.imgfmt, image_opts: str = ''
            ) -> bytes:
    """Return all bytes that the image shows."""
    status, out, data = try_content(path, fmt, image_opts)
    assert status == 0, out
    return data


def assert_same(got: bytes, want: bytes, what: str) -> None:
    """Like assert got == want, but says where they differ."""
    assert len(got) == len(want), f'{what}: {len(got)} bytes, not {len(want)}'
    for i in range(0, len(want), 512):
        assert got[i:i + 512] == want[i:i + 512], \
            f'{what}: sector at {i:#x} has {got[i:i + 8].hex()}...,' \
            f' not {want[i:i + 8].hex()}...'


class Chain:
    """
    Images made one on top of the other, and the bytes that the top one must
    show.  Layer k is the file NAME.k; backing file names are relative.
    """

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.paths: List[str] = []
        self.formats: List[str] = []
        self.model = bytearray(size)

    @property
    def top(self) -> str:
        return self.paths[-1]

    def add(self, fmt: str = iotests.imgfmt, options: Sequence[str] = (),
            count: int = 1) -> str:
        """Put @count new layers on top; return the path of the last one."""
        for _ in range(count):
            path = iotests.file_path(f'{self.name}.{len(self.paths)}')
            args = ['create', '-q', '-f', fmt]
            for option in options:
                args += ['-o', option]
            if self.paths:
                args += ['-b', os.path.basename(self.top),
                         '-F', self.formats[-1]]
                if fmt == 'qcow2':
                    args.append('-u')  # or it would open the whole chain
            status, out = run_img(*args, path, str(self.size))
            assert (status, out) == (0, ''), out
            self.paths.append(path)
            self.formats.append(fmt)
        return self.top

    def add_copies(self, count: int) -> None:
        """
        Put @count empty layers on the top one, which is empty, too, by
        copying it: the same as add(), but much faster.
        """
        with open(self.top, 'rb') as f:
            data = f.read()
        image = Image(self.top)
        place = image.header['backing_file_offset']
        fmt = self.formats[-1]
        assert image.kind == fmt and place and not any(image.l1)
        for _ in range(count):
            name = os.fsencode(os.path.basename(self.top))
            path = iotests.file_path(f'{self.name}.{len(self.paths)}')
            with open(path, 'wb') as f:
                f.write(data)
                f.seek(16)
                f.write(struct.pack('>I', len(name)))
                f.seek(place)
                f.write(name)
            if fmt == 'sqcow2':
                below = Image(self.top).record
                assert below
                patch_record(path, layer=below.layer + 1,
                             stamp=os.urandom(16), below_stamp=below.stamp)
            self.paths.append(path)
            self.formats.append(fmt)

    def write(self, pattern: int, offset: int, length: int,
              *args: str) -> None:
        """Write to the top layer; @args: of qemu-io's "write"."""
        status, out = run_io('-f', self.formats[-1], '-c',
                             f'write {" ".join(args)} -P {pattern}'
                             f' {offset} {length}', self.top)
        assert status == 0, out
        self.model[offset:offset + length] = bytes([pattern]) * length

    def write_alone(self, k: int, pattern: int, offset: int, length: int
                    ) -> None:
        """
        Write whole clusters to layer @k without opening those below; no
        layer above may own them.
        """
        name = {'driver': self.formats[k], 'backing': None,
                'file': {'driver': 'file', 'filename': self.paths[k]}}
        status, out = run_tool(*iotests.qemu_io_args_no_fmt, '-c',
                               f'write -P {pattern} {offset} {length}',
                               'json:' + json.dumps(name))
        assert status == 0, out
        self.model[offset:offset + length] = bytes([pattern]) * length

    def zero(self, offset: int, length: int) -> None:
        """Write zero clusters to the top layer."""
        status, out = run_io('-f', self.formats[-1], '-c',
                             f'write -z {offset} {length}', self.top)
        assert status == 0, out
        self.model[offset:offset + length] = bytes(length)

    def verify(self, what: str = 'content') -> None:
        """Compare what the top shows with the model."""
        assert_same(content(self.top, self.formats[-1]), bytes(self.model),
                    what)
