"""What the engine is asked for by a client's request."""

from __future__ import annotations

from typing import Any

from fdserve.engine.request import Request, SamplingParams
from tests.http.client import Client


async def asked(client: Client, path: str = "chat", **fields: Any) -> Request:
    """The engine's request that a client's leads to."""
    response = await (client.chat(**fields) if path == "chat" else client.complete(**fields))
    assert response.status == 200, response.body
    return client.engine.requests[-1]


async def params_of(client: Client, **fields: Any) -> SamplingParams:
    return (await asked(client, **fields)).params
