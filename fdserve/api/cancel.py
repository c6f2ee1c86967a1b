"""POST /v1/requests/{id}/cancel."""

from __future__ import annotations

from fdserve.errors import NotFound
from fdserve.http.request import Request
from fdserve.http.response import Reply
from fdserve.protocol.status import CancelledRequest
from fdserve.server.server import Server


async def cancel_request(server: Server, http: Request, reply: Reply) -> None:
    """End a running request by its response's id, its X-Request-Id or its request_id; it ends with a 409."""
    id = http.path_parameters["id"]
    if not server.running.cancel(id):
        raise NotFound(f"No request {id[:200]!r} is running.", param="id", code="request_not_found")
    await reply.json(CancelledRequest(id=id))
