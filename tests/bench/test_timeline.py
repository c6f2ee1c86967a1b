"""What the step timeline is drawn from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bench.plot import main, read_timeline
from bench.timeline import draw_timeline, read_steps, shares, steps_of_run
from fdserve.engine.step_log import StepRecord

LINE: dict[str, Any] = {
    "step": 1, "began": 100.0, "ended": 100.2, "computed": 0.15, "gap": None, "prefill_tokens": 256,
    "decode_tokens": 8, "running": 9, "waiting": 2,
}  # fmt: skip
SECOND = {**LINE, "step": 2, "began": 100.25, "ended": 100.3, "computed": 0.05, "gap": 0.05, "prefill_tokens": 0}
THIRD = {**SECOND, "step": 3, "began": 100.9, "ended": 101.0, "computed": 0.1, "gap": None}
RESULT: dict[str, Any] = {
    "output_throughput": 1.0, "begin_time": 100.24, "duration": 0.1, "start_times": [0.0, 0.01], "ttfts": [0.02, 0.0],
    "itls": [[0.01, 0.02], []], "request_errors": ["", "it failed"],
}  # fmt: skip


@dataclass
class Files:
    steps: Path
    result: Path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    files = Files(tmp_path / "steps.jsonl", tmp_path / "run.json")
    files.steps.write_text("".join(json.dumps(line) + "\n" for line in (LINE, SECOND, THIRD)) + '{"step": 4, "beg')
    files.result.write_text(json.dumps(RESULT))
    return files


def test_a_log_is_read_but_for_a_line_that_is_not_whole(files: Files) -> None:
    steps = read_steps(files.steps)
    assert [step.step for step in steps] == [1, 2, 3]
    assert steps[0] == StepRecord(**LINE)


def test_how_the_time_was_spent(files: Files) -> None:
    assert shares(read_steps(files.steps)) == pytest.approx(
        {"computing": 0.3, "to and from the ranks": 0.05, "between steps": 0.05, "nothing to do": 0.6}
    )


def test_the_steps_of_a_run(files: Files) -> None:
    steps = read_steps(files.steps)
    assert [step.step for step in steps_of_run(steps, RESULT)] == [2]
    with pytest.raises(ValueError, match="no step"):
        steps_of_run(steps, {**RESULT, "begin_time": 200.0})


def panels(steps: list[StepRecord] | None, result: dict[str, Any] | None) -> list[str]:
    figure = Figure()
    draw_timeline(steps, result, figure)
    return [axes.get_ylabel() for axes in figure.axes]


def test_what_is_drawn(files: Files) -> None:
    steps = read_steps(files.steps)
    of_steps = ["tokens computed", "duration (ms)", "sequences"]
    assert panels(steps, RESULT) == ["request", *of_steps]
    assert panels(steps, None) == of_steps
    assert panels(None, RESULT) == ["request"]
    figure = Figure()
    draw_timeline(steps[:1], None, figure)
    durations = figure.axes[1]
    assert [each.get_label() for each in durations.collections] == [
        "computing", "to and from the ranks", "between steps",
    ]  # fmt: skip
    # A step of 0.2 s, of which its ranks computed 0.15.
    assert durations.collections[1].get_paths()[0].get_extents().extents == pytest.approx([0, 150, 0.2, 200])


def test_the_files_may_come_in_any_order(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_timeline([files.result, files.steps]) == read_timeline([files.steps, files.result])
    assert read_timeline([files.steps])[1] is None
    out = tmp_path / "out.svg"
    assert main(["timeline", str(files.steps), "--out", str(out)]) == 0
    assert "<svg" in out.read_text()
    assert main(["timeline", str(files.steps), str(files.steps), "--out", str(out)]) == 1
    assert "one step log" in capsys.readouterr().err
    assert main(["curves", str(files.steps), "--out", str(out)]) == 1
    assert f"{files.steps} holds no result" in capsys.readouterr().err
    files.steps.write_text("neither\n")
    assert main(["timeline", str(files.steps), "--out", str(out)]) == 1
    assert "neither a result nor a step log" in capsys.readouterr().err
    files.steps.write_text("")
    assert main(["timeline", str(files.steps), "--out", str(out)]) == 1
    assert "holds no step" in capsys.readouterr().err
