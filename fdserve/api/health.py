"""GET /health and its other names, /version, /load and /metrics."""

from __future__ import annotations

import fdserve
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.protocol.status import Load, Status, Version
from fdserve.server.metrics import CONTENT_TYPE
from fdserve.server.server import Server


async def health(server: Server, request: Request, reply: Reply) -> None:
    """200 when requests can be served now, else 503 with the reason."""
    server.check_ready()
    await reply.json(Status())


async def version(server: Server, request: Request, reply: Reply) -> None:
    """The server's version; 200 in any state."""
    await reply.json(Version(fdserve.__version__))


async def load(server: Server, request: Request, reply: Reply) -> None:
    """What runs, what waits, and how full the KV cache is; 200 in any state."""
    stats = server.engine.stats()
    await reply.json(
        Load(
            server_load=stats.running + stats.waiting,
            running=stats.running,
            waiting=stats.waiting,
            kv_cache_usage=stats.kv_blocks_used / max(stats.kv_blocks_total, 1),
            kv_blocks_total=stats.kv_blocks_total,
            kv_blocks_used=stats.kv_blocks_used,
            kv_blocks_cached=stats.kv_blocks_cached,
        )
    )


async def metrics(server: Server, request: Request, reply: Reply) -> None:
    """The metrics in Prometheus' text format."""
    await reply.text(server.metrics.render(), CONTENT_TYPE)
