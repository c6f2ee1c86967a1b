"""What ranks on several hosts know each other by."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream, UNIXSocketStream

from fdserve.errors import RankError, StartupError
from fdserve.executor.cluster import Cluster, NotTrusted, check_secret, greet, read_cluster, welcome
from fdserve.executor.fingerprint import Fingerprint, show
from fdserve.executor.frames import FrameStream
from fdserve.executor.remote import accept_ranks

SECRET = "a secret of this cluster"
SAME = Fingerprint("1", {}, {}, {})
LAUNCHED = {
    "PADDLE_TRAINERS_NUM": "4",
    "PADDLE_TRAINER_ID": "3",
    "PADDLE_LOCAL_SIZE": "2",
    "PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:40001,10.0.0.1:40002,10.0.0.2:40001,10.0.0.2:40002",
}


def test_the_place_is_read_from_the_launchers_variables() -> None:
    assert read_cluster(LAUNCHED) == Cluster(3, 4, 2, "10.0.0.1", 40001)
    assert read_cluster({}) is None
    assert read_cluster({"PADDLE_TRAINERS_NUM": "1"}) is None


@pytest.mark.parametrize("changes", [{"PADDLE_TRAINER_ID": "x"}, {"PADDLE_TRAINER_ENDPOINTS": "somewhere"}])
def test_variables_that_cannot_be_read(changes: dict[str, str]) -> None:
    with pytest.raises(StartupError, match="PADDLE_TRAINER"):
        read_cluster(LAUNCHED | changes)


def test_variables_that_are_missing() -> None:
    with pytest.raises(StartupError, match="PADDLE_TRAINER_ENDPOINTS is not set"):
        read_cluster({"PADDLE_TRAINERS_NUM": "2", "PADDLE_TRAINER_ID": "0"})


def test_a_short_secret_is_refused() -> None:
    check_secret(SECRET)
    with pytest.raises(StartupError, match="FDSERVE_CLUSTER_SECRET"):
        check_secret("short")


async def both(rank_side: Callable[[Any], Any], server_side: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What either side returned, or the exception it raised."""
    results: dict[str, Any] = {}

    async def run(name: str, sock: socket.socket, side: Callable[[Any], Any]) -> None:
        async with await UNIXSocketStream.from_socket(sock) as stream:
            try:
                results[name] = await side(stream)
            except (NotTrusted, anyio.EndOfStream, anyio.BrokenResourceError) as error:
                results[name] = error

    ours, theirs = socket.socketpair()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(run, "rank", ours, rank_side)
            group.start_soon(run, "server", theirs, server_side)
    return results["rank"], results["server"]


@pytest.mark.anyio
async def test_both_sides_know_the_secret() -> None:
    rank, server = await both(lambda s: greet(s, SECRET, 2), lambda s: welcome(s, SECRET, 4))
    assert rank is None
    assert server == 2


@pytest.mark.anyio
async def test_neither_trusts_one_with_another_secret() -> None:
    rank, server = await both(lambda s: greet(s, SECRET + "!", 2), lambda s: welcome(s, SECRET, 4))
    assert isinstance(rank, NotTrusted)
    assert isinstance(server, anyio.EndOfStream)

    async def insist(stream: Any) -> None:
        await stream.send(struct.pack("<8sI32s", b"fdserve1", 2, bytes(32)))
        await stream.receive(64)
        await stream.send(bytes(32))

    _, server = await both(insist, lambda s: welcome(s, SECRET, 4))
    assert isinstance(server, NotTrusted)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "hello", [b"GET / HTTP/1.1\r\n" + b"x" * 40, struct.pack("<8sI32s", b"fdserve1", 4, bytes(32))]
)
async def test_what_is_no_rank_is_refused(hello: bytes) -> None:
    _, server = await both(lambda s: s.send(hello), lambda s: welcome(s, SECRET, 4))
    assert isinstance(server, NotTrusted)


@pytest.mark.anyio
async def test_all_ranks_are_waited_for_whatever_else_connects() -> None:
    cluster = Cluster(0, 3, 1, "127.0.0.1", free_port())
    streams: list[SocketStream] = []

    async def come(rank: int, secret: str) -> None:
        stream = await connect(cluster)
        try:
            await greet(stream, secret, rank)
            await show(FrameStream(stream, "the server"), SAME)
            streams.append(stream)
        except (NotTrusted, anyio.EndOfStream):
            await stream.aclose()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(come, 2, SECRET)
            group.start_soon(come, 1, "another secret, as long")
            group.start_soon(come, 1, SECRET)
            ranks = await accept_ranks(cluster, SECRET, SAME, 10)
    assert [rank.rank for rank in ranks] == [1, 2]
    for stream in streams:
        await stream.aclose()
    with anyio.fail_after(5):
        assert "connection to rank 1" in str(await ranks[0].failure())
    for rank in ranks:
        with pytest.raises(RankError, match="is lost"):
            rank.check()
        await rank.stop()


@pytest.mark.anyio
async def test_connections_that_are_reset_at_once_change_nothing() -> None:
    cluster = Cluster(0, 2, 1, "127.0.0.1", free_port())

    async def knock() -> None:
        await (await connect(cluster)).aclose()
        for _ in range(20):
            with socket.create_connection((cluster.host, cluster.port)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with anyio.create_task_group() as group:
        group.start_soon(knock)
        with pytest.raises(RankError, match="these did not come: 1"):
            await accept_ranks(cluster, SECRET, SAME, 0.3)


@pytest.mark.anyio
async def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(RankError, match="these did not come: 1, 2"):
        await accept_ranks(Cluster(0, 3, 1, "127.0.0.1", free_port()), SECRET, SAME, 0.1)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def connect(cluster: Cluster) -> SocketStream:
    with anyio.fail_after(5):
        while True:
            try:
                return await anyio.connect_tcp(cluster.host, cluster.port)
            except OSError:
                await anyio.sleep(0.01)
