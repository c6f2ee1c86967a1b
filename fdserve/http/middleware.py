"""What happens around every handler: keys, limits, the body, errors, the access log."""

from __future__ import annotations

import hmac
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import anyio

from fdserve.errors import InternalError, InvalidRequest, Overloaded, ServerError, Unauthorized, Unavailable
from fdserve.http.asgi import Receive, Scope, Send
from fdserve.http.body_values import check_values
from fdserve.http.error_forms import ErrorForm
from fdserve.http.errors import error_headers
from fdserve.http.media_type import check_media_type
from fdserve.http.request import ClientDisconnected, Request
from fdserve.http.response import Reply
from fdserve.http.router import Route, Router

access_log = logging.getLogger("fdserve.access")
log = logging.getLogger("fdserve.http")

_KEY_REQUIRED = "An API key is required: send it as the header 'Authorization: Bearer <key>'."
_INVISIBLE = re.compile(r"[^!-~]")
LONG_BODY_BYTES = 65_536
"""About a millisecond's work to decode."""
TURN_SECONDS = 0.02
"""From one long body to the next: a token of a stream takes several rounds of the event loop, and waits in each."""
GOODBYE_SECONDS = 1.0
"""For a client to take the last words of a server that stops."""
CLIENT_CLOSED = 499  # nginx's status for a client that left; it is only logged and counted


class Dispatcher:
    """Answers HTTP requests by the router's handlers.

    `answering` counts the requests on counted routes that are being answered: those whose bodies have come. `observe`
    is told the path of the route ("other" where there is none) and the status of every request, `trace` the request,
    path and status of those on counted routes.
    """

    def __init__(
        self,
        router: Router,
        *,
        api_keys: Sequence[str],
        max_concurrency: int,
        max_request_bytes: int,
        observe: Callable[[str, int], None],
        trace: Callable[[Request, str, int], None] | None = None,
    ) -> None:
        self._active = 0
        self.answering = 0
        self._router = router
        self._api_keys = [key.encode("utf-8") for key in api_keys]
        self._max_concurrency = max_concurrency
        self._max_request_bytes = max_request_bytes
        self._observe = observe
        self._trace = trace
        self._turnstile = anyio.Lock()
        self._reading: set[Request] = set()

    def stop_reading(self) -> None:
        """Refuse the requests whose bodies have not come: the server stops."""
        for request in self._reading:
            request.stop_reading()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Cancelling it abandons the request, frees what its handler held, and tells the client that the server stops.
        """
        request = Request(scope, receive)
        reply = Reply(send, request.id, request.http_version)
        form = self._router.error_form(request.path)
        reply.headers += [(name, request.id.encode("ascii")) for name in form.id_headers]
        route: Route | None = None
        try:
            try:
                route, request.path_parameters = self._router.match(request.method, request.path)
                self._authorize(route, request)
                if request.ambiguous:
                    raise InvalidRequest("A body has a content-length or a transfer-encoding.", code="invalid_http")
                if route.body is not None:
                    check_media_type(request.headers)
                route.admit()
                with self._counted(route):
                    # Some routes need no key, and no place: strangers could fill the memory with bodies nobody reads.
                    with self._reading_of(request):
                        await request.read(self._max_request_bytes, keep=route.body is not None)
                    if request.body_size > LONG_BODY_BYTES:
                        # Those that came together are decoded one by one, so that others get on in between.
                        async with self._turnstile:
                            check_values(request.body)
                            if self._turnstile.statistics().tasks_waiting:
                                await anyio.sleep(TURN_SECONDS)
                    with self._answering(route):
                        await _answer(route, request, reply)
            except ServerError as error:  # refused before the handler
                await _refuse(form, request, reply, error)
        except ClientDisconnected:
            pass
        except anyio.get_cancelled_exc_class():
            # Servers that give no other sign cut what still runs off at their stop.
            with anyio.move_on_after(GOODBYE_SECONDS, shield=True):
                await _send_error(form, request, reply, Unavailable("The server is shutting down."))
            raise
        finally:
            status = CLIENT_CLOSED if request.disconnected or reply.status is None else reply.status
            self._observe(route.name if route else "other", status)
            _log_access(scope, request, reply, status)
            if self._trace is not None and route is not None and route.counted:
                _told(self._trace, request, route.name, status)
            request.outputs.clear()  # which hold the request

    def _authorize(self, route: Route, request: Request) -> None:
        if route.public or not self._api_keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # Anthropic's clients have a header of their own for the key.
        key = key if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        given = key.strip().encode("latin-1")
        # Every key is compared, in constant time each: the time tells nothing about any of them.
        matches = [hmac.compare_digest(given, expected) for expected in self._api_keys]
        if not any(matches):
            raise Unauthorized("Incorrect API key provided." if given else _KEY_REQUIRED)

    @contextmanager
    def _counted(self, route: Route) -> Iterator[None]:
        if not route.counted:
            yield
            return
        if self._active >= self._max_concurrency:
            raise Overloaded(f"The server is at its limit of {self._max_concurrency} concurrent requests.")
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    @contextmanager
    def _reading_of(self, request: Request) -> Iterator[None]:
        self._reading.add(request)
        try:
            yield
        finally:
            self._reading.remove(request)

    @contextmanager
    def _answering(self, route: Route) -> Iterator[None]:
        self.answering += route.counted
        try:
            yield
        finally:
            self.answering -= route.counted


def _told(trace: Callable[[Request, str, int], None], request: Request, endpoint: str, status: int) -> None:
    try:
        trace(request, endpoint, status)
    except Exception:
        log.exception("request %s cannot be traced", request.id)


async def _answer(route: Route, request: Request, reply: Reply) -> None:
    """Run the handler until it is done or the client leaves; tell the client of what it raises."""
    async with request.watched(reply):
        try:
            await route.handler(request, reply)
        except ServerError as error:
            await _send_error(route.errors, request, reply, error)
        except Exception:
            log.exception("request %s failed", request.id)
            failure = InternalError("The server failed to handle the request.")
            await _send_error(route.errors, request, reply, failure)


async def _refuse(form: ErrorForm, request: Request, reply: Reply, error: ServerError) -> None:
    await request.discard()
    async with request.watched(reply):
        await _send_error(form, request, reply, error)


async def _send_error(form: ErrorForm, request: Request, reply: Reply, error: ServerError) -> None:
    """As the answer where none has begun; as the last event of a stream."""
    request.failure = error.code
    if reply.status is None:
        headers = error_headers(error)
        if request.closes and request.http_version.startswith("1"):
            headers.append((b"connection", b"close"))
        await reply.json(form.body(error, request.id), status=error.status, headers=headers)
    elif reply.streaming and not reply.finished:
        await reply.end_events(form.ending(error, request.id), mark=b"")


def _log_access(scope: Scope, request: Request, reply: Reply, status: int) -> None:
    path = scope.get("raw_path", b"").decode("latin-1") or request.path
    milliseconds = (time.monotonic() - request.started) * 1000
    details = ""
    if request.prompt_tokens is not None:
        details = f" prompt={request.prompt_tokens} generated={request.completion_tokens or 0}"
    if request.failure is not None:
        details += f" error={request.failure}"
    access_log.info(
        "%s %s %d %dB %.0fms%s id=%s",
        _visible(request.method), _visible(path), status, reply.bytes_sent, milliseconds, details, request.id,
    )  # fmt: skip


def _visible(text: str) -> str:
    """With escapes for what is no visible ASCII, so that no client can write a line or a field of its own.

    HTTP/1.1 has none of it in these places, HTTP/2 does.
    """
    return _INVISIBLE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
