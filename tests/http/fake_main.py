"""`python -m tests.http.fake_main`: the launcher over a fake engine; `hypercorn tests.http.fake_main:app` as well.

What a request's prompt says decides what it gets; see `scripted`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator

import anyio

from fdserve import launcher
from fdserve.app import create_app
from fdserve.config import Config
from fdserve.engine.request import Request, TokenDelta
from fdserve.errors import StartupError
from fdserve.server.server import Server
from tests.http.fake_engine import FakeEngine, broken, endless, make_server, say, silent


async def flood(request: Request) -> AsyncIterator[TokenDelta]:
    """Many tokens in little time, for ever."""
    while True:
        await anyio.sleep(0.001)
        for _ in range(20):
            yield TokenDelta([120] * 200)


async def scripted(request: Request) -> AsyncIterator[TokenDelta]:
    """ "endless", "flood" (endless, as fast as it goes), "silent", "broken", "slow" (2 s), "steady" (0.6 s), or greets.

    A request that ignores eos gets as many digits as it wants, with a turn for the reader every hundred.
    """
    prompt = bytes(token for token in request.prompt if token < 256).decode()
    scripts = {
        "endless": endless(),
        "flood": flood,
        "silent": silent,
        "broken": broken("half an ans"),
        "slow": say("0123456789" * 2, delay=0.1),
        "steady": say("0123456789" * 2, delay=0.03),
    }
    digits = say("0123456789" * 10_000, batch=100, delay=0.0002)
    greeting = say("Hello, world!") if request.params.ending_ids else digits
    script = next((script for name, script in scripts.items() if name in prompt), greeting)
    async for delta in script(request):
        yield delta


async def build_fake(config: Config) -> Server:
    """FAKE_FAILURE=startup or engine makes the start fail there."""
    engine = FakeEngine(scripted, max_model_len=100_000, max_requests=1000)
    failure = os.environ.get("FAKE_FAILURE")
    if failure == "startup":
        raise StartupError("the fake start failed.")
    if failure == "engine":
        engine.failure = StartupError("the fake rank failed.")
    engine.hold_loading = failure == "loading"
    return make_server(engine, config)


app = create_app(build=build_fake)

if __name__ == "__main__":
    launcher.FORCE_AFTER_SECONDS = float(os.environ.get("FAKE_FORCE_AFTER", launcher.FORCE_AFTER_SECONDS))
    sys.exit(launcher.main(build=build_fake))
