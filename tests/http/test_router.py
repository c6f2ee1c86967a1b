from __future__ import annotations

import pytest

from fdserve.errors import MethodNotAllowed, NotFound
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.http.router import Route, Router
from tests.http.client import serving


async def handler(request: Request, reply: Reply) -> None:
    raise AssertionError("not called")


ROUTES = [
    Route("GET", "/things", handler),
    Route("POST", "/things", handler),
    Route("GET", "/things/", handler),
    Route("POST", "/run", handler, counted=True),
]


def test_match() -> None:
    router = Router(ROUTES)
    assert router.match("GET", "/things") is ROUTES[0]
    assert router.match("HEAD", "/things") is ROUTES[0]
    assert router.match("POST", "/things") is ROUTES[1]
    assert router.match("GET", "/things/a/b") is ROUTES[2]
    assert router.match("POST", "/run") is ROUTES[3]


@pytest.mark.parametrize("path", ["", "/", "/thing", "/things2", "/run/", "//things", "/Things"])
def test_unknown_paths(path: str) -> None:
    with pytest.raises(NotFound):
        Router(ROUTES).match("GET", path)


def test_the_prefix_by_itself_is_no_path_below_it() -> None:
    router = Router([Route("GET", "/things/", handler)])
    assert router.match("GET", "/things/x").path == "/things/"
    with pytest.raises(NotFound):
        router.match("GET", "/things")


def test_methods() -> None:
    with pytest.raises(MethodNotAllowed) as error:
        Router(ROUTES).match("PUT", "/things")
    assert error.value.allow == "GET, HEAD, POST, OPTIONS"


@pytest.mark.anyio
async def test_over_http() -> None:
    async with serving() as client:
        unknown = await client.get("/v1/nothing")
        assert (unknown.status, unknown.error["code"]) == (404, "unknown_url")
        assert unknown.error["type"] == "invalid_request_error"
        wrong = await client.get("/v1/chat/completions")
        assert (wrong.status, wrong.error["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST, OPTIONS"
        options = await client.request("OPTIONS", "/health")
        assert (options.status, options.body, options.headers["allow"]) == (204, b"", "GET, HEAD, OPTIONS")
        assert "content-length" not in options.headers
        assert (await client.request("HEAD", "/health")).status == 200


@pytest.mark.anyio
async def test_websockets_are_turned_away() -> None:
    sent = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, str]) -> None:
        sent.append(message)

    async with serving() as client:
        await client.app({"type": "websocket"}, receive, send)
    assert sent == [{"type": "websocket.close"}]
