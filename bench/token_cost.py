"""`python -m bench.token_cost STREAMS TOKENS RUNS`: what a streamed token costs the application, sockets left out.

The application runs with ranks that answer at once (see `bench.null_server`), and its ASGI callable is called directly:
what is received is there, and to send is to give the other tasks a turn, as a socket that takes everything does.
Prints a JSON list with the microseconds of processor time that a token took in each run. The first run warms up.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import anyio
import trio

from bench.null_server import build_null
from fdserve.app import App, create_app
from fdserve.config import Config

PATH = "/v1/chat/completions"


async def ask(app: App, body: bytes) -> None:
    """One request, to the end of its stream."""
    waiting: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    ended = anyio.Event()

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise RuntimeError(f"the application answered with {message['status']}")
        if message["type"] == "http.response.body" and not message["more_body"]:
            ended.set()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": PATH, "headers": headers}
    await app(scope | {"raw_path": PATH.encode()}, receive, send)


async def measure(streams: int, tokens: int, runs: int) -> list[float]:
    """The microseconds a token of each run; see above."""
    options = ["--log-level", "error", "--max-num-seqs", str(streams), "--max-concurrency", str(streams)]
    options += ["--num-gpu-blocks-override", str(streams * (tokens // 64 + 4))]
    options += ["--max-num-batched-tokens", str(max(2048, streams))]
    app = create_app(Config.load(options, {}), build_null)
    messages = [{"role": "user", "content": "Say something."}]
    body = json.dumps({"messages": messages, "stream": True, "max_tokens": tokens, "ignore_eos": True}).encode()
    to_app, inbox = trio.open_memory_channel[dict[str, Any]](1)

    async def ignore(_: Any) -> None:
        """What the lifespan says."""

    costs = []
    async with trio.open_nursery() as lifespan:
        lifespan.start_soon(app, {"type": "lifespan"}, inbox.receive, ignore)
        await to_app.send({"type": "lifespan.startup"})
        await app.started.wait()
        assert app.server is not None
        await app.server.engine.wait_ready()
        for _ in range(1 + runs):
            before = time.process_time()
            async with trio.open_nursery() as clients:
                for _ in range(streams):
                    clients.start_soon(ask, app, body)
            costs.append(1e6 * (time.process_time() - before) / (streams * tokens))
        await to_app.send({"type": "lifespan.shutdown"})
    return costs[1:]


if __name__ == "__main__":
    streams, tokens, runs = map(int, sys.argv[1:])
    print(json.dumps(trio.run(measure, streams, tokens, runs)))
