"""The step timeline of `bench plot`: what the engine did when, by its step log, under what the clients saw."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from fdserve.engine.step_log import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]
Array = NDArray[np.float64]


_decode_lines = msgspec.json.Decoder(StepRecord).decode_lines


def read_steps(path: Path) -> list[StepRecord]:
    """The steps of a log, without a last line that is not whole. ValueError if there is none."""
    content = path.read_bytes()
    try:
        steps = _decode_lines(content[: content.rfind(b"\n") + 1])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is neither a result nor a step log: {error}") from None
    if not steps:
        raise ValueError(f"{path} holds no step")
    return steps


def token_times(result: Result) -> list[list[float]]:
    """For each request that succeeded, when it began and its chunks came, in seconds after the run's start."""
    if "itls" not in result:
        raise ValueError("the result was saved without --save-detailed")
    fields = zip(result["start_times"], result["ttfts"], result["itls"], result["request_errors"], strict=True)
    requests = sorted((start, ttft, itls) for start, ttft, itls, error in fields if not error)
    return [[start, *accumulate(itls, initial=start + ttft)] for start, ttft, itls in requests]


def steps_of_run(steps: Sequence[StepRecord], result: Result) -> list[StepRecord]:
    """The steps during a run. ValueError if there were none: the log is of another server, or another time."""
    begin = result["begin_time"]
    during = [step for step in steps if begin <= step.ended and step.began <= begin + result["duration"]]
    if not during:
        raise ValueError("no step of the log falls into the run")
    return during


def shares(steps: Sequence[StepRecord]) -> dict[str, float]:
    """How the time from the first step to the last was spent, as parts of 1."""
    total = steps[-1].ended - steps[0].began
    computed = sum(step.computed for step in steps)
    gaps = sum(step.gap or 0.0 for step in steps[1:])
    within = sum(step.ended - step.began for step in steps)
    times = {
        "computing": computed,
        "to and from the ranks": within - computed,
        "between steps": gaps,
        "nothing to do": total - within - gaps,
    }
    return {name: time / total for name, time in times.items()}


def draw_timeline(steps: Sequence[StepRecord] | None, result: Result | None, figure: Figure) -> None:
    """Requests of the result, where there is one, above three panels of the steps, where there are some.

    A request is grey until its first token, then a tick a chunk.
    """
    panels = ([3] if result is not None else []) + ([2, 2, 1] if steps is not None else [])
    axes: list[Axes] = list(figure.subplots(len(panels), 1, sharex=True, height_ratios=panels, squeeze=False)[:, 0])
    axes[-1].set_xlabel("seconds")
    if result is not None:
        _draw_requests(token_times(result), axes[0])
    if steps is not None:
        if result is not None:
            steps = steps_of_run(steps, result)
        _draw_steps(steps, steps[0].began if result is None else result["begin_time"], axes[-3:])


def _draw_requests(times: Sequence[Sequence[float]], axes: Axes) -> None:
    for row, (start, *chunks) in enumerate(times):
        axes.barh(row, chunks[0] - start, left=start, height=0.8, color="0.8")
        axes.barh(row, chunks[-1] - chunks[0], left=chunks[0], height=0.3, color="C0", alpha=0.3)
    axes.eventplot([chunks for _, *chunks in times], lineoffsets=range(len(times)), linelengths=0.6, linewidths=0.5)
    axes.set(ylabel="request")
    axes.invert_yaxis()


def _draw_steps(steps: Sequence[StepRecord], begin: float, axes: Sequence[Axes]) -> None:
    """The tokens that each step computed, how long it and the gap before it took, and the queue."""
    tokens, durations, queue = axes

    def column(name: str) -> Array:
        return np.array([getattr(step, name) or 0 for step in steps], float)

    began, ended = column("began") - begin, column("ended") - begin
    decode, prefill = column("decode_tokens"), column("prefill_tokens")
    _bars(tokens, began, ended, 0 * decode, decode, color="C0", label="decode")
    _bars(tokens, began, ended, decode, decode + prefill, color="C1", label="prefill")
    tokens.set(ylabel="tokens computed", ylim=(0, None))

    computed, gap = 1e3 * column("computed"), column("gap")
    _bars(durations, began, ended, 0 * computed, computed, color="C2", label="computing")
    whole = 1e3 * (ended - began)
    _bars(durations, began, ended, computed, whole, color="C4", label="to and from the ranks")
    _bars(durations, began - gap, began, 0 * gap, 1e3 * gap, color="C3", label="between steps")
    durations.set(ylabel="duration (ms)", ylim=(0, None))
    spent = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares(steps).items())
    durations.set_title(f"{len(steps)} steps: {spent}", fontsize="small", loc="left")

    queue.step(ended, column("running"), where="pre", color="C0", label="running")
    queue.step(ended, column("waiting"), where="pre", color="C1", label="waiting")
    queue.set(ylabel="sequences", ylim=(0, None))
    for each in axes:
        each.grid(alpha=0.3)
        each.legend(fontsize="x-small", loc="upper right")


def _bars(axes: Axes, left: Array, right: Array, low: Array, high: Array, *, color: str, label: str) -> None:
    """Bars that touch where the next begins as one ends: one polygon, for there may be tens of thousands."""
    x = np.stack([left, left, right, right], 1).ravel()
    bottom = np.repeat(low, 4)
    top = np.stack([low, high, high, low], 1).ravel()
    axes.fill_between(x, bottom, top, color=color, label=label, linewidth=0)
