"""Requests as bytes on a connection, right and wrong: what comes back, by endpoint."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any

import pytest

from tests.http.processes import TIMEOUT, ServerProcess

BODIES = {
    "/v1/chat/completions": b'{"messages": [{"role": "user", "content": "Hi"}]}',
    "/v1/chat/completions/render": b'{"messages": [{"role": "user", "content": "Hi"}]}',
    "/v1/completions": b'{"prompt": "Hi"}',
    "/tokenize": b'{"prompt": "Hi"}',
    "/detokenize": b'{"tokens": [72, 105]}',
}
PROBES = ("/health", "/ready", "/ping", "/version", "/load", "/metrics", "/openapi.json", "/v1/models")
LIMIT = 4096


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    environ = {"FDSERVE_PORT": "0", "FDSERVE_API_KEY": "key", "FDSERVE_MAX_REQUEST_BYTES": str(LIMIT)}
    with ServerProcess("-m", "tests.http.fake_main", **environ) as process:
        process.listening()
        process.wait_line("ready")
        yield process


class Answer:
    """An answer with an id; an error in OpenAI's form, if it is one."""

    def __init__(self, response: HTTPResponse, method: str) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()
        assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", self.headers["x-request-id"])
        self.code = None
        if self.status >= 400 and method != "HEAD":
            assert self.headers["content-type"] == "application/json"
            assert list(self.error) == ["message", "type", "param", "code"]
            assert self.error["message"].endswith(".")
            self.code = self.error["code"]

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


def send(server: ServerProcess, data: bytes) -> tuple[Answer, bool]:
    """Send bytes; the answer, and whether the connection stays open after it."""
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock:
        sock.sendall(data)
        method = data.split(b" ", 1)[0].decode("latin-1")
        response = HTTPResponse(sock, method=method)
        response.begin()
        answer = Answer(response, method)
        if answer.headers.get("connection", "").lower() == "close":
            assert sock.recv(1) == b""
            return answer, False
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 200"
        return answer, True


def post(path: str, *headers: str, body: bytes | None = None, framed: bool = True) -> bytes:
    content = BODIES.get(path, b"") if body is None else body
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Authorization: Bearer key", *headers]
    if framed:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


def chunked(content: bytes) -> bytes:
    return b"%x;name=value\r\n%s\r\n0\r\nX-Trailer: 1\r\n\r\n" % (len(content), content)


@pytest.mark.parametrize("path", BODIES)
def test_bodies(server: ServerProcess, path: str) -> None:
    body = BODIES[path]
    whole = ("chunked", chunked(body), 200, None)
    for coding, content, status, code in (
        whole,
        ("Chunked", chunked(body), 200, None),
        ("gzip, chunked", chunked(body), 400, "invalid_http"),
        ("identity", body, 400, "invalid_http"),
        ("chunked", b"zz\r\n" + body, 400, "invalid_http"),
    ):
        answer, open = send(server, post(path, f"Transfer-Encoding: {coding}", body=content, framed=False))
        assert (answer.status, answer.code, open) == (status, code, status == 200), coding
    for headers, content, status, code in (
        ([], body, 200, None),
        (["X-Request-Id: mine"], body, 200, None),
        (["Content-Type: application/x-www-form-urlencoded"], body, 200, None),
        (["Content-Type: application/json; charset=utf-8"], body, 200, None),
        (["Content-Type: image/png"], body, 415, "unsupported_media_type"),
        (["Content-Encoding: gzip"], b"\x1f\x8b", 415, "unsupported_media_type"),
        ([], b"", 400, "invalid_json"),
        ([], b"{", 400, "invalid_json"),
        ([], body[:-3] + b"\xff" + body[-3:], 400, "invalid_json"),
        ([], b"[" * 4000, 400, "invalid_value"),
        ([], b'{"x": ' + b"[" * 4000, 400, "invalid_json"),
        ([], b"[]", 400, "invalid_value"),
        ([], b"{}", 400, "missing_required_parameter"),
        ([], b" " * (LIMIT + 1), 413, "request_too_large"),
        ([], body.rstrip(b"}") + b', "model": "gpt-4"}', 404, "model_not_found"),
    ):
        answer, open = send(server, post(path, *headers, body=content))
        assert (answer.status, answer.code, open) == (status, code, True), (headers, content)
        if "X-Request-Id: mine" in headers:
            assert answer.headers["x-request-id"] == "mine"


