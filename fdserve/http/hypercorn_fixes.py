"""Mendings of hypercorn 0.18 on trio, and of trio's own server, each with a test that shows the fault.

The dependency is pinned to 0.18 because of this module.
"""

from __future__ import annotations

import logging
import os
import select
import uuid

import h11
import hypercorn.trio.run
import msgspec
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import EventWrapper

from fdserve.errors import HeadersTooLarge, InvalidRequest, ServerError
from fdserve.http.errors import error_body

log = logging.getLogger("fdserve.http")

LOOK_SECONDS = 0.5
"""How often to look whether a client is gone from whom nothing is read."""
SILENT_SECONDS = 60.0


class PromptServer(TCPServer):
    """Lets go of a connection whose client is gone, sends without ado, and fails alone.

    Hypercorn's own goes on waiting for the keep-alive timeout after the client has closed an idle connection, and
    holds its file descriptor as long. It does not notice a client that leaves after it has sent something behind its
    request. It lets all other tasks run twice in every send, which is most of what a token costs when hundreds are
    streamed at a time. It closes a connection while others send, and these fail. And what it fails on, such as a path
    in HTTP/2 that is not ASCII, ends the whole process.
    """

    _client_is_gone = False

    async def run(self) -> None:
        """Serve the connection until it ends. A defect costs nobody else's."""
        try:
            await super().run()
        except Exception as error:
            log.error("a connection failed: %s", _innermost(error), exc_info=log.isEnabledFor(logging.DEBUG))

    async def _read_data(self) -> None:
        if isinstance(self.protocol.protocol, H11Protocol) and isinstance(self.stream, trio.SocketStream):
            self.protocol.protocol.can_read = _WatchfulEvent(self.stream.socket)
        try:
            await super()._read_data()
        except _ClientGone:
            await self.protocol.handle(Closed())
        self._client_is_gone = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        """Pass the event on; no idle time begins for a client that is gone.

        Data is sent at once, without letting other tasks run, as far as the system takes it at once.
        """
        if isinstance(event, RawData) and isinstance(self.stream, trio.SocketStream) and not self.send_lock.locked():
            try:
                sent = os.write(self.stream.socket.fileno(), event.data)
            except OSError:
                sent = 0  # the ordinary way waits, or finds the client gone
            if sent == len(event.data):
                return
            event = RawData(data=event.data[sent:])
        if not (self._client_is_gone and isinstance(event, Updated) and event.idle):
            await super().protocol_send(event)

    async def _close(self) -> None:
        """Close the connection, with its end behind the last send.

        The end is sent like data, and trio lets nobody send meanwhile: an application that answered a client that is
        just found gone would fail. A send that waits for a reader is not waited for.
        """
        if self.send_lock.locked():
            await self.stream.aclose()
            return
        self.send_lock.acquire_nowait()
        try:
            await super()._close()
        finally:
            self.send_lock.release()


class _ClientGone(Exception):
    """The client has closed the connection, though not all that it sent was read."""


class _WatchfulEvent(EventWrapper):
    """What H11Protocol waits for before it reads what was sent behind a request: that this one is answered.

    Raises _ClientGone when the client has closed its side meanwhile. That stands behind all that it sent, so only the
    system can tell.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        super().__init__()
        self._closed = select.poll()  # over a socket of any family
        self._closed.register(sock.fileno(), select.POLLRDHUP)

    async def wait(self) -> None:
        while not self.is_set():
            with trio.move_on_after(LOOK_SECONDS):
                await super().wait()
            if not self.is_set() and self._closed.poll(0):
                raise _ClientGone


def _innermost(error: BaseException) -> str:
    while exceptions := getattr(error, "exceptions", ()):  # a group's, which Python 3.10 does not know
        error = exceptions[0]
    return f"{type(error).__name__}: {error}"


async def send_error_response(self: H11Protocol, status: int) -> None:
    """Refuse what is no proper HTTP/1.1 with a body and an id, as every other request is refused.

    Hypercorn's own answer is empty, and blames itself (501) for a transfer coding that it does not know.
    """
    error: ServerError = InvalidRequest("The request is not valid HTTP/1.1.", code="invalid_http")
    if status == HeadersTooLarge.status:
        error = HeadersTooLarge("The request's line and headers are too large.")
    elif status == 501:
        error = InvalidRequest("The only transfer-encoding that can be read is chunked.", code="invalid_http")
    body = msgspec.json.encode(error_body(error))
    headers = [
        (b"x-request-id", uuid.uuid4().hex.encode("ascii")),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"content-type", b"application/json"),
        (b"connection", b"close"),
        *self.config.response_headers("h11"),
    ]
    await self._send_h11_event(h11.Response(status_code=error.status, headers=headers))
    await self._send_h11_event(h11.Data(data=body))
    await self._send_h11_event(h11.EndOfMessage())


_handle = H11Protocol.handle


async def handle(self: H11Protocol, event: Event) -> None:
    """Take what the client sent, without empty lines before a request, which RFC 9112 (2.2) has a server skip.

    H11 refuses them. Old clients send one behind a body.
    """
    if isinstance(event, RawData) and isinstance(self.connection, h11.Connection):
        begun, _ = self.connection.trailing_data
        if self.connection.their_state in (h11.IDLE, h11.DONE) and not begun:
            event = RawData(event.data.lstrip(b"\r\n"), event.address)
            if not event.data:
                return
    await _handle(self, event)


class _OncePerMinute(logging.Filter):
    """Of the connections that cannot be accepted for want of open files trio logs a traceback ten times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._silent_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.created < self._silent_until:
            return False
        self._silent_until = record.created + SILENT_SECONDS
        record.exc_info = None
        return True


_once_per_minute = _OncePerMinute()


def apply() -> None:
    """Have hypercorn use them, and trio below it."""
    logging.getLogger("trio.serve_listeners").addFilter(_once_per_minute)
    H11Protocol.handle = handle  # type: ignore[method-assign]
    H11Protocol._send_error_response = send_error_response  # type: ignore[assignment, method-assign]
    # Where its `serve` looks the class up; the name is not one that the module exports.
    hypercorn.trio.run.TCPServer = PromptServer  # type: ignore[attr-defined]
