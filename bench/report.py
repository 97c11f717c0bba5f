# SPDX-License-Identifier: GPL-2.0-or-later
"""Figures with their spread, the limits they are held against, and how both are shown."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Sequence


@dataclass(frozen=True)
class Limit:
    """A bound that a figure's median must keep."""

    value: float
    at_least: bool = False

    def met(self, figure: float) -> bool:
        """Does a median keep it?"""
        return figure >= self.value if self.at_least else figure <= self.value

    def __str__(self) -> str:
        return f'{">=" if self.at_least else "<="} {number(self.value)}'


@dataclass
class Figure:
    """One measured figure: a value per paired run, and the raw values they come from."""

    key: str
    title: str
    unit: str
    samples: list[float]
    limit: Limit | None = None
    parts: dict[str, list[float]] = field(default_factory=dict)
    note: str = ''

    @property
    def value(self) -> float:
        """The median of the runs."""
        return median(self.samples)

    @property
    def verdict(self) -> str:
        """What is printed beside the limit; unsure if a quarter of the runs say otherwise."""
        if self.limit is None:
            return ''
        verdict = 'met' if self.limit.met(self.value) else 'NOT met'
        if len(self.samples) > 2:
            lower, _, upper = quantiles(self.samples, n=4)
            if self.limit.met(lower) != self.limit.met(upper):
                verdict += ', unsure'
        return verdict

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {'key': self.key, 'title': self.title, 'unit': self.unit,
                'median': self.value, 'min': min(self.samples), 'max': max(self.samples),
                'runs': len(self.samples), 'samples': self.samples,
                'limit': str(self.limit) if self.limit else None,
                'verdict': self.verdict or None, 'note': self.note,
                'parts': {name: {'median': median(values), 'samples': values}
                          for name, values in self.parts.items() if values}}


def number(value: float) -> str:
    """Three or four significant digits, and no exponent for large values."""
    return f'{value:.0f}' if abs(value) >= 1000 else f'{value:.4g}' if abs(value) >= 100 \
        else f'{value:.3g}'


def grid(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows as aligned text, the first `left` columns to the left, a rule under the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['  '.join(cell.ljust(width) if i < left else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))).rstrip()
             for row in rows]
    lines.insert(1, '  '.join('-' * width for width in widths))
    return '\n'.join(lines)


def table(figures: Sequence[Figure]) -> str:
    """The figures as text."""
    rows = [('figure', 'median', 'min .. max', 'runs', 'limit', '')]
    for figure in figures:
        spread = f'{number(min(figure.samples))} .. {number(max(figure.samples))}'
        rows.append((f'{figure.title} [{figure.unit}]', number(figure.value), spread,
                     str(len(figure.samples)), str(figure.limit or '-'), figure.verdict))
    notes = [f'{figure.title}: {figure.note}' for figure in figures if figure.note]
    return '\n'.join([grid(rows)] + ([''] + notes if notes else []))


def _output(*command: str, cwd: Path) -> str:
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def facts(repo: Path, work: Path, qemu: str) -> dict[str, Any]:
    """What a reader needs to judge a figure: commit, machine, file system."""
    cpuinfo = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    model = re.search(r'^model name\s*: (.*)', cpuinfo, re.MULTILINE)
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'commit': _output('git', 'rev-parse', 'HEAD', cwd=repo),
        'modified': bool(_output('git', 'status', '--porcelain', '-uno', cwd=repo)),
        'qemu': qemu,
        'processor': model.group(1) if model else platform.machine(),
        'processors': len(os.sched_getaffinity(0)),
        'memory_mib': memory >> 20,
        'kernel': platform.release(),
        'file_system': _output('stat', '-f', '-c', '%T', str(work), cwd=repo),
        'python': platform.python_version(),
        'load_at_start': os.getloadavg()[0],
    }


def save(folder: Path, result: dict[str, Any]) -> Path:
    """Write a result file named by date and commit."""
    folder.mkdir(exist_ok=True)
    commit = result['facts']['commit'][:12] or 'unknown'
    path = folder / f"{result['facts']['date'][:10]}-{commit}.json"
    path.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    return path
