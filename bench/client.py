"""Many HTTP/1.1 requests at a time from one thread, at little cost to the machine that is measured.

A load generator that shares its cores with the server must not compete with it. So sockets are read by one loop over
a selector, and while the load runs a received piece is only kept, with its time: reading what it says (`response.py`)
comes later. That is a few microseconds a piece, where an HTTP library with a task a stream takes many times that.
"""

from __future__ import annotations

import os
import resource
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from bench.response import LAST_CHUNK, Head, parse_head

RECEIVE_BYTES = 1 << 14
LOOK_EVERY_SECONDS = 0.5
_WAIT = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass
class Exchange:
    """A request's bytes, and the bytes that came back with the times at which they were received.

    Times are those of `time.perf_counter`. `error` says what went wrong on the way; a status that tells of an error
    is not among that.
    """

    request: bytes
    index: int = 0
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    error: str = ""


class Address:
    """Where a base URL such as http://127.0.0.1:8188/v1 points to. ValueError if it is none."""

    def __init__(self, base_url: str) -> None:
        split = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ValueError(f"{base_url!r} is no URL of a server, such as http://127.0.0.1:8188")
        self.tls = split.scheme == "https"
        self.host = split.hostname
        self.port = split.port or (443 if self.tls else 80)
        self.path = split.path.rstrip("/")
        self.netloc = split.netloc.rpartition("@")[2]

    def resolve(self) -> tuple[socket.AddressFamily, tuple[object, ...]]:
        """Family and socket address of the first answer. OSError if there is none."""
        family, _, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        return family, address


class _Connection:
    __slots__ = ("advance", "exchange", "fresh", "head", "received", "sock", "tail", "unsent")

    def __init__(self, sock: socket.socket, exchange: Exchange, advance: Callable[[_Connection], None]) -> None:
        self.sock = sock
        self.exchange: Exchange | None = exchange
        self.advance = advance
        """What to do once the socket is ready."""
        self.fresh = True
        """No request was answered on it yet."""
        self.unsent = memoryview(b"")
        self.head: Head | None = None
        self.received = 0
        self.tail = b""


