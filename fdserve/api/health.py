"""GET /health and GET /metrics."""

from __future__ import annotations

from fdserve.api.metrics import CONTENT_TYPE
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.server import Server


async def health(server: Server, request: Request, reply: Reply) -> None:
    """200 when requests can be served now, else 503 with the reason."""
    server.check_ready()
    await reply.json({"status": "ok"})


async def metrics(server: Server, request: Request, reply: Reply) -> None:
    """The metrics in Prometheus' text format."""
    await reply.text(server.metrics.render(), CONTENT_TYPE)
