from __future__ import annotations

import time

import pytest

from fdserve.errors import MethodNotAllowed, NotFound
from fdserve.http.asgi import Message
from fdserve.http.error_forms import ANTHROPIC, OPENAI
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.http.router import Route, Router
from tests.http.client import serving


async def handler(request: Request, reply: Reply) -> None:
    raise AssertionError("not called")


ROUTES = [
    Route("GET", "/things", handler),
    Route("POST", "/things", handler),
    Route("GET", "/things/{name:path}", handler),
    Route("POST", "/run", handler, counted=True),
    Route("GET", "/runs/{id}", handler),
    Route("POST", "/runs/{id}/end", handler),
]


def test_match() -> None:
    router = Router(ROUTES)
    for method, path, index, parameters in (
        ("GET", "/things", 0, {}),
        ("HEAD", "/things", 0, {}),
        ("POST", "/things", 1, {}),
        ("GET", "/things/a/b", 2, {"name": "a/b"}),
        ("POST", "/run", 3, {}),
        ("GET", "/runs/a b\n", 4, {"id": "a b\n"}),
        ("POST", "/runs/7/end", 5, {"id": "7"}),
        ("GET", "/things/{name:path}", 2, {"name": "{name:path}"}),
    ):
        route, found = router.match(method, path)
        assert (route, found) == (ROUTES[index], parameters)


@pytest.mark.parametrize(
    "path", ["", "/", "/thing", "/things2", "/run/", "//things", "/Things", "/runs/", "/runs/1/2", "/runs//end"]
)
def test_unknown_paths(path: str) -> None:
    with pytest.raises(NotFound):
        Router(ROUTES).match("GET", path)


def test_the_prefix_by_itself_is_no_path_below_it() -> None:
    router = Router([Route("GET", "/things/{name:path}", handler)])
    assert router.match("GET", "/things/x")[0].path == "/things/{name:path}"
    for path in ("/things", "/things/"):
        with pytest.raises(NotFound):
            router.match("GET", path)


def test_a_hint() -> None:
    router = Router(ROUTES, lambda path: "Try /things." if path == "/thing" else None)
    with pytest.raises(NotFound, match=r"^Unknown path '/thing'\. Try /things\.$"):
        router.match("GET", "/thing")
    with pytest.raises(NotFound, match=r"^Unknown path '/other'\.$"):
        router.match("GET", "/other")


def test_a_hint_about_a_method() -> None:
    router = Router(ROUTES, unserved=lambda path: "Try less." if path == "/things" else None)
    with pytest.raises(MethodNotAllowed, match=r"^/things takes GET, HEAD, POST, OPTIONS, not PUT\. Try less\.$"):
        router.match("PUT", "/things")
    with pytest.raises(NotFound, match=r"^Unknown path '/other'\.$"):
        router.match("PUT", "/other")


def test_the_form_of_errors_is_that_of_the_nearest_path_above() -> None:
    router = Router([Route("POST", "/talk", handler, errors=ANTHROPIC), *ROUTES])
    for path in ("/talk", "/talk/more", "/talk//" + "x/" * 1000):
        assert router.error_form(path) is ANTHROPIC
    for path in ("", "/", "/talking", "/runs/7/end", "/other/talk"):
        assert router.error_form(path) is OPENAI


def test_long_paths_take_no_time() -> None:
    """Every request has the form of its errors looked up, whoever sends it."""
    began = time.process_time()
    Router(ROUTES).error_form("/runs/" + "a" * 30_000 + "/" * 30_000)
    assert time.process_time() - began < 1


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

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async with serving() as client:
        await client.app({"type": "websocket"}, receive, send)
    assert sent == [{"type": "websocket.close"}]