class Client:
    """Sends requests to one server on connections that are kept and used again. A context manager."""

    def __init__(self, base_url: str, *, timeout: float = 600.0) -> None:
        """`timeout`: seconds without a byte after which a request has failed."""
        self._address = Address(base_url)
        # As many connections as the system lets the process have: the usual soft limit is 1024.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._family, self._socket_address = self._address.resolve()
        self._timeout = timeout
        self._selector = selectors.DefaultSelector()
        self._idle: list[_Connection] = []
        self._active: dict[_Connection, None] = {}
        self._on_end: Callable[[Exchange], None] = lambda exchange: None
        self._tls = ssl.create_default_context() if self._address.tls else None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [*self._idle, *self._active]:
            self._close(connection)
        self._selector.close()

    def run(
        self,
        requests: Iterable[bytes],
        *,
        arrivals: Iterable[float] | None = None,
        max_concurrency: int | None = None,
        on_end: Callable[[Exchange], None] = lambda exchange: None,
        on_look: Callable[[], None] = lambda: None,
    ) -> list[Exchange]:
        """Send all requests and wait until every one is answered or has failed.

        Request i is sent `arrivals[i]` seconds after the start (ascending; None: at once), or later, when fewer than
        `max_concurrency` are under way. `on_end` gets every exchange as it ends, `on_look` is called now and then.
        """
        exchanges = [Exchange(request, index) for index, request in enumerate(requests)]
        due = list(arrivals) if arrivals is not None else [0.0] * len(exchanges)
        limit = max_concurrency or len(exchanges)
        self._on_end = on_end
        start, began = time.perf_counter(), 0
        look = start + LOOK_EVERY_SECONDS
        while began < len(exchanges) or self._active:
            now = time.perf_counter()
            while began < len(exchanges) and len(self._active) < limit and start + due[began] <= now:
                self._begin(exchanges[began])
                began += 1
            wait = look - now
            if began < len(exchanges) and len(self._active) < limit:
                wait = min(wait, start + due[began] - now)
            for key, _ in self._selector.select(max(wait, 0.0)):
                key.data.advance(key.data)
            if time.perf_counter() >= look:
                self._fail_stalled()
                on_look()
                look = time.perf_counter() + LOOK_EVERY_SECONDS
        return exchanges

    # -- the life of a request, each step called when the socket is ready ---------------------------------------------

    def _begin(self, exchange: Exchange, *, fresh: bool = False) -> None:
        exchange.sent = exchange.sent or time.perf_counter()
        if self._idle and not fresh:
            connection = self._idle.pop()
            connection.exchange = exchange
            self._active[connection] = None
            self._start_sending(connection)
            return
        try:
            sock = socket.socket(self._family, socket.SOCK_STREAM)
        except OSError as error:
            exchange.error = f"no socket: {error.strerror}"
            self._on_end(exchange)
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(sock, exchange, self._connected)
        self._active[connection] = None
        sock.connect_ex(self._socket_address)  # its failure is told once the socket is ready
        self._selector.register(sock, selectors.EVENT_WRITE, connection)

    def _connected(self, connection: _Connection) -> None:
        code = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(connection, f"cannot connect: {os.strerror(code)}")
        elif self._tls is None:
            self._start_sending(connection)
        else:
            self._selector.unregister(connection.sock)
            connection.sock = self._tls.wrap_socket(
                connection.sock, server_hostname=self._address.host, do_handshake_on_connect=False
            )
            self._selector.register(connection.sock, selectors.EVENT_WRITE, connection)
            connection.advance = self._shake_hands
            self._shake_hands(connection)

    def _shake_hands(self, connection: _Connection) -> None:
        assert isinstance(connection.sock, ssl.SSLSocket)
        try:
            connection.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)
        except ssl.SSLWantWriteError:
            self._selector.modify(connection.sock, selectors.EVENT_WRITE, connection)
        except OSError as error:
            self._fail(connection, f"TLS: {error}")
        else:
            self._start_sending(connection)

    def _start_sending(self, connection: _Connection) -> None:
        assert connection.exchange is not None
        connection.unsent = memoryview(connection.exchange.request)
        connection.head, connection.received, connection.tail = None, 0, b""
        connection.advance = self._send
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        try:
            connection.unsent = connection.unsent[connection.sock.send(connection.unsent) :]
        except _WAIT:
            pass
        except OSError as error:
            self._ended_early(connection, f"sending failed: {error.strerror}")
            return
        if not connection.unsent:
            connection.advance = self._receive if self._tls is None else self._receive_tls
        events = selectors.EVENT_WRITE if connection.unsent else selectors.EVENT_READ
        if self._selector.get_key(connection.sock).events != events:
            self._selector.modify(connection.sock, events, connection)

    def _receive_tls(self, connection: _Connection) -> None:
        """Bytes that are decrypted already do not make the socket ready again."""
        assert isinstance(connection.sock, ssl.SSLSocket)
        self._receive(connection)
        while connection.exchange is not None and connection.sock.fileno() >= 0 and connection.sock.pending():
            self._receive(connection)

    def _receive(self, connection: _Connection) -> None:
        exchange = connection.exchange
        assert exchange is not None
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except _WAIT:
            return
        except OSError as error:
            self._ended_early(connection, f"receiving failed: {error.strerror}")
            return
        if not data:
            self._ended_early(connection, "the connection was closed before the end of the answer")
            return
        exchange.times.append(time.perf_counter())
        exchange.parts.append(data)
        connection.received += len(data)
        tail = data if len(data) >= len(LAST_CHUNK) else connection.tail + data
        connection.tail = tail[-len(LAST_CHUNK) :]
        try:
            head = connection.head = connection.head or parse_head(b"".join(exchange.parts))
        except ValueError as error:
            self._fail(connection, str(error))
            return
        if head is None:
            return
        if head.chunked:
            ended = connection.tail == LAST_CHUNK
        else:
            ended = head.length is not None and connection.received >= head.size + head.length
        if ended:
            self._end(connection, keep=head.keep_alive)

    def _end(self, connection: _Connection, *, keep: bool) -> None:
        exchange = connection.exchange
        assert exchange is not None
        del self._active[connection]
        if keep:
            connection.exchange = None
            connection.fresh = False
            connection.advance = self._close_idle
            self._idle.append(connection)
        else:
            self._close(connection)
        self._on_end(exchange)

    def _close_idle(self, connection: _Connection) -> None:
        """The server closed a connection that waited for its next request, or says what nobody asked."""
        self._idle.remove(connection)
        self._close(connection)

    def _ended_early(self, connection: _Connection, reason: str) -> None:
        exchange = connection.exchange
        assert exchange is not None
        if not connection.fresh and not exchange.parts:
            # The server let go of an idle connection just when it was used again.
            del self._active[connection]
            self._close(connection)
            self._begin(exchange, fresh=True)
        elif connection.head is not None and not connection.head.chunked and connection.head.length is None:
            self._end(connection, keep=False)
        else:
            self._fail(connection, reason)

    def _fail(self, connection: _Connection, reason: str) -> None:
        exchange = connection.exchange
        assert exchange is not None
        exchange.error = reason
        del self._active[connection]
        self._close(connection)
        self._on_end(exchange)

    def _fail_stalled(self) -> None:
        oldest = time.perf_counter() - self._timeout
        for connection in list(self._active):
            exchange = connection.exchange
            assert exchange is not None
            if (exchange.times[-1] if exchange.times else exchange.sent) < oldest:
                self._fail(connection, f"nothing came for {self._timeout:g} s")

    def _close(self, connection: _Connection) -> None:
        self._selector.unregister(connection.sock)
        connection.sock.close()
