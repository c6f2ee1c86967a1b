"""What `http.hypercorn_fixes` mends, seen from a client."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http.processes import ServerProcess, until

CLOSE_WAIT = "08"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("-m", "tests.http.fake_main", "--port", "0") as process:
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
