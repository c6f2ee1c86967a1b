"""What `http.hypercorn_fixes` mends, seen from a client."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import hypercorn.config
import hypercorn.trio.worker_context
import pytest
import trio
import trio.testing
from hypercorn.events import Closed, RawData

from fdserve.http.hypercorn_fixes import PromptServer
from tests.http.processes import ServerProcess, body, read_until, until

CLOSE_WAIT = "08"


HYPERCORN = ("-m", "hypercorn", "tests.http.fake_main:app", "-b", "127.0.0.1:0", "-k", "trio", "-w", "0")


@pytest.fixture(scope="module", params=[("-m", "tests.http.fake_main", "--port", "0"), HYPERCORN], ids=["own", "plain"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with ServerProcess(*request.param) as process:
        yield process.listening()


def half_open(port: int) -> int:
    """Connections on `port` that the client has closed and the server has not."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(local.endswith(f":{port:04X}") and state == CLOSE_WAIT for _, local, _, state, *_ in lines)


def test_a_connection_closed_before_any_request_is_let_go(server: ServerProcess) -> None:
    for _ in range(100):
        socket.create_connection(("127.0.0.1", server.port)).close()
    assert until(lambda: half_open(server.port) == 0, 5) < 2


def test_a_connection_closed_after_its_answer_is_let_go(server: ServerProcess) -> None:
    for _ in range(100):
        assert server.get("/health")[0] == 200
    assert until(lambda: half_open(server.port) == 0, 5) < 2


def test_a_connection_closed_during_an_answer_is_let_go(server: ServerProcess) -> None:
    for index in range(60):
        sock = server.open("endless", stream=True)
        time.sleep(0.001 * (index % 5))
        if index % 2:
            sock.shutdown(socket.SHUT_WR)
        sock.close()
    assert until(lambda: half_open(server.port) == 0, 5) < 2
    assert until(lambda: server.running() == 0, 5) < 2


def test_a_client_that_closes_its_side_behind_its_request_counts_as_gone(server: ServerProcess) -> None:
    with server.open("silent") as sock:
        until(lambda: server.running() == 1, 5)
        sock.shutdown(socket.SHUT_WR)
        assert until(lambda: server.running() == 0, 5) < 2
        assert sock.recv(1) == b""


def test_a_client_that_leaves_behind_more_than_its_request_ends_it(server: ServerProcess) -> None:
    for more in (b"\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        sock = server.open("endless")
        sock.sendall(more)
        until(lambda: server.running() == 1, 5)
        sock.close()
        assert until(lambda: server.running() == 0, 5) < 2
    assert until(lambda: half_open(server.port) == 0, 5) < 2


def test_requests_behind_one_that_takes_long_are_answered(server: ServerProcess) -> None:
    with server.open("slow", stream=True) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
        data = b""
        while data.count(b'"ok"') < 2:  # they may come in one piece
            data += read_until(sock, b"}")
        assert data.count(b"HTTP/1.1 200") == 3
        assert data.index(b"[DONE]") < data.index(b'"ok"')


def test_requests_behind_others_over_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with ServerProcess(*HYPERCORN, "-b", f"unix:{path}") as server:
        server.wait_line("unix:")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(path)
            content = body("slow")
            request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content
            sock.sendall(request + b"GET /load HTTP/1.1\r\nHost: x\r\n\r\n" + request)
            data = read_until(sock, b'"server_load":0')
            assert data.count(b"HTTP/1.1 200") == 2
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(10)
            other.connect(path)

            def load() -> bytes:
                other.sendall(b"GET /load HTTP/1.1\r\nHost: x\r\n\r\n")
                return read_until(other, b"}")

            # The second one is not finished for a client that has left.
            assert until(lambda: b'"server_load":0' in load(), 5) < 1.5


def test_what_a_connection_fails_on_ends_it_alone(server: ServerProcess) -> None:
    for path in ("/\u00ff", "/health"):
        client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        client.initiate_connection()
        headers = [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "x")]
        client.send_headers(1, headers, end_stream=True)
        with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
            sock.sendall(client.data_to_send())
            assert sock.recv(1 << 16)
            if path != "/health":
                assert until(lambda: sock.recv(1 << 16) == b"", 5) < 2
    assert server.process.poll() is None


