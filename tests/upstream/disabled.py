#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A build with -Dsqcow2=disabled knows nothing of sqcow2.

    tests/upstream/disabled.py [--build build-disabled] [--ordinary build]

The ordinary build makes the images that this build has to refuse, and shows
that each of the tests can fail: it gives the other answer to each of them.
The last line says "N passed, N failed".
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Callable, List

TOP = os.path.dirname(os.path.dirname(os.path.dirname(
    os.path.realpath(__file__))))
PROGRAMS = ('qemu-img', 'qemu-io', 'qemu-nbd',
            'storage-daemon/qemu-storage-daemon', 'qemu-system-x86_64')
NAME = re.compile('[sS]qcow2|SQCOW2')     # not BlockdevOptionsQcow2
QMP = ['{"execute": "qmp_capabilities"}', '{"execute": "query-qmp-schema"}',
       '{"execute": "quit"}']


class Build:
    def __init__(self, folder: str, scratch: str) -> None:
        self.folder = folder
        self.scratch = scratch

    def path(self, program: str) -> str:
        return os.path.join(self.folder, program)

    def run(self, program: str, *args: str, stdin: str = '') -> str:
        """All that the program says."""
        result = subprocess.run(
            [self.path(program), *args], cwd=self.scratch, input=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=60, check=False)
        return result.stdout

    def formats(self) -> List[str]:
        text = self.run('qemu-img', '--help')
        return re.search('^Supported formats: (.*)', text, re.M)[1].split()

    # Each of the tests: True if sqcow2 is not there

    def no_symbols(self) -> bool:
        names = ''
        for program in PROGRAMS:
            names += subprocess.run(
                ['nm', '-a', self.path(program)], text=True, check=True,
                stdout=subprocess.PIPE).stdout
        assert ' qcow2_alloc_clusters' in names
        return not NAME.search(names)

    def no_format(self) -> bool:
        formats = self.formats()
        assert 'qcow2' in formats
        return 'sqcow2' not in formats

    def no_help(self) -> bool:
        text = self.run('qemu-img', '--help')
        create = re.search(r'^  create .*', text, re.M)[0]
        return not NAME.search(text) and '[-p]' not in create

    def no_create(self) -> bool:
        text = self.run('qemu-img', 'create', '-f', 'sqcow2', 'new', '1M')
        return text == "qemu-img: new: Unknown file format 'sqcow2'\n"

    def no_create_progress(self) -> bool:
        text = self.run('qemu-img', 'create', '-p', '-f', 'qcow2', 'new', '1M')
        return text.startswith("qemu-img: unrecognized option '-p'\n")

    def no_schema(self) -> bool:
        text = self.run('qemu-system-x86_64', '-machine', 'none', '-nodefaults',
                        '-display', 'none', '-qmp', 'stdio',
                        stdin='\n'.join(QMP))
        schema = next(line['return'] for line in
                      map(json.loads, text.splitlines()) if line.get('return'))
        assert '"vmdk"' in json.dumps(schema)
        return 'qcow2"' in json.dumps(schema) and \
            not NAME.search(json.dumps(schema))

    def no_option(self) -> bool:
        text = self.run('storage-daemon/qemu-storage-daemon', '--blockdev',
                        'sqcow2,node-name=a,file.driver=file,'
                        'file.filename=no-such-file')
        return "does not accept value 'sqcow2'" in text

    def no_feature_name(self) -> bool:
        """In the header of the best image that this build can make"""
        name = 'qcow2' if self.no_format() else 'sqcow2'
        self.run('qemu-img', 'create', '-f', name, 'new', '1M')
        with open(os.path.join(self.scratch, 'new'), 'rb') as image:
            content = image.read()
        assert content.startswith(b'QFI\xfb')
        return b'sQcow2' not in content

    def refuses(self) -> bool:
        """What an sqcow2 image is to every QEMU without the driver"""
        text = self.run('qemu-io', '-r', '-c', 'read 0 64k', 'indexed')
        return text == ("qemu-io: can't open device indexed: Unsupported qcow2 "
                        'feature(s): sQcow2 ownership index\n')


TESTS: List[Callable[[Build], bool]] = [
    Build.no_symbols, Build.no_format, Build.no_help, Build.no_create,
    Build.no_create_progress, Build.no_schema, Build.no_option,
    Build.no_feature_name, Build.refuses]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--build', default=os.path.join(TOP, 'build-disabled'))
    parser.add_argument('--ordinary', default=os.path.join(TOP, 'build'))
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix='sqemu-disabled.') as scratch:
        ordinary = Build(os.path.realpath(args.ordinary), scratch)
        disabled = Build(os.path.realpath(args.build), scratch)
        ordinary.run('qemu-img', 'create', '-f', 'sqcow2', 'indexed', '1M')
        for test in TESTS:
            there, gone = not test(ordinary), test(disabled)
            good = there and gone
            failed += not good
            why = '' if good else ': ' + (
                'the ordinary build says the same' if gone
                else 'sqcow2 is there')
            print(f'{"ok  " if good else "FAIL"} {test.__name__}{why}')
    print(f'{len(TESTS) - failed} passed, {failed} failed')
    return failed != 0


if __name__ == '__main__':
    sys.exit(main())
