# SPDX-License-Identifier: GPL-2.0-or-later
"""
For sqcow2 tests of running machines: disks that a guest writes while the
graph below changes, beside a model of what it must read
"""

import json
import os
import random
import re
import time
import tty
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import iotests
from sqcow2_testlib import Disk, K, M, Op, TestCase, directory

SIZE = 4 * M
NAMES = ('write', 'write', 'write', 'zero')
CHAINS = (('sqcow2',) * 4, ('raw', 'qcow2', 'sqcow2', 'sqcow2'))
JOB_TIMEOUT = 60.0      # seconds; far above what any job here needs


def runs(data: bytes) -> List[Tuple[int, int, int]]:
    """(offset, bytes, value) of each stretch of equal bytes."""
    found = []
    start = 0
    while start < len(data):
        value = data[start]
        step, end = 1, start + 1
        while end < len(data) and data[end] == value:
            same = bytes([value]) * step
            if data[end:end + step] == same:
                end += step
                step *= 2
            else:
                step = max(1, step // 2)
        found.append((start, end - start, value))
        start = end
    return found


class Machine(iotests.VM):
    """
    A machine that can be heard while it runs.  A "qemu-io" command of its
    monitor says what went wrong on stdout only, and in the command's answer
    nothing; stdout is a terminal here, as it would be buffered else.
    """

    _terminal = -1

    def _pre_launch(self) -> None:
        super()._pre_launch()
        self._said: List[str] = []
        self._terminal, inner = os.openpty()
        tty.setraw(inner)
        os.set_blocking(self._terminal, False)
        assert self._qemu_log_file
        self._qemu_log_file.close()
        # pylint: disable=consider-using-with
        self._qemu_log_file = open(inner, 'wb')

    def hear(self) -> str:
        """What it has said since this was asked last, in whole lines."""
        pieces: List[bytes] = []
        deadline = time.monotonic() + 5
        while True:
            try:
                piece = os.read(self._terminal, 4096)
            except BlockingIOError:
                # It writes a message in pieces
                if (not pieces or pieces[-1].endswith(b'\n') or
                        time.monotonic() > deadline):
                    break
                time.sleep(.01)
                continue
            except OSError:     # it is gone
                break
            if not piece:
                break
            pieces.append(piece)
        said = b''.join(pieces).decode(errors='replace')
        self._said.append(said)
        return said

    def _post_shutdown(self) -> None:
        if self._terminal >= 0 and self._qemu_log_path:
            self.hear()
            os.close(self._terminal)
            self._terminal = -1
            with open(self._qemu_log_path, 'w', encoding='utf-8') as file:
                file.write(''.join(self._said))
        super()._post_shutdown()


class Guest:
    """What a guest does with one disk, and what it must read"""

    def __init__(self, vm: Machine, name: str, data: bytes,
                 rng: random.Random) -> None:
        self.vm = vm
        self.name = name        # of the drive, the device or the node
        self.data = bytearray(data)
        self.rng = rng

    def command(self, command: str) -> str:
        """Return what it says, but for warnings: these are of others."""
        qdev = self.name.startswith('/')
        self.vm.hear()
        answer = self.vm.hmp_qemu_io(self.name, command, qdev=qdev)
        said = str(answer['return']) + self.vm.hear()
        # One may have begun before
        return re.sub(r'^[-\w]*:? ?warning: .*\n', '', said, flags=re.M)

    def io(self, *ops: Op) -> None:
        model = Disk('', 'raw', self.data)
        for op in ops:
            said = self.command(Disk.command(op))
            assert not said.strip(), (op, said)
            model.apply(op)

    def write_some(self, count: int = 4, cluster_size: int = 64 * K) -> None:
        model = Disk('', 'raw', self.data)
        self.io(*model.random_ops(self.rng, count, cluster_size, NAMES))

    def flush(self) -> None:
        said = self.command('flush')
        assert not said.strip(), said

    def check(self, chunk: int = 1 << 20) -> None:
        """All bytes are the model's."""
        for offset, length, value in runs(self.data):
            while length:
                now = min(length, chunk)
                said = self.command(f'read -q -P {value} {offset} {now}')
                assert not said.strip(), (self.name, offset, now, value, said)
                offset += now
                length -= now


class LiveTest(TestCase):
    """A machine with disks; its guests are in self.guests, by drive"""

    def setUp(self) -> None:
        super().setUp()
        self.rng = random.Random(0x11fe)
        self.vm: Optional[Machine] = None
        self.guests: Dict[str, Guest] = {}

    def tearDown(self) -> None:
        if self.vm:
            self.vm.shutdown(hard=True)
        super().tearDown()

    def launch(self, *args: str) -> Machine:
        self.vm = Machine()
        # Files that become too long are an error, and no signal
        # pylint: disable=protected-access
        self.vm._wrapper = ('env', '--ignore-signal=XFSZ',
                            *self.vm._wrapper)
        self.vm.add_args(*args)
        self.vm.launch()
        return self.vm

    def start(self, disk: Disk, options: str = '',
              args: Sequence[str] = ()) -> Guest:
        """Run the image as drive "d0"."""
        self.launch(*self.drive('d0', disk, options), *args)
        return self.guest('d0', disk.data)

    @staticmethod
    def drive(name: str, disk: Disk, options: str = '') -> Sequence[str]:
        return ('-drive', f'id={name},if=none,file={disk.path},'
                f'format={disk.fmt},{options}'.rstrip(','))

    def guest(self, name: str, data: bytes) -> Guest:
        assert self.vm
        self.guests[name] = Guest(self.vm, name, data, self.rng)
        return self.guests[name]

    def pid(self) -> int:
        assert self.vm
        pid = self.vm.get_pid()
        assert pid
        return pid

    def stop(self) -> None:
        """End the machine as its user does."""
        if self.vm:
            vm, self.vm = self.vm, None
            vm.shutdown()

    def kill(self) -> None:
        if self.vm:
            vm, self.vm = self.vm, None
            vm.shutdown(hard=True)

    def cmd(self, command: str, /, **args: Any) -> Any:
        assert self.vm
        return self.vm.cmd(command, **args)

    def error(self, command: str, /, **args: Any) -> str:
        """The command fails; return what it says."""
        assert self.vm
        answer = self.vm.qmp(command, **args)
        self.assertIn('error', answer, (command, args))
        return str(answer['error']['desc'])

    def hmp(self, line: str) -> str:
        return str(self.cmd('human-monitor-command', command_line=line))

    # The graph

    def inserted(self, name: str = 'd0') -> Dict[str, Any]:
        """What query-block says of a drive."""
        for entry in self.cmd('query-block'):
            if name in (entry['device'], entry.get('qdev', '')):
                return dict(entry['inserted'])
        raise AssertionError(name)

    def nodes(self) -> List[Dict[str, Any]]:
        return list(self.cmd('query-named-block-nodes', flat=True))

    def count(self, driver: str) -> int:
        return sum(node['drv'] == driver for node in self.nodes())

    def index_state(self, name: str = 'd0') -> str:
        image = self.inserted(name)['image']
        return str(image['format-specific']['data']['index-state'])

    def assert_flat(self, name: str = 'd0', state: str = 'trusted') -> None:
        """One node serves all layers, and its index is right."""
        # A format node and its file, and the layer set
        drives = len([entry for entry in self.cmd('query-block')
                      if 'inserted' in entry])
        for _ in range(100):
            # Folding comes with the main loop's next turn
            nodes = self.nodes()
            if len(nodes) == 3 * drives:
                break
        self.assertEqual(len(nodes), 3 * drives,
                         [(n['node-name'], n['drv']) for n in nodes])
        self.assertEqual(self.index_state(name), state)

    # Operations

    def snapshot(self, path: str, name: str = 'd0', **args: Any) -> None:
        self.cmd('blockdev-snapshot-sync', device=name, snapshot_file=path,
                 **{'format': 'sqcow2', **args})

    def event(self, *names: str, job: Optional[str] = None) -> Any:
        """Wait for one of these events."""
        assert self.vm
        match = {'data': {'device': job}} if job else None
        event = self.vm.events_wait([(name, match) for name in names],
                                    timeout=JOB_TIMEOUT)
        assert event, names
        return event

    def wait_job(self, job: str, complete: bool = True) -> Dict[str, Any]:
        """Wait for a job's end, completing it when ready; return the event."""
        while True:
            event = self.event('BLOCK_JOB_READY', 'BLOCK_JOB_COMPLETED',
                               'BLOCK_JOB_CANCELLED', job=job)
            if event['event'] != 'BLOCK_JOB_READY':
                return dict(event)
            for guest in self.guests.values():
                guest.write_some(2)
            if complete:
                self.cmd('job-complete', id=job)

    def job(self, command: str, /, **args: Any) -> None:
        """Run a job to its end, well; guests write meanwhile."""
        job = args.setdefault('job_id', 'job')
        self.cmd(command, **args)
        for guest in self.guests.values():
            guest.write_some(2)
        event = self.wait_job(job)
        self.assertEqual(event['event'], 'BLOCK_JOB_COMPLETED')
        self.assertNotIn('error', event['data'])

    def check_all(self) -> None:
        for guest in self.guests.values():
            guest.check()

    def check_layers(self, disk: Disk) -> None:
        """Look at this image and all below it, offline."""
        layers: Optional[Disk] = disk
        while layers:
            self.check(layers)
            layers = layers.below


class JobTest(LiveTest):
    """
    Scripts that are run twice, once with qcow2 in place of sqcow2: all images
    must have the same content afterwards.

        base - one - two - top      and branches on base and two
    """
    fmt: str
    disks: Dict[str, Disk]
    base: Disk
    one: Disk
    two: Disk
    top: Disk

    def run_both(self, script: Callable[[], None],
                 kinds: Sequence[Sequence[str]] = CHAINS) -> None:
        for formats in kinds:
            with self.subTest(chain=formats):
                ours = self.run_one(script, formats)
                theirs = self.run_one(script, [
                    'qcow2' if f == 'sqcow2' else f for f in formats])
                self.assertEqual(list(ours), list(theirs))
                for name, content in ours.items():
                    self.assert_same(content, theirs[name], name)

    def run_one(self, script: Callable[[], None], formats: Sequence[str]
                ) -> Dict[str, bytes]:
        """Return the content of all images, by name."""
        self.tearDown()
        self.setUp()
        self.fmt = formats[-1]
        self.disks = {}
        self.base = self.keep(Disk.create('base', formats[0], SIZE))
        self.fill(self.base, 10)
        self.one = self.put(self.base, 'one', formats[1])
        self.two = self.put(self.one, 'two', formats[2])
        self.top = self.put(self.two, 'top', formats[3])
        self.put(self.base, 'branch1', self.fmt)
        self.put(self.two, 'branch2', self.fmt)
        script()
        self.stop()
        return {name: disk.convert() for name, disk in self.disks.items()}

    def keep(self, disk: Disk) -> Disk:
        self.disks[os.path.basename(disk.path)] = disk
        return disk

    def fill(self, disk: Disk, count: int) -> None:
        names = ('write',) if disk.fmt == 'raw' else NAMES
        disk.io(*disk.random_ops(self.rng, count, 64 * K, names))

    def put(self, below: Disk, name: str, fmt: str) -> Disk:
        disk = self.keep(below.overlay(name, fmt))
        self.fill(disk, 5)
        return disk

    def folded(self, name: str = 'd0') -> None:
        """The operation is over: the graph is as if freshly opened."""
        if self.fmt == 'sqcow2':
            self.assert_flat(name)

    def finish(self, disk: Disk, guest: Optional[Guest] = None,
               state: Optional[str] = 'trusted') -> None:
        """The guest's disk is in this image."""
        guest = guest or self.guests['d0']
        guest.write_some()
        guest.check()
        self.stop()
        disk.data = bytearray(guest.data)
        self.check(disk, state)

    @staticmethod
    def blockdev(*disks: Disk) -> str:
        """The chain with explicit nodes, named after their files"""
        options: Optional[Dict[str, Any]] = None
        for disk in reversed(disks):
            name = disk.path.rsplit('/', 1)[1]
            this: Dict[str, Any] = {
                'driver': disk.fmt, 'node-name': name,
                'file': {'driver': 'file', 'filename': disk.path}}
            if disk is not disks[0]:
                this['read-only'] = True
            if disk is not disks[-1]:
                this['backing'] = options
            options = this
        return json.dumps(options)


def descriptors(pid: int) -> int:
    """Open files of a process."""
    return len(os.listdir(f'/proc/{pid}/fd'))


def layer(path: str, below: Disk, data: bytes) -> Disk:
    """An image that a running machine made."""
    return Disk(path if os.path.isabs(path) else directory(path), 'sqcow2',
                bytearray(data), below)


class SnapshotTest(LiveTest):
    """What the tests of live snapshots share"""

    def make_base(self, fmt: str = 'sqcow2', options: str = '') -> Disk:
        base = Disk.create('base', fmt, SIZE, options)
        base.io(*base.random_ops(self.rng, 8, 64 * K, ('write',)))
        return base

    def take(self, disk: Disk, name: str = 'd0', **args: Any) -> Disk:
        """Take a snapshot of what is now @disk; return the new top."""
        guest = self.guests[name]
        disk.data = bytearray(guest.data)
        top = layer(f'{name}.{len(disk.chain)}.sq', disk, guest.data)
        self.snapshot(top.path, name, **args)
        return top

    def finish(self, disk: Disk, name: str = 'd0') -> None:
        """Look at all images of the chain offline."""
        guest = self.guests[name]
        self.check_all()
        if self.vm:
            self.stop()
        disk.data = bytearray(guest.data)
        self.check_layers(disk)

    def snapshots(self, disk: Disk, count: int) -> Disk:
        """Writes and snapshots in turn, the graph staying as it is"""
        guest = self.guests['d0']
        for _ in range(count):
            guest.write_some()
            disk = self.take(disk)
            self.assert_flat()
            guest.write_some()
            guest.check()
        return disk
