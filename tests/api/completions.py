"""Answers of /v1/completions, checked to be what openai's client takes."""

from __future__ import annotations

from typing import Any

from openai.types import Completion

from tests.http.client import Response


def choices(response: Response) -> list[dict[str, Any]]:
    assert response.status == 200, response.body
    Completion.model_validate(response.json(), strict=True)
    result: list[dict[str, Any]] = response.json()["choices"]
    return result
