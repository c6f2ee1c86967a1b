"""The harness for a GPU, as far as it goes without one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cuda import cases
from tests.cuda.harness import Emulated, link_emulated
from tests.cuda.outcomes import Outcome, run_all
from tests.cuda.report import Figure, Limits, Work

ROOT = Path(__file__).parents[2]

JOBS = """
import os, sys, time
from tests.cuda.outcomes import do_all

usable = True

def fail():
    raise ValueError("wrong\\nby far")

def poison():
    global usable
    usable = False
    raise RuntimeError("illegal access")

jobs = [("good", lambda: {"answer": 42}), ("bad", fail), ("crash", os.abort), ("poison", poison),
        ("hang", lambda: time.sleep(60)), ("last", lambda: "done")]
do_all([(name, job) for name, job in jobs], int(sys.argv[1]), lambda: usable)
"""


def test_every_job_has_an_outcome_whatever_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told: list[Outcome] = []
    outcomes = run_all([sys.executable, "-c", JOBS], deadline=time.monotonic() + 60, patience=3, told=told.append)
    assert told == outcomes
    assert [each.name for each in outcomes] == ["good", "bad", "crash", "poison", "hang", "last"]
    assert [each.result for each in outcomes] == [{"answer": 42}, None, None, None, None, "done"]
    errors = [each.error for each in outcomes]
    assert errors[:2] == [None, "ValueError: wrong"]
    assert "status -6" in str(errors[2])
    assert errors[3:] == ["RuntimeError: illegal access", "no end in sight", None]


def test_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started = time.monotonic()
    outcomes = run_all([sys.executable, "-c", "import time; time.sleep(60)"], deadline=started + 0.5)
    assert outcomes == []
    assert time.monotonic() - started < 10


def test_what_cannot_begin_says_why() -> None:
    outcomes = run_all([sys.executable, "-c", "import nothing_of_this_name"], deadline=time.monotonic() + 60)
    assert len(outcomes) == 1
    assert "No module named 'nothing_of_this_name'" in str(outcomes[0].error)


@pytest.mark.parametrize(
    ("figure", "row"),
    [
        (Figure(1e-3, Work(2e9, 1e9), 0.85, 2e-3), "| x | 1000.0 us | 2000 GB/s | 67 % | 85 %, missed | 2.00x |"),
        (Figure(1e-3, Work(1e6, 4e11), 0.55), "| x | 1000.0 us | 400 TFLOP/s | 57 % | 55 %, met |  |"),
        (Figure(5e-6, Work(3e6)), "| x | 5.0 us | 600 GB/s | 20 % |  |  |"),
    ],
)
def test_rows_of_the_report(figure: Figure, row: str) -> None:
    assert Figure.of(figure.plain()).row("x", Limits(3e12, 7e14)) == row


def test_it_needs_neither_paddle_nor_torch() -> None:
    """But for torch in its other processes."""
    code = "import sys, tests.cuda.run, tests.cuda.cases; print({'paddle', 'torch', 'msgspec'} & set(sys.modules))"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert told.stdout == "set()\n"


def test_cases_run(objects: list[Path], tmp_path: Path) -> None:
    """The first of every kernel, which are small, as on a GPU."""
    device = Emulated(ctypes.CDLL(str(link_emulated(objects, tmp_path / "emulated.so"))))
    for group in cases.groups().values():
        name, case = group[0]
        assert name
        case(device)
