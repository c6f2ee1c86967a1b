"""Bodies of many values are refused by their text."""

from __future__ import annotations

import msgspec
import pytest

from fdserve.errors import PayloadTooLarge
from fdserve.http.body_values import MAX_NUMBERS, MAX_VALUES, check_values
from tests.http.client import serving

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


@pytest.mark.anyio
async def test_a_request_of_too_many_values() -> None:
    async with serving() as client:
        response = await client.chat(metadata={"a": [[]] * MANY})
        assert (response.status, response.error["code"]) == (413, "request_too_large")
        assert (await client.chat(metadata={"a": "[" * MANY})).status == 200
        response = await client.post("/v1/completions", {"prompt": [1] * (MAX_NUMBERS + 1)})
        assert response.status == 413
        assert response.error["message"] == "The request body has more than 1048576 values."
