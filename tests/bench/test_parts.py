"""The benchmarks of parts: a smoke run of each, and what can be known of their figures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from bench import (
    collectives,
    kernel_attention,
    kernel_linear,
    kernel_moe,
    kernel_pack,
    kernel_rows,
    kernel_step,
    kernels,
)
from bench.__main__ import main
from bench.floors import Case, Floors
from bench.frontend import Measurement, summary
from bench.machine import fastest, memory_reads, read_bandwidth
from bench.onednn import OneDNN, Unavailable
from bench.scheduler import Loaded, measure
from fdserve import ops
from fdserve.ops.library import force_isa
from fdserve.ops.weights import FORMATS

FLOORS = Floors(bandwidth=1e10, onednn=None, peak=1e12, budget=0.001)


def test_calls_take_turns() -> None:
    calls: list[str] = []
    times = fastest({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, budget=0.001)
    assert "".join(calls).startswith("ababab")
    assert all(0 < time < 0.01 for time in times.values())


def test_memory_is_read_at_a_plausible_rate() -> None:
    assert 1e9 < read_bandwidth(2, budget=0.02) < 1e13


def test_onednn_multiplies() -> None:
    try:
        onednn = OneDNN(1)
    except Unavailable as error:
        pytest.skip(str(error))
    rows, k, n = 3, 64, 48
    with onednn.linear(rows, k, n, "float32", 2) as calls:
        assert len(calls) == 2
        for call in calls:
            call()
    with onednn.linear(rows, k, n, "int8", 1) as calls:
        calls[0]()


@pytest.mark.parametrize("name", FORMATS)
def test_linear_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_linear.SHAPES, "small", (64, 128))
    monkeypatch.setattr(kernel_linear, "CACHE_BYTES", 1 << 16)
    one, many = kernel_linear.linear_cases(FLOORS, names=[name], shapes=["small"], rows=[1, 8])
    assert (one.kernel, one.case) == (f"linear {name}", "small 64 -> 128, 1 rows")
    assert one.rate == pytest.approx(2 * 64 * 128 / one.seconds / 1e9)
    # The wider formats' bytes are the weights'; with quantized ones come scales.
    width = {"float32": 4, "bfloat16": 2, "wint8": 1.0625, "wint4": 0.5625, "w8a8": 1.0625}[name]
    assert one.of_memory == pytest.approx(64 * 128 * width / one.seconds / 1e10, rel=0.1)
    assert many.of_onednn is None


def test_attention_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_attention, "CACHE_BYTES", 1 << 20)
    dtype = ops.compute_dtype()
    cases = kernel_attention.attention_cases(FLOORS, dtypes=[dtype], decodes=[(2, 128)], prefills=[(16, 64)])
    decode, of_bytes, prefill, _ = cases
    for case, kv_dtype in ((decode, dtype), (of_bytes, "int8")):
        moved = 2 * 129 * ops.kv_bytes_per_token(2, 128, kv_dtype)
        assert case.of_memory == pytest.approx(moved / case.seconds / 1e10)
    assert prefill.of_onednn == pytest.approx(4 * 16 * 128 * (16 * 64 + 16 * 17 / 2) / prefill.seconds / 1e12)


def test_cost_of_experts_follows_those_touched() -> None:
    names = ["float32", "wint4"]
    few, many, nibbles, _ = kernel_moe.moe_cases(FLOORS, names=names, rows=[2, 12], hidden=64, inner=32)
    assert (few.case, many.case) == ("2 rows, 12 of 64 experts", "12 rows, 64 of 64 experts")
    assert few.of_memory == pytest.approx(12 * 3 * 64 * 32 * 4 / few.seconds / 1e10)
    assert nibbles.of_memory == pytest.approx(12 * 3 * 64 * 32 * (1 / 2 + 2 / 128) / nibbles.seconds / 1e10)
    assert kernel_moe.routes(2, 16, 3) == [[0, 1, 2], [3, 4, 5]]


def test_cases_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_rows, "CACHE_BYTES", 1 << 20)
    monkeypatch.setattr(kernel_rows, "VOCAB", 2048)
    samplers = list(kernel_rows.sampler_cases(FLOORS, rows=2))
    assert len(samplers) == 2 * len(kernel_rows.SAMPLERS)
    elements = list(kernel_rows.element_cases(FLOORS, dtype="float32", rows=[1, 4]))
    assert {case.kernel for case in elements} == {
        f"{name} float32" for name in ("rms_norm", "add_rms_norm", "swiglu", "embedding")
    }
    assert all(case.of_memory is not None and case.of_memory > 0 for case in samplers + elements)
    assert "-" in str(Case("k", "c", 1e-6, 1.0, "GB/s"))


def test_cases_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CACHE_BYTES": 1 << 16, "HIDDEN": 64, "WIDTH": 128}.items():
        monkeypatch.setattr(kernel_pack, name, value)
    cases = list(kernel_pack.pack_cases(FLOORS, names=["wint4", "w8a8"]))
    assert [(case.kernel, case.case) for case in cases] == [
        (f"pack {name}", shape) for shape in ("[N, K]", "[K, N]") for name in ("wint4", "w8a8")
    ]
    assert all(case.of_memory == pytest.approx(2 * 64 * 128 / case.seconds / 1e10) for case in cases)


def test_a_step_beside_its_weights() -> None:
    names = [ops.compute_dtype(), "w8a8"]
    cases = list(kernel_step.step_cases(names=names, rows=[1, 3], shape="tiny", budget=0.001))
    assert [case.kernel for case in cases[::2]] == [f"step {name}" for name in names for _ in range(2)]
    for step, products in zip(cases[::2], cases[1::2], strict=True):
        assert step.of_memory is not None
        assert products.of_memory is not None
        assert products.rate == pytest.approx(100 * step.of_memory / products.of_memory)
    assert cases[2].rate == pytest.approx(3 / cases[2].seconds)


def test_a_step_of_experts_reads_those_that_rows_go_to(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def reads(threads: int, size: int) -> Any:
        sizes.append(size)
        return memory_reads(threads, 4096)

    monkeypatch.setattr(kernel_step, "memory_reads", reads)
    name = ops.compute_dtype()
    (case,) = kernel_step.step_cases(names=[name], rows=[2], shape="moe-small", budget=0.001)
    assert case.kernel == f"step {name}"
    attention, dense, experts = 768 * (10 * 128 + 768), 3 * 768 * 2304, 3 * 768 * 384
    matrices = 103424 * 768 + 8 * attention + dense + 7 * (4 + 2) * experts
    assert sizes == [matrices * 2]  # weights of bfloat16 stay so in float32


def test_the_kernels_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads, path = ops.num_threads(), tmp_path / "kernels.json"
    try:
        arguments = ["kernels", "linear", "--shapes", "o", "--rows", "1", "--formats", "float32", "--budget", "0.01"]
        assert main([*arguments, "--threads", "1", "--json", str(path)]) == 0
    finally:
        ops.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "reading memory: " in shown
    assert "oneDNN" in shown
    (case, *_) = json.loads(path.read_text())["cases"]
    assert case["case"] == "o 2048 -> 1024, 1 rows"
    with pytest.raises(SystemExit):
        main(["kernels", "fly"])


def test_kernels_of_another_processor(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        arguments = ["kernels", "linear", "--shapes", "o", "--rows", "1", "--formats", "bfloat16", "--budget", "0.01"]
        assert main([*arguments, "--isa", "baseline"]) == 0
        assert ops.compute_dtype() == "float32"
    finally:
        force_isa(None)
    assert "linear bfloat16" in capsys.readouterr().out


def test_kernels_of_a_better_processor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(isa: str) -> None:
        raise ValueError(f"this CPU has no {isa}")

    monkeypatch.setattr(kernels, "force_isa", refuse)
    with pytest.raises(SystemExit):
        main(["kernels", "linear", "--isa", "amx"])
    assert "this CPU has no amx" in capsys.readouterr().err


def test_the_collectives_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert collectives.main(["--rows", "1", "3", "--vocab", "4096", "--turns", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sum("µs" in line for line in lines) == len(collectives.SHAPES)
    timed = [line.split("|")[1:-1] for line in lines if " ms " in line]
    assert len(timed) == 2 * len(collectives.SAMPLERS)
    assert all(float(ratio) > 0 for *_, ratio in timed)


def test_the_scheduler_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "scheduler.json"
    arguments = ["--running", "8", "--waiting", "0", "30", "--context", "70", "--steps", "70", "--json", str(path)]
    assert main(["scheduler", *arguments]) == 0
    assert "assemble the batch" in capsys.readouterr().out
    assert {part["waiting"] for part in json.loads(path.read_text())["parts"]} == {0, 30}


def test_what_the_scheduler_is_measured_with() -> None:
    parts = measure(4, 10, 100, 20)
    assert all(part.floor > 0 and 0 < part.seconds <= part.p99 for part in parts)
    loaded = Loaded(4, 10, 100, random.Random(0))
    tokens = loaded.rows.num_tokens.copy()
    loaded.step()
    assert (loaded.rows.num_tokens == tokens + 1).all()
    assert (len(loaded.scheduler.running), loaded.scheduler.num_waiting) == (4, 10)


def test_the_startup_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "startup.json"
    assert main(["startup", "--runs", "1", "--json", str(path), "--", "--kv-cache-memory", "64M"]) == 0
    assert "ready / floor" in capsys.readouterr().out
    (start,) = json.loads(path.read_text())["starts"]
    phases = list(start["phases"].values())
    assert len(phases) == 5
    assert phases == sorted(phases)
    assert start["memory"]["rank 0 resident"] > 1e8


def test_a_server_that_does_not_start(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["startup", "--runs", "1", "--model", str(tmp_path)]) == 1
    assert "ended with status 1" in capsys.readouterr().err


def test_the_frontend_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "frontend.json"
    arguments = ["--streams", "8", "--tokens", "16", "--rounds", "2", "--runs", "1", "--json", str(path)]
    assert main(["frontend", *arguments]) == 0
    assert "of hypercorn's speed" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert [0 < cost < 10_000 for cost in found["without_sockets"]["8"]] == [True] * 3
    runs = {run["server"]: run for run in found["runs"]}
    assert set(runs) == {"fdserve", "fdserve, free", "hypercorn"}
    assert runs["fdserve"]["tokens_per_chunk"] == pytest.approx(runs["hypercorn"]["tokens_per_chunk"], rel=0.2)


def test_the_frontends_ratios() -> None:
    def run(server: str, rate: float, cost: float) -> Measurement:
        return Measurement(server, 8, rate, 1.0, 1.0, cost, 10.0)

    runs = [run("fdserve", 50.0, 20.0), run("fdserve, free", 100.0, 10.0), run("hypercorn", 200.0, 5.0)]
    *_, ratios, client = summary(runs)
    assert "fdserve at 25% of hypercorn's speed; by processor time a token 25%" in ratios
    assert "its ceiling is 100000 a second" in client
