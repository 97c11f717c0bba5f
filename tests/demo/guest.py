# SPDX-License-Identifier: GPL-2.0-or-later
"""A real Linux guest: its kernel, its disk, and what it says when it runs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from tools import BenchError, Image, Tools, describe_status, run

HERE = Path(__file__).resolve().parent
META_PACKAGE = 'linux-image-cloud-amd64'
SAFE_NAME = re.compile(r'[A-Za-z0-9_.+,=@/-]+')
BOOT_TIMEOUT = 400


def cache_folder() -> Path:
    """Where downloads stay."""
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(base) / 'sqemu' / 'guest'


def _fetch(package: str, into: Path) -> None:
    """Download a Debian package with the machine's apt, unpack it, install nothing."""
    for tool in ('apt-get', 'apt-cache', 'dpkg'):
        if not shutil.which(tool):
            raise BenchError(f'{tool} is missing, {package} cannot be fetched: '
                             'give --kernel FILE and --busybox FILE')
    into.mkdir(parents=True, exist_ok=True)
    fetched = into / 'fetched'
    shutil.rmtree(fetched, ignore_errors=True)
    fetched.mkdir()
    # As root, apt drops privileges for a download and then cannot write here.
    options = ['-o', 'APT::Sandbox::User=root'] if os.geteuid() == 0 else []
    try:
        run(['apt-get', '-q', *options, 'download', package], cwd=fetched)
    except BenchError as err:
        raise BenchError(f'{err}\napt has no {package} to download: '
                         'is the network up, are the lists fresh (apt-get update)?') from None
    for archive in fetched.glob('*.deb'):
        run(['dpkg', '-x', str(archive), str(into)])
    shutil.rmtree(fetched)


def kernel() -> Path:
    """Debian's kernel for virtual machines: ext4 and nvme are built in, so no initramfs."""
    folder = cache_folder() / 'kernel'
    found = sorted(folder.glob('boot/vmlinuz-*'))
    if not found:
        depends = run(['apt-cache', 'depends', META_PACKAGE]) if shutil.which('apt-cache') else ''
        concrete = re.search(r'Depends: (linux-image-\S+)', depends)
        if not concrete:
            raise BenchError(f'apt knows no {META_PACKAGE}: run apt-get update on a Debian for '
                             'amd64, or give --kernel FILE with ext4 and nvme built in')
        _fetch(concrete.group(1), folder)
        found = sorted(folder.glob('boot/vmlinuz-*'))
        shutil.rmtree(folder / 'lib', ignore_errors=True)       # modules, not needed
    if not found:
        raise BenchError(f'no boot/vmlinuz in the kernel package unpacked in {folder}')
    return found[-1]


def _is_static(path: Path) -> bool:
    return path.is_file() and b'ld-linux' not in path.read_bytes()


def busybox() -> Path:
    """A static busybox: the system's, or Debian's."""
    system = Path('/bin/busybox')
    if _is_static(system):
        return system
    folder = cache_folder() / 'busybox'
    for place in ('bin/busybox', 'usr/bin/busybox'):
        if not (folder / place).exists():
            continue
        return folder / place
    _fetch('busybox-static', folder)
    for place in ('bin/busybox', 'usr/bin/busybox'):
        if (folder / place).exists():
            return folder / place
    raise BenchError(f'no busybox in the package unpacked in {folder}')


@dataclass(frozen=True)
class Disk:
    """A raw disk image and what is on it."""

    path: Path
    files: int
    bytes: int
    list_sum: str


def _choose_files(mebibytes: int) -> list[Path]:
    """Real files of this machine, of all sizes, the same ones on each run."""
    names = sorted((zlib.crc32(path.encode()), path)
                   for top in ('/usr/bin', '/usr/lib', '/usr/share')
                   for folder, _, files in os.walk(top)
                   for path in (f'{folder}/{file}' for file in files)
                   if SAFE_NAME.fullmatch(path))
    left = mebibytes << 20
    chosen = []
    for _, name in names:
        if os.path.islink(name) or not os.path.isfile(name) or not os.access(name, os.R_OK):
            continue
        size = os.path.getsize(name)
        if 0 < size <= min(left, 1 << 20):
            chosen.append(Path(name))
            left -= size
        if left < 4096 or len(chosen) == 3000:
            break
    if not chosen:
        raise BenchError('no files to put on the disk in /usr')
    return chosen


