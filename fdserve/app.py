"""The ASGI application: lifespan and wiring. `hypercorn fdserve.app:app` serves it with the FDSERVE_* settings."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Awaitable, Callable

import anyio
from anyio import to_thread

from fdserve.api.routes import routes
from fdserve.api.unserved import hints, unserved
from fdserve.config import Config
from fdserve.errors import StartupError
from fdserve.http.asgi import Receive, Scope, Send
from fdserve.http.middleware import Dispatcher
from fdserve.http.router import Router
from fdserve.server.server import Server, build

log = logging.getLogger("fdserve")

Build = Callable[[Config], Awaitable[Server]]

SWITCH_SECONDS = 0.0005
"""How long a thread that runs Python keeps the event loop waiting, a tenth of Python's own choice: the loop waits
several times a token, and grammars, long prompts and large answers are made in threads."""

TRACES_SECONDS = 2.0
"""For the collector to take the last traces when the server stops."""


class App:
    """One server as an ASGI application. Its lifespan builds the server and runs the engine.

    The start fails for what can be checked without ranks; then the engine loads while requests get a 503.
    `failure` says why it failed, at once or later; `started` is set when requests are taken, `failed` when the
    engine's first start failed after that.
    """

    def __init__(self, config: Config | None = None, build: Build = build) -> None:
        """With a `config` of None, the settings are those of the FDSERVE_* variables when the lifespan begins."""
        self.server: Server | None = None
        self.failure: str | None = None
        self.started = anyio.Event()
        self.failed = anyio.Event()
        self._config = config
        self._build = build
        self._dispatcher: Dispatcher | None = None
        self._engine_scope: anyio.CancelScope | None = None

    @property
    def active(self) -> int:
        """How many requests that generate or tokenize are being answered: their bodies have come."""
        return self._dispatcher.answering if self._dispatcher else 0

    def stop_engine(self) -> None:
        """Stop the engine now: what it still generates ends with an error, and new requests get a 503.

        So do those whose bodies have not come.
        """
        if self._dispatcher is not None:
            self._dispatcher.stop_reading()
        if self._engine_scope is not None:
            self._engine_scope.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope. Cancelling a request frees what it held; cancelling the lifespan stops all."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            assert self._dispatcher is not None, "requests come after the lifespan's startup"
            await self._dispatcher(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            server = self.server = await self._start()
        except StartupError as error:
            self._fail(str(error))
        except Exception as error:
            log.debug("the start failed", exc_info=True)
            self._fail(f"the start failed with an unexpected {type(error).__name__}: {error}")
        if self.failure is not None:
            # To raise here would make some servers carry on without the lifespan.
            await send({"type": "lifespan.startup.failed", "message": self.failure})
            return
        async with anyio.create_task_group() as tasks:
            self._engine_scope = anyio.CancelScope()
            tasks.start_soon(self._run_engine, server, self._engine_scope)
            self.started.set()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self.stop_engine()
        if server.tracing is not None:
            await to_thread.run_sync(server.tracing.close, TRACES_SECONDS)
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> Server:
        config = self._config
        if config is None:
            config = Config.load(None, os.environ)
            configure_logging(config)
        sys.setswitchinterval(SWITCH_SECONDS)
        if "hypercorn.trio.run" in sys.modules:
            # Hypercorn serves the application on trio, and looks its parts up when the lifespan has begun.
            from fdserve.http import hypercorn_fixes

            hypercorn_fixes.apply()
        server = await self._build(config)
        table = routes(server)
        self._dispatcher = Dispatcher(
            Router(table, hints({route.path for route in table}), unserved),
            api_keys=config.api_keys,
            max_concurrency=config.max_concurrency,
            max_request_bytes=config.max_request_bytes,
            observe=server.metrics.observe_request,
            trace=server.tracing.note if server.tracing else None,
        )
        return server

    async def _run_engine(self, server: Server, scope: anyio.CancelScope) -> None:
        with scope:
            try:
                await server.engine.run()
            except StartupError as error:
                self._fail(str(error))
            except Exception as error:
                log.exception("the engine failed")
                self._fail(f"the engine failed with an unexpected {type(error).__name__}: {error}")
        if self.failure is not None:
            server.engine.status, server.engine.reason = "failed", self.failure
            self.failed.set()

    def _fail(self, sentence: str) -> None:
        self.failure = sentence
        log.critical("%s", sentence)


def configure_logging(config: Config) -> None:
    """Log to stderr from the configured level on, unless logging was configured already.

    Libraries log from "info" on: below it, that of HTTP/2 tells all headers, with the keys of clients.
    """
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    # Hypercorn's own loggers write what they are told, and pass it on besides.
    handler.addFilter(lambda record: not logging.getLogger(record.name).handlers)
    level: int = getattr(logging, config.log_level.upper())
    logging.basicConfig(
        level=max(level, logging.INFO), handlers=[handler], format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    log.setLevel(level)


def create_app(config: Config | None = None, build: Build = build) -> App:
    """An application with these settings, or with those of the FDSERVE_* variables; see `App`."""
    return App(config, build)


app = create_app()
