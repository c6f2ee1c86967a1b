"""What the server says of itself, and of requests by their ids."""

from __future__ import annotations

from typing import Literal

import msgspec


class Status(msgspec.Struct):
    """Requests are taken."""

    status: Literal["ok"] = "ok"


class Version(msgspec.Struct):
    version: str


class Load(msgspec.Struct, kw_only=True):
    """The engine now. Sequences: a request with n choices is n of them; `server_load` counts all."""

    server_load: int
    running: int
    waiting: int
    kv_cache_usage: float
    """The share of the blocks that running sequences hold, 0 to 1."""
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int


class CancelledRequest(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["request"] = "request"
    cancelled: Literal[True] = True
