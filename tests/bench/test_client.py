from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.client import Address, Client, Exchange
from bench.response import parse_response
from tests.bench.scripted import CHUNKED_HEAD, PAUSE_SECONDS, ScriptedServer, chunk, stream


def request(body: bytes = b"{}") -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body


def ask(server: ScriptedServer, count: int = 1, max_concurrency: int = 1) -> list[Exchange]:
    with Client(server.url, timeout=5) as client:
        return client.run([request(str(i).encode()) for i in range(count)], max_concurrency=max_concurrency)


def body(exchange: Exchange) -> bytes:
    assert not exchange.error
    return parse_response(b"".join(exchange.parts)).body


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_a_chunked_answer_in_pieces_of_any_size(size: int) -> None:
    whole = CHUNKED_HEAD + chunk(b"data: 0\r\n") + chunk(b"x") + b"0\r\n\r\n"
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    with ScriptedServer(pieces) as server:
        (exchange,) = ask(server)
    assert body(exchange) == b"data: 0\r\nx"
    assert exchange.times == sorted(exchange.times)
    assert exchange.sent < exchange.times[0]


@pytest.mark.parametrize("framing", [b"Content-Length: 5\r\n", b"Connection: close\r\n"])
def test_an_answer_of_known_length_or_up_to_the_close(framing: bytes) -> None:
    with ScriptedServer([b"HTTP/1.1 200 OK\r\n" + framing + b"\r\nhe", b"llo"]) as server:
        (exchange,) = ask(server)
    assert body(exchange) == b"hello"


def test_a_connection_is_used_again() -> None:
    with ScriptedServer(*[stream("{}")] * 3) as server:
        exchanges = ask(server, count=3)
        assert server.connections == 1
        assert server.requests == [b"0", b"1", b"2"]
    assert [exchange.error for exchange in exchanges] == [""] * 3


def test_a_connection_that_was_closed_while_idle_is_replaced() -> None:
    with ScriptedServer(stream("{}"), None) as server:
        exchanges = ask(server, count=2)
        assert server.connections == 2
    assert [exchange.error for exchange in exchanges] == [""] * 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, "closed before the end"),
        ([CHUNKED_HEAD + chunk(b"half")], "closed before the end"),
        ([b"SSH-2.0-x\r\n\r\n"], "does not speak HTTP"),
    ],
)
def test_a_broken_answer_is_an_error(answer: Sequence[bytes] | None, error: str) -> None:
    with ScriptedServer(answer) as server:
        (exchange,) = ask(server)
    assert error in exchange.error


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with Client(f"127.0.0.1:{port}", timeout=5) as client:
        (exchange,) = client.run([request()])
    assert exchange.error == "cannot connect: Connection refused"


def test_a_server_that_says_nothing_fails_the_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, Client(f"127.0.0.1:{sock.getsockname()[1]}", timeout=0.1) as c:
        (exchange,) = c.run([request()])
    assert exchange.error == "nothing came for 0.1 s"


def test_no_more_than_max_concurrency_at_a_time() -> None:
    with ScriptedServer(*[stream("{}", "{}")] * 12) as server:
        exchanges = ask(server, count=12, max_concurrency=3)
        assert server.connections == 3
    for exchange in exchanges:
        others = [e for e in exchanges if e.sent < exchange.sent and e.times[-1] > exchange.sent]
        assert len(others) < 3


def test_requests_are_sent_when_they_are_due() -> None:
    arrivals = [0.0, 0.05, 0.1, 0.15]
    with ScriptedServer(*[stream("{}")] * 4) as server, Client(server.url, timeout=5) as client:
        began = time.perf_counter()
        exchanges = client.run([request()] * 4, arrivals=arrivals)
    for exchange, due in zip(exchanges, arrivals, strict=True):
        assert due <= exchange.sent - began < due + 0.04
    assert exchanges[0].times[-1] - exchanges[0].sent >= 3 * PAUSE_SECONDS


def test_a_url_that_is_none() -> None:
    with pytest.raises(ValueError, match="no URL of a server"):
        Address("ftp://host")
    address = Address("https://host/v1/")
    assert (address.tls, address.port, address.path) == (True, 443, "/v1")


def test_a_server_without_tls_is_an_error() -> None:
    with ScriptedServer() as server, Client(server.url.replace("http", "https"), timeout=5) as client:
        (exchange,) = client.run([request()])
    assert exchange.error.startswith("TLS: ")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=20)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    long = stream("x" * 40_000, "{}")
    with ScriptedServer(long, long, context=context) as server:
        exchanges = ask(server, count=2)
        assert server.connections == 1
    for exchange in exchanges:
        assert body(exchange) == b"data: " + b"x" * 40_000 + b"\n\ndata: {}\n\ndata: [DONE]\n\n"
