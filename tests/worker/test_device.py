"""Choosing a device, on a machine that has none but its CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paddle
import pytest

from fdserve import ops
from fdserve.errors import StartupError
from fdserve.executor.wire import Load
from fdserve.worker.device import check_formats, free_gpu_bytes, select_device
from fdserve.worker.runner import Runner
from tests.models.checkpoints import write_checkpoint


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Make Paddle claim to have so many GPUs; returns what it is told to use."""
    used: list[str] = []
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: count)
    monkeypatch.setattr(paddle, "set_device", used.append)
    return used


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_the_cpu_is_used_where_there_is_nothing_else(asked: str) -> None:
    select_device(asked, 0)
    assert paddle.device.get_device() == "cpu"


def test_auto_takes_the_cpu_where_the_build_for_gpus_finds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    used = with_gpus(monkeypatch, 0)
    select_device("auto", 0)
    assert used == ["cpu"]


def test_a_gpu_needs_the_build_for_it() -> None:
    with pytest.raises(StartupError, match="GPU build"):
        select_device("gpu", 0)


def test_a_gpu_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    with pytest.raises(StartupError, match="finds no GPU: look"):
        select_device("gpu", 0)


@pytest.mark.parametrize("asked", ["auto", "gpu"])
def test_every_rank_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    used = with_gpus(monkeypatch, 2)
    with pytest.raises(StartupError, match="finds 2 GPUs, and a rank needs number 2"):
        select_device(asked, 2)
    with pytest.raises(StartupError, match=r"kernels/cuda/build\.py"):
        select_device(asked, 1)
    assert used == ["gpu:1"]


def test_the_kernels_must_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    used = with_gpus(monkeypatch, 1)
    with pytest.raises(StartupError, match=r"kernels/cuda/build\.py"):
        select_device("auto", 0)
    assert used == ["gpu:0"]


def test_formats_of_a_gpu() -> None:
    for quantization in ("none", "wint8", "wint4"):
        for dtype in ("bfloat16", "float16"):
            check_formats(dtype, quantization, dtype)
    for wrong in (
        ("float32", "none", "float32"),
        ("bfloat16", "w8a8", "bfloat16"),
        ("bfloat16", "none", "int8"),
        ("bfloat16", "none", "float16"),
    ):
        with pytest.raises(StartupError, match="GPU"):
            check_formats(*wrong)


def test_float16_is_for_gpus(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    load = Load(
        directory=str(tmp_path), device="cpu", rank=0, world_size=1, dtype="float16", block_size=16, num_blocks=8,
        kv_cache_bytes=0, host_cache_bytes=0, max_num_seqs=1, max_model_len=64, num_threads=1, parent=0,
    )  # fmt: skip
    with pytest.raises(StartupError, match="--dtype float16 needs a GPU"):
        Runner(load, lambda what, done, total: None)


def test_kernels_for_another_gpu_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 1)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(ops, "use_gpu", lambda: None)

    def swiglu(x: paddle.Tensor) -> None:
        raise OSError("(External) swiglu: CUDA error 209,\n no kernel image is available")

    monkeypatch.setattr(ops, "swiglu", swiglu)
    with pytest.raises(StartupError, match=r"compute capability 8.6.* CUDA error 209, no kernel image"):
        select_device("gpu", 0)


def test_the_cache_has_what_all_else_leaves() -> None:
    done: list[str] = []

    def asked() -> tuple[int, int]:
        done.append("asked")
        return 700, 1000

    cuda: Any = SimpleNamespace(empty_cache=lambda: done.append("emptied"), mem_get_info=asked)
    assert free_gpu_bytes(cuda) == 600
    assert done == ["emptied", "asked"]
    cuda.mem_get_info = lambda: (50, 1000)
    assert free_gpu_bytes(cuda) == 0
