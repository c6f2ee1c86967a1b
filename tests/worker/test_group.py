"""The process group: its variables, and its calls between real processes, by Gloo on the loopback address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import paddle
import pytest

from fdserve import ops
from fdserve.executor.executor import connected, free_port
from fdserve.executor.wire import Load
from fdserve.worker import collectives
from fdserve.worker.group import gpu_number, group_variables, interface_of, join

ROOT = Path(__file__).parents[2]


def load_of(rank: int, device: str = "auto", rendezvous: str = "127.0.0.1:4711") -> Load:
    return Load(
        directory="", device=device, rank=rank, world_size=3, dtype="auto", block_size=16, num_blocks=0,
        kv_cache_bytes=0, host_cache_bytes=0, max_num_seqs=1, max_model_len=0, num_threads=1, parent=0,
        rendezvous=rendezvous,
    )  # fmt: skip


def test_ranks_of_one_host_are_told_where_to_meet() -> None:
    variables = group_variables(load_of(2))
    assert variables["PADDLE_TRAINER_ID"] == variables["FLAGS_selected_gpus"] == "2"
    assert variables["PADDLE_TRAINERS_NUM"] == "3"
    assert variables["PADDLE_TRAINER_ENDPOINTS"].split(",") == ["127.0.0.1:4711"] * 3
    assert variables["PADDLE_MASTER"] == variables["PADDLE_CURRENT_ENDPOINT"] == "127.0.0.1:4711"


def test_a_launchers_variables_stay_and_cpus_need_none() -> None:
    assert group_variables(load_of(1, rendezvous="")) == {}
    assert group_variables(load_of(1, device="cpu")) == {}


def test_ranks_started_together_meet_at_one_place() -> None:
    with connected(load_of(0, rendezvous=""), 64) as loads:
        assert [load.rank for load in loads] == [0, 1, 2]
        assert len({load.rendezvous for load in loads}) == 1
        host, port = loads[0].rendezvous.split(":")
        assert host == "127.0.0.1"
        assert int(port) > 0


@pytest.mark.parametrize(("value", "number"), [(None, 0), ("", 0), ("3", 3), ("5,6", 5)])
def test_the_gpu_is_the_one_that_the_launcher_chose(
    monkeypatch: pytest.MonkeyPatch, value: str | None, number: int
) -> None:
    monkeypatch.delenv("FLAGS_selected_gpus", raising=False)
    if value is not None:
        monkeypatch.setenv("FLAGS_selected_gpus", value)
    assert gpu_number() == number


def test_ranks_are_connected_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[paddle.Tensor] = []
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    monkeypatch.setattr(collectives, "join", lambda backend: gathered.append)
    collectives.Collectives(load_of(1))
    assert len(gathered) == 1


def test_interfaces_are_found_by_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None


@pytest.mark.parametrize(("backend", "interface", "on_stream"), [("nccl", "=lo", True), ("gloo", "lo", False)])
def test_nccl_gathers_on_the_stream_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, backend: str, interface: str, on_stream: bool
) -> None:
    """With stand-ins for what Paddle does."""
    calls: list[dict[str, object]] = []

    def all_gather(out: paddle.Tensor, x: paddle.Tensor, **options: object) -> None:
        calls.append(options)
        out[:] = paddle.concat([x, x + 1])

    for name in ("PADDLE_DISTRI_BACKEND", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:4711")
    monkeypatch.setattr(paddle.distributed, "init_parallel_env", lambda: None)
    monkeypatch.setattr(paddle.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(paddle.distributed.stream, "all_gather", all_gather)
    gather = join(backend)
    assert os.environ["PADDLE_DISTRI_BACKEND"] == backend
    assert os.environ[f"{backend.upper()}_SOCKET_IFNAME"] == interface
    assert gather(paddle.full([3, 2], 5.0)).tolist() == [[[5, 5]] * 3, [[6, 6]] * 3]
    assert calls == [{"sync_op": True, "use_calc_stream": on_stream}]


START = """
import os, sys
from fdserve.worker.group import group_variables, join
from tests.worker.test_group import load_of
rank, port = int(sys.argv[1]), sys.argv[2]
os.environ.update(group_variables(load_of(rank, rendezvous=f"127.0.0.1:{port}")), PADDLE_TRAINERS_NUM="2")
import paddle
gather = join("gloo")
for dtype in ("bfloat16", "float16", "float32", "int64", "uint8"):
    everyone = gather(paddle.full([3, 8], rank + 1).cast(dtype))
    assert everyone.shape == [2, 3, 8] and str(everyone.dtype).endswith(dtype)
    assert everyone.cast("float32").mean([1, 2]).tolist() == [1, 2]
print("gathered", flush=True)
if rank == 1:
    sys.stdin.read()
try:
    gather(paddle.zeros([8]))
except RuntimeError:
    print("gone", flush=True)
os._exit(0)
"""


@contextmanager
def two_ranks() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that run START; none is left on leaving."""
    with ExitStack() as stack:
        port = str(free_port())
        processes = []
        for rank in "01":
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", START, rank, port],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
            )  # fmt: skip
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
            stack.enter_context(process.stdin or ExitStack())
            stack.enter_context(process.stdout or ExitStack())
            processes.append(process)
        yield processes


def until_line(process: subprocess.Popen[str], line: str) -> None:
    """Read its output up to this line."""
    assert process.stdout is not None
    assert any(each.strip() == line for each in process.stdout)


def test_what_ranks_gather_is_in_their_order_and_a_lost_one_is_told() -> None:
    with two_ranks() as (first, second):
        for process in (first, second):
            until_line(process, "gathered")
        second.send_signal(signal.SIGKILL)
        until_line(first, "gone")