async def connection() -> tuple[PromptServer, trio.SocketStream]:
    """A server's side of a connection, and the client's."""
    ours, theirs = trio.socket.socketpair()
    context = hypercorn.trio.worker_context.WorkerContext(None)
    app: Any = None
    stream: Any = trio.SocketStream(ours)  # hypercorn's annotation knows TLS alone
    return PromptServer(app, hypercorn.config.Config(), context, {}, stream), trio.SocketStream(theirs)


@pytest.mark.parametrize("command", [("-m", "tests.http.fake_main", "--port", "0"), HYPERCORN], ids=["own", "plain"])
def test_connections_that_cannot_be_accepted_are_one_line_of_the_log(command: tuple[str, ...]) -> None:
    program = [sys.executable, *command]
    few_files = "import os, resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40));"
    with ServerProcess("-c", f"{few_files} os.execv({program[0]!r}, {program!r})") as server:
        server.listening()
        socks = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
        server.wait_line("accept returned EMFILE")
        time.sleep(1.0)  # trio tries ten times
        for sock in socks:
            sock.close()
        until(lambda: half_open(server.port) == 0)
        assert server.get("/health")[0] == 200
        server.stop()
        server.wait()
        output = "".join(server.output)
        assert output.count("accept returned EMFILE") == 1
        assert "Traceback" not in output


def test_sending_lets_no_other_task_run() -> None:
    async def main() -> None:
        server, client = await connection()
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_turns)
            await trio.lowlevel.checkpoint()
            before = turns
            for index in range(100):
                await server.protocol_send(RawData(b"%02d" % index))
            assert turns == before
            nursery.cancel_scope.cancel()
        assert await client.receive_some(1000) == b"".join(b"%02d" % index for index in range(100))

    trio.run(main)


def test_what_does_not_fit_waits_for_the_reader_and_keeps_its_order() -> None:
    data = [bytes([index]) * 300_000 for index in range(8)]

    async def main() -> None:
        server, client = await connection()
        received = b""
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for part in data:
                    nursery.start_soon(server.protocol_send, RawData(part))
                    await trio.testing.wait_all_tasks_blocked()
                assert nursery.child_tasks  # some wait
                while len(received) < sum(map(len, data)):
                    received += await client.receive_some(1 << 16)
        assert received == b"".join(data)

    trio.run(main)


def test_sending_to_a_client_that_is_gone() -> None:
    async def main() -> None:
        server, client = await connection()
        closed: list[object] = []

        class Protocol:
            async def handle(self, event: object) -> None:
                closed.append(event)

        server.protocol = Protocol()  # type: ignore[assignment]
        await client.aclose()
        for _ in range(3):
            await server.protocol_send(RawData(b"data"))
        await server.stream.aclose()
        await server.protocol_send(RawData(b"data"))
        assert [type(event) for event in closed] == [Closed] * 4

    trio.run(main)


def test_sending_while_the_connection_is_closed() -> None:
    """Hypercorn finds the client gone while the application answers; trio lets either go first."""

    async def main() -> None:
        for _ in range(100):
            server, client = await connection()
            server.protocol = Ignoring()  # type: ignore[assignment]
            await client.aclose()
            async with trio.open_nursery() as nursery:
                for event in (Closed(), RawData(b"data"), RawData(b"data"), Closed()):
                    nursery.start_soon(server.protocol_send, event)
            assert not server.send_lock.locked()
            assert server.stream.socket.fileno() == -1

    trio.run(main)


def test_closing_does_not_wait_for_a_reader() -> None:
    async def main() -> None:
        server, _client = await connection()
        server.protocol = Ignoring()  # type: ignore[assignment]
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.protocol_send, RawData(b"x" * 10_000_000))
                await trio.testing.wait_all_tasks_blocked()
                await server.protocol_send(Closed())
        assert not server.send_lock.locked()

    trio.run(main)


class Ignoring:
    """A protocol that is told of what happens."""

    async def handle(self, event: object) -> None:
        pass
