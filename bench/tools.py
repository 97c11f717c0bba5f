# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the QEMU tools of one build: with errors that say what failed, timed, and watched.

What differs between two images is measured, not what they share: every figure of
the bench is a difference or a ratio of two runs of the same program, so the start
of a process never has to be known.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

PROMPT = b'qemu-io> '


class BenchError(Exception):
    """Something that a user can understand and mend."""


@dataclass(frozen=True)
class Image:
    """An image file and the format to open it with."""

    path: Path
    fmt: str


def raise_file_limit() -> int:
    """Let children keep a descriptor per layer; tools start with a soft limit of 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def clean_up_on_sigterm() -> None:
    """Make SIGTERM end the program as Ctrl-C does, so that its work folder is removed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def require_space(folder: Path, needed: int) -> None:
    """Fail before the work, not in the middle of it, when the disk is too small."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BenchError(f'{folder} has {free >> 20} MiB free, {needed >> 20} MiB are needed: '
                         'set TMPDIR to a folder on a larger disk')


def describe_status(code: int) -> str:
    """Say how a process ended, as a reader would."""
    if code >= 0:
        return f'exit status {code}'
    try:
        return f'killed by {signal.Signals(-code).name}'
    except ValueError:
        return f'killed by signal {-code}'


class Tools:
    """The binaries of one build folder."""

    def __init__(self, build_dir: Path) -> None:
        self.build_dir = build_dir.resolve()
        self.img = str(self._find('qemu-img'))
        self.io = str(self._find('qemu-io'))

    def _find(self, name: str) -> Path:
        path = self.build_dir / name
        if not os.access(path, os.X_OK):
            raise BenchError(f'{path} is not there: build first '
                             '(./configure && ninja -C build), or set BUILD_DIR')
        return path

    def system(self) -> str:
        """The emulator: only the demo needs it."""
        return str(self._find('qemu-system-x86_64'))

    def require_format(self, fmt: str) -> None:
        """Fail early and clearly when the build lacks a driver."""
        result = subprocess.run([self.img, '--help'], capture_output=True, text=True, check=False)
        known = re.search(r'Supported formats:(.*)', result.stdout)
        if not known or fmt not in known.group(1).split():
            raise BenchError(f'{self.img} has no format {fmt}')

    def version(self) -> str:
        """First line of qemu-img --version."""
        return run([self.img, '--version']).splitlines()[0]

    def create(self, fmt: str, name: str, cwd: Path, backing: str = '', size: int = 0,
               cluster_size: int = 65536, unsafe: bool = False) -> None:
        """qemu-img create.  `unsafe` (-u) leaves the backing chain unopened."""
        command = [self.img, 'create', '-q', '-f', fmt, '-o', f'cluster_size={cluster_size}']
        if unsafe:
            command.append('-u')
        if backing:
            command += ['-b', backing, '-F', fmt]
        command.append(name)
        if size:
            command.append(str(size))
        run(command, cwd=cwd)


def run(command: Sequence[str], cwd: Path | None = None, timeout: float = 600) -> str:
    """Run a command, return its standard output; raise BenchError with its errors."""
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True,
                                timeout=timeout, check=False, errors='replace')
    except subprocess.TimeoutExpired:
        raise BenchError(f'no end after {timeout:.0f} s: {shorten(command)}') from None
    except OSError as err:
        raise BenchError(f'{command[0]}: {err.strerror}') from None
    if result.returncode:
        said = '\n'.join(result.stderr.strip().splitlines()[-5:])
        raise BenchError(f'{describe_status(result.returncode)}: {shorten(command)}\n{said}')
    return result.stdout + (result.stderr if 'valgrind' in command[0] else '')


def shorten(command: Sequence[str]) -> str:
    """A command line for an error message."""
    line = ' '.join(command)
    return line if len(line) < 300 else line[:300] + ' ...'


def cpu_seconds(command: Sequence[str]) -> float:
    """Processor time, user and system, that a command takes on all its threads.

    It tells the cost of the work on a busy machine too, where wall time tells little.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f'{describe_status(process.returncode)}: {shorten(command)}')
    return float(usage.ru_utime + usage.ru_stime)


@dataclass(frozen=True)
class Timed:
    """One timed run; a run that failed is a result too."""

    seconds: float
    status: int


def timed(command: Sequence[str], cwd: Path | None = None, timeout: float = 600) -> Timed:
    """Run a command for its wall time, output thrown away."""
    start = time.perf_counter()
    try:
        status = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                timeout=timeout, check=False).returncode
    except subprocess.TimeoutExpired:
        raise BenchError(f'no end after {timeout:.0f} s: {shorten(command)}') from None
    return Timed(time.perf_counter() - start, status)


def timed_ok(command: Sequence[str], cwd: Path | None = None, timeout: float = 600) -> float:
    """The wall time of a command that must succeed."""
    result = timed(command, cwd, timeout)
    if result.status:
        run(command, cwd, timeout)       # again, for its message
        raise BenchError(f'{describe_status(result.status)}, but not the second time: '
                         f'{shorten(command)}')
    return result.seconds


class QemuIo:
    """A qemu-io that stays open, so that its memory can be looked at.

    `ready_seconds` is the time until its first prompt: start and, with an image, opening.
    """

    def __init__(self, tools: Tools, image: Image | None = None) -> None:
        opened = ['-r', '-f', image.fmt, str(image.path)] if image else []
        start = time.perf_counter()
        self._process = subprocess.Popen([tools.io, *opened], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._await_prompt()
        self.ready_seconds = time.perf_counter() - start

    def __enter__(self) -> 'QemuIo':
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _await_prompt(self) -> str:
        assert self._process.stdout
        said = b''
        while not said.endswith(PROMPT):
            more = os.read(self._process.stdout.fileno(), 65536)
            if not more:
                status = describe_status(self._process.wait())
                raise BenchError(f'qemu-io: {status}: {said.decode(errors="replace")}')
            said += more
        return said[:-len(PROMPT)].decode(errors='replace')

    def command(self, line: str) -> None:
        """Give one quiet command; anything it says is an error."""
        assert self._process.stdin
        self._process.stdin.write(line.encode() + b'\n')
        self._process.stdin.flush()
        said = self._await_prompt().strip()
        if said:
            raise BenchError(f'qemu-io {line}: {said}')

    def peak_rss(self) -> int:
        """Peak resident memory in bytes.

        Not getrusage: its maximum is inherited from the process that forked.
        """
        status = Path(f'/proc/{self._process.pid}/status').read_text(encoding='ascii')
        found = re.search(r'^VmHWM:\s+(\d+) kB', status, re.MULTILINE)
        if not found:
            raise BenchError('no VmHWM in /proc/PID/status: is this Linux?')
        return int(found.group(1)) * 1024


def without_backing(path: str, fmt: str) -> str:
    """A file name for QEMU that opens one layer alone, its backing file left out."""
    return 'json:' + json.dumps({'driver': fmt, 'backing': None,
                                 'file': {'driver': 'file', 'filename': path}})
