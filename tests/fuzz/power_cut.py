#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Power cuts and failing disks in the middle of operations on sqcow2 chains.

A run makes a chain of images, runs one operation on it with what it does to the files written
down, and then makes the files as a power cut at any time may have left them: after every
request, and with any part of what was not flushed, in any order, torn into sectors. Whatever is
left must be readable, show the state before or after in every sector, check with no more than
leaks, have an index that is right or not trusted, and work on. A state that check has to repair
passes only if a cut of the same operation on qcow2 layers leaves one, too.

In the same way every request is made to fail: EIO, once or from then on, and a full disk. The
program must not crash, and must report it or do without. --kill kills writing programs.

Needs a C compiler, for the library that is preloaded into the programs.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Optional

from crash_judge import Judge, kind_of, read_views
from crash_record import Cut, Disk, Files, Log, build_shim, read_files, read_log, write_files
from crash_scenarios import Command, Result, Scenario, run


@dataclasses.dataclass
class Options:
    """The same for all runs."""

    build: str
    workdir: str
    shim: str
    cuts: int
    faults: int
    keep: bool


@dataclasses.dataclass
class Outcome:
    """Of one run."""

    seed: int
    operation: str
    states: int = 0
    trusted: int = 0
    leaks: int = 0
    faults: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    fault_problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    known: int = 0  # of those, that qcow2 has as well
    repairs: list[str] = dataclasses.field(default_factory=list)


