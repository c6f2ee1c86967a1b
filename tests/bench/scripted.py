"""A server that answers every request with given bytes, in given pieces."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Sequence
from types import TracebackType

CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PAUSE_SECONDS = 0.01


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def stream(*events: str, end: str = "\n\n") -> list[bytes]:
    """The pieces of a chunked answer with these events, each in a chunk of its own."""
    return [CHUNKED_HEAD, *(chunk(f"data: {event}{end}".encode()) for event in (*events, "[DONE]")), b"0\r\n\r\n"]


class ScriptedServer:
    """Answers the requests of each connection with `answers` in turn; an answer of None closes the connection.

    With a `context` it speaks TLS. A context manager. Pieces are sent with pauses between them. `requests` are the
    bodies that came.
    """

    def __init__(self, *answers: Sequence[bytes] | None, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._answers = answers
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self._socket.getsockname()[1]}"
        if context is not None:
            self._socket = context.wrap_socket(self._socket, server_side=True)
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for answer in self._answers:
                length = 0
                while (line := reader.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                if not line:
                    return
                self.requests.append(reader.read(length))
                if answer is None:
                    return
                for piece in answer:
                    connection.sendall(piece)
                    time.sleep(PAUSE_SECONDS)
