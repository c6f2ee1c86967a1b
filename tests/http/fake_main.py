"""`python -m tests.http.fake_main`: the launcher over a fake engine; `hypercorn tests.http.fake_main:app` as well.

What a request's prompt says decides what it gets; see `scripted`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator

from fdserve.__main__ import main
from fdserve.app import create_app
from fdserve.config import Config
from fdserve.engine.request import Request, TokenDelta
from fdserve.errors import StartupError
from fdserve.server import Server
from tests.http.fake_engine import FakeEngine, broken, endless, make_server, say, silent


async def scripted(request: Request) -> AsyncIterator[TokenDelta]:
    """ "endless", "flood" (endless and large), "silent", "broken", "slow" (2 s), else a greeting."""
    prompt = bytes(token for token in request.prompt if token < 256).decode()
    scripts = {
        "endless": endless(),
        "flood": endless(0.0005, "x" * 2000),
        "silent": silent,
        "broken": broken("half an ans"),
        "slow": say("0123456789" * 2, delay=0.1),
    }
    script = next((script for name, script in scripts.items() if name in prompt), say("Hello, world!"))
    async for delta in script(request):
        yield delta


async def build_fake(config: Config) -> Server:
    """FAKE_FAILURE=startup or engine makes the start fail there."""
    engine = FakeEngine(scripted, max_model_len=100_000)
    failure = os.environ.get("FAKE_FAILURE")
    if failure == "startup":
        raise StartupError("the fake start failed.")
    if failure == "engine":
        engine.failure = StartupError("the fake rank failed.")
    engine.hold_loading = failure == "loading"
    return make_server(engine, config)


app = create_app(build=build_fake)

if __name__ == "__main__":
    sys.exit(main(build=build_fake))
