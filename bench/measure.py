# SPDX-License-Identifier: GPL-2.0-or-later
"""Single measurements: one call, one number."""

from __future__ import annotations

import math
import re
import subprocess
from pathlib import Path
from typing import Callable, Sequence

from tools import (BenchError, Image, QemuIo, Tools, cpu_seconds, describe_status, run,
                   timed, timed_ok)

BLOCK = 4096
MIB = 1 << 20
MAX_STEP = (1 << 31) - BLOCK


def interleave(rounds: int, *measurements: Callable[[], float]) -> list[list[float]]:
    """Run each in turn, `rounds` times (ABAB...), so that a slow spell meets all of them."""
    results: list[list[float]] = [[] for _ in measurements]
    for turn in range(rounds):
        # Every other round backwards: who goes first must not matter either.
        order = list(zip(results, measurements))
        for samples, measurement in order if turn % 2 == 0 else reversed(order):
            samples.append(measurement())
    return results


def random_step(size: int) -> int:
    """A step for `qemu-img bench -S` that makes its walk visit every block, scattered.

    The walk is offset += step, modulo the image's size.  With a step near the golden
    ratio of the size successive offsets are far apart, and with a step coprime to the
    number of blocks no block is read again before all others.
    """
    blocks = size // BLOCK
    step = min(int(blocks * 0.6180339887), MAX_STEP // BLOCK)
    while math.gcd(step, blocks) != 1:
        step -= 1
    return step * BLOCK


def _bench(tools: Tools, image: Image, size: int, requests: int, depth: int, aio: str,
           *more: str) -> list[str]:
    return [tools.img, 'bench', '-f', image.fmt, '-c', str(requests), '-d', str(depth),
            '-i', aio, '-s', str(BLOCK), '-S', str(random_step(size)), *more, str(image.path)]


def _run_seconds(said: str) -> float:
    found = re.search(r'Run completed in ([\d.]+) seconds', said)
    if not found:
        raise BenchError(f'qemu-img bench did not say how long it took: {said}')
    return float(found.group(1))


def random_io(tools: Tools, image: Image, size: int, requests: int, depth: int = 1,
              aio: str = 'threads', write: bool = False) -> float:
    """Requests of 4 KiB per second; opening is not counted.

    Reads are done twice and the second walk, over the very same blocks, is timed: some
    machines give page cache back to their host within minutes.
    """
    command = _bench(tools, image, size, requests, depth, aio, *(['-w'] if write else []))
    if not write:
        run(command)
    return requests / _run_seconds(run(command))


def sequential_write(tools: Tools, image: Image, requests: int) -> float:
    """MiB per second of writes of 1 MiB each, from the disk's start."""
    return requests / _run_seconds(run([tools.img, 'bench', '-w', '-f', image.fmt, '-d', '1',
                                        '-c', str(requests), '-s', str(MIB), str(image.path)]))


def try_reads(tools: Tools, image: Image, size: int, requests: int) -> tuple[float, int]:
    """Seconds per 4 KiB read, one at a time, and the exit status; 0 s if it fails."""
    command = _bench(tools, image, size, requests, 1, 'threads')
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if result.returncode:
        return 0, result.returncode
    return _run_seconds(result.stdout) / requests, 0


def cpu_per_read(tools: Tools, image: Image, size: int, requests: int, depth: int) -> float:
    """Microseconds of processor time per read, from the difference of two runs."""
    random_io(tools, image, size, 3 * requests)
    few, many = (cpu_seconds(_bench(tools, image, size, count, depth, 'io_uring'))
                 for count in (requests, 3 * requests))
    return 1e6 * (many - few) / (2 * requests)


def instruction_counter() -> str:
    """'perf', 'valgrind', or '' where neither can count."""
    for name, probe in (('perf', ['perf', 'stat', '-x,', '-e', 'instructions:u', 'true']),
                        ('valgrind', ['valgrind', '--version'])):
        try:
            result = subprocess.run(probe, capture_output=True, text=True, check=False)
        except OSError:
            continue
        if result.returncode == 0 and 'not supported' not in result.stderr:
            return name
    return ''


def instructions(command: Sequence[str], counter: str) -> float:
    """Instructions that a command executes in user mode."""
    if counter == 'perf':
        result = subprocess.run(['perf', 'stat', '-x,', '-e', 'instructions:u', *command],
                                capture_output=True, text=True, check=True)
        return float(result.stderr.split(',')[0])
    said = run(['valgrind', '--tool=cachegrind', '--cache-sim=no',
                '--cachegrind-out-file=/dev/null', *command])
    found = re.search(r'I\s+refs:\s+([\d,]+)', said)
    if not found:
        raise BenchError(f'valgrind did not say its count: {said}')
    return float(found.group(1).replace(',', ''))


def instructions_per_read(tools: Tools, image: Image, size: int, counter: str,
                          requests: int) -> float:
    """The difference of two runs, so that start, opening and first misses drop out.

    io_uring, because with threads the count depends on who waits how long for whom; in the
    page cache, because a read that has to wait goes once more through the main loop; and 16
    at a time, because how often one read goes through it is a matter of luck.
    """
    random_io(tools, image, size, 3 * requests)
    few, many = (instructions(_bench(tools, image, size, count, 16, 'io_uring'), counter)
                 for count in (requests, 3 * requests))
    return (many - few) / (2 * requests)


def open_seconds(tools: Tools, image: Image) -> float:
    """Start qemu-io, open, close, end."""
    return timed_ok([tools.io, '-r', '-f', image.fmt, '-c', 'quit', str(image.path)])


def peak_rss(tools: Tools, image: Image, read_size: int = 0) -> float:
    """Peak memory in MiB of a qemu-io that opened an image and read `read_size` bytes."""
    with QemuIo(tools, image) as qemu_io:
        for offset in range(0, read_size, MIB):
            qemu_io.command(f'read -q {offset} {min(MIB, read_size - offset)}')
        return qemu_io.peak_rss() / MIB


def rebase_seconds(tools: Tools, image: Image, backing: str, top: Image) -> tuple[float, float]:
    """qemu-img rebase -u of an image; opening the top of the chain for writing after that."""
    rebased = timed_ok([tools.img, 'rebase', '-q', '-u', '-f', image.fmt, '-b', backing,
                        '-F', image.fmt, str(image.path)])
    opened = timed_ok([tools.io, '-f', top.fmt, '-c', 'quit', str(top.path)])
    return rebased, opened


def adopt_seconds(tools: Tools, image: Image, size: int, scratch: Path) -> float:
    """Index a qcow2 chain in a new sqcow2 image on top of it.

    -u, because qemu-img would open a node for each layer to learn the size.
    """
    overlay = scratch / 'adopted'
    seconds = timed_ok([tools.img, 'create', '-q', '-u', '-f', 'sqcow2', '-b', str(image.path),
                        '-F', image.fmt, str(overlay), str(size)])
    overlay.unlink()
    return seconds


def snapshot_seconds(tools: Tools, image: Image, scratch: Path) -> float:
    """qemu-img create of a snapshot on an image; the snapshot is removed."""
    overlay = scratch / 'snapshot'
    result = timed([tools.img, 'create', '-q', '-f', image.fmt, '-b', str(image.path),
                    '-F', image.fmt, str(overlay)])
    overlay.unlink(missing_ok=True)
    if result.status:
        raise BenchError(f'qemu-img create over {image.path}: {describe_status(result.status)}')
    return result.seconds


def snapshot_bytes(tools: Tools, image: Image, scratch: Path) -> tuple[int, int]:
    """Length of a new snapshot's file, and the bytes that it takes on the disk."""
    overlay = scratch / 'snapshot'
    tools.create(image.fmt, str(overlay), scratch, backing=str(image.path))
    facts = overlay.stat()
    overlay.unlink()
    return facts.st_size, facts.st_blocks * 512


def on_overlay(tools: Tools, image: Image, scratch: Path,
               measurement: Callable[[Image], float]) -> float:
    """Measure on a fresh snapshot of an image."""
    overlay = scratch / 'overlay'
    tools.create(image.fmt, str(overlay), scratch, backing=str(image.path))
    try:
        return measurement(Image(overlay, image.fmt))
    finally:
        overlay.unlink()


def warm(paths: Sequence[Path]) -> None:
    """Read files into the page cache."""
    for path in paths:
        with path.open('rb', buffering=0) as file:
            while file.read(8 * MIB):
                pass
