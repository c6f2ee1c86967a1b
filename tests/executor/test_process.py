"""Real rank processes over a tiny checkpoint of zeros: started, stepped, killed, orphaned."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import anyio
import pytest

from fdserve.errors import RankError
from fdserve.executor.executor import open_executor
from fdserve.executor.wire import Load, Loading, NewRow, Plan, SamplingParams
from fdserve.models.config import read_config
from fdserve.models.footprint import weight_bytes
from tests.executor.process_table import is_alive, wait_until_gone
from tests.models.checkpoints import write_checkpoint

pytestmark = pytest.mark.anyio


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path)
    return tmp_path


def make_load(directory: Path, **changes: Any) -> Load:
    values: dict[str, Any] = {"rank": 0, "world_size": 1, "block_size": 16, "num_blocks": 8, "kv_cache_bytes": 0}
    values |= {"max_num_seqs": 4, "host_cache_bytes": 0, "max_model_len": 64, "num_threads": 1, "parent": os.getpid()}
    values |= changes
    return Load(directory=str(directory), device="cpu", dtype="float32", **values)


def first_plan() -> Plan:
    params = SamplingParams(max_tokens=5, seed=0, temperature=0.0, logprobs=2)
    new = NewRow(0, array("i", [3, 4, 5]).tobytes(), 3, 0, (0,), params)
    return Plan(1, [new], [], [0], [3])


async def test_a_rank_loads_steps_and_stops(checkpoint: Path) -> None:
    seen: list[Loading] = []
    with anyio.fail_after(60):
        async with open_executor(make_load(checkpoint), seen.append) as ranks:
            (pid,) = ranks.pids
            assert ranks.ready.num_blocks == 8
            assert ranks.ready.dtype == "float32"
            await ranks.send(first_plan())
            result = await ranks.receive()
            assert result.step == 1
            # Weights of zero make all tokens equally likely: the lowest id wins.
            assert array("i", result.token_ids).tolist() == [0]
            assert array("i", result.top_ids).tolist() == [0, 1]
            assert array("f", result.logprobs)[0] == pytest.approx(-3.6888795)  # -log(40)
            await ranks.send(Plan(2, [], [], [0], [1]))
            assert len((await ranks.receive()).token_ids) == 4
    assert "weights" in {loading.what for loading in seen}
    assert not is_alive(pid)


async def test_a_killed_rank_is_noticed_in_the_middle_of_a_wait(checkpoint: Path) -> None:
    with anyio.fail_after(60):
        async with open_executor(make_load(checkpoint), lambda loading: None) as ranks:
            (pid,) = ranks.pids
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(RankError, match="killed by SIGKILL, as by a system that runs out of memory"):
                await ranks.receive()
            with pytest.raises(RankError, match="killed by SIGKILL"):
                await ranks.check()


async def test_a_rank_that_cannot_load_says_why(tmp_path: Path) -> None:
    with anyio.fail_after(60), pytest.raises(RankError, match=r"config\.json"):
        async with open_executor(make_load(tmp_path), lambda loading: None):
            pass


async def test_a_cache_that_is_too_small_is_one_sentence(checkpoint: Path) -> None:
    with anyio.fail_after(60), pytest.raises(RankError, match="--kv-cache-memory"):
        async with open_executor(make_load(checkpoint, num_blocks=0, kv_cache_bytes=4096), lambda loading: None):
            pass


async def test_a_cache_beyond_all_memory_is_one_sentence(checkpoint: Path) -> None:
    """The system would grant each of its four parts, and kill the rank once they are written."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with anyio.fail_after(60), pytest.raises(RankError, match="is more than the machine's memory of"):
        async with open_executor(make_load(checkpoint, num_blocks=memory * 3 // 2 // 8192), lambda loading: None):
            pass


async def test_weights_beyond_the_memory_are_refused_before_they_are_read(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"never looked at")
    available = weight_bytes(read_config(checkpoint), 1, "w8a8") - 1
    with anyio.fail_after(60), pytest.raises(RankError, match=r"in w8a8.* give --quantization wint4 .* or more memory"):
        async with open_executor(
            make_load(checkpoint, quantization="w8a8", host_bytes=available), lambda loading: None
        ):
            pass


async def test_weights_of_bfloat16_need_no_more_memory_in_float32(checkpoint: Path) -> None:
    available = weight_bytes(read_config(checkpoint), 1, "bfloat16") - 1
    with (
        anyio.fail_after(60),
        pytest.raises(RankError, match=r"in bfloat16.* give --quantization wint8 .* or --quantization wint4"),
    ):
        async with open_executor(make_load(checkpoint, host_bytes=available), lambda loading: None):
            pass


async def test_the_cache_takes_half_of_what_the_weights_leave(checkpoint: Path) -> None:
    weights = weight_bytes(read_config(checkpoint), 1, "bfloat16")
    block = 2 * 2 * 2 * 16 * 16 * 4  # keys and values, layers, heads, tokens, dimensions, bytes
    memory = {"num_blocks": 0, "host_cache_bytes": 20 * block, "host_bytes": weights + 10 * block}
    with anyio.fail_after(60):
        async with open_executor(make_load(checkpoint, **memory), lambda loading: None) as ranks:
            assert ranks.ready.num_blocks == 5


async def test_a_system_without_processes_to_give_is_a_lost_rank(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the engine tries again, and does not end with it."""

    def no_process(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(RankError, match="cannot be started: Resource temporarily unavailable"):
        async with open_executor(make_load(checkpoint), lambda loading: None):
            pass


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("delay", [0.0, 0.005, 0.05, 0.5])
async def test_a_start_that_is_cancelled_leaves_no_process(checkpoint: Path, ranks: int, delay: float) -> None:
    with anyio.move_on_after(delay):
        async with open_executor(make_load(checkpoint, world_size=ranks), lambda loading: None, slot_bytes=1 << 16):
            await anyio.sleep(60)
    assert rank_pids() == []


def rank_pids() -> list[int]:
    """This process's rank processes, zombies included."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    names = {pid: Path(f"/proc/{pid}/stat").read_text() for pid in children}
    return [int(pid) for pid, stat in names.items() if "python" in stat]


ORPHAN = """
import sys, anyio, os
from fdserve.executor.executor import open_executor
from tests.executor.test_process import make_load
from pathlib import Path

async def main():
    async with open_executor(make_load(Path(sys.argv[1])), lambda loading: None) as ranks:
        print(ranks.pids[0], flush=True)
        await anyio.sleep(60)

anyio.run(main)
"""


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_rank_does_not_outlive_the_api_process(checkpoint: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(checkpoint)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        started = time.monotonic()
        parent.kill()
        await wait_until_gone(pid)
        assert time.monotonic() - started < 2
