"""Whether ranks on several hosts serve the same."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import UNIXSocketStream
from msgspec.structs import replace

from bench.random_checkpoint import DEMO
from fdserve.errors import RankError, StartupError
from fdserve.executor.cluster import Cluster, NotTrusted
from fdserve.executor.executor import _all_loaded
from fdserve.executor.fingerprint import Different, Fingerprint, differences, examine, show, take_fingerprint
from fdserve.executor.follower import Host, follow
from fdserve.executor.frames import FrameStream
from fdserve.executor.remote import accept_ranks
from fdserve.executor.wire import Loading, Ready
from tests.executor.test_cluster import SECRET, free_port

OURS = Fingerprint(
    version="1.0",
    settings={"dtype": "auto", "quantization": "none"},
    config={"hidden_size": "64", "rope_theta": "1e4", "use_bias": "false"},
    weights={"a.safetensors": (10, "x"), "b.safetensors": (20, "y")},
)


def take(directory: Path, **settings: str) -> Fingerprint:
    return take_fingerprint(
        directory, **{"dtype": "auto", "quantization": "none", "kv_cache_dtype": "auto", **settings}
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo model."""
    return Path(shutil.copytree(DEMO, tmp_path / "copy"))


def change_config(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 7.0}))


def change_weights(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read()
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


def test_copies_are_the_same(checkpoint: Path) -> None:
    assert differences(take(checkpoint), take(DEMO)) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_config, "config.json differs in rope_theta"),
        (change_weights, "model.safetensors holds other weights"),
    ],
)
def test_a_checkpoint_that_differs(checkpoint: Path, change: Callable[[Path], None], expected: str) -> None:
    change(checkpoint)
    assert differences(take(checkpoint), take(DEMO)) == [expected]


@pytest.mark.parametrize("setting", ["dtype", "quantization", "kv_cache_dtype"])
def test_a_setting_that_differs(setting: str) -> None:
    usual = take(DEMO).settings[setting]
    assert differences(take(DEMO, **{setting: "float32"}), take(DEMO)) == [f"{setting} is float32, not {usual}"]


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"config\.json"):
        take(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": "2.0"}, ["fdserve is 2.0, not 1.0"]),
        ({"settings": {"dtype": "auto"}}, ["quantization is None, not none"]),
        ({"config": {}}, ["config.json differs in hidden_size, rope_theta, use_bias"]),
        (
            {"config": dict.fromkeys("abcd", "1")},
            ["config.json differs in hidden_size, rope_theta, use_bias, a and 3 more fields"],
        ),
        ({"weights": {"a.safetensors": (10, "x")}}, ["b.safetensors is missing"]),
        ({"weights": {**OURS.weights, "c.safetensors": (1, "")}}, ["c.safetensors is one too many"]),
        (
            {"weights": {"a.safetensors": (11, "x"), "b.safetensors": (20, "z")}},
            ["a.safetensors has 11 bytes, not 10", "b.safetensors holds other weights"],
        ),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], expected: list[str]) -> None:
    assert differences(replace(OURS, **changes), OURS) == expected


async def both(theirs: Fingerprint | bytes) -> list[BaseException | None]:
    """What the rank and the server raised, that show and examine a fingerprint (or garbage)."""
    raised: list[BaseException | None] = [None, None]

    async def rank(frames: FrameStream) -> None:
        await (frames.send(theirs) if isinstance(theirs, bytes) else show(frames, theirs))

    async def run(index: int, sock: socket.socket, side: Callable[[FrameStream], Any]) -> None:
        async with await UNIXSocketStream.from_socket(sock) as stream:
            try:
                await side(FrameStream(stream, "the other"))
            except (Different, NotTrusted, anyio.EndOfStream) as error:
                raised[index] = error

    ends = socket.socketpair()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(run, 0, ends[0], rank)
            group.start_soon(run, 1, ends[1], lambda frames: examine(frames, 3, OURS))
    return raised


@pytest.mark.anyio
async def test_the_same_is_let_in() -> None:
    assert await both(OURS) == [None, None]


@pytest.mark.anyio
async def test_both_sides_are_told_what_differs() -> None:
    weights = {f"{letter}.safetensors": (1, "") for letter in "cdef"}
    rank, server = await both(replace(OURS, version="2.0", weights=weights))
    assert isinstance(rank, Different)
    assert str(rank) == str(server)
    assert str(rank) == (
        "rank 3 does not match rank 0: fdserve is 2.0, not 1.0; a.safetensors is missing; b.safetensors is missing; "
        "c.safetensors is one too many; and 3 more"
    )


@pytest.mark.anyio
async def test_what_is_no_fingerprint_is_not_trusted() -> None:
    _, server = await both(b"\x03\0\0\0abc")
    assert isinstance(server, NotTrusted)


@pytest.mark.anyio
async def test_a_rank_that_differs_ends_the_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fdserve.executor")
    place = Cluster(0, 3, 1, "127.0.0.1", free_port())
    other = replace(OURS, settings={"dtype": "float32", "quantization": "none"})
    message = "rank 2 does not match rank 0: dtype is float32, not auto"
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            follower = Cluster(2, 3, 1, place.host, place.port)
            group.start_soon(follow, follower, SECRET, other, Host(DEMO, 1, 0))
            with pytest.raises(RankError, match=message):
                await accept_ranks(place, SECRET, OURS, 8)
            while not any(record.levelname == "ERROR" for record in caplog.records):
                await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [message]


class ReadyRank:
    def __init__(self, rank: int, ready: Ready) -> None:
        self.rank, self._ready = rank, ready

    async def receive(self) -> Loading | Ready:
        return self._ready


@pytest.mark.anyio
async def test_ranks_that_come_to_other_caches_do_not_serve() -> None:
    ready = Ready(8, "bfloat16", 1000)
    ranks: list[Any] = [ReadyRank(0, ready), ReadyRank(1, ready)]
    assert await _all_loaded(ranks, lambda loading: None, 1) == ready
    ranks.append(ReadyRank(2, Ready(8, "float32", 2000)))
    with pytest.raises(RankError, match="rank 2 has a KV cache of 8 blocks in float32, and rank 0 of 8 blocks in bfl"):
        await _all_loaded(ranks, lambda loading: None, 1)
