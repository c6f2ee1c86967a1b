"""The application on a real server: each of hypercorn's workers, over loopback."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.http.processes import ServerProcess, body, read_until, until


@pytest.fixture(scope="module", params=["asyncio", "uvloop", "trio"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    command = ["-m", "hypercorn", "tests.http.fake_main:app", "-w", "0", "-b", "127.0.0.1:0", "-k", request.param]
    with ServerProcess(*command, FDSERVE_ENABLE_LOGPROB="1", FDSERVE_API_KEY="") as process:
        yield process.listening()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(model="null", messages=messages, logprobs=True, top_logprobs=2, n=2)
    assert [choice.message.content for choice in chat.choices] == ["Hello, world!"] * 2
    assert chat.choices[0].logprobs is not None
    assert len(chat.choices[0].logprobs.content or ()) == 13
    stream = client.chat.completions.create(
        model="null", messages=messages, stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 5}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello, world!"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 14
    completion = client.completions.create(model="default", prompt=["a", "b"])
    assert [choice.text for choice in completion.choices] == ["Hello, world!"] * 2
    assert [model.id for model in client.models.list()] == ["fake-model"]
    assert client.models.retrieve("fake-model").id == "fake-model"


def test_openais_client_on_errors(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "broken"}]
    number: Any = [{"role": "user", "content": 5}]
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="null", messages=number)
    assert bad.value.param == "messages[0].content"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=messages)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="null", messages=messages)
    text = ""
    with pytest.raises(openai.APIError, match="not a number"):  # noqa: PT012
        for chunk in client.chat.completions.create(model="null", messages=messages, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "half an ans"


@pytest.mark.parametrize("reset", [True, False])
def test_leaving_a_stream_cancels_it(server: ServerProcess, reset: bool) -> None:
    sock = server.open("endless", stream=True)
    read_until(sock, b'"text":"x')
    assert server.running() == 1
    leave(sock, reset)
    assert until(lambda: server.running() == 0) < 1.0


@pytest.mark.parametrize("reset", [True, False])
def test_leaving_before_the_answer_cancels_it(server: ServerProcess, reset: bool) -> None:
    sock = server.open("silent", n=3)
    until(lambda: server.running() == 3)
    leave(sock, reset)
    assert until(lambda: server.running() == 0) < 1.0


def leave(sock: socket.socket, reset: bool) -> None:
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    sock.close()


def test_a_client_that_does_not_read(server: ServerProcess) -> None:
    """It holds up nobody, its memory is bounded, and its request ends; what was sent before, it can still read."""
    before, tokens = server.memory(), server.prompt_tokens()
    sock = server.open("flood", stream=True, small_buffers=True, return_token_ids=True)  # for more bytes a token
    try:
        until(lambda: server.prompt_tokens() > tokens)
        while server.running():
            began = time.monotonic()
            assert server.post("Hi")[0] == 200
            assert time.monotonic() - began < 2.0
        assert server.memory() - before < 100 << 20
        data = read_until(sock, b"data: [DONE]\n\n")
        assert b'"code":"slow_reader"' in data
    finally:
        sock.close()


def test_a_client_that_never_reads_and_leaves(server: ServerProcess) -> None:
    tokens = server.prompt_tokens()
    sock = server.open("flood", stream=True, small_buffers=True, return_token_ids=True)  # for more bytes a token
    until(lambda: server.prompt_tokens() > tokens)
    time.sleep(0.2)
    sock.close()
    assert until(lambda: server.running() == 0) < 2.0


def test_a_huge_body(server: ServerProcess) -> None:
    """It is refused, and the connection goes on."""
    connection = server.connect()
    for path, status in (("/v1/completions", 413), ("/nowhere", 404), ("/health", 405)):
        connection.request("POST", path, b"x" * (17 << 20))
        response = connection.getresponse()
        assert (response.status, list(json.loads(response.read()))) == (status, ["error"])
    connection.request("POST", "/v1/completions", body("Hi"))
    assert connection.getresponse().status == 200
    connection.close()


def test_a_body_that_never_ends(server: ServerProcess) -> None:
    sock = server.open("Hi")
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    sent = 0
    try:
        while sent < 200:
            sock.sendall(chunk)
            sent += 1
    except OSError:
        pass  # it was answered, and the connection closed
    sock.close()
    assert 16 < sent < 200
    assert server.post("Hi")[0] == 200


def test_a_refused_request_with_a_body(server: ServerProcess) -> None:
    """More than fits into the queue between the server and the application, and then the connection goes on."""
    connection = server.connect()
    for content in (b"{" + b" " * 600_000, b"x", b""):
        for path in ("/v1/chat/completions", "/nowhere"):
            connection.request("POST", path, content)
            response = connection.getresponse()
            assert response.status == (404 if path == "/nowhere" else 400)
            response.read()
    connection.request("GET", "/health")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.close()


def test_head_and_options(server: ServerProcess) -> None:
    connection = server.connect()
    connection.request("HEAD", "/health")
    response = connection.getresponse()
    assert (response.status, response.read(), response.getheader("content-length")) == (200, b"", "15")
    connection.request("OPTIONS", "/v1/chat/completions")
    response = connection.getresponse()
    assert (response.status, response.read(), response.getheader("allow")) == (204, b"", "POST, OPTIONS")
    connection.close()


def test_expect_continue(server: ServerProcess) -> None:
    content = body("Hi")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\nExpect: 100-continue"
        sock.sendall(head.encode() + b"\r\n\r\n")
        assert b" 100 " in read_until(sock, b"\r\n\r\n")
        sock.sendall(content)
        assert b"Hello, world!" in read_until(sock, b"}]")


def test_many_streams(server: ServerProcess) -> None:
    socks = [server.open("steady", stream=True, n=2) for _ in range(50)]
    for sock in socks:
        assert read_until(sock, b"[DONE]\n\n").count(b'"finish_reason":"stop"') == 2
        sock.close()
    assert server.running() == 0


@pytest.mark.parametrize("worker", ["asyncio", "trio"])
def test_what_a_stop_cuts_off_is_told(worker: str) -> None:
    command = ["-m", "hypercorn", "tests.http.fake_main:app", "-w", "1", "-b", "127.0.0.1:0", "-k", worker]
    with ServerProcess(*command, "--graceful-timeout", "1") as server:
        server.listening()
        until(lambda: server.get("/health")[0] == 200)
        stream, whole = server.open("endless", stream=True), server.open("silent")
        read_until(stream, b'"text":"x')
        until(lambda: server.running() == 2)
        with socket.create_connection(("127.0.0.1", server.port), 10) as upload:
            upload.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            time.sleep(0.2)
            server.stop()
            for sock in (upload, whole):
                answer = read_until(sock, b"}}")
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b"The server is shutting down." in answer
            assert b"The server is shutting down." in read_until(stream, b"data: [DONE]\n\n")
        stream.close()
        whole.close()
        server.wait()
