"""The whole server over the demo model, on every way to run it, through the openai client."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import openai
import pytest

from tests.e2e.asking import chat, check_that_a_stream_adds_up
from tests.http.processes import ServerProcess, read_until, until

SETTINGS = {"FDSERVE_ENABLE_LOGPROB": "1", "FDSERVE_KV_CACHE_MEMORY": "64M", "FDSERVE_MAX_MODEL_LEN": "1024"}
# Plain hypercorn keeps its one worker in a process of its own.
COMMANDS = {
    "fdserve": ["fdserve", "--port", "0"],
    "hypercorn": ["hypercorn", "fdserve.app:app", "-b", "127.0.0.1:0"],
    "hypercorn uvloop": ["hypercorn", "fdserve.app:app", "-b", "127.0.0.1:0", "-k", "uvloop", "-w", "0"],
    "hypercorn trio": ["hypercorn", "fdserve.app:app", "-b", "127.0.0.1:0", "-k", "trio", "-w", "0"],
}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, ServerProcess]]:
    """All of them, started together: a start keeps one core busy."""
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(ServerProcess("-m", *command, **SETTINGS)) for name, command in COMMANDS.items()
        }
        yield servers
        for server in servers.values():
            server.stop()  # by a signal: hypercorn's workers would outlive a killed parent
        for server in servers.values():
            server.wait()


@pytest.fixture(scope="module", params=list(COMMANDS))
def server(request: pytest.FixtureRequest, servers: dict[str, ServerProcess]) -> ServerProcess:
    server = servers[request.param].listening()
    assert server.get("/health")[0] in (200, 503)
    until(lambda: server.get("/health")[0] == 200)
    return server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="null", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 5, "n": 3},
        {"temperature": 0, "logprobs": True, "top_logprobs": 3},
    ],
)
def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    check_that_a_stream_adds_up(client, **fields)


def test_a_client_that_leaves_frees_its_blocks(server: ServerProcess) -> None:
    sock = server.open("Once upon a time", stream=True, max_tokens=900, ignore_eos=True)
    read_until(sock, b'"text"')
    assert metric(server, "kv_blocks_used") > 0
    sock.close()
    assert until(lambda: metric(server, "kv_blocks_used") == 0) < 1.0


@pytest.mark.parametrize("half_closed", [False, True])
def test_clients_that_leave_at_any_moment_leave_nothing_behind(server: ServerProcess, half_closed: bool) -> None:
    restarts = metric(server, "rank_restarts_total")
    random = Random(5)

    def come_and_go(_: int) -> None:
        sock = server.open("a", stream=True, max_tokens=60)
        if half_closed:
            sock.shutdown(socket.SHUT_WR)
        time.sleep(0.006 * random.random())
        sock.close()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(400)))
    until(lambda: metric(server, "kv_blocks_used") == 0)
    assert metric(server, "rank_restarts_total") == restarts
    assert server.post("Chunked prefill is", max_tokens=3)[0] == 200


def test_many_clients_at_once_get_what_they_get_alone(server: ServerProcess) -> None:
    questions = [f"What is {a} + {3 * a + 7}?" for a in range(10, 30)]

    def answer(question: str) -> str:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="null") as client:
            return str(chat(client, question, temperature=0).choices[0].message.content)

    alone = [answer(question) for question in questions[:4]]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(answer, questions))
    assert together[:4] == alone
    assert sum(str(4 * a + 7) in text for a, text in zip(range(10, 30), together, strict=True)) >= 18
    until(lambda: metric(server, "kv_blocks_used") == 0)


def metric(server: ServerProcess, name: str) -> int:
    match = re.search(rf"^fdserve_{name} (\d+)", server.get("/metrics")[1].decode(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def test_a_killed_rank_costs_what_ran_and_nothing_else() -> None:
    with ServerProcess("-m", "fdserve", "--port", "0", **SETTINGS) as server:
        server.listening()
        server.wait_line("^ready")
        sock = server.open("Once upon a time", stream=True, max_tokens=900, ignore_eos=True)
        read_until(sock, b'"text"')
        os.kill(rank_of(server), signal.SIGKILL)
        rest = read_until(sock, b"[DONE]")
        error = json.loads(re.findall(rb"data: (\{\"error.*)", rest)[0])["error"]
        assert "SIGKILL" in error["message"]
        assert b"Traceback" not in rest
        status, body = server.get("/health")
        assert status == 503
        assert b"SIGKILL" in body
        assert until(lambda: server.get("/health")[0] == 200) < 15
        assert server.post("Chunked prefill is", max_tokens=5)[0] == 200


def test_nothing_is_left_when_the_server_is_killed() -> None:
    with ServerProcess("-m", "fdserve", "--port", "0", **SETTINGS) as server:
        server.listening()
        server.wait_line("^ready")
        rank = rank_of(server)
        server.stop(signal.SIGKILL)
        server.wait()
        deadline = time.monotonic() + 5
        while os.path.exists(f"/proc/{rank}") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not os.path.exists(f"/proc/{rank}")


def rank_of(server: ServerProcess) -> int:
    children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    with open(children) as file:
        (rank,) = file.read().split()
    return int(rank)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/directory"], "/no/such/directory"),
        (["--max-model-len", "100000"], "--max-model-len 100000"),
        (["--kv-cache-memory", "1K"], "--kv-cache-memory"),
        (["--tensor-parallel-size", "3"], "--tensor-parallel-size 3"),
        (["--max-model-length", "5"], "--max-model-len"),
        (["--block-size", "24"], "block_size"),
        (["--reasoning-parser", "nope"], "nope"),
    ],
)
def test_a_start_that_cannot_work_ends_in_seconds_with_the_reason(arguments: list[str], words: str) -> None:
    started = time.monotonic()
    with ServerProcess("-m", "fdserve", "--port", "0", *arguments) as server:
        assert server.wait() == 1
    output = "".join(server.output)
    assert words in output
    assert "Traceback" not in output
    assert time.monotonic() - started < 10