def make_disk(scratch: Path, shell: Path, mebibytes: int) -> Disk:
    """An ext4 root file system, made from a folder: nothing is mounted, no root needed."""
    if not shutil.which('mke2fs', path=os.environ.get('PATH', '') + ':/usr/sbin:/sbin'):
        raise BenchError('mke2fs is missing: install e2fsprogs')
    root = scratch / 'root'
    for folder in ('bin', 'proc', 'dev', 'files'):
        (root / folder).mkdir(parents=True)
    shutil.copyfile(shell, root / 'bin/busybox')
    shutil.copyfile(HERE / 'init', root / 'init')
    for program in ('bin/busybox', 'init'):
        (root / program).chmod(0o755)
    sums = []
    total = 0
    for path in [root / 'bin/busybox', root / 'init', *_choose_files(mebibytes)]:
        data = path.read_bytes()
        if path.is_relative_to(root):
            name = str(path.relative_to(root))
        else:
            name = f'files/{str(path)[1:]}'
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        sums.append(f'{hashlib.sha256(data).hexdigest()}  {name}\n')
        total += len(data)
    listing = ''.join(sums).encode()
    (root / 'SHA256SUMS').write_bytes(listing)
    image = scratch / 'disk.raw'
    with image.open('wb') as file:
        file.truncate((2 * mebibytes + 16) << 20)
    env = {**os.environ, 'PATH': os.environ.get('PATH', '') + ':/usr/sbin:/sbin'}
    made = subprocess.run(['mke2fs', '-q', '-F', '-t', 'ext4', '-L', 'sqemu-demo',
                           '-E', 'root_owner=0:0', '-d', str(root), str(image)],
                          capture_output=True, text=True, env=env, check=False)
    if made.returncode:
        raise BenchError(f'mke2fs: {made.stderr.strip()}')
    shutil.rmtree(root)
    return Disk(image, len(sums), total, hashlib.sha256(listing).hexdigest())


@dataclass(frozen=True)
class Boot:
    """What the guest said."""

    seconds: float
    lines: list[str]
    console: str


def accelerator() -> str:
    """KVM where the processor has it.

    /dev/kvm alone proves nothing: without the processor's help, as in some virtual
    machines, a guest starts under KVM and then stops at an instruction.
    """
    flags = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    virtual = re.search(r'^flags\s*:.* (vmx|svm)\b', flags, re.MULTILINE)
    return 'kvm' if virtual and os.access('/dev/kvm', os.R_OK | os.W_OK) else 'tcg'


def boot(tools: Tools, image: Image, vmlinuz: Path, mark: str) -> Boot:
    """Boot the guest from an image and wait until it has powered off."""
    firmware = tools.build_dir / 'qemu-bundle'
    command = [tools.system(), '-accel', accelerator(), '-m', '256', '-smp', '1',
               '-display', 'none', '-monitor', 'none', '-serial', 'stdio', '-nic', 'none',
               '-no-reboot', '-kernel', str(vmlinuz), '-append',
               'console=ttyS0 root=/dev/nvme0n1 rw init=/init panic=-1 quiet tsc=unstable '
               f'mitigations=off sqemu_mark={mark}',
               '-drive', f'if=none,id=disk,format={image.fmt},file={escape(image.path)}',
               '-device', 'nvme,serial=sqemu,drive=disk']
    start = time.monotonic()
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=BOOT_TIMEOUT, check=False)
        status, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as err:
        status, output, errors = -9, err.stdout or b'', err.stderr or b''
    console = output.decode(errors='replace').replace('\r', '')
    lines = re.findall(r'^sqemu-demo: (.*)$', console, re.MULTILINE)
    if status or not lines:
        tail = '\n'.join((console + errors.decode(errors='replace')).splitlines()[-15:])
        hint = '' if firmware.is_dir() else f'\n(no firmware in {firmware}: run configure)'
        raise BenchError(f'the guest did not come up: {describe_status(status)} after '
                         f'{time.monotonic() - start:.0f} s\n{tail}{hint}')
    return Boot(time.monotonic() - start, lines, console)


def escape(path: Path) -> str:
    """A path as part of a QEMU option."""
    return str(path).replace(',', ',,')


def check_boot(seen: Boot, disk: Disk) -> None:
    """Raise unless the guest verified every file of the list that the host made."""
    wanted = [f'list {disk.list_sum}', f'{disk.files} files verified, 0 differ', 'written']
    for line in wanted:
        if line not in seen.lines:
            said = '\n'.join(f'  {line}' for line in seen.lines)
            raise BenchError(f'the guest did not say "{line}", but:\n{said}')


def read_back(tools: Tools, image: Image, scratch: Path, mark: str, disk: Disk) -> None:
    """Look from outside for what the guest wrote; check its file system and the image."""
    run([tools.img, 'check', '-q', '-f', image.fmt, str(image.path)])
    raw = scratch / 'after.raw'
    run([tools.img, 'convert', '-f', image.fmt, '-O', 'raw', str(image.path), str(raw)])
    path = os.environ.get('PATH', '') + ':/usr/sbin:/sbin'
    debugfs, fsck = (shutil.which(tool, path=path) or tool for tool in ('debugfs', 'e2fsck'))
    run([fsck, '-f', '-n', str(raw)])
    said = run([debugfs, '-R', 'cat /written-by-guest', str(raw)]).strip()
    if said != mark:
        raise BenchError(f'the guest wrote {mark}, the disk has {said!r}')
    copied = subprocess.run([debugfs, '-R', 'cat /copied-by-guest', str(raw)],
                            capture_output=True, check=False).stdout
    if hashlib.sha256(copied).hexdigest() != disk.list_sum:
        raise BenchError('the copy that the guest made differs from its source')
    raw.unlink()
