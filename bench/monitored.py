# SPDX-License-Identifier: GPL-2.0-or-later
"""A process that is spoken to by QMP on its standard input and output."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Sequence

from tools import BenchError, describe_status


class Monitored:
    """Runs until the end of the `with` block."""

    def __init__(self, command: Sequence[str]) -> None:
        self._name = Path(command[0]).name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answer('QMP')
        self.command('qmp_capabilities')

    def __enter__(self) -> 'Monitored':
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.command('quit')
        except (BenchError, OSError):
            self._process.kill()
        self._process.communicate()

    def answer(self, *keys: str) -> dict[str, Any]:
        """The next message that has one of these keys."""
        assert self._process.stdout
        for line in self._process.stdout:
            if not line.startswith(b'{'):
                continue                # what qemu-img create would say
            message: dict[str, Any] = json.loads(line)
            if 'error' in message:
                raise BenchError(message['error']['desc'])
            if any(key in message for key in keys):
                return message
        raise BenchError(f'{self._name}: {describe_status(self._process.wait())}')

    def command(self, name: str, **arguments: Any) -> Any:
        """Its return value."""
        assert self._process.stdin
        line = {'execute': name, 'arguments': {k.replace('_', '-'): v
                                               for k, v in arguments.items()}}
        self._process.stdin.write(json.dumps(line).encode() + b'\n')
        self._process.stdin.flush()
        return self.answer('return')['return']

    def memory(self, what: str) -> int:
        """Bytes of it, by its name in /proc/PID/status."""
        for line in Path(f'/proc/{self._process.pid}/status').read_text('ascii').splitlines():
            if line.startswith(f'{what}:'):
                return int(line.split()[1]) * 1024
        raise BenchError(f'no {what} in /proc/PID/status: is this Linux?')
