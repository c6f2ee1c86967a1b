"""Bodies of many values are refused by their text."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from fdserve.errors import PayloadTooLarge
from fdserve.http.body_values import MAX_NUMBERS, MAX_VALUES, check_values
from tests.http.client import serving
from tests.http.fake_engine import FakeEngine

MANY = MAX_VALUES + 1


@pytest.mark.parametrize(
    "value",
    [
        [[]] * MAX_VALUES,
        [{}] * MAX_VALUES,
        [""] * MAX_VALUES,
        ['\\"'] * MAX_VALUES,
        ["[\\"] * MAX_VALUES,
        {str(key): 0 for key in range(MAX_VALUES)},
        [["[" * MAX_VALUES]] + [[]] * (MAX_VALUES - 1),
        [1] * (MAX_NUMBERS + 1),
        [[1.5] * MAX_NUMBERS, '\\",'],
    ],
)
def test_too_many_values(value: object) -> None:
    with pytest.raises(PayloadTooLarge):
        check_values(msgspec.json.encode(value))


@pytest.mark.parametrize(
    "value",
    [
        [[]] * (MAX_VALUES - 1),
        [1] * MAX_NUMBERS,
        "," * MAX_NUMBERS,
        ['\\",' * MAX_NUMBERS, [1] * MANY],
        "[" * MANY,
        '"' * (2 * MANY),
        '\\"' * MANY,
        ["\n", "[{" * MANY, "\\", "{" * MANY],
        {"a\n": "[" * MANY, "b\\": '"[' * MANY},
    ],
)
def test_marks_in_texts_are_no_values(value: object) -> None:
    check_values(msgspec.json.encode(value))


def test_values_of_several_texts_count_together() -> None:
    half = msgspec.json.encode([[]] * (MAX_VALUES // 2))
    check_values(half, b'"' + half)  # of which the latter is a string that does not end
    check_values(half, msgspec.json.encode(["[" * MANY]))
    with pytest.raises(PayloadTooLarge):
        check_values(half, half)
    with pytest.raises(PayloadTooLarge):
        check_values(*[b"[[]]"] * MAX_VALUES)


@pytest.mark.anyio
async def test_arguments_of_calls_count_too() -> None:
    """They are JSON inside of a string, so the body's own values do not tell."""

    def turn(arguments: str) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}

    few, many = (json.dumps({"a": [[]] * count}) for count in (MAX_VALUES // 8, MANY))
    async with serving(FakeEngine(max_model_len=1 << 20)) as client:
        assert (await client.chat(messages=[turn(few)] * 7)).status == 200
        assert (await client.chat(messages=[turn(json.dumps({"a": "[" * MANY}))])).status == 200
        old = {"role": "assistant", "function_call": {"name": "f", "arguments": many}}
        for messages in ([turn(few)] * 8, [turn(many)], [old]):
            response = await client.chat(messages=messages)
            assert (response.status, response.error["code"]) == (413, "request_too_large")


@pytest.mark.anyio
async def test_a_request_of_too_many_values() -> None:
    async with serving() as client:
        response = await client.chat(metadata={"a": [[]] * MANY})
        assert (response.status, response.error["code"]) == (413, "request_too_large")
        assert (await client.chat(metadata={"a": "[" * MANY})).status == 200
        response = await client.post("/v1/completions", {"prompt": [1] * (MAX_NUMBERS + 1)})
        assert response.status == 413
        assert response.error["message"] == "The request body has more than 1048576 values."
