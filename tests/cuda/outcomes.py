"""Runs a list of named jobs in another process, which a failing one may end: the rest then go on in a new process."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """What became of a job: its result, or why there is none."""

    name: str
    result: Any = None
    error: str | None = None


def run_all(
    command: Sequence[str], *, deadline: float, patience: float = 90, told: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """The outcomes of the jobs of `command`, whose last argument is to be the number of the first one to run and which
    calls `do_all`. Once no job has ended for `patience` seconds, or at `deadline` (of time.monotonic), its process is
    ended; after a deadline the rest is left out.
    """
    outcomes: list[Outcome] = []
    while True:
        ended, reason = _run_some([*command, str(len(outcomes))], outcomes, deadline, patience, told)
        if ended or time.monotonic() >= deadline:
            return outcomes
        if reason is not None:
            # The process ended outside of a job: there is no job to leave out.
            outcomes.append(Outcome("the rest", error=reason))
            if told is not None:
                told(outcomes[-1])
            return outcomes


def do_all(jobs: Sequence[tuple[str, Callable[[], Any]]], first: int, is_usable: Callable[[], bool]) -> None:
    """In the other process: run the jobs from number `first` on, and say what became of each."""
    for name, job in jobs[first:]:
        print(json.dumps({"begin": name}), flush=True)
        result, error = None, None
        try:
            result = job()
        except Exception as problem:
            error = described(problem)
        print(json.dumps({"result": result, "error": error}), flush=True)
        if error is not None and not is_usable():
            return
    print(json.dumps({"end": True}), flush=True)


def described(problem: BaseException) -> str:
    """An error in a line: what it says, and where, for an assertion may say nothing; from the innermost place on."""
    told = f"{type(problem).__name__}: {problem}".partition("\n")[0][:500]
    frames = traceback.extract_tb(problem.__traceback__)[-4:][::-1]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{told} ({frames[0].line}; {places})"


def _run_some(
    command: list[str],
    outcomes: list[Outcome],
    deadline: float,
    patience: float,
    told: Callable[[Outcome], None] | None,
) -> tuple[bool, str | None]:
    """Add outcomes until the process ends. Whether it was at the end of the jobs, and if not why, had it begun none."""
    name: str | None = None
    before = len(outcomes)

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if told is not None:
            told(outcome)

    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        lines = _Lines(process)
        try:
            while (line := lines.next(min(deadline, time.monotonic() + patience))) is not None:
                if not line.startswith("{"):
                    continue
                told_by_child = json.loads(line)
                if "end" in told_by_child:
                    return True, None
                if "begin" in told_by_child:
                    name = told_by_child["begin"]
                elif name is not None:
                    add(Outcome(name, told_by_child["result"], told_by_child["error"]))
                    name = None
            if lines.late:
                reason = "no end in sight"
            else:
                errors.seek(0)
                last = errors.read().strip().rpartition("\n")[2]
                reason = f"the process ended with status {process.wait()}: {last[:300]}"
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    if name is not None:
        add(Outcome(name, error=reason))
    return False, None if len(outcomes) > before else reason


class _Lines:
    """A process's lines, with a time limit on each."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._process = process
        self.late = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._queue.put(line)
        except ValueError:  # it was closed
            pass
        self._queue.put(None)

    def next(self, deadline: float) -> str | None:
        """The next line; None at the end, or, which `late` then says, at the deadline."""
        try:
            return self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self.late = True
            return None