class Run:
    """One chain, one operation."""
    # pylint: disable=too-many-instance-attributes

    def __init__(self, options: Options, seed: int, operation: str, driver: str) -> None:
        self.options = options
        self.outcome = Outcome(seed, operation)
        self.dir = os.path.join(options.workdir, f"{operation}-{seed}-{driver}")
        self.images = os.path.join(self.dir, "images")
        self.log = os.path.join(self.dir, "log")
        shutil.rmtree(self.dir, ignore_errors=True)
        os.makedirs(self.images)
        self.env = {"LD_PRELOAD": options.shim, "CRASH_DIR": self.images,
                    "ASAN_OPTIONS": "verify_asan_link_order=0"}
        self.scenario = Scenario(options.build, self.images, self.env, seed, driver)
        self.rng = random.Random(seed)
        self.commands: list[Command] = []
        self.before: Files = {}

    def prepare(self) -> None:
        self.scenario.make_chain()
        self.scenario.writes.clear()
        self.commands = self.scenario.operations()[self.outcome.operation]()
        self.scenario.settle()
        self.before = read_files(self.images)

    def execute(self, env: dict[str, str]) -> list[Result]:
        """The operation, on the files as they were; stops at the first failure."""
        write_files(self.images, self.before)
        if os.path.exists(self.log):
            os.unlink(self.log)
        results: list[Result] = []
        for command in self.commands:
            results.append(run(command, self.images, {**self.env, "CRASH_LOG": self.log, **env}))
            if results[-1].status:
                break
        return results

    def problem(self, what: str, found: list[str]) -> None:
        self.outcome.problems += [f"{what}: {problem}" for problem in found]

    def record(self) -> tuple[Log, Optional[Judge]]:
        """Run the operation without an accident."""
        before = read_views(self.images, self.scenario.formats)
        results = self.execute({})
        log = read_log(self.log)
        # A shrunk disk may be refused by a commit, and so on: then there is nothing to interrupt
        if results[-1].status < 0:
            self.problem("recording", [f"{results[-1].status} {results[-1].output}"])
            return log, None
        changed = {request.name for request in log.requests if request.kind != "f"}
        if results[-1].status:
            self.outcome.operation += " (refused)"
        after = read_views(self.images, self.scenario.formats)
        judge = Judge(self.scenario, before, after, changed)
        judge.damaged = self.outcome.operation == "check"
        return log, judge

    def cut(self, log: Log, judge: Judge) -> None:
        disk = Disk(self.before, log, self.rng)
        for number, cut in enumerate(disk.cuts(self.options.cuts)):
            write_files(self.images, cut.files)
            found = judge.problems(self.images, cut.time == log.length, {
                name for name, when in log.marks.items() if when < cut.time})
            if found:
                self.problem(f"cut at {cut.time} of {log.length}, {cut.what}", found)
                if self.options.keep:
                    self.save(number, cut)

    def save(self, number: int, cut: Cut) -> None:
        write_files(os.path.join(self.dir, f"cut{number}"), cut.files)

    def fail(self, judge: Judge) -> None:
        """Let requests fail, one after the other."""
        styles = [("rwtf", errno.EIO, "once"), ("wtf", errno.EIO, "sticky"),
                  ("wt", errno.ENOSPC, "full")]
        left = self.options.faults
        judge.failing = True
        for kinds, number, how in styles:
            nth = 1
            step = 1
            while left > 0:
                results = self.execute({"CRASH_FAIL": f"{kinds}:{nth}:{number}:{how}"})
                if not read_log(self.log).failures:
                    break
                left -= 1
                self.outcome.faults += 1
                what = f"request {nth} of {kinds} fails ({how}, {errno.errorcode[number]})"
                last = results[-1]
                if last.status < 0:
                    self.problem(what, [f"signal {-last.status}: {last.output}"])
                elif last.status and not last.output.strip():
                    self.problem(what, [f"status {last.status} without a word"])
                silent = not last.status and not last.output.strip()
                self.outcome.fault_problems += [
                    (what, problem) for problem in judge.problems(self.images, silent)]
                nth += step
                step = self.rng.randrange(1, 4) if self.options.cuts else 1
            left = max(left, self.options.faults // 3)

    def go(self) -> Outcome:
        self.prepare()
        log, judge = self.record()
        if judge is not None:
            self.problem("no cut", judge.problems(self.images, True))
            judge.repaired.clear()
            self.cut(log, judge)
            self.outcome.repairs = list(judge.repaired)
            if self.options.faults:
                self.fail(judge)
            self.outcome.states = judge.states
            self.outcome.trusted = judge.trusted
            self.outcome.leaks = judge.leaks
        if not (self.outcome.problems and self.options.keep):
            shutil.rmtree(self.dir)
        return self.outcome


def one_run(options: Options, seed: int, operation: str) -> Outcome:
    """Run, and compare the need of repairs, and what failing requests do, with qcow2."""
    outcome = Run(options, seed, operation, "sqcow2").go()
    if outcome.repairs:
        again = dataclasses.replace(options, cuts=4 * options.cuts + 100, faults=0, keep=False)
        if not Run(again, seed, operation, "qcow2").go().repairs:
            outcome.problems += [f"a repair that qcow2 does not need: {repair}"
                                 for repair in outcome.repairs]
    if outcome.fault_problems:
        again = dataclasses.replace(options, cuts=0, faults=300, keep=False)
        known = {kind_of(problem) for _, problem
                 in Run(again, seed, operation, "qcow2").go().fault_problems}
        for what, problem in outcome.fault_problems:
            if kind_of(problem) in known:
                outcome.known += 1
            else:
                outcome.problems.append(f"{what}: {problem}")
    return outcome


def kill_loop(options: Options, seed: int, seconds: int) -> Outcome:
    """Kill a program that writes, again and again, on the same chain."""
    outcome = Outcome(seed, "kill")
    this = Run(options, seed, "write", "sqcow2")
    this.prepare()
    scenario = this.scenario
    # Lazy refcounts are wrong after a kill by design; the repair is tested all the same
    with open(os.path.join(this.images, scenario.top), "rb") as file:
        lazy = file.read(88)[87] & 1
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = read_views(this.images, scenario.formats)
        scenario.writes.clear()
        # No discard while other requests are in flight: qcow2 may give the cluster to one while
        # another still writes to it
        cmds: list[str] = []
        for _ in range(60):
            what = this.rng.choice(("aio", "zero", "discard"))
            cmds += ["aio_flush"] if what == "discard" else []
            cmds.append(scenario.write_command(scenario.top, what))
            if what == "discard":   # until it is flushed, shows what is put into the freed cluster
                scenario.writes[-1].pattern = None
        with subprocess.Popen(scenario.io(scenario.top, cmds + ["aio_flush"]).argv,
                              cwd=this.images, env={**os.environ, **this.env},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(this.rng.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        outcome.faults += 1
        judge = Judge(scenario, before, before, {scenario.top})
        found = judge.problems(this.images, False)
        outcome.states += judge.states
        outcome.problems += found if lazy else found + judge.repaired
        if outcome.problems:
            break
    shutil.rmtree(this.dir)
    return outcome


def summary(outcomes: list[Outcome]) -> int:
    """Print what happened; returns the exit status."""
    by_operation: dict[str, list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        by_operation[outcome.operation].append(outcome)
    for operation, group in sorted(by_operation.items()):
        print(f"{operation}: {len(group)} runs, {sum(o.states for o in group)} states, "
              f"{sum(o.trusted for o in group)} times an index was trusted, "
              f"{sum(o.leaks for o in group)} with leaks, "
              f"{sum(len(o.repairs) for o in group)} repaired as with qcow2, "
              f"{sum(o.faults for o in group)} faults, {sum(o.known for o in group)} times as "
              "bad as with qcow2")
    failed = [outcome for outcome in outcomes if outcome.problems]
    counts = collections.Counter(f"{outcome.operation}: {kind_of(problem.split(': ', 1)[-1])}"
                                 for outcome in failed for problem in outcome.problems)
    for kind, count in counts.most_common(40):
        print(f"  {count} times {kind}")
    print(f"{len(outcomes) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed or not outcomes else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--build", default="build", help="directory with the programs")
    parser.add_argument("--workdir", help="else one in memory that is removed")
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--operation", action="append", help="these only")
    parser.add_argument("--cuts", type=int, default=60, help="at most, per run")
    parser.add_argument("--faults", type=int, default=0, help="failing requests, per run")
    parser.add_argument("--kill", type=int, default=0, help="kill writers for this many seconds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--keep", action="store_true", help="the files of bad states")
    args = parser.parse_args()

    workdir = os.path.realpath(args.workdir or tempfile.mkdtemp(
        dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    os.makedirs(workdir, exist_ok=True)
    options = Options(os.path.abspath(args.build), workdir, build_shim(workdir), args.cuts,
                      args.faults, args.keep)
    names = args.operation or list(Scenario("", "", {}, 0, "sqcow2").operations())
    outcomes: list[Outcome] = []
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(one_run, options, seed, names[seed % len(names)])
                for seed in range(args.seed, args.seed + args.runs)]
        if args.kill:
            jobs.append(pool.submit(kill_loop, options, args.seed, args.kill))
        for job in jobs:
            outcome = job.result()
            outcomes.append(outcome)
            for problem in outcome.problems[:5]:
                print(f"seed {outcome.seed}, {outcome.operation}: {problem[:600]}", flush=True)
    if not args.workdir:
        shutil.rmtree(workdir)
    return summary(outcomes)


if __name__ == "__main__":
    sys.exit(main())
