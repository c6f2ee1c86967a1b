"""GET /v1/models."""

from __future__ import annotations

from typing import Literal

import msgspec


class Model(msgspec.Struct, kw_only=True):
    """`root` is what the server was asked to load; `max_model_len` bounds prompt plus completion, in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fdserve"
    root: str
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]