def test_a_body_framed_in_two_ways(server: ServerProcess) -> None:
    """A proxy might see another request in it: such a connection is not used again."""
    body = chunked(BODIES["/tokenize"])
    answer, open = send(server, post("/tokenize", "Transfer-Encoding: chunked", body=body))
    assert (answer.status, answer.code, open) == (400, "invalid_http", False)


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"hello\r\n\r\n", 400, "invalid_http"),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400, "invalid_http"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "invalid_http"),  # no host
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400, "invalid_http"),
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "invalid_http"),
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: a\r\n\r\n", 400, "invalid_http"),
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "invalid_http"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000, 431, "headers_too_large"),
    ],
)
def test_what_is_not_http(server: ServerProcess, data: bytes, status: int, code: str) -> None:
    answer, open = send(server, data)
    assert (answer.status, answer.code, open) == (status, code, False)


def test_empty_lines_before_a_request(server: ServerProcess) -> None:
    request = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    for lines in (b"\r\n", b"\n", b"\r\n\r\n\r\n"):
        answer, open = send(server, lines + request)
        assert (answer.status, open) == (200, True)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        for part in (b"\r\n", request, b"\r\n", b"\r\n", request):  # behind an answer, too
            sock.sendall(part)
            if part == request:
                data = b""
                while not data.endswith(b"}"):
                    data += sock.recv(65536)
                assert data.startswith(b"HTTP/1.1 200")


def test_http_1_0_is_served_and_streamed_until_the_connection_ends(server: ServerProcess) -> None:
    data = post("/v1/completions", body=b'{"prompt": "Hi", "stream": true}').replace(b" HTTP/1.1", b" HTTP/1.0")
    answer, open = send(server, data)
    assert (answer.status, open) == (200, False)
    assert "transfer-encoding" not in answer.headers
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(("encoding", "status"), [("identity", 200), ("gzip", 415), ("identity, gzip", 415)])
def test_content_encodings(server: ServerProcess, encoding: str, status: int) -> None:
    answer, open = send(server, post("/v1/completions", f"Content-Encoding: {encoding}"))
    assert (answer.status, open) == (status, True)


@pytest.mark.parametrize("path", [*PROBES, *BODIES, "/v1/requests/x/cancel"])
def test_methods(server: ServerProcess, path: str) -> None:
    posts = path in BODIES or path.endswith("cancel")
    allow = "POST, OPTIONS" if posts else "GET, HEAD, OPTIONS"
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "BREW", "OPTIONS"):
        head = f"{method} {path}?a=b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Length: 0\r\n\r\n"
        answer, open = send(server, head.encode())
        assert open
        if method == "OPTIONS":
            assert (answer.status, answer.body, answer.headers["allow"]) == (204, b"", allow)
        elif method in allow:
            assert answer.status != 405
            assert (answer.body == b"") == (method == "HEAD")
        else:
            assert (answer.status, answer.headers["allow"]) == (405, allow)
            assert answer.code == (None if method == "HEAD" else "method_not_allowed")


@pytest.mark.parametrize("path", [*PROBES, *BODIES, "/v1/requests/x/cancel"])
def test_keys(server: ServerProcess, path: str) -> None:
    method = "POST" if path in BODIES or path.endswith("cancel") else "GET"
    for header in ("", "Authorization: Bearer wrong\r\n", "Authorization: Basic key\r\n", "X-Api-Key: kez\r\n"):
        answer, _ = send(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\n{header}Content-Length: 0\r\n\r\n".encode())
        if path in PROBES[:-1]:
            assert answer.status == 200
        else:
            assert (answer.status, answer.code) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET /health HTTP/1.0", 200),
        ("GET http://example.com/health HTTP/1.1", 200),
        ("GET https://example.com HTTP/1.1", 404),
        ("OPTIONS * HTTP/1.1", 204),
        ("GET * HTTP/1.1", 405),
        ("OPTIONS /nowhere HTTP/1.1", 404),
        ("HEAD /nowhere HTTP/1.1", 404),
        ("GET /%ff%00%0a%2e%2e HTTP/1.1", 404),
        (f"GET /{'a' * 10_000} HTTP/1.1", 404),
        ("CONNECT example.com:80 HTTP/1.1", 404),
        ("POST /v1/embeddings HTTP/1.1", 404),
    ],
)
def test_targets(server: ServerProcess, line: str, status: int) -> None:
    answer, _ = send(server, f"{line}\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
    assert answer.status == status
    assert len(answer.body) < 1000


def test_requests_in_one_go(server: ServerProcess) -> None:
    requests = b"".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in ("/health", "/nowhere", "/load"))
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT) as sock:
        sock.sendall(requests)
        data = b""
        while data.count(b"HTTP/1.1 ") < 3 or not data.endswith(b"}"):
            part = sock.recv(1 << 16)
            assert part
            data += part
    assert re.findall(rb"HTTP/1.1 (\d+)", data) == [b"200", b"404", b"200"]
