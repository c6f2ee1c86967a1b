"""Mendings of hypercorn 0.18 as `python -m fdserve` uses it, each with a test that shows the fault.

The dependency is pinned to 0.18 because of this module.
"""

from __future__ import annotations

import os
import uuid

import h11
import hypercorn.trio.run
import msgspec
import trio
from hypercorn.events import Event, RawData, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer

from fdserve.errors import HeadersTooLarge, InvalidRequest, ServerError
from fdserve.http.errors import error_body


class PromptServer(TCPServer):
    """Lets go of a connection whose client is gone, and sends without ado.

    Hypercorn's own goes on waiting for the keep-alive timeout after the client has closed an idle connection, and
    holds its file descriptor as long. It also lets all other tasks run twice in every send, which is most of what a
    token costs when hundreds are streamed at a time.
    """

    _client_is_gone = False

    async def _read_data(self) -> None:
        await super()._read_data()
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


def apply() -> None:
    """Have hypercorn use them."""
    H11Protocol._send_error_response = send_error_response  # type: ignore[assignment, method-assign]
    # Where its `serve` looks the class up; the name is not one that the module exports.
    hypercorn.trio.run.TCPServer = PromptServer  # type: ignore[attr-defined]
