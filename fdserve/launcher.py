"""The server in one process, on trio, with an orderly end."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import hypercorn.config
import hypercorn.trio
import trio

import fdserve
from fdserve.app import App, Build, configure_logging, create_app
from fdserve.config import Config
from fdserve.engine.machine import available_cores, available_memory
from fdserve.errors import StartupError
from fdserve.executor.cluster import Cluster, check_secret, read_cluster
from fdserve.executor.fingerprint import take_fingerprint
from fdserve.executor.follower import Host, follow
from fdserve.hub import resolve_model
from fdserve.server.server import build

log = logging.getLogger("fdserve")

# After the requests that were waited for: time for the last events to go out, and for the ranks to end.
GOODBYE_SECONDS = 2.0
FORCE_AFTER_SECONDS = 5.0


def main(argv: Sequence[str] | None = None, build: Build = build) -> int:
    """Serve until a signal says otherwise; return the exit status.

    SIGTERM, SIGINT and SIGHUP let running requests finish, for `graceful_timeout` seconds; a second SIGTERM or SIGINT
    ends at once. Where a launcher started several processes, those but the first run a rank for the first.
    """
    try:
        config = Config.load(sys.argv[1:] if argv is None else argv, os.environ)
        cluster = read_cluster(os.environ)
        if cluster is not None and cluster.rank > 0:
            return _follow(config, cluster)
        sock = listen(config.host, config.port)
    except StartupError as error:
        print(f"fdserve: {error}", file=sys.stderr)
        return 1
    configure_logging(config)
    logging.getLogger("hypercorn.error").setLevel(logging.WARNING)
    _raise_descriptor_limit()
    return trio.run(_Launcher(config, create_app(config, build), sock).run)


def _follow(config: Config, cluster: Cluster) -> int:
    """Run a rank for the server on rank 0's host until a signal ends it. Raises StartupError."""
    check_secret(config.cluster_secret)
    configure_logging(config)
    directory = resolve_model(config.model)
    fingerprint = take_fingerprint(
        directory, dtype=config.dtype, quantization=config.quantization, kv_cache_dtype=config.kv_cache_dtype
    )
    num_threads = config.num_threads or max(1, available_cores() // cluster.local_size)
    host = Host(directory, num_threads, available_memory() // cluster.local_size)
    trio.run(follow, cluster, config.cluster_secret, fingerprint, host)
    return 0


def _raise_descriptor_limit() -> None:
    """As many connections as the system lets the process have: the usual soft limit is 1024."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; StartupError when the address cannot be had."""
    sock: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it; a token is not to wait for the next one.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
        # Two sockets may be bound to one address as long as neither listens: only this tells.
        sock.listen(1)
    except OSError as error:
        if sock is not None:
            sock.close()
        problem = f"cannot listen on {host} port {port}: {error.strerror}"
        raise StartupError(f"{problem}; choose another --host or --port.") from None
    except UnicodeError:  # of an empty or a long part of a name
        raise StartupError(f"cannot listen on {host:.200}: it is no host's name; choose another --host.") from None
    return sock


class _Launcher:
    def __init__(self, config: Config, app: App, sock: socket.socket) -> None:
        self._config = config
        self._app = app
        host, port = sock.getsockname()[:2]
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._sock = sock
        self._began = time.monotonic()
        self._stopping = trio.Event()
        self._status = 0

    async def run(self) -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_signals, nursery)
            nursery.start_soon(self._watch_engine)
            nursery.start_soon(self._announce)
            try:
                # Hypercorn types its applications' messages by structs of its own, where ASGI has plain dictionaries.
                app: Any = self._app
                await hypercorn.trio.serve(app, self._hypercorn(), shutdown_trigger=self._stopping.wait)
            except Exception:
                if self._app.failure is None:
                    raise
                self._status = 1  # the application has said why
            nursery.cancel_scope.cancel()
        return self._status

    def _hypercorn(self) -> hypercorn.config.Config:
        config = hypercorn.config.Config()
        config.bind = [f"fd://{self._sock.detach()}"]
        config.backlog = 2048
        config.keep_alive_timeout = 75
        config.startup_timeout = 86400  # a download may be part of the start
        config.graceful_timeout = GOODBYE_SECONDS
        config.errorlog = logging.getLogger("hypercorn.error")
        config.include_server_header = False
        # HTTP/2 flow control does not reach the application, so a client that reads nothing would have a whole
        # stream buffered. Clients that speak it without being asked cannot be kept out; streams refuse them.
        config.alpn_protocols = ["http/1.1"]
        return config

    async def _announce(self) -> None:
        await self._app.started.wait()
        server = self._app.server
        assert server is not None
        _say(f"fdserve {fdserve.__version__} listens on {self._url}, loading {server.model_name}")
        await server.engine.wait_ready()
        # What lives by now lives for ever: full collections need not look at it, and may be rarer. Those of what is
        # young look at less at a time: with a large body just decoded they take 50 ms in place of 130.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 3, 30)
        seconds, longest = time.monotonic() - self._began, server.engine.max_model_len
        _say(f"ready in {seconds:.1f} s: {server.model_name}, {longest} tokens at most")

    async def _watch_engine(self) -> None:
        await self._app.failed.wait()
        self._status = 1
        self._stopping.set()

    async def _watch_signals(self, nursery: trio.Nursery) -> None:
        first = True
        with trio.open_signal_receiver(*_stop_signals()) as signals:
            async for number in signals:
                # A terminal that is closed, and systemd after its SIGTERM, send SIGHUPs that are no one's impatience.
                if number == signal.SIGHUP and not first:
                    continue
                if not first or not self._app.started.is_set():
                    _exit(128 + number, "stopped at once")
                first = False
                nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        """Refuse what is new, wait for what runs, then end it; the process ends whatever clients do."""
        server = self._app.server
        assert server is not None
        server.engine.drain()
        timeout = self._config.graceful_timeout
        waiting = f": {self._app.active} to finish, for up to {timeout:g} s; a second signal ends at once"
        _say("stopping" + (waiting if self._app.active else ""))
        with trio.move_on_after(timeout):
            while self._app.active:
                await trio.sleep(0.05)
        self._app.stop_engine()
        self._stopping.set()
        # A client that stopped reading blocks its connection, and no deadline reaches it there.
        await trio.sleep(FORCE_AFTER_SECONDS)
        _exit(self._status, "stopped without waiting for clients that do not read")


def _stop_signals() -> list[signal.Signals]:
    """What ends the server: SIGHUP, too, of a terminal that is closed, unless nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


def _exit(status: int, message: str) -> None:
    _say(message)
    logging.shutdown()
    os._exit(status)


def _say(message: str) -> None:
    """Announce it on stdout. Where nobody reads that any more, or the disk is full, the server goes on."""
    try:
        print(message, flush=True)
    except UnicodeEncodeError:  # a model's name, where stdout's encoding has not all characters
        _say(message.encode("ascii", "backslashreplace").decode("ascii"))
    except OSError:
        sys.stdout = None  # what it still holds would fail again at the end
