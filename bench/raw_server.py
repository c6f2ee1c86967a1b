"""`python -m bench.raw_server PORT FILE`: hypercorn alone, on trio, set up as fdserve sets it up.

Answers every POST with the server-sent events in FILE, each sent by a call of its own, and anything else with an empty
200. This is what streaming costs when nothing is behind it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import hypercorn.config
import hypercorn.trio
import trio

HEADERS = [
    (b"x-request-id", b"0123456789abcdef"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
]


class RawApp:
    """The application; `events` are sent in order."""

    def __init__(self, events: list[bytes]) -> None:
        self._events = events

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] == "lifespan":
            for what in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{what}.complete"})
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        for event in self._events if scope["method"] == "POST" else ():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def main() -> None:
    port, path = sys.argv[1:]
    events = [event + b"\n\n" for event in Path(path).read_bytes().split(b"\n\n") if event]
    config = hypercorn.config.Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.backlog = 2048
    config.keep_alive_timeout = 75
    config.include_server_header = False
    config.errorlog = logging.getLogger("hypercorn.error")
    # Hypercorn types its applications' messages by structs of its own, where ASGI has plain dictionaries.
    app: Any = RawApp(events)
    trio.run(hypercorn.trio.serve, app, config)


if __name__ == "__main__":
    main()
