"""The harness for a GPU, as far as it goes without one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cuda import cases, checks, run
from tests.cuda.harness import Emulated, link_emulated
from tests.cuda.outcomes import Outcome, described, run_all
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
    assert errors[0] is None
    assert str(errors[1]).startswith("ValueError: wrong (")
    assert "<string>:8 < outcomes.py:" in str(errors[1])
    assert "status -6" in str(errors[2])
    assert str(errors[3]).startswith("RuntimeError: illegal access (")
    assert errors[4:] == ["no end in sight", None]


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


def test_a_mistake_is_told_with_its_place_and_size() -> None:
    expected = np.arange(12.0).reshape(3, 4)
    actual = expected.copy()
    actual[1, 2], actual[2, 3] = 6.5, np.nan
    checks.close(expected, expected, 0)
    with pytest.raises(AssertionError) as problem:
        checks.close(actual, expected, 0.01)
    assert str(problem.value) == (
        "not within 0.01: 2 of 12 wrong, from (1, 2) (6.5 for 6.0) to (2, 3) (nan for 11.0), at most 0.5 apart, "
        "1 with a NaN"
    )
    # Where a check says nothing itself, its line does.
    with pytest.raises(AssertionError) as problem:
        checks.close(actual[:2], expected, 0.01)
    assert "(assert actual.shape == expected.shape; checks.py:" in described(problem.value)


TIMES = """
import sys
from tests.cuda.outcomes import do_all

def limits():
    if sys.argv[1] == "no limits":
        raise RuntimeError("too little memory")
    return {"copy": 4e12, "matmul": 8e14}

figure = {"seconds": 1e-3, "work": {"moved": 2e9, "flops": 0}, "goal": 0.85, "torch": None}
do_all([("the limits", limits), ("copying", lambda: figure)], int(sys.argv[2]), lambda: True)
"""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("limits", ["copy: 4000 GB/s", "| copying | 1000.0 us | 2000 GB/s | 50 % | 85 %, missed |  |"]),
        ("no limits", ["| the limits | failed: RuntimeError: too little memory", "| copying | 1000.0 us | | | | |"]),
    ],
)
def test_times_are_told_with_the_limits_and_without(
    kind: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, "-c", TIMES, kind]
    run._time(lambda kind, group: command, ["rows", "experts"], time.monotonic() + 60)
    told = capsys.readouterr().out
    assert [line in told for line in expected] == [True, True], told


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


def test_a_library_is_the_file_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--library", "launchers.so"])
    assert run._arguments().library == Path.cwd() / "launchers.so"


def test_what_has_no_times_is_checked_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every job of these is that the device is there."""
    script = 'import sys; from tests.cuda.outcomes import do_all; do_all([("it", lambda: {"told": ""})], 0, bool)'
    kinds: list[str] = []

    def command(library: Path, kind: str, group: str) -> list[str]:
        kinds.append(kind)
        return [sys.executable, "-c", script]

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which would be set otherwise, and stay
    monkeypatch.setattr(run, "_command", command)
    monkeypatch.setattr(run, "groups", lambda: {"rope": [("it", None)], "rows": [("it", None)]})
    monkeypatch.setattr(sys, "argv", ["run", "--library", str(tmp_path), "--only", "rope"])
    assert run.main() == 0
    assert kinds == ["device", "check"]


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
