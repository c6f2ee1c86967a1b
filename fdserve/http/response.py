"""The answer to a request: one JSON body, or a stream of server-sent events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

import msgspec

from fdserve.errors import InvalidRequest
from fdserve.http.asgi import Send

T = TypeVar("T")

Headers = Sequence[tuple[bytes, bytes]]

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def encode(value: object) -> bytes:
    """The value as JSON."""
    return _encode(value)


def encoded_apart(shapes: Iterable[T]) -> list[T]:
    """The shapes as JSON that goes into an answer as it is.

    What is large is made and encoded piece by piece so: a thread that encodes, or gives back what was encoded, holds up
    all others meanwhile.
    """
    return [cast(T, msgspec.Raw(encode(shape))) for shape in shapes]


def event(value: object) -> bytes:
    """One server-sent event whose data is the value as JSON."""
    return b"data: " + _encode(value) + b"\n\n"


def named_event(name: str, value: object) -> bytes:
    """One server-sent event with a name: Anthropic's streams have them, and those of /v1/responses."""
    return b"event: " + name.encode("ascii") + b"\n" + event(value)


class Reply:
    """Sends the answer, once.

    `status` is None until it began, `streaming` tells that events were begun, `finished` that its last part is
    sent or being sent. `headers` are sent with every answer besides its own.

    Every method waits for a client that reads slowly and never fails for one that has gone. When a method is
    cancelled the answer is unfinished, and the connection is good for nothing more.
    """

    def __init__(self, send: Send, request_id: str, http_version: str = "1.1") -> None:
        self._send = send
        self._http_version = http_version
        self.headers: list[tuple[bytes, bytes]] = [(b"x-request-id", request_id.encode("ascii"))]
        self.status: int | None = None
        self.streaming = False
        self.finished = False
        self.bytes_sent = 0

    async def json(self, value: object, *, status: int = 200, headers: Headers = ()) -> None:
        """Send the value as the whole answer."""
        await self.text(_encode(value), "application/json", status=status, headers=headers)

    async def text(self, body: bytes, content_type: str, *, status: int = 200, headers: Headers = ()) -> None:
        """Send the body as the whole answer."""
        length = str(len(body)).encode("ascii")
        await self._start(status, [(b"content-length", length), *headers], content_type)
        await self._body(body, more=False)

    async def empty(self, status: int, headers: Headers = ()) -> None:
        """Send an answer that has no body."""
        await self._start(status, headers, None)
        await self._body(b"", more=False)

    async def start_events(self) -> None:
        """Begin a stream of events. Raises InvalidRequest on an HTTP/2 connection.

        Over HTTP/2 a reader that stops would not hold the sender back, and the whole stream would be buffered.
        """
        if self._http_version.startswith("2"):
            raise InvalidRequest("Streams are served over HTTP/1.1 only.", param="stream")
        # Proxies that buffer would hold the tokens back.
        headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await self._start(200, headers, "text/event-stream; charset=utf-8")
        self.streaming = True

    async def events(self, data: bytes) -> None:
        """Send one or several whole events at once."""
        await self._body(data, more=True)

    async def end_events(self, data: bytes = b"", *, mark: bytes = DONE) -> None:
        """Send the last events and the end mark, which is that of OpenAI's older streams; the newer have none."""
        await self._body(data + mark, more=False)

    async def _start(self, status: int, headers: Headers, content_type: str | None) -> None:
        if self.status is not None:
            raise RuntimeError("the answer has begun already")
        self.status = status
        sent = [*self.headers, *headers]
        if content_type is not None:
            sent.append((b"content-type", content_type.encode("ascii")))
        await self._send({"type": "http.response.start", "status": status, "headers": sent})

    async def _body(self, body: bytes, *, more: bool) -> None:
        self.bytes_sent += len(body)
        self.finished = not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
