"""An incoming request: its headers, its body under a limit, and the watch for a client that leaves."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import anyio
import msgspec

from fdserve.errors import InvalidRequest, PayloadTooLarge, RequestTimeout, Unavailable
from fdserve.http.asgi import Receive, Scope
from fdserve.http.errors import invalid_field
from fdserve.http.response import Reply

T = TypeVar("T")

BODY_SECONDS = 60.0

# What is read of a body that nobody wants before the answer, so that clients that send first and read later see it.
DISCARD_BYTES = 64 << 20
DISCARD_SECONDS = 5.0
STOP_DISCARD_SECONDS = 1.0
"""The same where the server stops: the answer must be out before the connections are cut."""

_LONE_SURROGATE = re.compile(rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ClientDisconnected(Exception):
    """The client went away before its request was read."""


class Request:
    """One HTTP request.

    `id` is the client's X-Request-Id where that is fit to be echoed and logged, else a new one. `started` is
    `time.monotonic()` at arrival. `path_parameters` are those of the route. `body` is what was read, until it is taken,
    and `body_size` its length. The token counts, and as `failure` the code of the error that ended the request, are for
    the access log, and `outputs` (`server.tracing.Output`, until the request is over) and `response_id`, the id in the
    answer, for traces; whoever knows them sets them.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.started = time.monotonic()
        self.method: str = scope["method"]
        self.path = _path(scope)
        self.scheme: str = scope.get("scheme", "http")
        self.http_version: str = scope.get("http_version", "1.1")
        self.path_parameters: dict[str, str] = {}
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = self.headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.body = b""
        self.body_size = 0
        self.body_complete = False
        self.disconnected = False
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.failure: str | None = None
        self.outputs: list[Any] = []
        self._query: bytes = scope.get("query_string", b"")
        self.response_id: str | None = None
        self._receive = receive
        self._reading = anyio.CancelScope()

    @property
    def query(self) -> list[tuple[str, str]]:
        """The names and values of the query, in order; a name without a value has ""."""
        return parse_qsl(self._query.decode("latin-1"), keep_blank_values=True)

    @property
    def ambiguous(self) -> bool:
        """Whether the headers frame the body in two ways, so that a proxy may see other requests than this server."""
        return "transfer-encoding" in self.headers and "content-length" in self.headers

    @property
    def closes(self) -> bool:
        """Whether nothing more can be read from the connection after this request, or is going to be."""
        return self.ambiguous or not self.body_complete or self._reading.cancel_called

    async def read(self, limit: int, *, keep: bool = True) -> None:
        """Read the whole body, into `body` if it is to be kept.

        Raises PayloadTooLarge as soon as it is known to exceed `limit` bytes, RequestTimeout, ClientDisconnected, and
        Unavailable after `stop_reading`. When cancelled, what was read is lost.
        """
        try:
            with anyio.fail_after(BODY_SECONDS), self._reading:
                await self._read(limit, keep)
        except TimeoutError:
            raise RequestTimeout(f"The body did not come within {BODY_SECONDS:g} seconds.") from None
        if self._reading.cancelled_caught:
            raise Unavailable("The server is shutting down.")

    def stop_reading(self) -> None:
        """Wait no longer for a body that has not come: the server stops."""
        self._reading.cancel()

    async def _read(self, limit: int, keep: bool) -> None:
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        size = 0
        while not self.body_complete:
            chunk = await self._next_chunk()
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            if keep:
                chunks.append(chunk)
        self.body = b"".join(chunks)
        self.body_size = len(self.body)

    def take_body(self) -> bytes:
        """The body, which the request then has no more: nobody needs its memory while the answer is made."""
        body, self.body = self.body, b""
        return body

    async def discard(self) -> None:
        """Read and drop the rest of the body, within bounds of time and size.

        Raises ClientDisconnected. May be cancelled at any point.
        """
        size = 0
        with anyio.move_on_after(STOP_DISCARD_SECONDS if self._reading.cancel_called else DISCARD_SECONDS):
            while not self.body_complete and size < DISCARD_BYTES:
                size += len(await self._next_chunk())

    async def _next_chunk(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.disconnected = True
            raise ClientDisconnected
        self.body_complete = not message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        return chunk

    @asynccontextmanager
    async def watched(self, reply: Reply) -> AsyncIterator[None]:
        """Cancel the block when the client disconnects; `disconnected` then tells, and the block just ends.

        Sending never fails for a client that has gone, so this is the only way to notice. Whatever is left of
        the body is received and dropped meanwhile: an unread body can wedge the connection.
        """
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, reply, tasks.cancel_scope)
            try:
                yield
            finally:
                if self.body_complete or self.disconnected:
                    tasks.cancel_scope.cancel()
                else:
                    # The answer is out and the connection is being closed: the disconnect is about to come.
                    tasks.cancel_scope.deadline = anyio.current_time() + DISCARD_SECONDS

    async def _watch(self, reply: Reply, scope: anyio.CancelScope) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                # It also follows the last part of every answer. The server may be closing the connection inside of
                # that last send, and to cancel it there would leave the connection open.
                if not reply.finished:
                    self.disconnected = True
                    scope.cancel()
                return
            if not message.get("more_body", False):
                self.body_complete = True


def _path(scope: Scope) -> str:
    """The path, without the one under which a proxy has the server, if the server is told of that and the proxy not."""
    path = re.sub(r"^https?://[^/]*", "", scope["path"])  # a proxy's client sends the whole URL
    root: str = scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The JSON body as the decoder's type; InvalidRequest, with the offending path as `param`, if it is not that."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid_field(str(error), decoder.type) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {_flaw(body, error)}.", code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.", code="invalid_json") from None


def _flaw(body: bytes, error: Exception) -> str:
    """What is wrong with a body that cannot be decoded; msgspec gives some positions from a string's beginning only."""
    if not body:
        return "it is empty"
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as flaw:
        return f"it is not UTF-8: {flaw.reason} (byte {flaw.start})"
    # Backslashes that stand for themselves begin no escape.
    if isinstance(error, msgspec.DecodeError) and (half := _LONE_SURROGATE.search(body.replace(rb"\\", b"--"))):
        return f"a surrogate stands alone (byte {half.start()})"
    return str(error).removeprefix("JSON is malformed: ")


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body is larger than the limit of {limit} bytes.")
